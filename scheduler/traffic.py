"""NVMe bytes of one optimizer step, by running the caching rule over an order of use without moving bytes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import nn

from tierflow.scheduler.placement import MemoryPlan, Placement
from tierflow.scheduler.trace import Trace
from tierflow.scheduler.units import Unit, module_units
from tierflow.swap import Kind, Tier

#: Fetches kept under way ahead of use.
PREFETCH = 4


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
    """One tier's working pool: which units it holds, how much is staged, and what it would give up."""

    def __init__(self, capacity: int, sizes: dict[int, int]):
        self.capacity, self._sizes, self.held, self.staged = capacity, sizes, set[int](), 0

    def make_room(self, nbytes: int, trace: Trace, keep: set[int], beyond: int = -1) -> bool:
        """Drops units, the farthest next use first, until ``nbytes`` more fit; as ``Engine.victims`` has it."""
        used = self.staged + sum(self._sizes[u] for u in self.held)
        for victim in sorted(self.held - keep, key=trace.next_use, reverse=True):
            if used + nbytes <= self.capacity or trace.next_use(victim) <= beyond:
                break
            self.held.discard(victim)
            used -= self._sizes[victim]
        return used + nbytes <= self.capacity


def estimate(
    units: list[Unit], placement: Placement, pools: Pools, order: list[int], prefetch: bool = True
) -> tuple[int, int]:
    """(read, written) NVMe bytes of one steady step with the given order of use."""
    sizes = {u.index: u.chunk.nbytes for u in units}
    near, far, trace = _Cache(pools.device, sizes), _Cache(pools.host, sizes), Trace(order)
    read = written = 0
    for _ in range(3):  # the later passes start from what the one before left in memory
        read = _fetches(near, far, trace, sizes, prefetch) if placement.param is Tier.NVME else 0
        staged, written = _updates(units, placement, pools, near, far, trace)
        read += staged
    return read, written


def _fetches(near: _Cache, far: _Cache, trace: Trace, sizes: dict[int, int], prefetch: bool) -> int:
    read = 0

    def bring(unit: int, running: int, beyond: int = -1) -> bool:
        nonlocal read
        if unit not in far.held:
            if not far.make_room(sizes[unit], trace, set(), beyond):
                return False
            far.held.add(unit)
            read += sizes[unit]
        if not near.make_room(sizes[unit], trace, {running}, beyond):
            return False
        near.held.add(unit)
        return True

    trace.rewind()
    for unit in trace.order:
        trace.visit(unit)
        if unit not in near.held:
            bring(unit, unit)
        ahead = [u for u in dict.fromkeys(trace.upcoming(2 * PREFETCH)) if u not in near.held] if prefetch else []
        for soon in ahead[:PREFETCH]:
            if not bring(soon, unit, trace.next_use(soon)):
                break
    return read


def _updates(
    units: list[Unit], placement: Placement, pools: Pools, near: _Cache, far: _Cache, trace: Trace
) -> tuple[int, int]:
    """(read, written) by the update pipeline, which stages in the host's pool what kernels cannot reach."""
    read = written = 0
    flight: deque[tuple[int, int]] = deque()  # bytes staged for a piece, its unit

    def retire() -> None:
        nbytes, unit = flight.popleft()
        far.staged -= nbytes
        if not pools.device_is_host:
            near.held.discard(unit)  # updated in HOST or on NVMe: this copy is stale

    for unit in (u for u in units if u.trainable):
        cached = unit.index in far.held or (pools.device_is_host and unit.index in near.held)
        homes = {k: placement.home(k) for k in unit.chunks if k is not Kind.GRAD}
        here = {Tier.HOST} | ({Tier.DEVICE} if pools.device_is_host else set())
        staged = [k for k, tier in homes.items() if tier not in here and not (k is Kind.PARAM and cached)]
        read += sum(unit.chunks[k].nbytes for k in staged if homes[k] is Tier.NVME)
        written += sum(unit.chunks[k].nbytes for k, tier in homes.items() if tier is Tier.NVME)
        per_element = sum(unit.chunks[k].itemsize for k in staged)
        for begin in range(0, unit.chunk.numel, pools.piece_elements) if staged else ():
            need = min(pools.piece_elements, unit.chunk.numel - begin) * per_element
            while not far.make_room(need, trace, {unit.index, *(u for _, u in flight)}) and flight:
                retire()
            far.staged += need
            flight.append((need, unit.index))
            while len(flight) >= pools.pieces:
                retire()
    while flight:
        retire()
    return read, written


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
