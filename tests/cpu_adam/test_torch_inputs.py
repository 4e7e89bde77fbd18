"""CPUAdamW against torch.optim.AdamW: torch's own good and bad inputs, and hyperparameters at random."""

import copy
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierflow.cpu_adam import CPUAdamW

inputs = pytest.importorskip("torch.testing._internal.common_optimizers", reason="torch's own test inputs need expecttest")

GOOD = [i for i in inputs.optim_inputs_func_adamw("cpu") if not i.kwargs.get("amsgrad")]
NOT_HERE = [i for i in inputs.optim_inputs_func_adamw("cpu") if i.kwargs.get("amsgrad")]
BAD = inputs.optim_error_inputs_func_adamw("cpu", torch.float32)
ONE_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")


def options_of(info):
    """Both optimizers' options; torch's flag for its own implementations is torch's alone."""
    theirs = dict(info.kwargs)
    return {k: v for k, v in theirs.items() if k not in ONE_IMPLEMENTATION}, theirs


@pytest.mark.parametrize("info", GOOD, ids=lambda i: i.desc)
def test_torch_s_good_inputs(info):
    ours, theirs = options_of(info)
    gen = torch.Generator().manual_seed(0)
    # torch's operators may fuse on long vectors and not on the rest of one: lengths of both kinds.
    a = [torch.nn.Parameter(torch.randn(shape, generator=gen)) for shape in ((10, 5), (33,), (256, 20), ())]
    b = [torch.nn.Parameter(p.detach().clone()) for p in a]
    mine, reference = CPUAdamW(a, **copy.deepcopy(ours)), torch.optim.AdamW(b, **copy.deepcopy(theirs))
    for _ in range(6):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn(p.shape, generator=gen)
            q.grad = p.grad.clone()
        mine.step()
        reference.step()
    lr = float(mine.param_groups[0]["lr"])
    for p, q in zip(a, b, strict=True):
        assert torch.allclose(p, q, rtol=2e-6, atol=6e-5 * lr)


@pytest.mark.parametrize("info", NOT_HERE, ids=lambda i: i.desc)
def test_what_torch_has_and_this_has_not_is_refused_by_name(info):
    ours, _ = options_of(info)
    with pytest.raises(ValueError, match="amsgrad=True is not supported"):
        CPUAdamW([torch.nn.Parameter(torch.zeros(3))], **ours)


@pytest.mark.parametrize("bad", BAD, ids=lambda b: str(b.optimizer_error_input.desc))
def test_torch_s_bad_inputs(bad):
    info = bad.optimizer_error_input
    known = inspect.signature(CPUAdamW).parameters
    options = {k: v for k, v in info.kwargs.items() if k in known}
    # torch refuses a few combinations of its implementations; here each of these is refused by name.
    message = bad.error_regex if not set(options) & set(ONE_IMPLEMENTATION) else "is not supported|" + bad.error_regex
    params = [torch.nn.Parameter(torch.zeros(1))] if info.params is None else info.params
    expect = pytest.warns if issubclass(bad.error_type, Warning) else pytest.raises
    with expect(bad.error_type, match=message):
        CPUAdamW(params, **options)


@settings(max_examples=60, deadline=None)
@given(
    lr=st.floats(1e-6, 0.5),
    beta1=st.floats(0.0, 0.99),
    beta2=st.floats(0.0, 0.9999),
    eps=st.sampled_from([1e-8, 1e-6, 1e-3]),
    weight_decay=st.one_of(st.just(0.0), st.floats(1e-4, 0.5)),
    maximize=st.booleans(),
    decoupled=st.booleans(),
    size=st.integers(1, 300),
    exponent=st.integers(-6, 3),
    seed=st.integers(0, 2**31),
)
def test_any_hyperparameters(lr, beta1, beta2, eps, weight_decay, maximize, decoupled, size, exponent, seed):
    gen = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(size, generator=gen))
    q = torch.nn.Parameter(p.detach().clone())
    common = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
    mine = CPUAdamW([p], decoupled_weight_decay=decoupled, **common)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)([q], foreach=True, **common)
    for _ in range(4):
        p.grad = torch.randn(size, generator=gen) * 10.0**exponent
        q.grad = p.grad.clone()
        before = q.detach().clone()
        mine.step()
        reference.step()
        moved = (q.detach() - before).abs()
        # Two roundings of the update and one of the weight.
        room = moved * 4e-7 + torch.maximum(before.abs(), q.detach().abs()) * 2.4e-7 + lr * 1e-5
        assert ((p.detach() - q.detach()).abs() <= room).all()
        # Each step is judged alone: where moments are tiny beside eps a last place of them moves the next update.
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(mine.state[p][key], reference.state[q][key], rtol=1e-6, atol=1e-37)
            mine.state[p][key].copy_(reference.state[q][key])
        p.data.copy_(q.data)
