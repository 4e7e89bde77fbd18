"""The kernels, on 1-D contiguous CPU tensors.

Every function gives the same bits on every instruction set, with any number of threads and wherever its
tensors lie in memory. NaN comes out as NaN where it should, but only a NaN that is rounded or split has
defined bits. Results are written through raw pointers: autograd's version counters do not see them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import _cpu_adam

__all__ = [
    "GradStats",
    "adam_step",
    "grad_stats",
    "intake",
    "isa",
    "isas",
    "join",
    "set_threads",
    "split",
    "threads",
]

_FLOATS = {torch.float32: _cpu_adam.F32, torch.bfloat16: _cpu_adam.BF16, torch.float16: _cpu_adam.F16}

# (param dtype, master dtype or None) -> how the fp32 master is laid out.
_FORMATS = {
    (torch.float32, None): _cpu_adam.MASTER_IS_PARAM,
    (torch.bfloat16, torch.int16): _cpu_adam.LOSSLESS,
    (torch.bfloat16, torch.float32): _cpu_adam.MASTER_BF16,
    (torch.float16, torch.float32): _cpu_adam.MASTER_F16,
}

_ISAS = tuple(_cpu_adam.isas())
_default_threads = max(1, _cpu_adam.hardware_threads())


class GradStats(NamedTuple):
    """What a pass over a gradient tells: the sum of its squares, in double, and if all of it is finite."""

    sum_squares: float
    finite: bool


def isas() -> list[str]:
    """The instruction sets that this CPU can run, best first; "scalar" is always the last."""
    return list(_ISAS)


@cache
def _isa_index(name: str | None) -> int:
    if name is None:
        name = os.environ.get("TIERFLOW_ISA") or _ISAS[0]
    if name not in _ISAS:
        raise ValueError(f"instruction set {name!r} is not available here; choose from {', '.join(_ISAS)}")
    return _ISAS.index(name)


def isa() -> str:
    """The instruction set in use: the environment variable TIERFLOW_ISA's (read once), else the best."""
    return _ISAS[_isa_index(None)]


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


def _check(name: str, t: Tensor, n: int | None, dtypes: Iterable[torch.dtype]) -> int:
    """Refuse what the kernels cannot take; return the address."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {t.layout}")
    if not t.is_cpu:
        raise ValueError(f"{name} must be on the CPU, got device {t.device}")
    if t.dtype not in dtypes:
        expected = ", ".join(str(d) for d in dtypes)
        raise TypeError(f"{name} must have one of the dtypes {expected}, got {t.dtype}")
    if t.dim() != 1 or not t.is_contiguous():
        raise ValueError(
            f"{name} must be 1-D and contiguous, got shape {tuple(t.shape)}, strides {t.stride()}; "
            "pass t.view(-1)"
        )
    if n is not None and t.numel() != n:
        raise ValueError(f"{name} has {t.numel()} elements, but {n} are expected")
    return t.data_ptr()


def _check_overlap(spans: list[tuple[int, int, str]]) -> None:
    """Spans are (address, bytes, name); no two may share memory."""
    spans.sort()
    for (begin, size, name), (following, _, other) in pairwise(spans):
        if begin + size > following:
            raise ValueError(f"{name} and {other} overlap in memory")


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    master: Tensor | None = None,
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
    isa: str | None = None,
    threads: int | None = None,
) -> None:
    """One AdamW step (Adam with L2 decay if not `decoupled`), in one pass, in place. `step` counts from 1.

    `master` says how the fp32 master weight is kept: None if it is `param` (fp32); an int16 remainder that
    together with a bf16 `param` is all 32 bits of it; or fp32, and then `param` (bf16 or fp16) is rewritten
    as its rounding to the nearest. The gradient (fp32, bf16 or fp16) is multiplied by `unscale` and then by
    `clip`, each product rounded to fp32; 1.0 changes nothing.

    Moments equal those of torch's foreach AdamW in every bit (torch on AVX2 or AVX-512). Weights do too
    wherever torch's square root is IEEE's. The one in torch builds with MKL is not: it is off by one unit in
    the last place for about one value in six, which moves an update by less than 3e-7 of its size, before the
    weight is rounded.
    """
    p_ptr = _check("param", param, None, _FLOATS)
    n = param.numel()
    g_ptr = _check("grad", grad, n, _FLOATS)
    m_ptr = _check("exp_avg", exp_avg, n, (torch.float32,))
    v_ptr = _check("exp_avg_sq", exp_avg_sq, n, (torch.float32,))
    x_ptr = 0
    spans = [
        (p_ptr, n * param.itemsize, "param"),
        (g_ptr, n * grad.itemsize, "grad"),
        (m_ptr, n * 4, "exp_avg"),
        (v_ptr, n * 4, "exp_avg_sq"),
    ]
    if master is not None:
        x_ptr = _check("master", master, n, (torch.int16, torch.float32))
        spans.append((x_ptr, n * master.itemsize, "master"))
    layout = _FORMATS.get((param.dtype, None if master is None else master.dtype))
    if layout is None:
        got = "no master" if master is None else f"a master of {master.dtype}"
        raise TypeError(
            f"param of {param.dtype} with {got} is not a format: fp32 takes no master, bf16 takes an int16 "
            "remainder or an fp32 master, fp16 takes an fp32 master"
        )
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    if n:
        _check_overlap(spans)
    # In double, and in torch's order.
    bias1 = 1 - beta1**step
    bias2_sqrt = (1 - beta2**step) ** 0.5
    step_size = (lr / bias1) * -1
    coupled = not decoupled and weight_decay != 0
    decay = 1 - lr * weight_decay if decoupled and weight_decay != 0 else 1.0
    _cpu_adam.adam_step(
        n, layout, _FLOATS[grad.dtype], p_ptr, x_ptr, g_ptr, m_ptr, v_ptr,
        decay, weight_decay, beta1, beta2, bias2_sqrt, eps, step_size, unscale, clip, coupled, maximize,
        _isa_index(isa), _check_threads(threads),
    )  # fmt: skip


def intake(
    dst: Tensor, src: Tensor, *, accumulate: bool, isa: str | None = None, threads: int | None = None
) -> GradStats:
    """`dst = src`, or `dst += src` if `accumulate`, and the statistics of what `dst` then holds, in one pass.

    The sum is computed in fp32 and rounded once to dst's dtype, as torch's `dst.add_(src)` does.
    """
    d_ptr = _check("dst", dst, None, _FLOATS)
    n = dst.numel()
    s_ptr = _check("src", src, n, _FLOATS)
    if n:
        _check_overlap([(d_ptr, n * dst.itemsize, "dst"), (s_ptr, n * src.itemsize, "src")])
    total = _cpu_adam.intake(
        n, d_ptr, _FLOATS[dst.dtype], s_ptr, _FLOATS[src.dtype], accumulate,
        _isa_index(isa), _check_threads(threads),
    )  # fmt: skip
    return GradStats(total, math.isfinite(total))


def grad_stats(src: Tensor, *, isa: str | None = None, threads: int | None = None) -> GradStats:
    """The sum of squares of a tensor and whether all of it is finite; the bits are those of `intake`."""
    s_ptr = _check("src", src, None, _FLOATS)
    total = _cpu_adam.sum_squares(
        src.numel(), s_ptr, _FLOATS[src.dtype], _isa_index(isa), _check_threads(threads)
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
    _cpu_adam.split(n, *ptrs, _isa_index(isa), _check_threads(threads))


def join(
    param: Tensor, remainder: Tensor, out: Tensor, *, isa: str | None = None, threads: int | None = None
) -> None:
    """Write to fp32 `out` the master weight that bf16 `param` and int16 `remainder` hold together."""
    n, (o_ptr, p_ptr, r_ptr) = _split_arguments(out, param, remainder, "out")
    _cpu_adam.join(n, p_ptr, r_ptr, o_ptr, _isa_index(isa), _check_threads(threads))


def _split_arguments(
    master: Tensor, param: Tensor, remainder: Tensor, name: str = "master"
) -> tuple[int, tuple[int, int, int]]:
    f_ptr = _check(name, master, None, (torch.float32,))
    n = master.numel()
    p_ptr = _check("param", param, n, (torch.bfloat16,))
    r_ptr = _check("remainder", remainder, n, (torch.int16,))
    if n:
        _check_overlap([(f_ptr, n * 4, name), (p_ptr, n * 2, "param"), (r_ptr, n * 2, "remainder")])
    return n, (f_ptr, p_ptr, r_ptr)
