"""Streams initial weights to their homes, one parameter at a time: they never exist twice as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tierflow.scheduler.binding import raw
from tierflow.scheduler.contents import store_parameter
from tierflow.scheduler.units import Slot, Unit
from tierflow.swap import Manager

#: (slot, parameter) -> its values as a CPU tensor of any float dtype.
Source = Callable[[Slot, torch.nn.Parameter], torch.Tensor]


def from_model(slot: Slot, param: torch.nn.Parameter) -> torch.Tensor:
    """The parameter's own data. Raises ValueError for a parameter on the meta device."""
    if param.is_meta:
        raise ValueError(
            f"parameter {slot.names[0]!r} is on the meta device and has no values: use "
            "tierflow.load(model_class, folder, config), or materialize the model first"
        )
    return param.data.detach().to("cpu")


def fill(manager: Manager, units: list[Unit], source: Source) -> None:
    """Writes every parameter, and the master's remainder, to its home, and frees the original's memory."""
    for unit in units:
        for slot, param in zip(unit.slots, unit.params, strict=True):
            values = source(slot, param).contiguous().view(-1)
            if tuple(values.shape) != (slot.numel,):
                raise ValueError(f"{slot.names[0]!r}: {values.numel()} values given, {slot.numel} expected")
            with raw():  # the original is dropped before the next parameter is read
                param.data = _nothing(slot, unit.dtype, param.device)
            store_parameter(manager, unit, slot, values, lambda tier: ())


def _nothing(slot: Slot, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(1, dtype=dtype, device=device).as_strided(slot.shape, (0,) * len(slot.shape))
