"""Each rule's and format's step written in plain torch operations, to hold the kernels against. Slow, and sharing
nothing with them. On any device.

torch's own lerp_ and addcmul_ fuse on some CPUs and not on others, and its square root may be one unit off;
so the fused operations and the root are computed here in float64 and rounded once to fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .reference_codes import (
    decode_root,
    decode_signed,
    encode_root,
    encode_signed,
    fma,
    join24,
    noise,
    split24,
    to_bf16,
)
from .rules import Hyper, Rule

_NAN = 0x7FC00000


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


def lion_step_fp32(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, *, lr: float, beta1: float, beta2: float, weight_decay: float
) -> None:
    """Lion's step on an fp32 weight, in place; the gradient is fp32 and scaled."""
    diff = grad - exp_avg
    direction = fma(1 - beta1, diff, exp_avg)
    rate = torch.tensor(lr, dtype=torch.float32, device=weight.device)
    # sign() of a NaN is 0 in torch
    move = torch.where(direction.isnan(), direction, direction.sign() * rate)
    weight.copy_(weight * (1 - lr * weight_decay) - move)
    exp_avg.copy_(fma(1 - beta2, diff, exp_avg))


def adagrad_step_fp32(
    weight: Tensor, grad: Tensor, exp_avg_sq: Tensor, *, lr: float, eps: float, weight_decay: float
) -> None:
    """Adagrad's step on an fp32 weight, in place; the gradient is fp32 and scaled."""
    g = fma(weight_decay, weight, grad)
    exp_avg_sq.copy_(fma(g, g, exp_avg_sq))
    weight.add_((-lr * g) / (sqrt(exp_avg_sq) + eps))


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


def _step(
    update: Callable[..., None],
    param: Tensor,
    moments: dict[str, Tensor],
    master: Tensor | None,
    scale: Tensor | None,
    seed: int,
    step: int,
    index: int,
) -> None:
    """Unpacks the state, calls ``update(weight, **moments)`` on fp32 values, packs it again."""
    random = noise(seed, step, index, param.numel(), param.device)
    if master is None:
        weight = param
    elif master.dtype == torch.int16:
        weight = join(param, master)
    elif master.dtype == torch.int8:
        weight = join24(param, master)
    else:
        weight = master
    # (groups, moments); each moment's scales, or nothing to unpack
    scales = None if scale is None else scale.view(-1, len(moments))
    values = {}
    for k, (name, kept) in enumerate(moments.items()):
        decode = decode_signed if name == "exp_avg" else decode_root
        values[name] = kept.float() if scales is None else decode(kept, scales[:, k])
    update(weight, **values)
    for k, (name, kept) in enumerate(moments.items()):
        first = name == "exp_avg"
        if scales is not None:
            encoded = encode_signed(values[name], random & 0x3FFFF) if first else encode_root(sqrt(values[name]), random >> 14)
            kept.copy_(encoded[0])
            scales[:, k] = encoded[1]
        elif kept.dtype == torch.bfloat16:
            kept.copy_(to_bf16(values[name], random & 0xFFFF if first else random >> 16))
        else:
            kept.copy_(values[name])
    if master is None:
        return
    if master.dtype == torch.int16:
        half, rest = split(weight)
    elif master.dtype == torch.int8:
        half, rest = split24(weight, random & 0xFF)
    else:
        half, rest = round_to(weight, param.dtype), weight
    param.copy_(half)
    master.copy_(rest)


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    master: Tensor | None = None,
    scale: Tensor | None = None,
    step: int,
    seed: int = 0,
    index: int = 0,
    **hyper: Any,
) -> None:
    """What `kernels.adam_step` does, in place."""
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def update(weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        adam_step_fp32(weight, grad, exp_avg, exp_avg_sq, step=step, **hyper)

    _step(update, param, moments, master, scale, seed, step, index)


def _scaled(grad: Tensor, unscale: float, clip: float, maximize: bool) -> Tensor:
    g = grad.float() * unscale * clip
    return -g if maximize else g


def lion_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    master: Tensor | None = None,
    scale: Tensor | None = None,
    step: int,
    seed: int = 0,
    index: int = 0,
    unscale: float = 1.0,
    clip: float = 1.0,
    maximize: bool = False,
    **hyper: Any,
) -> None:
    """What `kernels.rule_step` does with LION; ``hyper`` is lr, beta1, beta2 and weight_decay."""
    update: Callable[..., None] = partial(lion_step_fp32, grad=_scaled(grad, unscale, clip, maximize), **hyper)
    _step(update, param, {"exp_avg": exp_avg}, master, scale, seed, step, index)


def adagrad_step(
    param: Tensor,
    grad: Tensor,
    exp_avg_sq: Tensor,
    *,
    master: Tensor | None = None,
    scale: Tensor | None = None,
    step: int,
    seed: int = 0,
    index: int = 0,
    unscale: float = 1.0,
    clip: float = 1.0,
    maximize: bool = False,
    **hyper: Any,
) -> None:
    """What `kernels.rule_step` does with ADAGRAD; ``hyper`` is lr, eps and weight_decay."""
    update: Callable[..., None] = partial(adagrad_step_fp32, grad=_scaled(grad, unscale, clip, maximize), **hyper)
    _step(update, param, {"exp_avg_sq": exp_avg_sq}, master, scale, seed, step, index)


_STEPS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "Adam": (adam_step, ("step", "lr", "beta1", "beta2", "eps", "weight_decay", "decoupled")),
    "Lion": (lion_step, ("step", "lr", "beta1", "beta2", "weight_decay")),
    "Adagrad": (adagrad_step, ("step", "lr", "eps", "weight_decay")),
}


def rule_step(
    rule: Rule, param: Tensor, grad: Tensor, moments: Mapping[str, Tensor], *, hyper: Hyper, **rest: Any
) -> None:
    """What `kernels.rule_step` does, in place; ``rest`` is its other arguments."""
    step, used = _STEPS[rule.name]
    step(param, grad, **moments, **{name: getattr(hyper, name) for name in used}, **rest)
