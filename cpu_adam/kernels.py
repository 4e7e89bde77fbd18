"""The kernels, on 1-D contiguous CPU tensors.

Every function gives the same bits on every instruction set, with any number of threads and wherever its
tensors lie in memory. NaN comes out as NaN where it should, but only a NaN that is rounded or split has
defined bits. Results are written through raw pointers: autograd's version counters do not see them.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import _cpu_adam
from .formats import GROUP
from .operands import FLOATS, address, check_apart, check_overlap, operands
from .rules import ADAM, Hyper, Rule

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

_ISAS = tuple(_cpu_adam.isas())
# The processors that this process may use, which may be fewer than there are.
_default_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class GradStats(NamedTuple):
    """What a pass over a gradient tells: the sum of its squares, in double, and if all of it is finite."""

    sum_squares: float
    finite: bool


def isas() -> list[str]:
    """The instruction sets that this CPU can run, best first; "scalar" is always the last."""
    return list(_ISAS)


@cache
def isa_index(name: str | None) -> int:
    """The native half's number of an instruction set; None: of the one in use."""
    if name is None:
        name = os.environ.get("TIERFLOW_ISA") or _ISAS[0]
    if name not in _ISAS:
        raise ValueError(f"instruction set {name!r} is not available here; choose from {', '.join(_ISAS)}")
    return _ISAS.index(name)


def isa() -> str:
    """The instruction set in use: the environment variable TIERFLOW_ISA's (read once), else the best."""
    return _ISAS[isa_index(None)]


def threads() -> int:
    """How many threads a large call uses, the caller's included."""
    return _default_threads


def set_threads(n: int) -> None:
    """Set how many threads a large call uses. Results do not depend on it."""
    global _default_threads
    _default_threads = _check_threads(n)


def _check_threads(n: int | None) -> int:
    if n is None:
        return _default_threads
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 4096:
        raise ValueError(f"threads must be an integer from 1 to 4096, got {n!r}")
    return n


#: Below this many elements a step is too short for threads to matter.
_WORTH_A_WARNING = 1 << 20
_PRESENT = os.cpu_count() or 1
_warned = False


def threads_for_step(n: int | None, elements: int) -> int:
    """Of a step; says once if a long one uses less than the machine has, unless the caller chose the number."""
    global _warned
    if n is None and not _warned and elements >= _WORTH_A_WARNING and _default_threads < _PRESENT:
        _warned = True
        warnings.warn(
            f"the optimizer step runs on {_default_threads} of this machine's {_PRESENT} processors: this process is "
            "limited to them (taskset, a container), or set_threads() was called",
            RuntimeWarning,
            stacklevel=5,
        )
    return _check_threads(n)


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
    found = operands(rule, param, moments, master, scale)
    g_ptr = address("grad", grad, found.n, FLOATS)
    check_apart(g_ptr, grad.nbytes, found)
    if hyper.step < 1:
        raise ValueError(f"step counts from 1, got {hyper.step}")
    if index < 0 or index % GROUP:
        raise ValueError(f"index must be a multiple of {GROUP}, at which a group begins, got {index}")
    batch = _cpu_adam.Batch(isa_index(isa))
    constants, general = rule.constants(hyper)
    batch.add(
        *found[:-1], g_ptr, FLOATS[grad.dtype], constants, general, unscale, -clip if maximize else clip,
        seed & 0xFFFFFFFFFFFFFFFF, hyper.step, index // GROUP, 0,
    )  # fmt: skip
    batch.run(threads_for_step(threads, found.n))


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
        isa_index(isa), _check_threads(threads),
    )  # fmt: skip
    return GradStats(total, math.isfinite(total))


def grad_stats(src: Tensor, *, isa: str | None = None, threads: int | None = None) -> GradStats:
    """The sum of squares of a tensor and whether all of it is finite; the bits are those of `intake`."""
    s_ptr = address("src", src, None, FLOATS)
    total = _cpu_adam.sum_squares(
        src.numel(), s_ptr, FLOATS[src.dtype], isa_index(isa), _check_threads(threads)
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
    _cpu_adam.split(n, *ptrs, isa_index(isa), _check_threads(threads))


def join(
    param: Tensor, remainder: Tensor, out: Tensor, *, isa: str | None = None, threads: int | None = None
) -> None:
    """Write to fp32 `out` the master weight that bf16 `param` and int16 `remainder` hold together."""
    n, (o_ptr, p_ptr, r_ptr) = _split_arguments(out, param, remainder, "out")
    _cpu_adam.join(n, p_ptr, r_ptr, o_ptr, isa_index(isa), _check_threads(threads))


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
