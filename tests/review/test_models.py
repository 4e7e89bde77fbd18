"""Models and loops off the beaten track: equal to plain torch in every bit, or one clear error."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tierflow
from tierflow.swap import DebugMemory, Tier


class Net(nn.Module):
    def __init__(self, width: int = 32, depth: int = 4):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Stack(nn.Module):
    """``layer`` four times."""

    def __init__(self, layer: Callable[[], nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(layer() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def batch() -> torch.Tensor:
    return torch.randn(4, 32)


def backward(loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return loss


def agrees(model: nn.Module, step: Callable, path, steps: int = 3, random_places: bool = True, **options) -> None:
    plain = copy.deepcopy(model)
    a = tiny.plain_adamw(plain)
    debug = DebugMemory(random.Random(1)) if random_places else None
    caps = tiny.tight(model) | options
    _, b = tierflow.offload(model, tiny.config("everything", path, **caps), debug_memory=debug)
    try:
        for i in range(steps):
            losses = []
            for m, o in ((plain, a), (model, b)):
                torch.manual_seed(i)
                losses.append(step(m).item())
                o.step()
                o.zero_grad()
            assert losses[0] == losses[1], i
            b.engine.manager.ledger.check()
        assert tiny.same(tiny.weights(plain), tiny.weights(model))
        assert not any(b.engine.manager.ledger.pins(u.chunk, t) for u in b.engine.units for t in Tier)
    finally:
        b.close()


def test_inference_mode_between_steps(tmp_path) -> None:
    def step(model: nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            model(batch())
        loss = backward(model(batch()).square().mean())
        with torch.inference_mode():
            model(batch())
        return loss

    agrees(Net(), step, tmp_path)


def test_gradient_penalty(tmp_path) -> None:
    def step(model: nn.Module) -> torch.Tensor:
        x = batch().requires_grad_()
        out = model(x).square().mean()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        return backward(out + grad.square().sum())

    agrees(Net(), step, tmp_path, random_places=False, device_memory="64MB")


class Rotates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.view_as_complex(self.weight).conj()


def test_a_lazily_conjugated_view_of_a_weight_is_saved_as_such(tmp_path) -> None:
    def step(model: nn.Module) -> torch.Tensor:
        return backward(model(torch.randn(4, 32, dtype=torch.complex64)).abs().square().mean())

    agrees(Stack(Rotates), step, tmp_path)


def test_sparse_activations(tmp_path) -> None:
    class Spreads(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sparse.mm(torch.eye(4).to_sparse(), super().forward(x))

    agrees(Stack(lambda: Spreads(32, 32)), lambda m: backward(m(batch()).square().mean()), tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(32, dtype=torch.int8), torch.ones(32, dtype=torch.bool), torch.ones(32, dtype=torch.float64),
        torch.ones(32, dtype=torch.complex64), torch.zeros(0), torch.tensor(0.5),
    ],
    ids=["int8", "bool", "float64", "complex64", "empty", "scalar"],
)  # fmt: skip
def test_parameters_of_any_kind_beside_trained_ones(tmp_path, value) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)
            self.odd = nn.Parameter(value.clone(), requires_grad=value.dtype == torch.float32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.linear(x)
            if not self.odd.numel():
                return x + self.odd.sum()
            odd = self.odd.abs() if self.odd.is_complex() else self.odd
            return (x * odd).float()

    agrees(Stack(Odd), lambda m: backward(m(batch()).square().mean()), tmp_path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_a_trainable_parameter_that_no_kernel_takes_is_refused(tmp_path, dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=dtype))
    with pytest.raises(ValueError, match=r"'1\.weight' is .* can be trained"):
        tierflow.offload(model, tiny.config("everything", tmp_path))


@pytest.mark.parametrize("placement", ["host", "everything"])
def test_parameters_of_two_offloaded_models_are_refused_and_the_first_goes_on(tmp_path, placement) -> None:
    shared = nn.Linear(32, 32)
    first, second = nn.Sequential(shared, nn.Linear(32, 32)), nn.Sequential(nn.Linear(32, 32), shared)
    plain = copy.deepcopy(first)
    a = tiny.plain_adamw(plain)
    _, b = tierflow.offload(first, tiny.config(placement, tmp_path))
    with pytest.raises(ValueError, match="offloaded already"):
        tierflow.offload(second, tiny.config(placement, tmp_path))
    x = batch()
    for m, o in ((plain, a), (first, b)):
        m(x).square().mean().backward()
        o.step()
    assert tiny.same(tiny.weights(plain), tiny.weights(first))
    b.close()


def test_no_grad_within_a_forward(tmp_path) -> None:
    class Gated(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                gate = self.blocks[1](x)
            for block in self.blocks:
                x = x + block(x) * gate
            return x

    agrees(Gated(), lambda m: backward(m(batch()).square().mean()), tmp_path)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_within_checkpoints_that_use_weights_directly(tmp_path, reentrant) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32) * 0.1)
            self.linear = nn.Linear(32, 32)

        def inner(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x @ self.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(checkpoint(self.inner, x, use_reentrant=reentrant) @ self.weight.t())

    class Pairs(Stack):
        def pair(self, x: torch.Tensor, i: int) -> torch.Tensor:
            return self.blocks[i + 1].forward(self.blocks[i].forward(x))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i in (0, 2):
                x = checkpoint(self.pair, x, i, use_reentrant=reentrant)
            return x

    def step(model: nn.Module) -> torch.Tensor:
        return backward(model(batch().requires_grad_()).square().mean())

    agrees(Pairs(Block), step, tmp_path, device_memory="64MB")


def test_a_generator_as_forward(tmp_path) -> None:
    class Yields(Net):
        def forward(self, x: torch.Tensor):
            for block in self.blocks:
                x = block(x)
                yield x

    agrees(Yields(), lambda m: backward(sum(y.square().mean() for y in m(batch()))), tmp_path)


def test_ctrl_c_in_a_forward_leaves_a_model_that_runs(tmp_path) -> None:
    model = Net()
    plain, x = copy.deepcopy(model), batch()
    _, b = tierflow.offload(model, tiny.config("everything", tmp_path, **tiny.tight(model)))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[2][0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    assert torch.equal(model(x), plain(x))
    assert not b.engine.hooks.inside()
    assert not any(b.engine.manager.ledger.pins(u.chunk, t) for u in b.engine.units for t in Tier)
    b.close()


def test_a_step_within_gathered_is_refused_and_changes_nothing(tmp_path) -> None:
    model = Net()
    plain, x = copy.deepcopy(model), batch()
    a = tiny.plain_adamw(plain)
    _, b = tierflow.offload(model, tiny.config("everything", tmp_path))
    for m in (plain, model):
        m(x).square().mean().backward()
    with tierflow.gathered(model), pytest.raises(RuntimeError, match="leave the block first"):
        b.step()
    a.step(), b.step()
    assert tiny.same(tiny.weights(plain), tiny.weights(model))
    b.close()


def test_sparse_gradients_and_transforms_raise(tmp_path) -> None:
    model = nn.Sequential(nn.Embedding(50, 32, sparse=True), nn.Linear(32, 32))
    _, b = tierflow.offload(model, tiny.config("everything", tmp_path))
    with pytest.raises(RuntimeError, match="sparse gradient"):
        model(torch.arange(4)).sum().backward()
    b.close()
    model = Net()
    values = {k: v.detach().clone() for k, v in model.named_parameters()}
    x = batch()
    expected = model(x)
    _, b = tierflow.offload(model, tiny.config("everything", tmp_path, **tiny.tight(model)))
    assert torch.equal(torch.func.functional_call(model, values, (x,)), expected)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(dict(model.named_parameters()))
    assert not b.engine.hooks.inside()
    b.close()
