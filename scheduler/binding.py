"""Binds parameters to the memory their unit is in, and takes them off it again."""

from __future__ import annotations

import torch

from tierflow.scheduler.guard import evicted_class
from tierflow.scheduler.units import Unit
from tierflow.swap import Lease

#: Switches subclass dispatch off around metadata of evicted parameters.
raw = torch._C.DisableTorchFunctionSubclass


class Binder:
    """Which units' parameters point at real memory, and which classes they wear."""

    def __init__(self, units: list[Unit], device: torch.device, owner: object):
        self._classes = {id(p): type(p) for u in units for p in u.params}
        self._bound: dict[int, Lease] = {}
        self._by_storage: dict[int, Unit] = {}
        self._nan: dict[torch.dtype, torch.Tensor] = {}
        self._device = device
        for unit in units:
            for slot, p in zip(unit.slots, unit.params, strict=True):
                p._tierflow_owner, p._tierflow_name = owner, slot.names[0]  # type: ignore[attr-defined]

    def bound(self, unit: Unit) -> bool:
        """Whether the unit's parameters point at its memory."""
        return unit.index in self._bound

    def views(self, unit: Unit) -> int:
        """How many tensors of ours refer to the unit's memory."""
        return len(unit.params) if unit.index in self._bound else 0

    def unit_of(self, tensor: torch.Tensor) -> Unit | None:
        """The unit whose bound memory the tensor lies in."""
        try:
            return self._by_storage.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # sparse, or wrapped by a transform: no storage
            return None

    def bind(self, unit: Unit, lease: Lease) -> None:
        """Points every parameter of the unit at its slot of ``lease``."""
        # tensors made in inference mode could not be trained on later
        with raw(), torch.inference_mode(False):
            flat = lease.view(unit.dtype)
            for slot, p in zip(unit.slots, unit.params, strict=True):
                p.data = flat[slot.offset : slot.offset + slot.numel].view(slot.shape)
        self._bound[unit.index] = lease
        self._by_storage[flat.untyped_storage()._cdata] = unit

    def follow(self, unit: Unit, lease: Lease) -> None:
        """The unit's memory has moved to ``lease``."""
        old = self._bound.pop(unit.index, None)
        if old is not None:
            self._by_storage = {key: u for key, u in self._by_storage.items() if u is not unit}
            self.bind(unit, lease)

    def unbind(self, unit: Unit) -> None:
        """Leaves shape, dtype and device, over one NaN."""
        lease = self._bound.pop(unit.index, None)
        if lease is not None:
            del self._by_storage[lease.bytes().untyped_storage()._cdata]
        with raw(), torch.inference_mode(False):
            nan = self._nan.get(unit.dtype)
            if nan is None:
                nan = self._nan[unit.dtype] = _nan(unit.dtype, self._device)
            for slot, p in zip(unit.slots, unit.params, strict=True):
                p.data = nan.as_strided(slot.shape, (0,) * len(slot.shape))

    def open(self, unit: Unit) -> None:
        """The unit is pinned: its parameters are ordinary ones."""
        for p in unit.params:
            p.__class__ = self._classes[id(p)]

    def shut(self, unit: Unit) -> None:
        """The unit is no longer pinned: its parameters guard themselves."""
        for p in unit.params:
            p.__class__ = evicted_class(self._classes[id(p)])


def _nan(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    value = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((1,), value, dtype=dtype, device=device)
