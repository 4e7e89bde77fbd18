"""Notes where the forward, the backward and each unit's share of them begin and end."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tierflow.swap import Lane, Timeline
from tierflow.swap.lanes import DeviceLane

#: What lies between a forward and the first sign of its backward: the loss, its own backward, and the loop's code.
BETWEEN = "between forward and backward"


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class ComputeWatch:
    """Turns what the hooks see into COMPUTE spans.

    In a forward a unit's span is that of the module that holds it; in a backward it lasts from one unpacking of the
    unit's weights to the next unit's. The spans of whole forwards and backwards lie around them.
    """

    def __init__(self, timeline: Timeline, lane: DeviceLane):
        self._timeline, self._lane = timeline, lane
        self._forward: Any = None
        self._between: Any = None
        self._backward: Any = None
        self._segment: tuple[str, Any] | None = None
        self._entered: dict[str, Any] = {}

    def _note(self, name: str, begin: Any) -> None:
        if begin is not None:
            self._timeline.follow(Lane.COMPUTE, name, self._lane.stretch(begin))

    def forward_began(self, *_: Any) -> None:
        """The outermost module runs, unless it is computed anew in a backward. Forgets what was left open."""
        if _in_backward():
            return
        self._backward = self._segment = None
        self._entered.clear()
        self._forward = self._lane.stamp()

    def forward_ended(self, *_: Any) -> None:
        """The outermost module is done."""
        if self._forward is None:
            return
        self._note("forward", self._forward)
        self._forward = None
        self._between = self._lane.stamp() if torch.is_grad_enabled() else None

    def enter(self, name: str) -> None:
        """A module holds the unit."""
        self._close()
        self._entered.setdefault(name, self._lane.stamp())

    def leave(self, name: str) -> None:
        """The unit's outermost module is done with it."""
        self._note(name, self._entered.pop(name, None))

    def in_backward(self, *_: Any) -> None:
        """A sign of a running backward; its end is noted by itself."""
        if self._backward is not None or not _in_backward():
            return  # a user may unpack saved tensors at any time
        self._note(BETWEEN, self._between)
        self._between = None
        self._backward = self._lane.stamp()
        torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def unpacked(self, name: str) -> None:
        """The backward is about to use the unit's weights."""
        if self._backward is not None and (self._segment is None or self._segment[0] != name):
            self._close()
            self._segment = name, self._lane.stamp()

    def _close(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            self._note(*segment)

    def _backward_ended(self) -> None:
        self._close()
        self._note("backward", self._backward)
        self._backward = None


def watch_model(watch: ComputeWatch, model: nn.Module) -> list[Any]:
    """Hooks for a model whose weights never leave the device, and which needs no others. Returns their handles."""
    handles: list[Any] = [
        model.register_forward_pre_hook(watch.forward_began, prepend=True),
        model.register_forward_hook(watch.forward_ended, always_call=True),
    ]
    return handles + [p.register_post_accumulate_grad_hook(watch.in_backward) for p in model.parameters() if p.requires_grad]
