"""Managed gradients: each lives in its unit's GRAD memory, and ``p.grad`` is a handle of it.

A hook that took ``p.grad`` away would make ``clip_grad_norm_`` clip nothing and return 0, without a word. So
``p.grad`` is a wrapper tensor: AccumulateGrad's ``add_``, clipping, GradScaler, zeroing and any other operation
act on the managed memory.

[Note: loss scale] Under fp16 the memory holds gradients times the loss scale, since many would vanish in 16 bits
without it. They stay so until the update kernel divides: micro-batches add up in scaled units, and whatever reads
or changes a gradient through its handle computes on an unscaled fp32 copy, whose changes are scaled on their way
back. So each user sees the gradient itself.

[Note: kept gradients] Where a gradient's memory serves nothing else and is the processor's own, the first one of a step is
not copied there: the tensor that autograd made takes its place until the gradient is dropped, and what the plan set aside
for it stays untouched. A copy would cost more than the norm, and the next forward finds the memory again that it frees.
Autograd may give several parameters one storage (that of a sum's gradient, say): such a gradient is copied all the same,
for adding to it in place would change the others.
"""

from __future__ import annotations

import math
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from tierflow.cpu_adam.kernels import GradStats, grad_stats, intake
from tierflow.scheduler.binding import raw
from tierflow.scheduler.grad_handle import ManagedGrad
from tierflow.scheduler.scaling import Scaling
from tierflow.swap import Lane, Ticket, Timeline, aliases
from tierflow.swap.lanes import DeviceLane
from tierflow.swap.tickets import Take


@dataclass(eq=False)
class GradContext:
    """What the gradients of an engine have in common.

    ``before_write``: called before a gradient's memory changes; ``arrived``: after one was accumulated. ``spilled``: brings
    gradients that live on NVMe to their memory; None where they live in memory. ``keeps``: whether a gradient may
    stay what autograd made, see [Note: kept gradients].
    """

    lane: DeviceLane
    scaling: Scaling = field(default_factory=Scaling)
    timeline: Timeline = field(default_factory=Timeline)
    keeps: bool = False
    before_write: Callable[[GradSlot], None] = lambda slot: None
    arrived: Callable[[GradSlot], None] = lambda slot: None
    spilled: Spilled | None = None


class Spilled(Protocol):
    """Brings a unit's gradients to memory, and keeps them there."""

    def need(self) -> None: ...

    def hold(self) -> None: ...

    def let_go(self) -> None: ...


class GradSlot:
    """One parameter's gradient: memory of ``param.shape``, its statistics, and factors not yet applied.

    The gradient is ``memory * scale / loss_scale``: the user's factor, and [Note: loss scale].
    """

    def __init__(self, name: str, param: torch.Tensor, memory: torch.Tensor, context: GradContext):
        self.name, self._memory, self.context = name, memory, context
        self._own = memory  # what the plan has for it
        self.writes = 0  # how often the gradient has changed
        self._param = weakref.ref(param)  # param -> its grad, the handle -> this: no collector sees that cycle
        self._stats: GradStats | None = None
        self.transfer: Ticket | None = None  # its way from the device, until that was waited for
        self.scale = self.loss_scale = 1.0
        self.norm_was_read = False
        self.user_scaled = False
        with raw():
            self.handle = ManagedGrad(self, memory, param.dtype, param.device)

    @property
    def memory(self) -> torch.Tensor:
        """The gradient's memory, of ``param.shape``, with its bytes in it wherever they live.

        To be asked for before each use, and before ``writes`` counts a change: what is brought from NVMe is what it has.
        """
        if self.context.spilled is not None:
            self.context.spilled.need()
        return self._memory

    @property
    def param(self) -> torch.Tensor:
        """The parameter; its model holds it."""
        found = self._param()
        assert found is not None, f"{self.name} is gone"
        return found

    def take(self, grad: torch.Tensor, loss_scale: float = 1.0, handed_over: bool = False) -> None:
        """The gradient is now ``grad / loss_scale`` (any device and dtype); its old content is overwritten.

        ``handed_over``: the caller gives the tensor away, so that it may take the memory's place.
        """
        self.context.before_write(self)
        self._reset_flags()
        self.loss_scale = loss_scale
        if handed_over and self._can_keep(grad):
            self._keep(grad)
        else:
            self._intake(grad, accumulate=False)

    def _can_keep(self, grad: torch.Tensor) -> bool:
        own = self._own
        fits = self.context.keeps and grad.dtype is own.dtype and grad.device == own.device and grad.is_contiguous()
        return fits and grad.untyped_storage().nbytes() == grad.nbytes and not aliases(grad)

    def _keep(self, grad: torch.Tensor) -> None:
        self._memory = self.handle._memory = grad
        self.writes += 1
        began = time.perf_counter()
        self._stats = grad_stats(grad.view(-1))
        self.context.timeline.span(Lane.INTAKE, f"{self.name} grad", began, nbytes=grad.nbytes)

    @property
    def kept(self) -> bool:
        """Whether the gradient is the tensor that autograd made, see [Note: kept gradients]."""
        return self._memory is not self._own

    def rest(self) -> None:
        """Lets go of a kept gradient that the parameter has no longer."""
        if self.kept and not self.present():
            self._memory = self.handle._memory = self._own
            self._stats = None

    def add(self, grad: torch.Tensor, loss_scale: float = 1.0) -> None:
        """Adds ``grad / loss_scale``, as ``tensor.add_`` would in the memory's dtype."""
        self.context.before_write(self)
        self.settle()
        if loss_scale != self.loss_scale:  # not zeroed since a step that moved the scale
            self.memory.mul_(loss_scale / self.loss_scale)
            self.loss_scale = loss_scale
        self._intake(grad, accumulate=True)

    def _intake(self, grad: torch.Tensor, accumulate: bool) -> None:
        self.finish_transfer()
        memory = self.memory
        self._stats = None
        self.writes += 1  # once the memory is there: what it brings counts as stored
        if grad.device == memory.device and grad.device.type != "cpu":
            memory.add_(grad) if accumulate else memory.copy_(grad)
        elif grad.device.type == "cpu":
            self._kernel(grad, accumulate)
        elif accumulate or grad.dtype != memory.dtype or self.context.spilled is not None:
            self._carry(self.context.lane.drain_pieces(grad.contiguous(), self._taker(accumulate)), grad.nbytes)
        else:  # the 16 bits that the device made cross once, behind the backward
            self._carry(self.context.lane.drain(memory, grad.contiguous(), transient=True), grad.nbytes)

    def _carry(self, transfer: Ticket, nbytes: int) -> None:
        self.transfer = transfer
        self.context.timeline.follow(Lane.TO_HOST, f"{self.name} grad", transfer.times, nbytes)

    def _kernel(self, grad: torch.Tensor, accumulate: bool) -> None:
        flat = grad.contiguous().view(-1)
        if self.memory.device.type == "cpu":
            began = time.perf_counter()
            self._stats = intake(self.memory.view(-1), flat, accumulate=accumulate)
            self.context.timeline.span(Lane.INTAKE, f"{self.name} grad", began, nbytes=flat.nbytes)
        else:  # the user assigned a gradient that is on the host
            self._intake(grad.to(self.memory.device), accumulate)

    def _taker(self, accumulate: bool) -> Take:
        flat = self.memory.view(-1)

        def take(at: int, piece: torch.Tensor) -> None:
            began = time.perf_counter()
            stats = intake(flat[at : at + piece.numel()], piece, accumulate=accumulate)
            self.context.timeline.span(Lane.INTAKE, f"{self.name} grad", began, nbytes=piece.nbytes)
            # sums of pieces added up would have other bits than the whole's
            self._stats = stats if piece.numel() == flat.numel() else None

        return take

    def finish_transfer(self) -> None:
        """Waits until the gradient has crossed."""
        if self.transfer is not None:
            self.transfer.wait()
            self.transfer = None

    def _reset_flags(self) -> None:
        self.finish_transfer()
        self.scale, self.norm_was_read, self.user_scaled = 1.0, False, False

    @property
    def factor(self) -> float:
        """What the memory is to be multiplied by: the user's scale over the loss scale, rounded to fp32 once."""
        if self.loss_scale == 1.0:
            return self.scale
        return float(torch.tensor(self.scale / self.loss_scale, dtype=torch.float32))

    def unscaled(self, memory: torch.Tensor) -> torch.Tensor:
        """``memory`` (ours, or a view of it, settled) without the loss scale: itself, or an fp32 copy."""
        return memory if self.loss_scale == 1.0 else memory.to(torch.float32, copy=True).mul_(self.factor)

    def references(self) -> int:
        """What refers to the gradient: other tensors over its memory, and objects that have the handle."""
        return aliases(self._memory) + sys.getrefcount(self.handle)

    def settle(self) -> torch.Tensor:
        """The memory with everything pending applied but the loss scale."""
        self.finish_transfer()
        if self.scale != 1.0:
            self.context.before_write(self)
            self.memory.mul_(self.scale)
            self.writes += 1
            self.scale, self._stats = 1.0, None
        return self.memory  # for the caller to use at once

    def close(self) -> None:
        """Lets go of the memory: the slot and its handle refer to each other and may live on for a while."""
        self.transfer = self._stats = None
        self._memory = self._own = self.handle._memory = torch.empty(0)

    def updated(self) -> None:
        """The gradient served a step: what was known of it goes with the next zero_grad or backward."""
        self.norm_was_read = self.user_scaled = False

    def rescale(self, scale: float) -> None:
        """Multiplies by ``scale`` (fp32) without a pass: the update kernel does it."""
        if self.scale != 1.0:
            self.settle()
        self.scale = scale

    def changed(self) -> None:
        """The memory was written by somebody else."""
        self._stats = None
        self.writes += 1

    def stats(self) -> GradStats:
        """Sum of squares and finiteness of the gradient; the factor that the kernel is to apply is included."""
        self.finish_transfer()
        if self._stats is None:
            self._stats = _stats_of(self.memory)
        factor = self.factor
        if factor == 1.0:
            return self._stats
        return GradStats(self._stats.sum_squares * factor**2, self._stats.finite and math.isfinite(factor))

    def note_stats(self) -> None:
        """Takes the statistics while the gradient is in memory, for a norm that is asked for later."""
        if self._stats is None and self.present():
            self._stats = _stats_of(self._memory)

    def present(self) -> bool:
        """Whether the parameter has a managed gradient now."""
        with raw():
            return self.param.grad is self.handle

    def collect(self) -> bool:
        """Takes in a gradient that the user assigned; returns whether there is one at all."""
        with raw():
            grad = self.param.grad
            if grad is None:
                return False
            if grad is not self.handle:
                if isinstance(grad, ManagedGrad):
                    grad = grad.materialize()
                self.take(grad)
                self.param.grad = self.handle
        self.finish_transfer()
        return True

    def on_accumulated(self, _param: torch.Tensor) -> None:
        """Post-accumulate hook: moves a fresh gradient into managed memory."""
        with raw():
            grad = self.param.grad
            if grad is None:
                return
            if grad.is_sparse:
                raise RuntimeError(f"parameter {self.name!r} has a sparse gradient, which tierflow does not support")
            if grad is not self.handle:
                self.param.grad = None  # of an unscaled backward nothing stays
                loss_scale = self.context.scaling.of_backward(self.name)
                self.take(grad, loss_scale, handed_over=True)
                self.param.grad = self.handle
        self.context.arrived(self)


class WatchedGradients:
    """One unit's gradients, and whether anybody has them still. Made while nobody has."""

    def __init__(self, slots: list[GradSlot]):
        self.slots = slots
        self._references = self._count()

    def _count(self) -> int:
        return sum(slot.references() for slot in self.slots)

    def idle(self) -> bool:
        """Whether no parameter has its gradient, and nobody kept a handle or a view of one."""
        return not any(slot.present() for slot in self.slots) and self._count() == self._references


def weakly(slot: GradSlot) -> Callable[[torch.Tensor], None]:
    """The slot's post-accumulate hook without a reference to it: Python's collector cannot see into autograd's."""
    found = weakref.ref(slot)

    def hook(param: torch.Tensor) -> None:
        alive = found()
        if alive is not None:
            alive.on_accumulated(param)

    return hook


def while_alive(method: Callable[[GradSlot], None]) -> Callable[[GradSlot], None]:
    """The bound method without a reference to its object: that holds the parameters, and their ``grad`` this."""
    found = weakref.WeakMethod(method)

    def call(slot: GradSlot) -> None:
        alive = found()
        if alive is not None:
            alive(slot)

    return call


#: Elements of a gradient on the device that are held in fp64 at a time.
_STATS_ELEMENTS = 1 << 22


def _stats_of(memory: torch.Tensor) -> GradStats:
    if memory.device.type == "cpu":
        return grad_stats(memory.view(-1))
    total = torch.zeros((), dtype=torch.float64, device=memory.device)
    for piece in memory.view(-1).split(_STATS_ELEMENTS):
        total += piece.double().square().sum()
    found = total.item()
    return GradStats(found, math.isfinite(found))  # squares of fp32 cannot overflow in fp64
