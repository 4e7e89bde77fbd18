"""Every way in which an update that ran in the backward turns out wrong, and what is left of it: nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import overlap
import pytest
import tiny
import torch
from outcome import states_of
from overlap import Case, Run, Seen
from slow import prompt
from torch import nn
from torch.utils.checkpoint import checkpoint

import tierflow
from tierflow import offloading
from tierflow.scheduler.gradients import GradSlot
from tierflow.scheduler.speculation import PATIENCE
from tierflow.swap.tickets import Done


def check(case: Case, path: Path) -> Seen:
    """Against the plain schedule, with transfers whose ends depend on no time."""
    return overlap.check(case, path, prompt)


PLACEMENTS = ["everything", "nvme", "param_host_states_nvme"]

@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("model", ["stack", "llama", "frozen_llama"])
@pytest.mark.parametrize("loop", ["owned", "batch"])
def test_updates_in_the_backward_count(tmp_path: Path, placement: str, model: str, loop: str) -> None:
    seen = check(Case(model=model, placement=placement, loop=loop, accumulation=2, steps=4), tmp_path)
    assert seen.committed > 0 and seen.undone == 0


def test_clipping_that_bites_after_quiet_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placement = "everything"  # "auto" defers where weights are in memory, and by itself without an accelerator
    assert not check(Case(placement=placement, update="auto", clip=50.0, steps=PATIENCE + 4), tmp_path).committed
    monkeypatch.setattr(offloading, "_speculative_or_not", lambda *_: (True, False))
    quiet = Case(placement=placement, update="auto", clip=50.0, steps=PATIENCE + 4)
    seen = check(quiet, tmp_path)
    assert seen.committed > 0 and seen.undone == 0
    loud = Case(placement=placement, update="auto", clip=50.0, steps=PATIENCE + 4, loud_step=PATIENCE + 1)
    after = check(loud, tmp_path)
    assert after.undone > 0 and 0 < after.committed < seen.committed
    early = Case(placement=placement, update="auto", clip=50.0, steps=PATIENCE + 1, loud_step=PATIENCE - 1)
    assert check(early, tmp_path).undone == 0, "it had not been quiet for long enough to count on it"


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("what", ["lr", "scale_grad", "assign_grad", "forget", "zero", "write", "load_state_dict", "restore"])
def test_what_is_changed_before_the_step_undoes_it(tmp_path: Path, placement: str, what: str) -> None:
    case = Case(placement=placement, events=((4, "before_step", what),), steps=6)
    seen = check(case, tmp_path)
    assert seen.undone > 0 and seen.committed > 0


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("what", ["read", "state_dict", "save", "evaluate", "touch"])
def test_who_looks_before_the_step_sees_the_weights_of_before(tmp_path: Path, placement: str, what: str) -> None:
    case = Case(placement=placement, events=((4, "before_step", what), (4, "before_step", "state_dict")), steps=6)
    assert check(case, tmp_path).undone > 0


@pytest.mark.parametrize("update", ["deferred", "speculative"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("what", ["zero", "assign_grad", "scale_grad", "read_grad", "write", "restore", "load_state_dict"])
def test_what_is_changed_while_updates_are_due_waits_for_them(tmp_path: Path, placement: str, what: str, update: str) -> None:
    case = Case(placement=placement, update=update, delay=1e-3, events=((3, "after_step", what),), steps=5)
    overlap.check(case, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_undoing_finds_memory_while_other_pieces_hold_it(tmp_path: Path, seed: int) -> None:
    case = Case(placement="nvme", delay=1e-3, seed=seed, events=tuple((n, "before_step", "lr") for n in range(2, 6)), steps=6)
    overlap.check(case, tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "fp16"])
def test_a_checkpoint_has_the_masters_of_weights_that_were_written(tmp_path: Path, dtype: str) -> None:
    def case(placement: str) -> Case:
        kind = {"fp16": True} if dtype == "fp16" else {"dtype": dtype}
        return Case(placement=placement, update="deferred", steps=3, events=((2, "between", "load_state_dict"), (2, "between", "save")), **kind)

    seen = {placement: Run(case(placement), tmp_path).run() for placement in ("device", *PLACEMENTS)}
    assert len({run.log[-1] for run in seen.values()}) == 1


def test_a_checkpoint_is_loaded_over_weights_that_were_written(tmp_path: Path) -> None:
    for placement in ("device", *PLACEMENTS):  # with the 16 bits that the weights themselves lack
        case = Case(dtype="bfloat16", placement=placement, update="deferred", events=((2, "between", "restore"),), steps=4)
        seen, plain = Run(case, tmp_path).run(), Run(replace(case, placement="everything", events=((2, "between", "save"),)), tmp_path)
        found, expected = seen.states, plain.run().states
        assert tiny.same(found, expected), placement


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_gradient_that_is_not_finite(tmp_path: Path, placement: str, accumulation: int) -> None:
    seen = check(Case(placement=placement, bad_step=4, accumulation=accumulation), tmp_path)
    assert seen.undone > 0 and ("not finite" in str(seen.log))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_overflow_under_a_loss_scale(tmp_path: Path, placement: str) -> None:
    seen = check(Case(placement=placement, fp16=True, steps=10), tmp_path)
    overflows = [entry[-1] for entry in seen.log]
    assert True in overflows and not all(overflows) and seen.committed > 0 and seen.undone > 0


class Shared(nn.Module):
    """A block that runs ``times`` times under reentrant checkpoints, and a use of a weight that asks for no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.times, self.peeks = 2, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.blocks[0](x))
        if self.peeks:
            x = x @ self.blocks[3].weight.detach()
        for _ in range(self.times):
            x = checkpoint(self.blocks[1], x, use_reentrant=True)
            x = torch.tanh(self.blocks[2](x))
        return torch.tanh(self.blocks[3](x)).square().mean()


def train(model: Any, optimizer: Any, change: Any, steps: int = 7, begin: Any = lambda: None) -> list[float]:
    """A loop in which ``change(model, step)`` says whether the step comes."""
    losses = []
    for step in range(steps):
        wanted = change(model, step)
        begin()
        loss = model(torch.randn(2, 64, generator=torch.Generator().manual_seed(step)))
        loss.backward()
        losses.append(loss.item())
        if wanted:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def against_plain(path: Path, change: Any, placement: str) -> tuple[int, int]:
    """The loop with plain torch and the kernels' optimizer, and with updates in the backward; (committed, undone)."""
    model = Shared()
    plain = copy.deepcopy(model)
    expected = train(plain, tiny.plain_adamw(plain), change)
    config = tiny.config(placement, path, update="speculative", **tiny.tight(model, placement, slack=1.0))
    _, optimizer = tierflow.offload(model, config, owned_loop=True)
    prompt(optimizer.engine)
    found = train(model, optimizer, change, begin=optimizer.expect_step)
    assert found == expected
    states_of(optimizer.engine)
    assert tiny.same(tiny.weights(model), tiny.weights(plain))
    speculation = optimizer.engine.speculation
    counts = speculation.committed, speculation.undone
    optimizer.close()
    return counts


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_gradient_that_comes_more_often_than_before(tmp_path: Path, placement: str) -> None:
    def change(model: Shared, step: int) -> bool:
        model.times = 4 if step == 4 else 2
        return True

    committed, undone = against_plain(tmp_path, change, placement)
    assert committed > 0 and undone > 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_weight_that_is_used_again_after_its_update(tmp_path: Path, placement: str) -> None:
    def change(model: Shared, step: int) -> bool:
        model.peeks = step == 4
        return True

    committed, undone = against_plain(tmp_path, change, placement)
    assert committed > 0 and undone > 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_step_that_never_comes(tmp_path: Path, placement: str) -> None:
    def change(model: Shared, step: int) -> bool:
        return step != 4  # its gradients add up with the next backward's

    committed, undone = against_plain(tmp_path, change, placement)
    assert committed > 0 and undone > 0


@pytest.mark.parametrize("update", ["immediate", "deferred"])
@pytest.mark.parametrize("placement", ["device", "nvme"])
def test_a_weight_on_device_that_is_written_before_the_backward(tmp_path: Path, placement: str, update: str) -> None:
    model = Shared()
    _, optimizer = tierflow.offload(model, tiny.config(placement, tmp_path, update=update))
    x = torch.randn(2, 64, requires_grad=True)
    for looked_at in (True, False):
        loss = model(x)
        with tierflow.gathered(model):
            model.blocks[3].weight.sum()
            if not looked_at:
                with torch.no_grad():
                    model.blocks[3].weight.mul_(2.0)
        if looked_at:
            loss.backward()  # a look changes nothing
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    optimizer.close()


class _Crossing:
    """A gradient on its way from a device: it is taken in when somebody asks for the third time, or waits."""

    times = Done(0.0)

    def __init__(self, take_in: Callable[[], None]):
        self._take_in: Callable[[], None] | None = take_in
        self._asked = 0

    def done(self) -> bool:
        self._asked += 1
        if self._asked > 2:
            self.wait()
        return self._take_in is None

    def wait(self) -> None:
        if self._take_in is not None:
            take_in, self._take_in = self._take_in, None
            take_in()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_update_in_the_backward_waits_for_gradients_that_are_crossing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    # room for two more units: else whether any is tried depends on how fast the drive is
    case = Case(placement="everything", accumulation=accumulation, steps=4, slack=2.0)
    expected = Run(case, tmp_path).run()
    at_once = GradSlot._kernel

    def crosses(slot: GradSlot, grad: torch.Tensor, accumulate: bool) -> None:
        slot.transfer = _Crossing(partial(at_once, slot, grad.clone(), accumulate))

    monkeypatch.setattr(GradSlot, "_kernel", crosses)
    found = Run(case, tmp_path).run()
    assert found.committed > 0
    assert not expected.difference(found)
