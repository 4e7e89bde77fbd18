"""NVMe bytes of one optimizer step, by running the caching rule over an order of use without moving bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tierflow.scheduler.placement import MemoryPlan, Placement
from tierflow.scheduler.trace import Trace
from tierflow.scheduler.units import Unit, module_units
from tierflow.swap import Kind, Tier


@dataclass(frozen=True)
class Pools:
    """Working memory in bytes, and the update's pieces: elements of one, and how many are in flight."""

    device: int
    host: int
    piece_elements: int
    pieces: int
    device_is_host: bool  # kernels work on DEVICE memory too

    @classmethod
    def of(cls, plan: MemoryPlan, device_is_host: bool) -> Pools:
        """What the plan gives."""
        sizes = plan.working[Tier.DEVICE], plan.working[Tier.HOST]
        return cls(*sizes, plan.piece_elements, plan.pieces_in_flight, device_is_host)


class _Cache:
    """One tier's working pool: which units it holds and what it would give up."""

    def __init__(self, capacity: int, sizes: dict[int, int]):
        self.capacity, self._sizes, self.held = capacity, sizes, set[int]()

    def shrink(self, room: int, trace: Trace) -> None:
        """Drops units, the farthest next use first, until ``room`` more bytes fit."""
        used = sum(self._sizes[u] for u in self.held)
        for victim in sorted(self.held, key=trace.next_use, reverse=True):
            if used + room <= self.capacity:
                return
            self.held.discard(victim)
            used -= self._sizes[victim]

    def admit(self, unit: int, trace: Trace) -> None:
        """Brings a unit in."""
        if unit not in self.held:
            self.shrink(self._sizes[unit], trace)
            self.held.add(unit)


def estimate(units: list[Unit], placement: Placement, pools: Pools, order: list[int]) -> tuple[int, int]:
    """(read, written) NVMe bytes of one steady step with the given order of use."""
    sizes = {u.index: u.chunk.nbytes for u in units}
    near, far, trace = _Cache(pools.device, sizes), _Cache(pools.host, sizes), Trace(order)
    read = written = 0
    for _ in range(2):  # the second pass starts from what the first left in memory
        read = _fetches(order, near, far, trace, sizes) if placement.param is Tier.NVME else 0
        cached = far.held | near.held if pools.device_is_host else set(far.held)
        for unit in units:
            if unit.trainable:
                more, out = _update(unit, placement, unit.index in cached)
                read, written = read + more, written + out
        far.shrink(_scratch(units, placement, pools), trace)
        # updated in place where the kernel reached them first; the other copies are out of date
        near.held = near.held - far.held if pools.device_is_host else set()
    return read, written // 2


def _fetches(order: list[int], near: _Cache, far: _Cache, trace: Trace, sizes: dict[int, int]) -> int:
    read = 0
    trace.rewind()
    for unit in order:
        trace.visit(unit)
        if unit not in near.held:
            if unit not in far.held:
                read += sizes[unit]
            far.admit(unit, trace)
            near.admit(unit, trace)
    return read


def _update(unit: Unit, placement: Placement, cached: bool) -> tuple[int, int]:
    """(read, written) by the update of one unit."""
    homes = [(k, c.nbytes) for k, c in unit.chunks.items() if k is not Kind.GRAD]
    stored = [(k, n) for k, n in homes if placement.home(k) is Tier.NVME]
    written = sum(n for _, n in stored)
    return written - (unit.chunk.nbytes if cached and placement.param is Tier.NVME else 0), written


def _scratch(units: list[Unit], placement: Placement, pools: Pools) -> int:
    """Host bytes that the update stages at its peak."""
    if placement.optimizer is not Tier.NVME:
        return 0
    pieces: list[int] = []
    for unit in units:
        per_element = sum(c.itemsize for k, c in unit.chunks.items() if k is not Kind.GRAD)
        whole, rest = divmod(unit.chunk.numel, pools.piece_elements)
        pieces += [pools.piece_elements * per_element] * min(whole, pools.pieces) + [rest * per_element]
    return sum(sorted(pieces)[-pools.pieces :])


def default_order(model: nn.Module, units: list[Unit]) -> list[int]:
    """The order of use that is assumed before one is seen: modules as registered, then back.

    The backward of an embedding does not look at its weight.
    """
    forward, backward = list[int](), list[int]()
    for module, needed in module_units(model, units).items():
        indices = [u.index for u in needed]
        forward += indices
        if not isinstance(module, nn.Embedding):
            backward += indices
    order = forward + backward[::-1]
    return [u for i, u in enumerate(order) if i == 0 or order[i - 1] != u]
