"""An optimizer's step over many parameters at once: the bits of steps one by one, whatever changes in between."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref

import pytest
import torch
from torch import nn

from tierflow.cpu_adam import CPUAdagrad, CPUAdamW, CPULion, choice, reference
from tierflow.cpu_adam.formats import resolve
from tierflow.cpu_adam.rules import Hyper

KINDS = [(CPUAdamW, "fp32", torch.float32), (CPUAdamW, "lossless", torch.bfloat16), (CPUAdamW, "int8", torch.float32),
         (CPUAdamW, "int8-24bit", torch.bfloat16), (CPULion, "bf16", torch.bfloat16), (CPUAdagrad, "fp32", torch.float16)]  # fmt: skip
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(INTS[a.itemsize]), b.contiguous().view(INTS[b.itemsize]))


def equal(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    """Parameters and whole states, bit for bit."""
    pairs = zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True)
    return all(
        same(p.detach(), q.detach()) and a.state[p].keys() == b.state[q].keys()
        and all(same(value.view(-1), b.state[q][name].view(-1)) for name, value in a.state[p].items())
        for p, q in pairs
    )  # fmt: skip


def tensors(dtype: torch.dtype, count: int = 40, seed: int = 0) -> list[nn.Parameter]:
    """Of sizes from none to some of the pool's grains, matrices and vectors."""
    draw, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = [draw.choice([0, 1, 3, 17, 64, 200, 700, 2100]) for _ in range(count)]
    shapes = [(n, 64) if draw.random() < 0.7 else (n * 7,) for n in rows]
    return [nn.Parameter(torch.randn(shape, generator=gen).to(dtype)) for shape in shapes]


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def gradients(params: list[nn.Parameter], seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)


@pytest.mark.parametrize(("cls", "name", "dtype"), KINDS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_step_over_all_has_the_bits_of_the_reference_on_each(cls, name, dtype, threads, monkeypatch):
    monkeypatch.setattr(choice, "_default_threads", threads)
    params = tensors(dtype)
    optimizer = cls(params, lr=1e-2, weight_decay=0.1, state_format=name, seed=3)
    for step in range(1, 4):
        gradients(params, step)
        before = copies(params)
        states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
        optimizer.step()
        for i, (p, old, state) in enumerate(zip(params, before, states, strict=True)):
            fmt = resolve(name, dtype).for_shape(p.shape)
            master = {torch.int16: "remainder", torch.int8: "correction", torch.float32: "master", None: ""}[fmt.master]
            fresh = {k.name: torch.zeros(k.numel(p.numel()), dtype=k.dtype) for k in fmt.kinds(cls.rule)}
            made = {"master": old.detach().float()} if master == "master" else {}
            held = {**fresh, **made, master: made.get("master", fresh.get("master")), **state}
            group = optimizer.param_groups[0]
            hyper = Hyper(step, 1e-2, *group["betas"], group["eps"], 0.1, group["decoupled_weight_decay"])
            flat = {k: v.view(-1) for k, v in held.items() if v is not None and k != "step"}
            weight = old.detach().view(-1)
            reference.rule_step(
                cls.rule, weight, p.grad.view(-1), {k: flat[k] for k in cls.rule.moments}, hyper=hyper,
                master=flat[master] if master else None, scale=flat.get("scale"), seed=(3 << 32) + i,
            )  # fmt: skip
            assert same(weight, p.detach().view(-1)), (step, i)
            for key, value in optimizer.state[p].items():
                assert (key == "step" and value.item() == step) or same(value.view(-1), flat[key]), (step, i, key)


def swap_data(p: nn.Parameter, state: dict) -> None:
    p.data = p.data.clone()


def turn(p: nn.Parameter, state: dict) -> None:
    """The same memory, in another order."""
    p.data = torch.as_strided(p.data, p.shape, (1, p.shape[0])) if p.dim() == 2 and p.shape[0] == p.shape[1] else p.data


def new_moment(p: nn.Parameter, state: dict) -> None:
    state["exp_avg"] = torch.full_like(state["exp_avg"], 0.5)


def filled_moment(p: nn.Parameter, state: dict) -> None:
    state["exp_avg"].fill_(0.25)


def moved_moment(p: nn.Parameter, state: dict) -> None:
    state["exp_avg"].data = torch.full_like(state["exp_avg"], 0.75)


def forgotten(p: nn.Parameter, state: dict) -> None:
    state.clear()


def counted(p: nn.Parameter, state: dict) -> None:
    state["step"] = torch.tensor(41.0)


@pytest.mark.parametrize("change", [swap_data, turn, new_moment, filled_moment, moved_moment, forgotten, counted])
def test_what_changes_between_steps_is_seen(change):
    params = [nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(i))) for i in range(5)]
    others = copies(params)
    kept, fresh = CPUAdamW(params), CPUAdamW(others)
    for step in range(1, 5):
        for group in (params, others):
            gradients(group, step)
        kept.step()
        fresh.step()
        for p, q in zip(params[1:3], others[1:3], strict=True):
            change(p, kept.state[p])
            change(q, fresh.state[q])
        fresh.__dict__.pop("_prepared")  # nothing is known from the step before
    assert equal(kept, fresh)


def test_another_dtype_takes_another_format():
    p = nn.Parameter(torch.randn(64, 64))
    optimizer = CPUAdamW([p])
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        p.data = p.data.to(dtype)
        p.grad = torch.ones_like(p)
        optimizer.state[p].clear()
        optimizer.step()
        assert ("remainder" in optimizer.state[p]) == (dtype == torch.bfloat16)


def test_nothing_is_kept_alive():
    p = nn.Parameter(torch.randn(64, 64))
    optimizer = CPUAdamW([p])
    gradients([p], 0)
    optimizer.step()
    refs = [weakref.ref(t) for t in (p, p.grad, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])]
    p.grad = None
    optimizer.state.clear()
    gc.collect()
    assert [ref() is None for ref in refs] == [False, True, True, True]
    optimizer.param_groups.clear()
    del p
    gc.collect()
    assert refs[0]() is None


def test_parameters_that_share_memory_are_refused_and_nothing_is_stepped():
    memory = torch.ones(3, 64)
    params = [nn.Parameter(memory[:2]), nn.Parameter(memory[1:])]
    gradients(params, 0)
    optimizer = CPUAdamW(params)
    with pytest.raises(ValueError, match=r"param of parameter 0 and param of parameter 1 overlap"):
        optimizer.step()
    assert torch.equal(memory, torch.ones(3, 64)) and optimizer.state[params[0]]["step"].item() == 0
    params[1].data = memory[2:].clone()
    params[1].grad = torch.ones(1, 64)
    optimizer.state[params[1]].clear()
    optimizer.step()
    assert not torch.equal(memory[0], torch.ones(64))


def test_a_gradient_that_cannot_be_taken_leaves_all_as_it_was():
    params = [nn.Parameter(torch.ones(64, 64)) for _ in range(3)]
    optimizer = CPUAdamW(params)
    gradients(params, 0)
    params[2].grad = torch.ones(64, 64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert all(torch.equal(p.detach(), torch.ones(64, 64)) for p in params)
    assert all(optimizer.state[p]["step"].item() == 0 for p in params[:2])


def test_no_gradient_at_all_and_an_empty_parameter():
    params = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.empty(0, 4))]
    optimizer = CPUAdamW(params)
    optimizer.step()
    assert not optimizer.state
    gradients(params, 0)
    optimizer.step()
    assert optimizer.state[params[1]]["step"].item() == 1


@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_in_mid_run_goes_on_alone(again):
    params = tensors(torch.float32, 8)
    first = CPUAdamW(params)
    gradients(params, 0)
    first.step()
    second = again(first)
    theirs = second.param_groups[0]["params"]
    for group, optimizer in ((params, first), (theirs, second)):
        for step in (1, 2):
            gradients(group, step)
            optimizer.step()
    assert equal(first, second)
