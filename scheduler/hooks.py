"""Hooks on a live model: units are pinned while their modules run, and weights saved for the backward become
handles that bring their unit up again.

[Note: weights in the backward] Autograd saves a weight, or a view of it, for the backward. Inside a managed
forward it saves a handle (unit, offset) instead; unpacking fetches the unit and returns an alias of its memory,
which lives until the node that asked has run. A unit with a live alias is never evicted, so the node's operands
stay whatever else it unpacks. The same rule covers non-reentrant checkpointing, whose recomputation keeps
detached aliases of the weights until the segment's backward has used them, and views that a user holds.

[Note: recomputation] Checkpointing may call ``forward`` of a block directly, so the block's own hooks do not
fire; those of the modules inside it do, and the guard class catches a parameter that the block uses itself.
Under a non-reentrant checkpoint only its own saved-tensor hooks may be on top, or it finds other tensors than
it had saved: ours are pushed only where none are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from tierflow.scheduler.activations import Gauge
from tierflow.scheduler.binding import raw
from tierflow.scheduler.units import Unit, module_units
from tierflow.scheduler.watch import ComputeWatch
from tierflow.swap import CapacityError

if TYPE_CHECKING:
    from tierflow.scheduler.engine import Engine
    from tierflow.scheduler.rotation import Rotation


_T = TypeVar("_T")


def in_backward() -> bool:
    """Whether a backward runs on this thread (recomputation included)."""
    return torch._C._current_graph_task_id() != -1


@dataclass(frozen=True)
class SavedWeight:
    """A weight, or a view of one, saved for the backward. Offset and strides in elements."""

    unit: Unit
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    conjugate: bool
    negative: bool
    generation: tuple[int, int]


@dataclass(frozen=True)
class SavedTensor:
    """Any other saved tensor; its version, since saved-tensor hooks hide an in-place change from autograd."""

    tensor: torch.Tensor
    version: int


@dataclass(eq=False)
class Running:
    """What one forward and backward has under way: the pins of the modules that run, and what was pushed for them."""

    watch: ComputeWatch
    frames: list[list[Unit]] = field(default_factory=list)
    until_backward_ends: list[Unit] = field(default_factory=list)
    callback_task: int = -1
    pushed: list[bool] = field(default_factory=list)
    cache_was_on: list[bool] = field(default_factory=list)

    def holds(self, unit: Unit) -> bool:
        """Whether one of its own modules, or its backward, has the unit pinned."""
        return unit.index in self.units()

    def units(self) -> set[int]:
        """Indices of the units that it has pinned."""
        held = {unit.index for frame in self.frames for unit in frame}
        return held.union(unit.index for unit in self.until_backward_ends)


class ModelHooks:
    """The hooks of one engine on one model. ``running`` is swapped when micro-batches take turns (``Rotation``)."""

    def __init__(self, engine: Engine, model: nn.Module, units: list[Unit]):
        self._engine = engine
        self._root = model
        self.running = Running(engine.watch)
        self.rotation: Rotation | None = None
        self.gauge: Gauge | None = None
        self._handles: list[Any] = []
        # else weights may be saved as they are: they stay where they are, and change at the step
        self._streams = bool(engine.plan.homes.streamed(units)) or bool(engine.plan.spare)
        for module, needed in module_units(model, units).items():
            self._handles.append(module.register_forward_pre_hook(self._before(needed), prepend=True))
            self._handles.append(module.register_forward_hook(self._after, always_call=True))

    def remove(self) -> None:
        """Takes every hook off."""
        self.reset()
        for handle in self._handles:
            handle.remove()

    def inside(self) -> bool:
        """Whether a managed module runs, or a backward does."""
        return bool(self.running.frames) or in_backward()

    def hold(self, unit: Unit) -> None:
        """Pins the unit until the innermost running module ends, or the backward does."""
        self._acquire(unit)
        running = self.running
        if running.frames:
            running.frames[-1].append(unit)
            running.watch.enter(unit.label)
            return
        running.until_backward_ends.append(unit)
        task = torch._C._current_graph_task_id()
        if running.callback_task != task:
            running.callback_task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self.running.callback_task = -1
        while self.running.until_backward_ends:
            self._engine.release(self.running.until_backward_ends.pop())

    def reset(self) -> None:
        """Gives up pins that an interrupted forward or backward left behind."""
        self._backward_ended()
        while self.running.frames:
            self._leave()

    def _acquire(self, unit: Unit) -> None:
        if self.rotation is not None and not self.running.holds(unit):
            self.rotation.arrive(unit.index)
        self._with_room(lambda: self._engine.acquire(unit))

    def _with_room(self, take: Callable[[], _T]) -> _T:
        """Other micro-batches may hold the memory that this one needs."""
        while True:
            try:
                return take()
            except CapacityError:
                if self.rotation is None or not self.rotation.wait_for_room():
                    raise

    # ---- module hooks

    def _before(self, needed: list[Unit]) -> Callable[..., None]:
        def enter(module: nn.Module, _args: Any) -> None:
            if module is self._root and self.running.frames and not in_backward():
                self.reset()  # Ctrl-C in an earlier forward: torch calls no hook for it
            self._enter()
            for unit in needed:
                self._acquire(unit)
                self.running.frames[-1].append(unit)
                self.running.watch.enter(unit.label)

        return enter

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self.gauge is not None:
            self.gauge.note_all(output)
        if self.running.frames:
            self._leave()

    def _enter(self) -> None:
        running = self.running
        if not running.frames:
            running.watch.forward_began()
        push = self._streams and not running.frames and not (in_backward() and not _no_saved_tensor_hooks())
        if push:  # refused inside torch.func's transforms: nothing is noted then
            torch._C._autograd._push_saved_tensors_default_hooks(self._pack, self._unpack)
        running.frames.append([])
        running.pushed.append(push)
        if push:
            # autocast would keep 16-bit copies of weights alive after their unit is gone
            running.cache_was_on.append(torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(False)

    def _leave(self) -> None:
        running = self.running
        for unit in reversed(running.frames.pop()):
            if self._engine.release(unit) == 0:
                running.watch.leave(unit.label)
        if running.pushed.pop():
            torch._C._autograd._pop_saved_tensors_default_hooks()
            torch.set_autocast_cache_enabled(running.cache_was_on.pop())
        if not running.frames:
            running.watch.forward_ended()
        if not running.frames and not in_backward() and torch.is_grad_enabled():
            self._engine.recorder.forward_ended()
            if self.gauge is not None:
                self.gauge.forward_ended()

    # ---- saved tensors

    def _pack(self, tensor: torch.Tensor) -> SavedWeight | SavedTensor:
        with raw():
            unit = self._engine.binder.unit_of(tensor)
            if unit is None:
                if self.gauge is not None:
                    self.gauge.note(tensor)
                # detached, or a node that saves its own output would keep itself, and a forward without a
                # backward its activations, for ever; the version counter is shared
                return SavedTensor(tensor.detach(), tensor._version)
            offset = int(tensor.storage_offset())
            return SavedWeight(
                unit, offset, tensor.shape, tensor.stride(), tensor.dtype,
                tensor.is_conj(), tensor.is_neg(), self._engine.values.generation(unit, offset),
            )  # fmt: skip

    def _unpack(self, saved: SavedWeight | SavedTensor) -> torch.Tensor:
        self.running.watch.in_backward()
        if isinstance(saved, SavedTensor):
            if saved.tensor._version != saved.version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"a tensor of shape {tuple(saved.tensor.shape)} is at version {saved.tensor._version}, "
                    f"expected version {saved.version}"
                )
            return saved.tensor
        engine = self._engine
        engine.usable()
        if engine.values.generation(saved.unit, saved.offset) != saved.generation:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"the weights of {saved.unit.name!r} were updated between this forward and its backward"
            )
        if self.rotation is not None and not self.running.holds(saved.unit):
            self.rotation.arrive(saved.unit.index)
        lease = self._with_room(lambda: engine.touch(saved.unit))
        alias = torch.as_strided(lease.bytes().view(saved.dtype), saved.size, saved.stride, saved.offset)
        if saved.conjugate:  # lazy: a flag of the tensor, not of its bytes
            alias = alias.conj()
        if saved.negative:
            alias = torch._neg_view(alias)
        engine.prefetch()
        self.running.watch.unpacked(saved.unit.label)
        return alias


def _no_saved_tensor_hooks() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:  # an older torch: never on top of a checkpoint's own
        return False
    return top(True) is None
