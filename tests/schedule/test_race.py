"""Shapes that compute next to nothing for the bytes that they move, so that a missing wait shows as wrong bits.

The reference is plain torch for forward and backward, and an AdamW written here in numpy: it shares no code with what
it checks and nothing of it runs beside anything.
"""

from __future__ import annotations

import copy
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from outcome import Stack, states_of
from torch import nn

import tierflow
from tierflow.swap import DebugMemory

LR, DECAY, BETA1, BETA2, EPS = 1e-2, 0.1, 0.9, 0.999, 1e-8
STEPS = 10
SHAPES = {"wide": (4, 384), "tiny": (12, 16)}


def fma(a: Any, b: Any, c: Any) -> np.ndarray:
    """a * b + c rounded once: fp64 holds the product of two fp32 numbers exactly."""
    return (np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)).astype(np.float32)


class AdamW:
    """Of one parameter, every operation rounded once in the order of torch's foreach AdamW."""

    def __init__(self, param: torch.Tensor):
        self.param = param
        self.m, self.v = np.zeros(param.shape, np.float32), np.zeros(param.shape, np.float32)

    def step(self, t: int) -> None:
        one = np.float32
        grad, weight = self.param.grad.numpy(), self.param.detach().numpy()
        self.m = fma(one(1 - BETA1), grad - self.m, self.m)
        self.v = fma(one(1 - BETA2) * grad, grad, self.v * one(BETA2))
        denom = np.sqrt(self.v) / one((1 - BETA2**t) ** 0.5) + one(EPS)
        weight[...] = weight * one(1 - LR * DECAY) + (one(-(LR / (1 - BETA1**t))) * self.m) / denom


def train(model: Any, update: Any, begin: Any = lambda: None) -> list[float]:
    losses = []
    for step in range(1, STEPS + 1):
        begin()
        loss = model(model.input(step, rows=1))
        loss.backward()
        losses.append(loss.item())
        update(step)
    return losses


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[nn.Module, list[float], dict[str, np.ndarray]]]:
    """Per shape: the model before, its losses, and weights and moments after, by name and kind."""
    found = {}
    for shape, (layers, width) in SHAPES.items():
        model = Stack(layers, width)
        before = copy.deepcopy(model)
        adams = {n: AdamW(p) for n, p in model.named_parameters()}

        def update(step: int, model: nn.Module = model, adams: Any = adams) -> None:
            for adam in adams.values():
                adam.step(step)
            model.zero_grad()

        losses = train(model, update)
        after = {f"{n}.param": a.param.detach().numpy() for n, a in adams.items()}
        after |= {f"{n}.{k}": v for n, a in adams.items() for k, v in (("exp_avg", a.m), ("exp_avg_sq", a.v))}
        found[shape] = before, losses, after
    return found


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
@pytest.mark.parametrize("worker", [False, True])
@pytest.mark.parametrize("update", ["immediate", "deferred", "speculative"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_no_byte_is_used_before_it_is_there(
    tmp_path: Path, references: Any, shape: str, update: str, worker: bool, engine: str
) -> None:
    before, losses, after = references[shape]
    for repetition in range(3):
        model = copy.deepcopy(before)
        through_host = repetition == 1
        slack = (0.0, 0.0, 1.5)[repetition]
        caps = tiny.tight(model, "everything", slack=slack, direct=not through_host)
        config = tiny.config("everything", tmp_path, update=update, engine=engine, **caps)
        debug = DebugMemory(random.Random(repetition), through_host=through_host)
        _, optimizer = tierflow.offload(model, config, owned_loop=update == "speculative", debug_memory=debug)
        inner = optimizer.engine
        if worker:  # kernels beside the caller's thread, as with an accelerator
            inner.updates.stager._worker = ThreadPoolExecutor(1)

        def step(_step: int, optimizer: Any = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        try:
            found = train(model, step, optimizer.expect_step)
            states = states_of(inner)
            assert inner.manager.traffic.nvme_read > 0 and inner.manager.store.engine == engine
        finally:
            optimizer.close()
        assert found == losses
        wrong = [n for n, v in after.items() if states[n].numpy().tobytes() != v.tobytes()]
        assert not wrong and states.keys() == after.keys()
