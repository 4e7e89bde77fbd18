"""Moments and masters in fewer bits, written in plain torch operations: see `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
_NAN = 0x7FC00000


def fma(a: Tensor | float, b: Tensor, c: Tensor) -> Tensor:
    """`a * b + c`, rounded once to fp32.

    The product of two fp32 values is exact in float64. Their sum with a third may not be; it is rounded to
    odd there, so that rounding it again to fp32 gives what one rounding would have.
    """
    factor = a.double() if isinstance(a, Tensor) else torch.tensor(a, dtype=torch.float32).double()
    product, addend = factor * b.double(), c.double()
    total = product + addend
    other = total - product
    error = (product - (total - other)) + (addend - other)
    inexact = total.isfinite() & error.isfinite() & (error != 0)
    bits = total.view(torch.int64)
    toward = torch.where((error > 0) == (total > 0), 1, -1)
    bits = torch.where(inexact & (bits & 1 == 0), bits + toward, bits)
    return bits.view(torch.float64).float()


def _signed(x: int) -> int:
    """The int64 with these 64 bits."""
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x


def _splitmix(z: Tensor) -> Tensor:
    """splitmix64's next output for each state, as int64 bits; int64 products wrap around."""
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & (2**33 - 1))


def noise(seed: int, step: int, index: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """32 random bits for each of n elements from ``index`` on, as int64."""
    key = _splitmix(_splitmix(torch.tensor([_signed(seed)], device=device)) ^ step)
    element = torch.arange(index, index + n, device=device)
    group = element // GROUP
    x = (_splitmix(key + group * _signed(0x9E3779B97F4A7C15)) >> 32) & 0xFFFFFFFF
    x = (x + (element % GROUP) * 0x9E3779B9) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _bits(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), _NAN, x.view(torch.int32)).to(torch.int64) & 0xFFFFFFFF


def to_bf16(x: Tensor, chance: Tensor) -> Tensor:
    """Away from zero with a probability that is what bf16 cuts off; ``chance`` is 16 random bits."""
    up = (_bits(x) & 0xFFFF) + chance >= 0x10000
    return ((_bits(x) >> 16) + up).to(torch.int16).view(torch.bfloat16)


def split24(master: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """To 24 bits, by ``chance``, 8 random bits; then the nearest bf16, half away from zero, and what it is off by."""
    kept = (_bits(master) >> 8) + ((_bits(master) & 0xFF) + chance >= 0x100)
    half = (kept + 0x80) >> 8
    return half.to(torch.int16).view(torch.bfloat16), (kept - half * 0x100).to(torch.int8)


def join24(param: Tensor, correction: Tensor) -> Tensor:
    bits = param.view(torch.int16).to(torch.int64) * 0x10000 + correction.to(torch.int64) * 0x100
    return bits.to(torch.int32).view(torch.float32)


def _magnitudes(codes: int, device: torch.device) -> Tensor:
    """What each code stands for, in units of its group's scale: octaves of 32 steps from 1 on, less 1."""
    c = torch.arange(codes, dtype=torch.float64, device=device)
    return (1 + (c % 32) / 32) * 2.0 ** (c // 32) - 1


def _spread(scale: Tensor, n: int) -> Tensor:
    """Each element's scale."""
    return scale.repeat_interleave(GROUP)[:n]


def decode_signed(codes: Tensor, scale: Tensor) -> Tensor:
    y = _magnitudes(128, codes.device)[(codes & 0x7F).long()].float() * _spread(scale, codes.numel())
    return torch.where(codes >= 0x80, -y, y)


def decode_root(codes: Tensor, scale: Tensor) -> Tensor:
    root = _magnitudes(256, codes.device)[codes.long()].float() * _spread(scale, codes.numel())
    return root * root


#: y of a group's largest element: a little below that of the last code, which chance then cannot pass.
_TOP_SIGNED, _TOP_ROOT = 14.7499, 250.998


def _scales(x: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """Each group's scale, and by what its elements are multiplied before they are encoded."""
    rows = torch.nn.functional.pad(x.abs(), (0, -x.numel() % GROUP)).view(-1, GROUP)
    broken = ~rows.isfinite().all(1)
    largest = torch.where(broken, 0.0, rows.amax(1)) if rows.numel() else rows.sum(1)
    nothing = largest < 2.0**-96
    divisor = torch.where(nothing, 1.0, largest)
    top_ = torch.full_like(divisor, top)
    scale = torch.where(broken, float("nan"), torch.where(nothing, 0.0, divisor / top_))
    return scale, torch.where(nothing, 0.0, top_ / divisor)


def _codes(magnitude: Tensor, inverse: Tensor, chance: Tensor) -> Tensor:
    """Codes without their upper limit. ``chance`` is a fraction of one, in float64."""
    z = fma(magnitude, _spread(inverse, magnitude.numel()), torch.ones_like(magnitude)).double()
    octave = z.log2().floor()
    # log2 may round up to a whole number
    octave = torch.where(2.0**octave > z, octave - 1, octave)
    return (((z / 2.0**octave) - 1 + octave) * 32 + chance).floor()


def _encode(x: Tensor, chance: Tensor, codes: int, lowest: int, top: float) -> tuple[Tensor, Tensor, Tensor]:
    """The codes, each element's right to one, and the scales."""
    scale, inverse = _scales(x, top)
    used = _spread(inverse, x.numel()) != 0
    found = _codes(torch.where(used, x.abs(), 0.0), inverse, chance).clamp(lowest, codes - 1)
    return torch.where(used, found, 0.0).to(torch.uint8), used, scale


def encode_signed(x: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of an exp_avg; ``chance`` is 18 random bits."""
    codes, used, scale = _encode(x, chance.double() / 2**18, 128, 0, _TOP_SIGNED)
    return codes | ((x.view(torch.int32) < 0) & used).to(torch.uint8) * 0x80, scale


def encode_root(root: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of the square root of an exp_avg_sq; ``chance`` is 18 random bits."""
    codes, _, scale = _encode(root, chance.double() / 2**18, 256, 1, _TOP_ROOT)
    return codes, scale
