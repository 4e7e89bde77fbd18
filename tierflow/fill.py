"""Streams initial weights to their homes, one parameter at a time: they never exist twice as a whole."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from tierflow.scheduler.binding import raw
from tierflow.scheduler.contents import join_master, read_bytes, read_parameter, slot_bytes, store_parameter
from tierflow.scheduler.units import Slot, Unit
from tierflow.swap import Chunk, Kind, Manager, Tier

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
    """Writes every parameter, and the master's remainder, to its home, and frees the original's memory.

    If that fails half way, parameters whose source is the model itself get their values back.
    """
    moved: list[tuple[Unit, Slot, torch.nn.Parameter, torch.dtype]] = []
    for unit in units:
        for slot, param in zip(unit.slots, unit.params, strict=True):
            values, dtype = source(slot, param).contiguous().view(-1), param.dtype
            if tuple(values.shape) != (slot.numel,):
                raise ValueError(f"{slot.names[0]!r}: {values.numel()} values given, {slot.numel} expected")
            with raw():  # the original is dropped before the next parameter is read
                param.data = _nothing(slot, unit.dtype, param.device)
            try:
                store_parameter(manager, unit, slot, values, _no_victims)
            except BaseException:
                if source is from_model:
                    with raw():
                        param.data = values.view(slot.shape).to(param.device)
                    _give_back(manager, moved)
                raise
            moved.append((unit, slot, param, dtype))
    _trim_heap()


def _trim_heap() -> None:
    """Gives the kernel back what is free inside the C heap.

    Aligned allocations of changing sizes leave holes there that the next ones do not fit: a model of a billion
    parameters left half a gigabyte behind.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others have none
    if trim is not None:
        trim(0)


def _give_back(manager: Manager, moved: list[tuple[Unit, Slot, torch.nn.Parameter, torch.dtype]]) -> None:
    for unit, slot, param, dtype in moved:
        values = read_parameter(manager, unit, slot, _no_victims)
        master = unit.chunks.get(Kind.MASTER)
        if dtype != unit.dtype and master is not None:  # it came as fp32: what the format keeps of that is there
            rest = read_bytes(manager, unit, Kind.MASTER, *slot_bytes(master, slot), _no_victims)
            values = join_master(values, rest.view(unit.layouts[Kind.MASTER].dtype))
        with raw():
            param.data = values.to(param.device, dtype).view(slot.shape)


def _no_victims(_tier: Tier) -> tuple[Chunk, ...]:
    return ()


def _nothing(slot: Slot, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(1, dtype=dtype, device=device).as_strided(slot.shape, (0,) * len(slot.shape))
