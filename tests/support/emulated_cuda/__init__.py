"""A device behind torch's ``cuda`` where torch has none: host memory, streams that are threads, copies that lag.

The lines of tierflow that are for CUDA run on it as they are: streams, events, registration, copies in both directions
and memory that its stream hands on. Work of a stream that nobody waits for is late, so that a missing wait is seen in the
numbers; freed memory is NaN. It says nothing of speed, of the driver, nor of CUDA's own kernels.
"""

from __future__ import annotations

import sys

if "torch" in sys.modules:  # it asks once which device there is, while it is imported
    raise ImportError("the emulated device has to be imported before torch")

from .native import native as native  # isort: skip  (before torch)

from typing import Any

import torch

from .runtime import REPLACED


def inputs_follow_models() -> None:
    """A model's inputs are brought to the device that it is on: tests make them on the host."""
    called = torch.nn.Module.__call__

    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        device = next((p.device for p in self.parameters()), None)
        if device is None or device.type == "cpu":
            return called(self, *args, **kwargs)
        there = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
        return called(self, *there[0], **there[1])

    torch.nn.Module.__call__ = call  # type: ignore[method-assign, assignment]


def install() -> None:
    """Makes ``torch.cuda`` that of the emulated device, in this process for good."""
    for name, value in REPLACED.items():
        setattr(torch.cuda, name, value)
