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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tierflow.scheduler.binding import raw
from tierflow.scheduler.units import Unit, module_units

if TYPE_CHECKING:
    from tierflow.scheduler.engine import Engine


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
    generation: int


@dataclass(frozen=True)
class SavedTensor:
    """Any other saved tensor; its version, since saved-tensor hooks hide an in-place change from autograd."""

    tensor: torch.Tensor
    version: int


class ModelHooks:
    """The hooks of one engine on one model, and the pins of the modules that are running."""

    def __init__(self, engine: Engine, model: nn.Module, units: list[Unit]):
        self._engine = engine
        self._root = model
        self._frames: list[list[Unit]] = []
        self._until_backward_ends: list[Unit] = []
        self._callback_task = -1
        self._pushed: list[bool] = []
        self._cache_was_on: list[bool] = []
        self._handles: list[Any] = []
        self._managed = units
        self._watch = engine.watch
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
        return bool(self._frames) or in_backward()

    def hold(self, unit: Unit) -> None:
        """Pins the unit until the innermost running module ends, or the backward does."""
        self._engine.acquire(unit)
        if self._frames:
            self._frames[-1].append(unit)
            self._watch.enter(unit.label)
            return
        self._until_backward_ends.append(unit)
        task = torch._C._current_graph_task_id()
        if self._callback_task != task:
            self._callback_task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self._callback_task = -1
        while self._until_backward_ends:
            self._engine.release(self._until_backward_ends.pop())

    def reset(self) -> None:
        """Gives up pins that an interrupted forward or backward left behind."""
        self._backward_ended()
        while self._frames:
            self._leave()

    # ---- module hooks

    def _before(self, needed: list[Unit]) -> Callable[..., None]:
        def enter(module: nn.Module, _args: Any) -> None:
            if module is self._root and self._frames and not in_backward():
                self.reset()  # Ctrl-C in an earlier forward: torch calls no hook for it
            self._enter()
            for unit in needed:
                self._engine.acquire(unit)
                self._frames[-1].append(unit)
                self._watch.enter(unit.label)

        return enter

    def _after(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._frames:
            self._leave()

    def _enter(self) -> None:
        if not self._frames:
            self._watch.forward_began()
        push = not self._frames and not (in_backward() and not _no_saved_tensor_hooks())
        if push:  # refused inside torch.func's transforms: nothing is noted then
            torch._C._autograd._push_saved_tensors_default_hooks(self._pack, self._unpack)
        self._frames.append([])
        self._pushed.append(push)
        if push:
            # autocast would keep 16-bit copies of weights alive after their unit is gone
            self._cache_was_on.append(torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(False)

    def _leave(self) -> None:
        for unit in reversed(self._frames.pop()):
            if self._engine.release(unit) == 0:
                self._watch.leave(unit.label)
        if self._pushed.pop():
            torch._C._autograd._pop_saved_tensors_default_hooks()
            torch.set_autocast_cache_enabled(self._cache_was_on.pop())
        if not self._frames:
            self._watch.forward_ended()
        if not self._frames and not in_backward() and torch.is_grad_enabled():
            self._engine.recorder.forward_ended()

    # ---- saved tensors

    def _pack(self, tensor: torch.Tensor) -> SavedWeight | SavedTensor:
        with raw():
            unit = self._engine.binder.unit_of(tensor)
            if unit is None:
                # detached, or a node that saves its own output would keep itself, and a forward without a
                # backward its activations, for ever; the version counter is shared
                return SavedTensor(tensor.detach(), tensor._version)
            return SavedWeight(
                unit, int(tensor.storage_offset()), tensor.shape, tensor.stride(), tensor.dtype,
                tensor.is_conj(), tensor.is_neg(), self._engine.generation(unit),
            )  # fmt: skip

    def _unpack(self, saved: SavedWeight | SavedTensor) -> torch.Tensor:
        self._watch.in_backward()
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
        if engine.generation(saved.unit) != saved.generation:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"the weights of {saved.unit.name!r} were updated between this forward and its backward"
            )
        lease = engine.touch(saved.unit)
        alias = torch.as_strided(lease.bytes().view(saved.dtype), saved.size, saved.stride, saved.offset)
        if saved.conjugate:  # lazy: a flag of the tensor, not of its bytes
            alias = alias.conj()
        if saved.negative:
            alias = torch._neg_view(alias)
        engine.prefetch()
        self._watch.unpacked(saved.unit.label)
        return alias


def _no_saved_tensor_hooks() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:  # an older torch: never on top of a checkpoint's own
        return False
    return top(True) is None
