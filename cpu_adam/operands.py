"""What a step works on: checked tensors, as the addresses and codes that the native half takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import _cpu_adam
from .formats import GROUP, kernel_codes
from .rules import EXP_AVG, EXP_AVG_SQ, Rule

__all__ = ["FLOATS", "Operands", "Span", "address", "check_apart", "check_overlap", "operands"]

#: (address, bytes, name) of a tensor's memory.
Span = tuple[int, int, str]

FLOATS = {torch.float32: _cpu_adam.F32, torch.bfloat16: _cpu_adam.BF16, torch.float16: _cpu_adam.F16}

_MASTER_DTYPES = (torch.int16, torch.int8, torch.float32)
_MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


class Operands(NamedTuple):
    """All of a step's memory but the gradient, in the native call's order; and which memory that is."""

    n: int
    rule: int
    layout: int
    moments: int
    param: int
    master: int
    exp_avg: int
    exp_avg_sq: int
    scale: int
    spans: tuple[Span, ...]


def address(name: str, t: Tensor, n: int | None, dtypes: Iterable[torch.dtype]) -> int:
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


def check_overlap(spans: Iterable[Span]) -> None:
    """Raises ValueError where two spans share memory."""
    taken = sorted(span for span in spans if span[1])
    for (begin, size, name), (following, _, other) in pairwise(taken):
        if begin + size > following:
            raise ValueError(f"{name} and {other} overlap in memory")


def check_apart(pointer: int, nbytes: int, found: Operands) -> None:
    """Raises ValueError where the gradient shares memory with an operand."""
    for begin, size, name in found.spans:
        if pointer < begin + size and begin < pointer + nbytes:
            raise ValueError(f"grad and {name} overlap in memory")


def operands(
    rule: Rule, param: Tensor, moments: Mapping[str, Tensor], master: Tensor | None, scale: Tensor | None
) -> Operands:
    """Checks dtypes, shapes, devices and that no two share memory; 1-D tensors."""
    p_ptr = address("param", param, None, FLOATS)
    n = param.numel()
    spans = [(p_ptr, n * param.itemsize, "param")]

    def also(name: str, t: Tensor, count: int, dtypes: Iterable[torch.dtype]) -> int:
        spans.append((address(name, t, count, dtypes), count * t.itemsize, name))
        return spans[-1][0]

    kept = moments[rule.moments[0]].dtype
    pointers = {EXP_AVG: 0, EXP_AVG_SQ: 0}
    for name in rule.moments:
        pointers[name] = also(name, moments[name], n, _MOMENT_DTYPES if name == rule.moments[0] else (kept,))
    x_ptr = 0 if master is None else also("master", master, n, _MASTER_DTYPES)
    layout, moment_code = kernel_codes(param.dtype, None if master is None else master.dtype, kept)
    s_ptr = 0
    if kept == torch.uint8:
        if scale is None:
            raise TypeError("scale is missing: 8-bit moments need their groups' scales")
        s_ptr = also("scale", scale, -(-n // GROUP) * len(rule.moments), (torch.float32,))
    elif scale is not None:
        raise TypeError(f"scale belongs to 8-bit moments; these are {kept}")
    check_overlap(spans)
    return Operands(
        n, rule.code, layout, moment_code, p_ptr, x_ptr, pointers[EXP_AVG], pointers[EXP_AVG_SQ], s_ptr, tuple(spans)
    )
