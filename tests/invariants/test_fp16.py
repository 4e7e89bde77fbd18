"""fp16 under a loss scale: every placement the same bits, and the bits of a reference that knows nothing of tierflow."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from exact import DECAY, EPS, LR, Master
from outcome import Outcome, Stack, states_of
from torch import nn

import tierflow
from tierflow.swap import DebugMemory
from tierflow.weights import WeightsError

WINDOW = 3


def config(
    model: nn.Module, path: Path, placement: str, accumulation: int, clip: float, **fp16: Any
) -> dict[str, Any]:
    """Under tight caps."""
    top = {"fp16": {"enabled": True, "loss_scale_window": WINDOW, "hysteresis": 1} | fp16}
    caps = {} if placement == "device" else tiny.tight(model, placement, accumulation=accumulation, top=top)
    made = tiny.config(placement, path, clip, accumulation, **caps)
    made["optimizer"]["params"] = {"lr": LR, "weight_decay": DECAY, "eps": EPS}
    return made | top


class Plain:
    """The same training in torch and numpy: an fp16 model, fp32 masters, and the scale's rules for hysteresis 1."""

    def __init__(self, model: Stack, scale: float, dynamic: bool = True):
        self.masters = {n: Master(p.detach()) for n, p in model.named_parameters()}
        self.model = copy.deepcopy(model).half()
        self.scale, self.dynamic, self.since = scale, dynamic, 0
        self.taken, self.losses, self.norms, self.scales = 0, [], [], []

    def step(self, inputs: list[torch.Tensor], clip: float) -> None:
        total: dict[str, torch.Tensor] = {}
        for x in inputs:
            self.model.zero_grad()
            loss = self.model(x) / len(inputs)
            (loss * self.scale).backward()
            self.losses.append(loss.item())
            for n, p in self.model.named_parameters():
                total[n] = total[n] + p.grad.float() if n in total else p.grad.float()
        self.scales.append(self.scale)
        if all(bool(g.isfinite().all()) for g in total.values()):
            self.update(total, clip)
            if self.dynamic and self.since and self.since % WINDOW == 0:
                self.scale *= 2
            self.since += 1
        else:
            assert self.dynamic
            self.norms.append(None)
            self.scale, self.since = self.scale / 2, 0

    def update(self, total: dict[str, torch.Tensor], clip: float) -> None:
        self.taken += 1
        unscale = np.float32(1 / self.scale)
        grads = {n: g * unscale for n, g in total.items()}
        self.norms.append(sum(float(g.double().square().sum()) for g in total.values()) ** 0.5 * float(unscale))
        norm = torch.tensor(self.norms[-1], dtype=torch.float32)
        factor = torch.clamp(clip / (norm + 1e-6), max=1.0) if clip else torch.ones(())  # as clip_grad_norm_
        for n, p in self.model.named_parameters():
            self.masters[n].step(grads[n] * factor, self.taken)
            p.data.copy_(torch.from_numpy(self.masters[n].weight.astype(np.float16)).view(p.shape))


def inputs(step: int, accumulation: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(4, width, generator=generator).half() for _ in range(accumulation)]


@pytest.mark.parametrize("placement", ["device", "everything"])
@pytest.mark.parametrize(("accumulation", "clip"), [(1, 0.0), (1, 0.05), (3, 0.0), (3, 0.05)])
@pytest.mark.parametrize("scale", [{"initial_scale_power": 24}, {"loss_scale": 100}], ids=["dynamic", "constant"])
def test_the_reference_in_every_bit(
    tmp_path: Path, placement: str, accumulation: int, clip: float, scale: dict[str, int]
) -> None:
    model = Stack(layers=2, width=9)
    plain = Plain(model, float(scale.get("loss_scale", 2.0**24)), "loss_scale" not in scale)
    _, optimizer = tierflow.offload(model, config(model, tmp_path, placement, accumulation, clip, **scale))
    losses, norms, scales = [], [], []
    for step in range(24):
        batch = inputs(step, accumulation, 9)
        plain.step(batch, clip)
        scales.append(optimizer.loss_scale)
        for x in batch:
            loss = model(x) / accumulation
            optimizer.backward(loss)
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        norms.append(optimizer.last_grad_norm)
        assert optimizer.overflow == (norms[-1] is None)
    assert (losses, scales) == (plain.losses, plain.scales)
    assert [n is None for n in norms] == [n is None for n in plain.norms]
    assert [n for n in norms if n] == pytest.approx([n for n in plain.norms if n], rel=1e-12)
    assert (optimizer.steps_taken, optimizer.skipped_steps) == (plain.taken, 24 - plain.taken)
    if plain.dynamic:  # it overflowed at the start, grew, and overflowed again
        first = next(i for i, n in enumerate(norms) if n is not None)
        assert first > 2 and None in norms[first:]
        assert any(b > a for a, b in itertools.pairwise(scales))
    if clip:
        assert max(n for n in norms if n) > clip
    held = states_of(optimizer.engine)
    for name, master in plain.masters.items():
        for kind, mine in (("master", master.weight), ("exp_avg", master.m), ("exp_avg_sq", master.v)):
            assert np.array_equal(held[f"{name}.{kind}"].numpy().view(np.uint32), mine.view(np.uint32)), (name, kind)
        half = master.weight.astype(np.float16)
        assert np.array_equal(held[f"{name}.param"].numpy().view(np.uint16), half.view(np.uint16))
    optimizer.close()


def run(path: Path, placement: str, accumulation: int, clip: float, seed: int | None = 1) -> tuple[Outcome, list[float]]:
    """A tiny Llama under tight caps, slots at random, freed memory poisoned; and the loss scale of each step."""
    model = tiny.llama(layers=2, hidden=32)
    made = config(model, path, placement, accumulation, clip, initial_scale_power=24, hysteresis=2)
    debug = None if seed is None else DebugMemory(random.Random(seed))
    _, optimizer = tierflow.offload(model, made, debug_memory=debug)
    losses, norms, scales = [], [], []
    for step in tiny.batches(20, accumulation):
        for ids in step:
            loss = model(input_ids=ids, labels=ids).loss / accumulation
            optimizer.backward(loss)
            losses.append(loss.item())
        scales.append(optimizer.loss_scale)
        optimizer.step()
        norms.append(optimizer.last_grad_norm)
        optimizer.zero_grad()
    try:
        optimizer.engine.manager.ledger.check()
        return Outcome(losses, norms, states_of(optimizer.engine), optimizer.engine.manager.traffic.nvme_read), scales
    finally:
        optimizer.close()


@functools.cache
def on_device(accumulation: int, clip: float) -> tuple[Outcome, list[float]]:
    return run(Path("/nowhere"), "device", accumulation, clip, None)


@pytest.mark.parametrize(("accumulation", "clip"), [(1, 0.0), (1, 0.5), (3, 0.0), (3, 0.5)])
@pytest.mark.parametrize("placement", ["host", "nvme", "everything"])
def test_every_placement_the_same_bits(tmp_path: Path, placement: str, accumulation: int, clip: float) -> None:
    here, there = on_device(accumulation, clip), run(tmp_path, placement, accumulation, clip)
    assert here == there
    assert (there[0].nvme_read > 0) == (placement != "host")
    skipped = here[0].norms.count(None)
    assert 3 < skipped < 17 and len(set(here[1])) > 3
    if clip:
        assert here[0] != on_device(accumulation, 0.0)[0]


class Resumable:
    """A run that overflows, recovers and grows its scale; the LR schedule follows the steps that were taken."""

    def __init__(self, path: Path, placement: str, **fp16: Any):
        path.mkdir(exist_ok=True)
        self.model = Stack(layers=2, width=16)
        _, self.optimizer = tierflow.offload(self.model, config(self.model, path, placement, 1, 0.1, hysteresis=2, **fp16))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: 1 / (s + 1))
        self.at = 0

    def steps(self, count: int) -> list[Any]:
        found = []
        for _ in range(count):
            self.at += 1
            scale = self.optimizer.loss_scale
            loss = self.model(*inputs(self.at, 1, 16))
            self.optimizer.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if not self.optimizer.overflow:
                self.schedule.step()
            lr = self.optimizer.param_groups[0]["lr"]
            found.append((loss.item(), scale, self.optimizer.last_grad_norm, self.optimizer.skipped_steps, lr))
        return found


@pytest.mark.parametrize("cut", [1, 2, 6, 11])  # before and between overflows, and while the scale grows
def test_resuming_goes_on_with_the_same_scale(tmp_path: Path, cut: int) -> None:
    first = Resumable(tmp_path / "a", "everything", initial_scale_power=20)
    first.steps(cut)
    client = {"schedule": first.schedule.state_dict(), "at": first.at}
    tierflow.save_checkpoint(first.model, first.optimizer, tmp_path / "checkpoint", client)
    expected, held = first.steps(16), states_of(first.optimizer.engine)
    assert {e[3] for e in expected} != {expected[0][3]} and expected[-1][3] < cut + 16
    first.optimizer.close()
    for placement in ("nvme", "everything"):
        again = Resumable(tmp_path / "b", placement)  # another initial scale
        again.steps(1)
        client = tierflow.load_checkpoint(again.model, again.optimizer, tmp_path / "checkpoint")
        again.schedule.load_state_dict(client["schedule"])
        again.at = client["at"]
        assert again.steps(16) == expected
        assert tiny.same(held, states_of(again.optimizer.engine))
        again.optimizer.close()


def test_a_checkpoint_of_another_16_bit_format_is_refused(tmp_path: Path) -> None:
    run = Resumable(tmp_path / "a", "everything")
    tierflow.save_checkpoint(run.model, run.optimizer, tmp_path / "checkpoint")
    run.optimizer.close()
    model = Stack(layers=2, width=16)
    _, optimizer = tierflow.offload(
        model, tiny.config("everything", tmp_path, optimizer_state="fp32") | {"bf16": {"enabled": True}}
    )
    with pytest.raises(WeightsError, match=r"saved as float16 and is bfloat16 in this run.*fp16\.enabled"):
        tierflow.load_checkpoint(model, optimizer, tmp_path / "checkpoint")
    optimizer.close()
