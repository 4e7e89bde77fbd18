"""Where nothing is staged a gradient stays what autograd made: the same numbers, and nothing of it is left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from outcome import Stack
from torch import nn

import tierflow
from tierflow.scheduler.gradients import GradSlot

pytestmark = pytest.mark.skipif(tiny.DEVICE.type != "cpu", reason="on an accelerator gradients go to their memory")


def offload(model: nn.Module, path: Path, placement: str = "device", **block: Any) -> Any:
    return tierflow.offload(model, tiny.config(placement, path, **block))[1]


def slots(optimizer: Any) -> list[GradSlot]:
    return list(optimizer.engine.gradients.slots.values())


def kept(optimizer: Any) -> list[bool]:
    return [slot.kept for slot in slots(optimizer)]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("zero", ["optimizer", "model", "fill"])
def test_the_numbers_are_plain_torchs(tmp_path: Path, accumulation: int, clip: bool, zero: str) -> None:
    model = Stack(layers=3)
    plain = copy.deepcopy(model)
    a, b = tiny.plain_adamw(plain), offload(model, tmp_path, accumulation=accumulation)
    for step in range(3):
        for m in (plain, model):
            for part in range(accumulation):
                m(m.input(10 * step + part)).backward()
        assert all(kept(b))
        assert all(torch.equal(p.grad, q.grad.clone()) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
        if clip:
            norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.01) for m in (plain, model)]
            assert torch.equal(*norms)
        for m, o in ((plain, a), (model, b)):
            o.step()
            m.zero_grad() if zero == "model" else o.zero_grad(set_to_none=zero != "fill")
        assert not any(kept(b)) or zero != "optimizer"
    assert tiny.same(tiny.weights(plain), tiny.weights(model))
    b.close()


def test_what_was_kept_goes_with_zero_grad_and_with_close(tmp_path: Path) -> None:
    model = Stack(layers=3)
    optimizer = offload(model, tmp_path)
    for end in (optimizer.zero_grad, optimizer.close):
        model(model.input()).backward()
        alive = [weakref.ref(slot._memory) for slot in slots(optimizer)]
        assert all(kept(optimizer))
        end()
        gc.collect()
        assert not any(ref() is not None for ref in alive)


def test_what_a_hook_of_the_user_has_seen_does_not_change(tmp_path: Path) -> None:
    model, seen = Stack(layers=2), list[torch.Tensor]()
    optimizer = offload(model, tmp_path, clip=0.01)
    for p in model.parameters():
        p.register_hook(seen.append)
    model(model.input()).backward()
    before = [grad.clone() for grad in seen]
    model(model.input(1)).backward()
    optimizer.step()
    assert all(torch.equal(grad, was) for grad, was in zip(seen, before, strict=False))
    optimizer.close()


class Together(nn.Module):
    """Parameters whose gradients autograd makes of one storage: whole, or a part each."""

    def __init__(self, parts: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = parts
        self.a, self.b, self.c = (nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (6, 4), (24,)))

    def forward(self, factor: float) -> torch.Tensor:
        flat = [p.view(-1) for p in (self.a, self.b, self.c)]
        joined = torch.cat(flat) if self.parts else flat[0] + flat[1] + flat[2]
        return joined.dot(torch.full_like(joined, factor))


@pytest.mark.parametrize("parts", [False, True])
def test_gradients_over_one_storage_add_up_each_for_itself(tmp_path: Path, parts: bool) -> None:
    model = Together(parts)
    optimizer = offload(model, tmp_path, accumulation=3)
    for factor in (1.0, 2.0, 4.0):
        model(factor).backward()
    assert all(torch.equal(p.grad.clone(), torch.full(p.shape, 7.0)) for p in model.parameters())
    optimizer.close()


@pytest.mark.parametrize(
    ("placement", "block"),
    [("nvme", {}), ("host", {"update": "deferred"}), ("everything", {"gradients": "nvme"})],
)
def test_memory_that_serves_for_staging_gets_its_gradients(tmp_path: Path, placement: str, block: dict[str, Any]) -> None:
    model = Stack(layers=6)
    caps = {} if placement == "host" else tiny.tight(model, placement, **block)
    optimizer = offload(model, tmp_path, placement, **block, **caps)
    model(model.input()).backward()
    assert not any(kept(optimizer))
    optimizer.close()


def test_another_dtype_than_the_accumulators_is_added_up_there(tmp_path: Path) -> None:
    model = Stack(layers=2, dtype=torch.bfloat16)
    config = tiny.config("device", tmp_path, accumulation=2) | {"data_types": {"grad_accum_dtype": "fp32"}}
    _, optimizer = tierflow.offload(model, config)
    model(model.input()).backward()
    assert not any(kept(optimizer))
    optimizer.close()
