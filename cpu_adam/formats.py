"""State formats: in which bytes a parameter's weight and optimizer state are kept. Each is described here alone.

Every kind is a flat buffer of a fixed number of bytes per element, so a piece of a unit that begins at a whole group is
a piece of every kind, and a step on it gives the bits of a step on the whole. Scales are a kind of their own: at the end
of each piece they would break the multiples of 4096 bytes that direct I/O wants; as a kind they keep them for pieces of
`StateFormat.io_elements` elements (32,768 with two moments), and weigh an eighth of a byte a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import lcm, prod

import torch

from . import _cpu_adam
from .rules import ADAM, Rule

__all__ = ["FORMATS", "GROUP", "KindLayout", "StateFormat", "resolve", "shaped"]

#: Elements that share a scale and a key of the rounding noise; pieces begin at a multiple of it.
GROUP: int = _cpu_adam.GROUP

_PARAM, _MASTER, _SCALE = "param", "master", "scale"
_CODES = {torch.float32: _cpu_adam.MOMENTS_F32, torch.bfloat16: _cpu_adam.MOMENTS_BF16, torch.uint8: _cpu_adam.MOMENTS_INT8}

# (param dtype, master dtype or None) -> how the fp32 master is laid out.
_LAYOUTS = {
    (torch.float32, None): _cpu_adam.MASTER_IS_PARAM,
    (torch.bfloat16, torch.int16): _cpu_adam.LOSSLESS,
    (torch.bfloat16, torch.float32): _cpu_adam.MASTER_BF16,
    (torch.float16, torch.float32): _cpu_adam.MASTER_F16,
    (torch.bfloat16, torch.int8): _cpu_adam.MASTER_24,
}


@dataclass(frozen=True)
class KindLayout:
    """One kind's buffer: ``per_group`` values of ``dtype`` for each ``group`` elements."""

    name: str
    dtype: torch.dtype
    per_group: int = 1
    group: int = 1

    @property
    def bytes_per_element(self) -> Fraction:
        return Fraction(self.per_group * self.dtype.itemsize, self.group)

    def numel(self, elements: int) -> int:
        """Values that serve so many elements; the last group may be short."""
        return -(-elements // self.group) * self.per_group


@dataclass(frozen=True)
class StateFormat:
    """How the state behind parameters of one dtype is kept.

    ``master`` is the dtype of what the parameter lacks of its master weight, None if it lacks nothing. ``moments`` is
    that of the moments: fp32, bf16, or uint8 for 8-bit codes in groups of GROUP with an fp32 scale for each moment.
    ``lossy``: the numbers are not those of fp32 states.
    """

    name: str
    param: torch.dtype
    master: torch.dtype | None
    moments: torch.dtype

    def __post_init__(self) -> None:
        if (self.param, self.master) not in _LAYOUTS or self.moments not in _CODES:
            got = "no master" if self.master is None else f"a master of {self.master}"
            raise TypeError(
                f"param of {self.param} with {got} and moments of {self.moments} is not a format: fp32 takes no "
                "master, bf16 an int16 remainder, an int8 correction or an fp32 master, fp16 an fp32 master; moments "
                "are fp32, bf16 or uint8"
            )
        if self.master == torch.int8 and self.moments != torch.uint8:
            raise TypeError(f"an int8 correction goes with 8-bit moments (uint8), not with {self.moments}")

    @property
    def lossy(self) -> bool:
        return self.moments != torch.float32 or self.master == torch.int8

    @property
    def codes(self) -> tuple[int, int]:
        """The kernels' codes of the master's layout and of the moments."""
        return _LAYOUTS[self.param, self.master], _CODES[self.moments]

    def kinds(self, rule: Rule = ADAM) -> tuple[KindLayout, ...]:
        """Every kind, the working weight first."""
        found = [KindLayout(_PARAM, self.param)]
        if self.master is not None:
            found.append(KindLayout(_MASTER, self.master))
        found += [KindLayout(name, self.moments) for name in rule.moments]
        if self.moments == torch.uint8:
            found.append(KindLayout(_SCALE, torch.float32, len(rule.moments), GROUP))
        return tuple(found)

    def bytes_at_rest(self, rule: Rule = ADAM) -> Fraction:
        """Bytes per parameter of all kinds: what the state occupies."""
        return sum((k.bytes_per_element for k in self.kinds(rule)), Fraction(0))

    def state_bytes(self, rule: Rule = ADAM) -> Fraction:
        """Bytes per parameter beside the working weight: what a step reads, and writes, of optimizer state."""
        return self.bytes_at_rest(rule) - self.param.itemsize

    def io_elements(self, io_bytes: int = 4096, rule: Rule = ADAM) -> int:
        """The smallest piece whose bytes are a multiple of ``io_bytes`` in every kind."""
        needed = 1
        for k in self.kinds(rule):
            size = k.bytes_per_element
            needed = lcm(needed, io_bytes * size.denominator // size.numerator)
        return needed

    def keeps_fp32(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape is left out of a lossy format: norms, biases and what is below 4,096 elements.

        They are a few thousandths of a model, and what they scale is not averaged over a large matrix.
        """
        return self.lossy and (len(shape) < 2 or prod(shape) < SMALL)

    def for_shape(self, shape: Sequence[int]) -> StateFormat:
        """The format that a parameter of this shape gets: this one, or its exact form by the rule of `keeps_fp32`."""
        return resolve("auto", self.param) if self.keeps_fp32(shape) else self


#: Parameters of fewer elements keep exact states.
SMALL = 4096

@cache
def kernel_codes(param: torch.dtype, master: torch.dtype | None, moments: torch.dtype) -> tuple[int, int]:
    """`StateFormat.codes` of what these dtypes make; raises TypeError where they make no format."""
    return StateFormat("", param, master, moments).codes


_EXACT_MASTER = {torch.float32: None, torch.bfloat16: torch.int16, torch.float16: torch.float32}
_WHOLE_MASTER = {torch.float32: None, torch.bfloat16: torch.float32, torch.float16: torch.float32}

#: The names that options take. "auto" is exact: lossless for bf16 parameters, fp32 for others.
FORMATS = ("auto", "fp32", "lossless", "bf16", "int8", "int8-24bit")


@cache
def resolve(name: str, param: torch.dtype) -> StateFormat:
    """The format called ``name`` for parameters of dtype ``param``.

    Raises ValueError for a name that is none of FORMATS, or that does not serve the dtype.
    """
    if name not in FORMATS:
        raise ValueError(f"Invalid state_format: {name!r}; choose from {', '.join(FORMATS)}")
    if param not in _EXACT_MASTER:
        raise ValueError(f"state formats serve parameters of float32, bfloat16 or float16, not {param}")
    if name == "lossless" and param == torch.float16:
        raise ValueError(
            'state_format="lossless" cannot serve a float16 parameter: with 16 more bits it does not hold an fp32; use '
            '"fp32" or "auto"'
        )
    if name == "int8-24bit" and param != torch.bfloat16:
        raise ValueError(
            f'state_format="int8-24bit" serves bfloat16 parameters, not {param}: the 8 bits correct a bf16; use "int8"'
        )
    if name == "auto":
        name = "lossless" if param == torch.bfloat16 else "fp32"
    master = _WHOLE_MASTER[param] if name == "fp32" else _EXACT_MASTER[param]
    if name == "int8-24bit":
        master = torch.int8
    moments = {"bf16": torch.bfloat16, "int8": torch.uint8, "int8-24bit": torch.uint8}.get(name, torch.float32)
    return StateFormat(name, param, master, moments)


@cache
def shaped(name: str, param: torch.dtype, shape: torch.Size) -> StateFormat:
    """The format that a parameter of this dtype and shape gets under a name; raises ValueError as `resolve` does."""
    return resolve(name, param).for_shape(shape)
