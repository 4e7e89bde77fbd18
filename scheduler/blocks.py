"""Gradients of the largest weights, delivered in blocks of rows as they are computed.

[Note: large gradients] Autograd makes a weight's gradient whole, and for a head that is tied to the embedding it
holds three of that size at once: the head's, from the first layer of the backward to the last, the embedding's and
their sum. Here the head's product is computed a block of rows at a time and the embedding's rows are added where they
belong, both straight in the managed gradient, so autograd holds one block. The sums are autograd's own, in its order,
as long as a step has one micro-batch; with several, (sum + head) + embedding stands for sum + (head + embedding).

What is delivered this way is not returned to autograd: ``torch.autograd.grad`` gives None for such a weight and tensor
hooks on it do not run. So this is for loops that the engine owns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tierflow.cpu_adam.kernels import intake
from tierflow.scheduler.binding import raw
from tierflow.scheduler.gradients import GradSlot

#: Weights from this many bytes on are handled so, and this is the size of a block.
LARGE_BYTES = 64 << 20
BLOCK_BYTES = 16 << 20


def deliver_in_blocks(
    model: nn.Module, slots: dict[int, GradSlot], large: int = LARGE_BYTES, block: int = BLOCK_BYTES
) -> list[str]:
    """Replaces ``forward`` of every plain Linear and Embedding whose weight has ``large`` bytes or more.

    ``slots``: the engine's, by id of parameter; their memory is on the CPU. Returns the names of the modules.
    """
    changed = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        slot = slots.get(id(weight))
        if weight is None or slot is None or weight.numel() * weight.element_size() < large:
            continue
        rows = max(block // (weight.shape[-1] * weight.element_size()), 1)
        if type(module) is nn.Linear and module.bias is None:
            module.forward = _linear(module, slot, rows)
        elif type(module) is nn.Embedding and not (module.sparse or module.scale_grad_by_freq or module.max_norm):
            module.forward = _embedding(module, slot)  # type: ignore[method-assign]
        else:
            continue
        changed.append(name)
    return changed


def _linear(module: nn.Linear, slot: GradSlot, rows: int) -> Any:
    def forward(inputs: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or torch.is_autocast_enabled(inputs.device.type):
            return F.linear(inputs, module.weight)
        return _Linear.apply(inputs, module.weight, slot, rows)

    return forward


def _embedding(module: nn.Embedding, slot: GradSlot) -> Any:
    def forward(ids: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return F.embedding(ids, module.weight, module.padding_idx)
        return _Embedding.apply(ids, module.weight, slot, module.padding_idx)

    return forward


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, slot: GradSlot, rows: int) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.slot, ctx.rows = slot, rows
        return F.linear(inputs, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        inputs, weight = ctx.saved_tensors
        back = grad @ weight
        del weight  # its unit may go now
        flat, given = grad.reshape(-1, grad.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        ends = [(at, min(at + ctx.rows, flat.shape[1])) for at in range(0, flat.shape[1], ctx.rows)]
        _add_blocks(ctx.slot, ((at, flat[:, at:end].t() @ given) for at, end in ends))
        return back, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, slot: GradSlot, padding: int | None) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.slot, ctx.padding = slot, -1 if padding is None else padding
        return F.embedding(ids, weight, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        used, places = torch.unique(ids, return_inverse=True)
        padding = torch.searchsorted(used, ctx.padding).item() if bool((used == ctx.padding).any()) else -1
        # the rows alone, summed by the kernel that autograd would call for all of them
        rows = torch.ops.aten.embedding_dense_backward(grad, places, len(used), padding, False)
        _add_rows(ctx.slot, used, rows)
        return None, None, None, None


def _add_blocks(slot: GradSlot, blocks: Iterable[tuple[int, torch.Tensor]]) -> None:
    """Adds blocks of rows that together cover the whole gradient, each at its first row."""
    first = not _open(slot)
    for at, block in blocks:
        intake(slot.memory[at : at + len(block)].view(-1), block.contiguous().view(-1), accumulate=not first)
    _close(slot)


def _add_rows(slot: GradSlot, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Adds ``values`` to the rows of the given numbers, each of which occurs once."""
    if not _open(slot):
        slot.memory.zero_()
    slot.memory.index_add_(0, rows, values.to(slot.memory.dtype))
    _close(slot)


def _open(slot: GradSlot) -> bool:
    """Whether there is a gradient to add to; it has everything pending applied then."""
    slot.context.before_write(slot)
    present = slot.collect()
    if present:
        slot.settle()
    else:
        slot._reset_flags()
    return present


def _close(slot: GradSlot) -> None:
    slot.changed()
    with raw():
        slot.param.grad = slot.handle
