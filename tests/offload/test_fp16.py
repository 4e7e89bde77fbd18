"""What a loop may do under the ``fp16`` block: it acts on gradients without the loss scale, or raises with the remedy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from outcome import Stack, states_of
from torch import nn

import tierflow
from tierflow.swap import Tier


def offloaded(path: Path, accumulation: int = 1, clip: float = 0.0, model: nn.Module | None = None, **fp16: Any):
    """An fp16 Stack with everything on NVMe, and its optimizer."""
    model = Stack(layers=3, width=64) if model is None else model
    top = {"fp16": {"enabled": True} | fp16}
    config = tiny.config("everything", path, clip, accumulation, **tiny.tight(model, accumulation=accumulation, top=top))
    _, optimizer = tierflow.offload(model, config | top)
    assert optimizer.engine.plan.resident_bytes(Tier.NVME)
    return model, optimizer


def scaled_gradients(
    model: Stack, seeds: list[int], scale: float, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Sums in ``dtype`` of what plain torch's fp16 backward of the scaled loss gives, as fp32."""
    plain = Stack(layers=3, width=64).half()
    plain.load_state_dict({n: p.half() for n, p in tiny.weights(model).items()})
    sums = [torch.zeros(p.shape, dtype=dtype) for p in plain.parameters()]
    for seed in seeds:
        plain.zero_grad()
        (plain(plain.input(seed)) * scale).backward()
        for p, total in zip(plain.parameters(), sums, strict=True):
            total.add_(p.grad)
    return [total.float() for total in sums]


@pytest.mark.parametrize("accumulator", [torch.float16, torch.float32])
def test_reading_a_gradient_shows_it_without_the_scale_and_costs_nothing(
    tmp_path: Path, accumulator: torch.dtype
) -> None:
    model, optimizer = offloaded(tmp_path, 1 if accumulator == torch.float16 else 2, initial_scale_power=12)
    scale = optimizer.loss_scale
    assert scale == 4096.0
    seeds: list[int] = []
    for seed in range(3):  # each micro-batch adds in scaled units, whatever was read between
        optimizer.backward(model(model.input(seed)))
        seeds.append(seed)
        for p, g in zip(model.parameters(), scaled_gradients(model, seeds, scale, accumulator), strict=True):
            assert torch.equal(p.grad.float(), g / scale)
            assert torch.equal(p.grad.clone(), (g / scale).half()) and p.grad.dtype == torch.float16
            assert p.grad.tolist() == (g / scale).half().tolist()
            assert torch.equal(p.grad.detach().view(-1)[3:5].float(), g.view(-1)[3:5] / scale)
            assert torch.equal(p.grad.float().norm(), (g / scale).norm())
    optimizer.close()


def edit(p: torch.Tensor, unit: float) -> None:
    """What a loop may do to gradients; ``unit`` is what they are multiplied by."""
    p.grad.mul_(0.5)
    p.grad.clamp_(-0.02 * unit, 0.02 * unit)
    p.grad.view(-1)[2:4].zero_()
    p.grad.data[0].mul_(-1)
    p.grad.add_(torch.full_like(p.grad, 2.0**-9) * unit)
    p.grad.add_(p.grad, alpha=0.25)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_changing_a_gradient_changes_it_without_the_scale(tmp_path: Path, accumulation: int) -> None:
    model, optimizer = offloaded(tmp_path, accumulation, initial_scale_power=10)
    expected = scaled_gradients(model, [0], 1024.0)
    optimizer.backward(model(model.input()))
    for p, g in zip(model.parameters(), expected, strict=True):
        edit(p, 1.0)
        plain = nn.Parameter(torch.zeros_like(g, dtype=torch.float32))
        plain.grad = g
        edit(plain, 1024.0)
        if accumulation == 2:  # the accumulator is fp32, and every step of it is exact in both units
            assert torch.equal(p.grad.float(), plain.grad / 1024.0)
        else:
            torch.testing.assert_close(p.grad.float(), plain.grad / 1024.0, rtol=2e-3, atol=1e-7)
    optimizer.step()
    assert optimizer.steps_taken == 1
    optimizer.close()


def test_clipping_by_the_loop_clips_what_is_updated(tmp_path: Path) -> None:
    states = []
    for scale in (1.0, 1024.0):  # the clipped update is that of a run without a scale
        path = tmp_path / str(scale)
        path.mkdir()
        model, optimizer = offloaded(path, 2, loss_scale=scale)
        optimizer.backward(model(model.input()))
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        assert 0.05 < norm < 5
        assert nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() == pytest.approx(0.01, rel=1e-2)
        optimizer.step()
        assert optimizer.last_grad_norm == pytest.approx(0.01, rel=1e-2)
        states.append(states_of(optimizer.engine))
        optimizer.close()
    for name, held in states[0].items():
        if name.endswith("exp_avg"):
            there = states[1][name].view(torch.float32)
            torch.testing.assert_close(held.view(torch.float32), there, rtol=2e-2, atol=1e-7)
    model, optimizer = offloaded(tmp_path, clip=1.0)
    optimizer.backward(model(model.input()))
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with pytest.raises(RuntimeError, match="gradient_clipping is set too"):
        optimizer.step()
    optimizer.close()


def test_an_assigned_gradient_is_taken_without_the_scale(tmp_path: Path) -> None:
    model, optimizer = offloaded(tmp_path, 2, initial_scale_power=6)
    (g, *rest) = scaled_gradients(model, [1], 64.0)
    first = next(model.parameters())
    first.grad = torch.full_like(g, 0.25).half()
    optimizer.backward(model(model.input(1)))
    assert torch.equal(first.grad.float(), 0.25 + g / 64.0)
    first.grad = first.grad.clone() * 2
    second = list(model.parameters())[1]
    assert torch.equal(second.grad.float(), rest[0] / 64.0)
    for _ in range(2):  # zeroed in place after a step that doubled the scale: zero in any unit
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert not any(p.grad.any() for p in model.parameters())
    optimizer.scale.scale = 128.0
    expected = scaled_gradients(model, [2], 128.0)
    optimizer.backward(model(model.input(2)))
    for p, g in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad.float(), g / 128.0)
    optimizer.close()


def test_gradients_that_outlive_a_change_of_the_scale_add_up(tmp_path: Path) -> None:
    model, optimizer = offloaded(tmp_path, 2, initial_scale_power=6)
    expected = [g / 64.0 for g in scaled_gradients(model, [1], 64.0)]
    optimizer.backward(model(model.input(1)))
    optimizer.scale.scale = 256.0
    for total, g in zip(expected, scaled_gradients(model, [2], 256.0), strict=True):
        total.add_(g / 256.0)
    optimizer.backward(model(model.input(2)))
    for p, total in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad.float(), total)
    optimizer.close()


def test_a_backward_without_the_scale_is_refused(tmp_path: Path) -> None:
    model, optimizer = offloaded(tmp_path, initial_scale_power=8)
    with pytest.raises(RuntimeError, match=r"fp16\.enabled is true: call optimizer\.backward\(loss\)"):
        model(model.input()).backward()
    assert all(p.grad is None for p in model.parameters())
    before = states_of(optimizer.engine)
    for loss in (model(model.input()), model(model.input(1))):
        optimizer.backward(loss)
    with pytest.raises(RuntimeError, match=r"optimizer\.backward"):
        model(model.input()).backward()
    for p, g in zip(model.parameters(), scaled_gradients(model, [0, 1], 256.0, torch.float16), strict=True):
        assert torch.equal(p.grad.float(), g / 256.0)  # nothing of it was added
    optimizer.step()
    assert not tiny.same(before, states_of(optimizer.engine))
    optimizer.close()


def test_a_gradscaler_beside_the_block_is_refused(tmp_path: Path) -> None:
    model, optimizer = offloaded(tmp_path, initial_scale_power=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with pytest.raises(RuntimeError, match=r"GradScaler .* fp16"):
        scaler.scale(model(model.input())).backward()
    optimizer.backward(scaler.scale(model(model.input())))
    with pytest.raises(RuntimeError, match=r"GradScaler and fp16\.enabled both scale"):
        scaler.step(optimizer)
    with pytest.raises(ValueError, match="unscale FP16"):  # torch's own
        scaler.unscale_(optimizer)
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.step(optimizer)
    assert optimizer.steps_taken == 1
    optimizer.close()


def test_backward_without_the_block_is_plain(tmp_path: Path) -> None:
    runs = []
    for call in (lambda o, loss: o.backward(loss), lambda o, loss: loss.backward()):
        model = Stack(layers=3, width=64)
        _, optimizer = tierflow.offload(model, tiny.config("everything", tmp_path, **tiny.tight(model)))
        call(optimizer, model(model.input()))
        optimizer.step()
        assert optimizer.loss_scale == 1.0 and not optimizer.overflow
        runs.append(states_of(optimizer.engine))
        optimizer.close()
    assert tiny.same(*runs)


def test_an_overflow_changes_nothing_but_the_scale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = offloaded(tmp_path, initial_scale_power=8, hysteresis=1)
    before, manifest = states_of(optimizer.engine), optimizer.state_dict()["tierflow"]["step_counts"]
    with caplog.at_level(logging.INFO, "tierflow"):
        optimizer.backward(model(model.input()) * float("inf"))
        optimizer.step()
    assert [r.message for r in caplog.records if "skipped" in r.message] == [
        "step skipped: the gradient of 'layers.0.weight' is not finite at loss scale 256; the scale is now 128"
    ]
    assert (optimizer.overflow, optimizer.skipped_steps, optimizer.steps_taken) == (True, 1, 0)
    assert optimizer.last_grad_norm is None and optimizer.loss_scale == 128.0
    assert tiny.same(before, states_of(optimizer.engine))
    assert optimizer.state_dict()["tierflow"]["step_counts"] == manifest
    optimizer.zero_grad()
    optimizer.backward(model(model.input()))
    optimizer.step()
    assert (optimizer.overflow, optimizer.skipped_steps, optimizer.steps_taken) == (False, 1, 1)
    assert not tiny.same(before, states_of(optimizer.engine))
    optimizer.close()


@pytest.mark.parametrize(
    ("fp16", "words"),
    [
        ({"loss_scale": 64}, r"constant fp16\.loss_scale 64; nothing was updated"),
        ({"initial_scale_power": 0, "hysteresis": 1}, r"loss scale is 1, its minimum \(fp16\.min_loss_scale\)"),
    ],
)
def test_an_overflow_that_no_scale_can_cure_raises(tmp_path: Path, fp16: dict[str, Any], words: str) -> None:
    model, optimizer = offloaded(tmp_path, **fp16)
    before, scale = states_of(optimizer.engine), optimizer.loss_scale
    optimizer.backward(model(model.input()) * float("nan"))
    with pytest.raises(tierflow.NonFiniteGradient, match=words):
        optimizer.step()
    assert tiny.same(before, states_of(optimizer.engine)) and optimizer.loss_scale == scale
    assert optimizer.skipped_steps == 0
    optimizer.close()


def test_what_the_block_casts(tmp_path: Path) -> None:
    class Reads(Stack):
        def __init__(self) -> None:
            super().__init__(layers=2, width=64)
            self.register_buffer("shift", torch.ones(64))

        def forward(self, x: torch.Tensor, *, more: dict[str, torch.Tensor]) -> torch.Tensor:
            assert x.dtype == more["y"].dtype == self.shift.dtype == torch.float16 and more["ids"].dtype == torch.int64
            return super().forward(x + more["y"] + self.shift)

    model, optimizer = offloaded(tmp_path, model=Reads(), auto_cast=True)
    assert all(p.dtype == torch.float16 for p in model.parameters())
    assert {n.rsplit(".", 1)[1] for n in states_of(optimizer.engine)} == {"param", "master", "exp_avg", "exp_avg_sq"}
    optimizer.backward(model(torch.randn(3, 64), more={"y": torch.randn(3, 64), "ids": torch.arange(3)}))
    optimizer.step()
    optimizer.close()
    with pytest.raises(AssertionError):  # the hook is gone
        model(torch.randn(3, 64), more={"y": torch.randn(3, 64), "ids": torch.arange(3)})
