"""The kernels, on 1-D contiguous CPU tensors.

Every function gives the same bits on every instruction set, with any number of threads and wherever its
tensors lie in memory. NaN comes out as NaN where it should, but only a NaN that is rounded or split has
defined bits. Results are written through raw pointers: autograd's version counters do not see them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import _cpu_adam
from .choice import check_threads, isa, isa_index, isas, set_threads, threads
from .operands import FLOATS, address, check_overlap
from .rules import ADAM, Hyper, Rule
from .steps import Steps

__all__ = [
    "GradStats",
    "adam_step",
    "grad_stats",
    "intake",
    "isa",
    "isas",
    "join",
    "rule_step",
    "set_threads",
    "split",
    "threads",
]


class GradStats(NamedTuple):
    """What a pass over a gradient tells: the sum of its squares, in double, and if all of it is finite."""

    sum_squares: float
    finite: bool


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    master: Tensor | None = None,
    scale: Tensor | None = None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    maximize: bool = False,
    unscale: float = 1.0,
    clip: float = 1.0,
    seed: int = 0,
    index: int = 0,
    isa: str | None = None,
    threads: int | None = None,
) -> None:
    """One AdamW step (Adam with L2 decay if not `decoupled`), in one pass, in place. `step` counts from 1.

    `master` says how the fp32 master weight is kept: None if it is `param` (fp32); an int16 remainder that
    together with a bf16 `param` is all 32 bits of it; an int8 correction that makes 24 bits of it; or fp32, and then
    `param` (bf16 or fp16) is rewritten as its rounding to the nearest. The gradient (fp32, bf16 or fp16) is multiplied
    by `unscale` and then by `clip`, each product rounded to fp32; 1.0 changes nothing.

    The moments are fp32, bf16, or uint8 codes with fp32 `scale`, two for each group of 64 elements (`formats`). The
    lossy ones round by chance, which depends on `seed`, `step` and the index of an element alone: a piece of a longer
    sequence gives as `index` which of its elements comes first, a multiple of 64.

    fp32 moments equal those of torch's foreach AdamW in every bit (torch on AVX2 or AVX-512). Weights do too
    wherever torch's square root is IEEE's. The one in torch builds with MKL is not: it is off by one unit in
    the last place for about one value in six, which moves an update by less than 3e-7 of its size, before the
    weight is rounded.
    """
    rule_step(
        ADAM, param, grad, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, master=master, scale=scale,
        hyper=Hyper(step, lr, beta1, beta2, eps, weight_decay, decoupled), maximize=maximize, unscale=unscale,
        clip=clip, seed=seed, index=index, isa=isa, threads=threads,
    )  # fmt: skip


def rule_step(
    rule: Rule,
    param: Tensor,
    grad: Tensor,
    moments: Mapping[str, Tensor],
    *,
    hyper: Hyper,
    master: Tensor | None = None,
    scale: Tensor | None = None,
    maximize: bool = False,
    unscale: float = 1.0,
    clip: float = 1.0,
    seed: int = 0,
    index: int = 0,
    isa: str | None = None,
    threads: int | None = None,
) -> None:
    """One step of any rule; `moments` holds what `rule.moments` names. For the rest see `adam_step`."""
    steps = Steps(rule, param, moments, master=master, scale=scale, isa=isa)
    steps.add(0, param.numel(), grad, hyper=hyper, maximize=maximize, unscale=unscale, clip=clip, seed=seed, index=index)
    steps.run(threads)


def intake(
    dst: Tensor, src: Tensor, *, accumulate: bool, isa: str | None = None, threads: int | None = None
) -> GradStats:
    """`dst = src`, or `dst += src` if `accumulate`, and the statistics of what `dst` then holds, in one pass.

    The sum is computed in fp32 and rounded once to dst's dtype, as torch's `dst.add_(src)` does.
    """
    d_ptr = address("dst", dst, None, FLOATS)
    n = dst.numel()
    s_ptr = address("src", src, n, FLOATS)
    if n:
        check_overlap([(d_ptr, n * dst.itemsize, "dst"), (s_ptr, n * src.itemsize, "src")])
    total = _cpu_adam.intake(
        n, d_ptr, FLOATS[dst.dtype], s_ptr, FLOATS[src.dtype], accumulate,
        isa_index(isa), check_threads(threads),
    )  # fmt: skip
    return GradStats(total, math.isfinite(total))


def grad_stats(src: Tensor, *, isa: str | None = None, threads: int | None = None) -> GradStats:
    """The sum of squares of a tensor and whether all of it is finite; the bits are those of `intake`."""
    s_ptr = address("src", src, None, FLOATS)
    total = _cpu_adam.sum_squares(
        src.numel(), s_ptr, FLOATS[src.dtype], isa_index(isa), check_threads(threads)
    )
    # The square of any fp32 value, and any sum of them that fits in memory, is finite in double.
    return GradStats(total, math.isfinite(total))


def split(
    master: Tensor, param: Tensor, remainder: Tensor, *, isa: str | None = None, threads: int | None = None
) -> None:
    """Split fp32 `master` into bf16 `param` (round half away from zero) and the int16 `remainder`.

    `join` gives back every bit of every value that is not NaN; NaN becomes the one quiet NaN 0x7fc00000.
    Finite values from 0x7f7f8000 (3.3962e38) on read as infinity in `param` alone.
    """
    n, ptrs = _split_arguments(master, param, remainder)
    _cpu_adam.split(n, *ptrs, isa_index(isa), check_threads(threads))


def join(
    param: Tensor, remainder: Tensor, out: Tensor, *, isa: str | None = None, threads: int | None = None
) -> None:
    """Write to fp32 `out` the master weight that bf16 `param` and int16 `remainder` hold together."""
    n, (o_ptr, p_ptr, r_ptr) = _split_arguments(out, param, remainder, "out")
    _cpu_adam.join(n, p_ptr, r_ptr, o_ptr, isa_index(isa), check_threads(threads))


def _split_arguments(
    master: Tensor, param: Tensor, remainder: Tensor, name: str = "master"
) -> tuple[int, tuple[int, int, int]]:
    f_ptr = address(name, master, None, (torch.float32,))
    n = master.numel()
    p_ptr = address("param", param, n, (torch.bfloat16,))
    r_ptr = address("remainder", remainder, n, (torch.int16,))
    if n:
        check_overlap([(f_ptr, n * 4, name), (p_ptr, n * 2, "param"), (r_ptr, n * 2, "remainder")])
    return n, (f_ptr, p_ptr, r_ptr)
