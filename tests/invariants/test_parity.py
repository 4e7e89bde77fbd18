"""Placement changes no bit; neither do threads, instruction set, I/O engine, prefetch, memory slots or pieces."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import DECAY, EPS, LR, Master
from outcome import Outcome, Stack, run_llama, states_of
from torch import nn

import tierflow
from tierflow import aio
from tierflow.cpu_adam import kernels

SETTINGS = [(a, c) for a in (1, 3) for c in (0.0, 0.5)]


@functools.cache
def on_device(dtype: torch.dtype, accumulation: int, clip: float, steps: int) -> Outcome:
    return run_llama(Path("/nowhere"), "device", steps, dtype, accumulation, clip, seed=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "lossless"])
@pytest.mark.parametrize(("accumulation", "clip"), SETTINGS)
@pytest.mark.parametrize("placement", ["host", "nvme", "everything"])
def test_twenty_steps_are_equal_in_every_bit(
    tmp_path: Path, placement: str, accumulation: int, clip: float, dtype: torch.dtype
) -> None:
    here = on_device(dtype, accumulation, clip, 20)
    there = run_llama(tmp_path, placement, 20, dtype, accumulation, clip)
    assert len(here.losses) == 20 * accumulation and len(set(here.losses)) > 15
    assert here.norms == there.norms
    assert here == there
    assert (there.nvme_read > 0) == (placement != "host")
    if clip:  # it did clip, and what it did is another training
        assert all(n is not None for n in here.norms) and max(n for n in here.norms if n) > clip
        assert here.states.keys() == on_device(dtype, accumulation, 0.0, 20).states.keys()
        assert here != on_device(dtype, accumulation, 0.0, 20)


@pytest.mark.parametrize("seed", [2, 3, None])
def test_where_in_memory_a_unit_lands_is_all_one(tmp_path: Path, seed: int | None) -> None:
    assert run_llama(tmp_path, "everything", 6, seed=seed, layers=4) == layers4(6)


@functools.cache
def layers4(steps: int) -> Outcome:
    return run_llama(Path("/nowhere"), "device", steps, seed=None, layers=4)


@pytest.mark.parametrize("engine", ["threads", "io_uring"])
def test_the_io_engine_is_all_one(tmp_path: Path, engine: str) -> None:
    if engine == "io_uring" and not aio.probe().io_uring:
        pytest.skip(f"io_uring cannot run here: {aio.probe().reason}")
    assert run_llama(tmp_path, "everything", 6, layers=4, engine=engine) == layers4(6)


def test_prefetch_is_all_one(tmp_path: Path) -> None:
    assert run_llama(tmp_path, "everything", 6, layers=4, prefetch=False) == layers4(6)


@pytest.mark.parametrize("placement", ["nvme", "everything"])
@pytest.mark.parametrize("elements", [1, 4096, 5000, 8192, 1 << 40])  # rounded to what the drive and the cap take
def test_the_size_of_pieces_is_all_one(tmp_path: Path, placement: str, elements: int) -> None:
    there = run_llama(tmp_path, placement, 6, layers=4, piece_elements=elements)
    assert there.nvme_read > 0
    assert there == layers4(6)


def wide_run(path: Path) -> Outcome:
    """Parameters large enough that every kernel call is cut over several threads."""
    model = Stack(layers=3, width=512)
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY}},
        "gradient_clipping": 0.1,
        "zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": str(path)}},
        "tierflow": {"device_memory": "64MB", "host_memory": "64MB", "nvme_capacity": "64MB"},
    }
    _, optimizer = tierflow.offload(model, config)
    losses, norms = [], []
    for step in range(3):
        loss = model(model.input(step))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        norms.append(optimizer.last_grad_norm)
        optimizer.zero_grad()
    try:
        return Outcome(losses, norms, states_of(optimizer.engine))
    finally:
        optimizer.close()


def test_the_number_of_threads_is_all_one(tmp_path: Path) -> None:
    before = kernels.threads()
    outcomes = []
    try:
        for count in (1, 2, 5):
            kernels.set_threads(count)
            outcomes.append(wide_run(tmp_path))
    finally:
        kernels.set_threads(before)
    assert outcomes[0] == outcomes[1] == outcomes[2]


ISA_PROGRAM = """
import sys
from pathlib import Path
import torch
from outcome import Stack, states_of, Outcome
import tierflow
from tierflow.cpu_adam import kernels
torch.set_num_threads(1)
digests = []
for dtype in (torch.float32, torch.bfloat16):
    model = Stack(layers=3, width=72, dtype=dtype)
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}, "gradient_clipping": 0.1,
              "zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": sys.argv[1]},
                                    "offload_optimizer": {"device": "nvme", "nvme_path": sys.argv[1]}},
              "tierflow": {"device_memory": "1MB", "host_memory": "2MB", "nvme_capacity": "8MB"}}
    _, optimizer = tierflow.offload(model, config)
    generator = torch.Generator().manual_seed(1)
    norms = []
    for step in range(4):
        for p in model.parameters():  # no backward: its matrix products choose their own instructions
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
        norms.append(optimizer.last_grad_norm)
    digests.append(Outcome([], norms, states_of(optimizer.engine)).digest())
    optimizer.close()
print(kernels.isa(), *digests)
"""


def test_the_instruction_set_is_all_one(tmp_path: Path, python) -> None:
    printed = {isa: python(ISA_PROGRAM, tmp_path, TIERFLOW_ISA=isa).split() for isa in kernels.isas()}
    assert all(words[0] == isa and len(words) == 3 for isa, words in printed.items())
    assert len({tuple(words[1:]) for words in printed.values()}) == 1
    assert printed[kernels.isas()[0]][1] != printed[kernels.isas()[0]][2]
    if len(printed) == 1:
        pytest.skip("this CPU has no other instruction set than scalar")


# ---- against torch, and against arithmetic done elsewhere


def fed(path: Path, dtype: torch.dtype):
    """A model with all states and weights on NVMe, whose gradients the test supplies."""
    model = Stack(layers=2, width=9, dtype=dtype)
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY, "eps": EPS}},
        "zero_optimization": {
            "offload_param": {"device": "nvme", "nvme_path": str(path)},
            "offload_optimizer": {"device": "nvme", "nvme_path": str(path)},
        },
        "tierflow": {"device_memory": "1MB", "host_memory": "2MB", "nvme_capacity": "8MB"},
    }
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    _, optimizer = tierflow.offload(model, config)
    return model, optimizer, before


def gradients(named: dict[str, torch.Tensor], steps: int):
    """A gradient a step for each tensor, over many magnitudes, some zero."""
    generator = torch.Generator().manual_seed(9)
    for _ in range(steps):
        found = {}
        for name, p in named.items():
            scale = 10.0 ** torch.randint(-6, 2, p.shape, generator=generator)
            g = torch.randn(p.shape, generator=generator) * scale
            found[name] = torch.where(torch.rand(p.shape, generator=generator) < 0.05, 0.0, g).to(p.dtype)
        yield found


def test_fp32_equals_torch_foreach_adamw(tmp_path: Path, record_property) -> None:
    model, optimizer, before = fed(tmp_path, torch.float32)
    plain = {n: nn.Parameter(p.clone()) for n, p in before.items()}
    theirs = torch.optim.AdamW(plain.values(), lr=LR, weight_decay=DECAY, eps=EPS, foreach=True)
    names = dict(model.named_parameters())
    exact = True
    for step, grads in enumerate(gradients(before, 20), 1):
        for n, g in grads.items():
            plain[n].grad, names[n].grad = g.clone(), g.clone()
        optimizer.step()
        theirs.step()
        ours = states_of(optimizer.engine)
        for n, p in plain.items():
            weight = ours[f"{n}.param"].view(torch.float32).view(p.shape)
            one_ulp = torch.nextafter(p.abs(), torch.tensor(torch.inf)) - p.abs()
            assert bool(((weight - p).abs() <= step * (1e-5 * LR + one_ulp)).all()), (step, n)
            exact &= torch.equal(weight, p)
            for kind in ("exp_avg", "exp_avg_sq"):
                held = ours[f"{n}.{kind}"].view(torch.float32).view(p.shape)
                torch.testing.assert_close(held, theirs.state[p][kind], rtol=1e-6, atol=1e-30)
    for n, p in plain.items():
        assert not torch.equal(p, before[n])
    record_property("fp32 against torch foreach", "every bit" if exact else "within 1e-5 of lr a step")
    optimizer.close()


def joined(half: torch.Tensor, rest: torch.Tensor) -> np.ndarray:
    """bf16 bits above a signed 16-bit remainder, as fp32."""
    high = half.numpy().view(np.uint16).astype(np.int64) << 16
    return (high + rest.numpy().view(np.int16)).astype(np.uint32).view(np.float32)


def test_lossless_is_the_fp32_master_in_all_32_bits(tmp_path: Path) -> None:
    model, optimizer, before = fed(tmp_path, torch.bfloat16)
    masters = {n: Master(p) for n, p in before.items()}
    plain = {n: nn.Parameter(p.float()) for n, p in before.items()}
    theirs = torch.optim.AdamW(plain.values(), lr=LR, weight_decay=DECAY, eps=EPS, foreach=True)
    names = dict(model.named_parameters())
    remainders = set()
    for step, grads in enumerate(gradients(before, 20), 1):
        for n, g in grads.items():
            names[n].grad, plain[n].grad = g.clone(), g.float()
            masters[n].step(g, step)
        optimizer.step()
        theirs.step()
        ours = states_of(optimizer.engine)
        for n, master in masters.items():
            held = joined(ours[f"{n}.param"], ours[f"{n}.master"])
            assert np.array_equal(held.view(np.uint32), master.weight.view(np.uint32)), (step, n)
            assert np.array_equal(ours[f"{n}.exp_avg"].numpy().view(np.uint32), master.m.view(np.uint32))
            assert np.array_equal(ours[f"{n}.exp_avg_sq"].numpy().view(np.uint32), master.v.view(np.uint32))
            one_ulp = np.spacing(np.abs(held))
            near = np.abs(held - plain[n].detach().numpy().reshape(-1)) <= step * (1e-5 * LR + one_ulp)
            assert near.all(), (step, n)
            remainders.update(ours[f"{n}.master"].view(torch.int16).tolist())
    assert min(remainders) < -20000 and max(remainders) > 20000  # the remainder holds what bf16 cannot
    optimizer.close()
