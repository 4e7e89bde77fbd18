"""The state of one parameter: made, completed, and checked when it comes from a file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .formats import GROUP, StateFormat
from .rules import Rule

__all__ = ["MASTER_KEYS", "check_codes", "complete", "restored"]

#: Under which name a master of each dtype is kept.
MASTER_KEYS = {torch.float32: "master", torch.int16: "remainder", torch.int8: "correction"}


@cache
def _names(fmt: StateFormat, rule: Rule) -> frozenset[str]:
    kinds = fmt.kinds(rule)[1:]
    return frozenset({"step", *(MASTER_KEYS[k.dtype] if k.name == "master" else k.name for k in kinds)})


def _expected(p: Tensor, fmt: StateFormat, rule: Rule) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors beside ``step``. Scales are (groups, moments of the rule)."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for kind in fmt.kinds(rule)[1:]:
        name = MASTER_KEYS[kind.dtype] if kind.name == "master" else kind.name
        shape = (-(-p.numel() // kind.group), kind.per_group) if kind.group > 1 else tuple(p.shape)
        found[name] = (kind.dtype, shape)
    return found


def complete(state: dict[str, Any], p: Tensor, fmt: StateFormat, rule: Rule) -> None:
    """Adds what ``state`` lacks: zeros, and the master from the parameter."""
    if state.keys() >= _names(fmt, rule):
        return
    if "step" not in state:
        state["step"] = torch.tensor(0.0)
    for name, (dtype, shape) in _expected(p, fmt, rule).items():
        if name in state:
            continue
        if name == "master":
            state[name] = p.detach().to(torch.float32, memory_format=torch.contiguous_format)
        else:
            state[name] = torch.zeros(shape, dtype=dtype)


def restored(
    saved: Mapping[str, Any], p: Tensor, fmt: StateFormat, rule: Rule, where: str
) -> dict[str, Any]:
    """Copies of the tensors of a saved state, each in its own dtype.

    Raises ValueError, with ``where`` in it, for a dtype, shape or value that a step in this format does not leave. What
    is missing is left out, but scales and codes come together or not at all.
    """
    found: dict[str, Any] = {}
    expected = _expected(p, fmt, rule)
    for name in {"exp_avg", "exp_avg_sq", "scale", *MASTER_KEYS.values()} & set(saved):
        if name not in expected:
            raise ValueError(f"{where}: state {name!r} has no place in the state format {fmt.name!r}")
        value, (dtype, shape) = saved[name], expected[name]
        # torch's own optimizer keeps the moments of a 16-bit parameter in 16 bits.
        widened = dtype == torch.float32 and name in rule.moments and value.is_floating_point()
        if tuple(value.shape) != shape or (value.dtype != dtype and not widened):
            raise ValueError(
                f"{where}: state {name!r} is {value.dtype} of shape {tuple(value.shape)}; the state format "
                f"{fmt.name!r} has {dtype} of shape {shape}"
            )
        found[name] = torch.empty(shape, dtype=dtype).copy_(value)
    if fmt.moments == torch.uint8:
        check_codes(found, rule, where)
    if "step" in saved:
        step = float(saved["step"])
        if not step >= 0 or step != int(step):
            raise ValueError(f"{where}: state 'step' is {step}; a count of steps is expected")
        found["step"] = torch.tensor(step)
    return found


def check_codes(found: Mapping[str, Any], rule: Rule, where: str) -> None:
    """Raises ValueError, with ``where`` in it, for codes and scales of one parameter that no step leaves together.

    ``found``: the moments by name, of any shape, and ``scale``, (groups, moments of the rule); nothing if none is there.
    """
    needed = {*rule.moments, "scale"}
    if not needed & set(found):
        return
    if missing := needed - set(found):
        raise ValueError(f"{where}: 8-bit state without {', '.join(sorted(missing))}")
    for k, name in enumerate(rule.moments):
        scale, codes = found["scale"][:, k], found[name]
        if bool((scale < 0).any() or scale.isinf().any()):
            raise ValueError(f"{where}: state 'scale' of {name} has a negative or infinite value: it is corrupted")
        padded = torch.nn.functional.pad(codes.view(-1), (0, -codes.numel() % GROUP))
        used = (padded.view(-1, GROUP) != 0).any(1)
        if not torch.equal(used, scale > 0):
            raise ValueError(
                f"{where}: state {name!r} has codes where its scale is 0 or NaN, or none where it is not: it is corrupted"
            )
