"""What users do to gradients must act on the managed ones, or raise with the remedy."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from loops import check, ids, loss_of, pair
from torch import nn

import tierflow
from tierflow.scheduler.gradients import GradContext, GradSlot
from tierflow.swap import HostLane


@pytest.fixture(autouse=True, params=["host", "nvme"])
def _gradients(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the gradients wait for the update."""
    monkeypatch.setattr(tiny, "GRADIENTS", request.param)


def test_clip_grad_norm_clips_what_is_managed(tmp_path) -> None:
    plain, a, model, b = pair(tmp_path)
    for step in range(3):
        for m in (plain, model):
            loss_of(m, step).backward()
        norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.05) for m in (plain, model)]
        assert norms[0] > 0.05 and torch.equal(*norms)
        for o in (a, b):
            o.step()
            o.zero_grad()
    check(plain, model)
    b.close()


def test_clip_grad_value_and_user_arithmetic_on_gradients(tmp_path) -> None:
    plain, a, model, b = pair(tmp_path)
    for m in (plain, model):
        loss_of(m).backward()
        nn.utils.clip_grad_value_(m.parameters(), 0.01)
        for p in m.parameters():
            p.grad.mul_(0.5).add_(1e-3)
            p.grad *= 2
            p.grad.data.mul_(0.25)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad.clone())
        assert torch.equal(p.grad.abs().sum(), q.grad.abs().sum())
        assert (q.grad.shape, q.grad.dtype, q.grad.device) == (p.grad.shape, p.grad.dtype, p.grad.device)
    a.step(), b.step()
    check(plain, model)
    b.close()


def test_reading_a_gradient(tmp_path) -> None:
    plain, _, model, b = pair(tmp_path)
    for m in (plain, model):
        loss_of(m).backward()
    p, q = next(plain.parameters()), next(model.parameters())
    assert q.grad.tolist() == p.grad.tolist()
    assert (q.grad.numpy() == p.grad.numpy()).all()
    assert torch.equal(copy.deepcopy(q.grad), p.grad)
    assert float(q.grad[0, 1]) == float(p.grad[0, 1])
    assert "ManagedGrad" in repr(q.grad)
    with pytest.raises(RuntimeError, match=r"grad\.clone"):
        q.grad.data_ptr()
    b.close()


def test_an_assigned_gradient_counts(tmp_path) -> None:
    plain, a, model, b = pair(tmp_path)
    for m in (plain, model):
        loss_of(m).backward()
        for i, p in enumerate(m.parameters()):
            p.grad = None if i == 0 else p.grad * 0.5
    a.step(), b.step()
    check(plain, model)
    b.close()


@pytest.mark.parametrize("zero", [lambda o, m: o.zero_grad(), lambda o, m: o.zero_grad(set_to_none=False),
                                  lambda o, m: m.zero_grad(), lambda o, m: m.zero_grad(set_to_none=False)])  # fmt: skip
def test_every_way_to_zero_gradients(tmp_path, zero) -> None:
    plain, a, model, b = pair(tmp_path)
    for step in range(3):
        for m, o in ((plain, a), (model, b)):
            loss_of(m, step).backward()
            loss_of(m, step + 10).backward()
            o.step()
            zero(o, m)
    check(plain, model)
    b.close()


def test_gradscaler_skips_an_overflow_and_unscales(tmp_path) -> None:
    plain, a, model, b = pair(tmp_path)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    for step in range(3):
        for m, o, s in ((plain, a, scalers[0]), (model, b, scalers[1])):
            loss = loss_of(m, step) * (float("inf") if step == 1 else 1.0)
            s.scale(loss).backward()
            s.unscale_(o)
            nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            s.step(o)
            s.update()
            o.zero_grad()
    assert scalers[0].get_scale() == scalers[1].get_scale() == 2.0**9
    check(plain, model)
    b.close()


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path) -> None:
    _, _, model, b = pair(tmp_path)
    before = tiny.weights(model)
    (loss_of(model) * float("nan")).backward()
    with pytest.raises(tierflow.NonFiniteGradient, match=r"step 1: the gradient of .* not finite"):
        b.step()
    assert tiny.same(before, tiny.weights(model))
    order = list(b.engine.recorder.trace.order)  # of the step that ended there
    b.zero_grad()
    loss_of(model).backward()
    b.step()
    assert b.engine.recorder.trace.order == order
    b.close()


def test_user_clipping_and_config_clipping_at_once_is_an_error(tmp_path) -> None:
    model = tiny.llama(layers=2, hidden=32)
    _, b = tierflow.offload(model, tiny.config("everything", tmp_path, clip=1.0))
    loss_of(model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with pytest.raises(RuntimeError, match="gradient_clipping is set too"):
        b.step()
    b.close()


def test_in_place_changes_between_forward_and_backward_are_seen(tmp_path) -> None:
    _, _, model, b = pair(tmp_path)
    loss_of(model).backward()
    loss = loss_of(model, 1)
    b.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    b.zero_grad()

    class Spoils(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.w(x).exp()
            z = y * 2
            y.detach().add_(1)
            return z.sum()

    spoils = Spoils()
    _, c = tierflow.offload(spoils, tiny.config("everything", tmp_path, **tiny.tight(spoils)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spoils(torch.randn(2, 4)).backward()
    b.close()
    c.close()


def test_retain_graph_and_two_losses(tmp_path) -> None:
    plain, a, model, b = pair(tmp_path)
    for m, o in ((plain, a), (model, b)):
        out = m(input_ids=ids()).logits
        out.square().mean().backward(retain_graph=True)
        out.abs().mean().backward()
        o.step()
    check(plain, model)
    b.close()


def test_a_gradient_goes_to_the_device_that_is_asked_for() -> None:
    param, memory = nn.Parameter(torch.zeros(4, device="meta")), torch.arange(4.0)
    grad = GradSlot("weight", param, memory, GradContext(HostLane())).handle
    assert grad.device.type == (grad * 2).device.type == torch.zeros_like(grad).device.type == "meta"
    assert torch.equal(grad.cpu(), memory) and torch.equal(grad.to("cpu", torch.float64), memory.double())
    assert torch.equal(torch.zeros_like(grad, device="cpu"), torch.zeros(4))
