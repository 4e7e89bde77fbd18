"""Micro-batches in turns: models, data, and the plain loop that they are held against."""

from __future__ import annotations

import random
import threading

import tiny
import torch
from architectures import VOCAB
from loops import Tower
from torch import nn
from torch.utils.checkpoint import checkpoint

import tierflow
from tierflow.swap import DebugMemory, Tier

COUNT = 4


def text(steps: int = 3, count: int = COUNT, same_length: bool = True) -> list[list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(11)
    found = []
    for _ in range(steps):
        rows = [torch.randint(1, VOCAB, (2, 10 if same_length else 6 + i), generator=generator) for i in range(count)]
        found.append([{"input_ids": r, "labels": r} for r in rows])
    return found


def plain(model: nn.Module, steps, loss=None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Plain torch: every micro-batch's forward and backward in order, one update a step."""
    optimizer = tiny.plain_adamw(model)
    losses = []
    for step in steps:
        parts = []
        for batch in step:
            part = loss(model, batch) if loss else model(**batch).loss / len(step)
            part.backward()
            parts.append(part.detach())
        losses.append(sum(parts[1:], parts[0]).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, tiny.weights(model)


def engine_for(model, path, placement="everything", order="layer_major", count=COUNT, prefetch=True, **options):
    caps = tiny.tight(model, placement, accumulation=count) | options
    config = tiny.config(placement, path, 0.0, count, **caps)
    config["tierflow"] |= {"accumulation": order, "prefetch": prefetch}
    return tierflow.initialize(model, config, debug_memory=DebugMemory(random.Random(1)))


def train(engine, steps, loss=None) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = []
    for step in steps:
        losses.append(engine.train_batch(step, loss).item())
        engine.optimizer.engine.manager.ledger.check()
        assert not [t for t in threading.enumerate() if t.name.startswith("tierflow-micro-batch")]
    engine.optimizer.engine.settle()
    assert no_pins(engine)
    return losses, tiny.weights(engine.module)


def no_pins(engine) -> bool:
    inner = engine.optimizer.engine
    inner.settle()  # an update holds its weights until they are written
    return not any(inner.manager.ledger.pins(u.chunk, t) for u in inner.units for t in (Tier.DEVICE, Tier.HOST)
                   if inner.manager.home(u.chunk) is not t)  # fmt: skip


def equal(a, b) -> None:
    assert a[0] == b[0]
    assert tiny.same(a[1], b[1])


class Ways(Tower):
    """The order of blocks is an argument: micro-batches may go different ways."""

    def forward(self, x: torch.Tensor, order: list[int], checkpointed: bool | None = None) -> torch.Tensor:  # type: ignore[override]
        for i in order:
            run = self.blocks[i] if checkpointed is None else (
                lambda v, block=self.blocks[i]: checkpoint(block, v, use_reentrant=checkpointed))  # fmt: skip
            x = x + torch.tanh(run(x)) * self.scale + self.shift
        return x.square().mean() / COUNT


def way_loss(model: nn.Module, batch) -> torch.Tensor:
    seed, order, *rest = batch
    x = torch.randn(4, model.scale.numel(), generator=torch.Generator().manual_seed(seed), requires_grad=True)
    return model(x, order, *rest)


#: Room for two blocks of ``wide()`` on the device, and for one beside the gradients and the update on the host.
SMALL = {"device_memory": "250KB", "host_memory": "1170KB"}


def wide() -> Ways:
    torch.manual_seed(3)
    model = Ways(width=128, depth=12)
    del model.idle
    return model


def ways(orders: list[list[list[int]]], *rest):
    return [[(10 * s + i, order, *rest) for i, order in enumerate(step)] for s, step in enumerate(orders)]


class Drops(nn.Module):
    """Dropout in segments of two blocks, checkpointed or not."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))
        self.mode: bool | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(0, 6, 2):
            x = self.segment(x, i) if self.mode is None else checkpoint(self.segment, x, i, use_reentrant=self.mode)
        return x.square().mean()

    def segment(self, x: torch.Tensor, i: int) -> torch.Tensor:
        for block in self.blocks[i : i + 2]:
            x = torch.nn.functional.dropout(torch.tanh(block(x)) + x, 0.3, self.training)
        return x
