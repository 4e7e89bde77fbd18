"""A whole run with everything it produced, and a model without transformers."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import nn

import tierflow
from tierflow.scheduler.contents import read_bytes
from tierflow.scheduler.plan import MemoryPlan
from tierflow.swap import DebugMemory, Kind

ROOT = Path(__file__).parents[2]


class Stack(nn.Module):
    """Equal layers in a list; ``forward`` gives the mean square of what comes out."""

    def __init__(self, layers: int = 10, width: int = 64, dropout: float = 0.0, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(self.dropout(layer(x)))
        return x.float().square().mean()

    def input(self, seed: int = 0, rows: int = 4) -> torch.Tensor:
        x = torch.randn(rows, self.width, generator=torch.Generator().manual_seed(seed))
        return x.to(self.layers[0].weight.dtype)


def step(model: Stack, optimizer: Any, seed: int = 0) -> float:
    """One optimizer step; the loss."""
    loss = model(model.input(seed))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def states_of(engine: Any) -> dict[str, torch.Tensor]:
    """The bytes of every weight, remainder, moment and scale, read from their homes."""
    engine.settle()
    found = {}
    for unit in engine.units:
        for slot in unit.slots:
            for kind, chunk in unit.chunks.items():
                if kind is not Kind.GRAD:
                    begin = chunk.bytes_of(slot.offset)
                    span = begin, begin + chunk.bytes_of(slot.numel)
                    found[f"{slot.names[0]}.{kind.value}"] = read_bytes(engine.manager, unit, kind, *span, engine.victims())
    return found


def checkpoint_into_other_caps(path: Path, place: str, model: Callable[[], Stack], tight: dict[str, int]) -> MemoryPlan:
    """Saves a checkpoint under ``tight`` caps and loads it with all on the device and under the same; every bit must be back.

    Returns the plan under the tight caps.
    """

    def offloaded(block: dict[str, int]) -> Any:
        return tierflow.offload(model(), tiny.config(place if block else "device", path, **block))

    made, optimizer = offloaded(tight)
    step(made, optimizer)
    plan, expected = optimizer.engine.plan, states_of(optimizer.engine)
    tierflow.save_checkpoint(made, optimizer, path / "saved")
    optimizer.close()
    for block in ({}, tight):
        made, optimizer = offloaded(block)
        tierflow.load_checkpoint(made, optimizer, path / "saved")
        assert tiny.same(expected, states_of(optimizer.engine))
        optimizer.close()
    return plan


@dataclass
class Outcome:
    """All that a run gave: what must be equal between placements, and what proves that bytes moved."""

    losses: list[float]
    norms: list[float | None]
    states: dict[str, torch.Tensor]
    nvme_read: int = 0

    def digest(self) -> str:
        """Of losses, norms and every byte of the states."""
        found = hashlib.sha256(repr((self.losses, self.norms)).encode())
        for name in sorted(self.states):
            found.update(name.encode() + self.states[name].numpy().tobytes())
        return found.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outcome) and (self.losses, self.norms) == (other.losses, other.norms) and tiny.same(
            self.states, other.states
        )


def run_llama(
    path: Path, placement: str, steps: int = 20, dtype: torch.dtype = torch.float32, accumulation: int = 1,
    clip: float = 0.0, seed: int | None = 1, layers: int = 2, hidden: int = 32, vocab: int = 160, **options: Any,
) -> Outcome:  # fmt: skip
    """Trains a tiny Llama in ``placement`` under tight caps, memory slots at random and freed memory poisoned."""
    model = tiny.llama(layers=layers, hidden=hidden, vocab=vocab, dtype=dtype)
    caps = {} if placement == "device" else tiny.tight(model, placement, accumulation=accumulation, direct=seed is None or seed % 2 == 0)
    config = tiny.config(placement, path, clip, accumulation, **(caps | options))
    debug = None if seed is None else DebugMemory(random.Random(seed), through_host=bool(seed % 2))
    _, optimizer = tierflow.offload(model, config, debug_memory=debug)
    try:
        losses, norms = tiny.train(model, optimizer, steps, accumulation, vocab)
        optimizer.engine.manager.ledger.check()
        read = optimizer.engine.manager.traffic.nvme_read
        return Outcome(losses, norms, states_of(optimizer.engine), read)
    finally:
        optimizer.close()


def child_environment(**extra: str) -> dict[str, str]:
    """The environment of a program that is to import tierflow and what the tests share."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **extra}
