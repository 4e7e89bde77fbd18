"""What the GPU's tests train: layers whose weights take longer to cross than to be used, and where their bytes live."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import tiny
import torch
from torch import nn

import tierflow
from tierflow.swap import DebugMemory

CUDA = torch.device("cuda", 0)
#: An emulated device (tests/support/emulated_cuda) computes on the processor, so models are smaller there, and caps.
EMULATED = torch.version.cuda is None
WIDTH = 512 if EMULATED else 1024


def mb(count: float) -> str:
    """That much beside layers of 1024 x 1024."""
    return str(int(count * 1e6 * (WIDTH / 1024) ** 2))


class Wide(nn.Module):
    """Terrible density: every weight is read once for one row, so that transfers take longer than compute."""

    def __init__(self, width: int = WIDTH, depth: int = 6):
        super().__init__()
        self.mix = nn.Parameter(torch.full((width,), 0.5))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(x + block(x) * self.mix)
        return x


def wide(dtype: torch.dtype = torch.float32, **kw: int) -> Wide:
    torch.manual_seed(11)
    return Wide(**kw).to(dtype)


def wide_loss(model: nn.Module, seed: int) -> torch.Tensor:
    parameter = next(model.parameters())
    x = torch.randn(1, parameter.shape[0], generator=torch.Generator().manual_seed(seed))
    return model(x.to(CUDA, parameter.dtype)).float().square().mean()


#: Room for one layer of ``wide()`` on its way in and four ahead of it: no layer has a place on the device for good.
ROOM = {torch.float32: mb(24), torch.bfloat16: mb(12)}
ON_NVME = ("nvme", "param_host_states_nvme", "everything")


def offload(model: nn.Module, path: Any, placement: str, debug: bool = False, **kw: Any) -> Any:
    """With NVMe in the placement the host has room for gradients, weights and staging, and hardly any tier for states."""
    weights = sum(p.nbytes for p in model.parameters())
    device, host = (weights + (1 << 20), mb(140)) if placement in ON_NVME else ("512MB", "1GB")
    options = {"device_memory": str(device), "host_memory": host, "nvme_capacity": "1GB", "device": "cuda:0"}
    accumulation, clip = kw.pop("accumulation", 1), kw.pop("clip", 0.0)
    config = tiny.config(placement, path, clip=clip, accumulation=accumulation, **(options | kw))
    memory = DebugMemory(random.Random(1)) if debug else None
    return tierflow.offload(model, config, debug_memory=memory)[1]


def train(model: nn.Module, optimizer: Any, loss_of: Callable, steps: int = 4, accumulation: int = 1) -> list[float]:
    losses = []
    for step in range(steps):
        for micro in range(accumulation):
            loss = loss_of(model, step * accumulation + micro)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def run(path: Any, placement: str, dtype: torch.dtype, accumulation: int = 1, **kw: Any) -> tuple[list[float], Any]:
    model = wide(dtype)
    optimizer = offload(model, path, placement, accumulation=accumulation, **kw)
    try:
        losses = train(model, optimizer, wide_loss, accumulation=accumulation)
        optimizer.engine.settle()
        manager = optimizer.engine.manager
        manager.ledger.check()
        assert (manager.traffic.nvme_read > 0) == (manager.traffic.nvme_written > 0) == (placement in ON_NVME)
        return losses, {k: v.cpu() for k, v in tiny.weights(model).items()}
    finally:
        optimizer.close()
