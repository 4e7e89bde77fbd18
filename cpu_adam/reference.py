"""Each format's step written in plain torch operations, to hold the kernels against. Slow, and sharing
nothing.

torch's own lerp_ and addcmul_ fuse on some CPUs and not on others, and its square root may be one unit off;
so the fused operations and the root are computed here in float64 and rounded once to fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def sqrt(x: Tensor) -> Tensor:
    """The square root, IEEE-rounded: float64's root, even if a little off, is never that near a tie."""
    return x.double().sqrt().float()


def adam_step_fp32(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
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
) -> None:
    """The step on an fp32 weight, in place."""
    g = grad.float() * unscale * clip
    if maximize:
        g = -g
    if weight_decay != 0 and decoupled:
        weight.mul_(1 - lr * weight_decay)
    elif weight_decay != 0:
        g = fma(weight_decay, weight, g)
    share = torch.tensor(1 - beta1, dtype=torch.float32)
    if share < 0.5:
        exp_avg.copy_(fma(share, g - exp_avg, exp_avg))
    else:
        exp_avg.copy_(fma(share - 1, g - exp_avg, g))
    exp_avg_sq.copy_(fma((1 - beta2) * g, g, exp_avg_sq * beta2))
    # as a tensor: CUDA multiplies by the reciprocal of a Python scalar, which rounds twice
    root = torch.full((1,), (1 - beta2**step) ** 0.5, dtype=torch.float32, device=exp_avg_sq.device)
    denom = sqrt(exp_avg_sq) / root + eps
    step_size = -(lr / (1 - beta1**step))
    weight.add_((step_size * exp_avg) / denom)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 half, rounded half away from zero, and the int16 that restores the rest."""
    bits = torch.where(master.isnan(), _NAN, master.view(torch.int32)).to(torch.int64) & 0xFFFFFFFF
    low = bits & 0xFFFF
    up = low >= 0x8000
    high = (bits >> 16) + up.to(torch.int64)
    return high.to(torch.int16).view(torch.bfloat16), torch.where(up, low - 0x10000, low).to(torch.int16)


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 value that a bf16 half and its remainder stand for."""
    bits = param.view(torch.int16).to(torch.int64) * 0x10000 + remainder.to(torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest, ties to even; NaN to bf16's one quiet NaN."""
    rounded = x.to(dtype)
    return torch.where(x.isnan(), torch.tensor(float("nan"), dtype=dtype), rounded)


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
) -> None:
    """What `kernels.adam_step` does, in place."""
    if master is None:
        weight = param
    elif master.dtype == torch.int16:
        weight = join(param, master)
    else:
        weight = master
    adam_step_fp32(
        weight, grad, exp_avg, exp_avg_sq, step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
        weight_decay=weight_decay, decoupled=decoupled, maximize=maximize, unscale=unscale, clip=clip,
    )  # fmt: skip
    if master is None:
        return
    if master.dtype == torch.int16:
        half, rest = split(weight)
        param.copy_(half)
        master.copy_(rest)
    else:
        param.copy_(round_to(weight, param.dtype))
