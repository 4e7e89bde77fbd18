"""Which tier each kind of each unit lives in for good, under the caps.

The placement names the slowest tier that a kind may live in. Room that is left in a faster tier is filled in the order
of first use: DEVICE with weights, HOST with weights and then with optimizer states, the last of these cut where the
room ends. What lives in memory crosses no link at all; a cache of the same size would spare the reads only. The first
units of the order are those that the next forward and its updates need before anything could be brought up.
"""

from __future__ import annotations

from dataclasses import dataclass

from tierflow.scheduler.placement import Caps, Needs, Placement, Together, working_needs
from tierflow.scheduler.units import STATES, Unit
from tierflow.swap import Kind, Tier


@dataclass(frozen=True)
class Homes:
    """The tier of every (unit index, kind), and how many elements of a unit's states are in HOST ahead of the rest."""

    tiers: dict[tuple[int, Kind], Tier]
    front: dict[int, int]

    def of(self, unit: Unit, kind: Kind) -> Tier:
        """Where the kind lives (what is in front of it apart)."""
        return self.tiers[unit.index, kind]

    def of_states(self, unit: Unit) -> Tier | None:
        """Where the optimizer states live (what is in front of them apart); None for a unit that has none."""
        return next((self.of(unit, chunk.kind) for chunk in unit.states), None)

    def streamed(self, units: list[Unit]) -> list[Unit]:
        """Units whose weights come and go."""
        return [u for u in units if self.of(u, Kind.PARAM) is not Tier.DEVICE]

    def resident(self, units: list[Unit]) -> dict[tuple[Tier, Kind], int]:
        """Bytes of every (tier, kind). What is in front has its place in NVMe too."""
        table: dict[tuple[Tier, Kind], int] = {}

        def count(tier: Tier, kind: Kind, nbytes: int) -> None:
            if nbytes:
                table[tier, kind] = table.get((tier, kind), 0) + nbytes

        for unit in units:
            for kind, chunk in unit.chunks.items():
                count(self.of(unit, kind), kind, chunk.nbytes)
                if kind in STATES:
                    count(Tier.HOST, kind, chunk.bytes_of(self.front.get(unit.index, 0)))
        return table


def choose_homes(
    units: list[Unit], placement: Placement, caps: Caps, together: Together, order: list[int]
) -> Homes:
    """``order``: unit indices in order of use."""
    tiers = {(u.index, kind): placement.home(kind) for u in units for kind in u.chunks}
    first = sorted(units, key=lambda u: order.index(u.index) if u.index in order else len(order))
    homes = Homes(tiers, {})
    _fill_device(homes, first, placement, caps, together)
    _fill_host(homes, first, placement, caps, together)
    return homes


def _fill_device(homes: Homes, units: list[Unit], placement: Placement, caps: Caps, together: Together) -> None:
    for unit in homes.streamed(units):
        before = homes.tiers[unit.index, Kind.PARAM]
        homes.tiers[unit.index, Kind.PARAM] = Tier.DEVICE
        if _stay(homes, units, Tier.DEVICE) + needs_of(homes, units, placement, together).device_good > caps.device:
            homes.tiers[unit.index, Kind.PARAM] = before


def _fill_host(homes: Homes, units: list[Unit], placement: Placement, caps: Caps, together: Together) -> None:
    def room() -> int:
        needs = needs_of(homes, units, placement, together)
        return caps.host - _stay(homes, units, Tier.HOST) - needs.host_good

    for unit in units:
        if homes.tiers[unit.index, Kind.PARAM] is Tier.NVME and unit.chunk.nbytes <= room():
            homes.tiers[unit.index, Kind.PARAM] = Tier.HOST
    cut: Unit | None = None
    for unit in units:
        if homes.of_states(unit) is not Tier.NVME:
            continue
        if sum(chunk.nbytes for chunk in unit.states) <= room():
            homes.tiers.update({(unit.index, chunk.kind): Tier.HOST for chunk in unit.states})
        elif cut is None:
            cut = unit
    if cut is not None:
        grains = max(room(), 0) // sum(chunk.bytes_of(cut.grain) for chunk in cut.states)
        homes.front[cut.index] = grains * cut.grain


def needs_of(homes: Homes, units: list[Unit], placement: Placement, together: Together) -> Needs:
    """Working memory for what the homes leave to be moved."""
    streamed = homes.streamed(units)
    on_nvme = [u for u in streamed if homes.of(u, Kind.PARAM) is Tier.NVME]
    staged = [u for u in units if u.trainable and _stages(homes, u, placement)]
    return working_needs(placement, together, streamed, on_nvme, staged)


def _stages(homes: Homes, unit: Unit, placement: Placement) -> bool:
    """Whether the update brings anything of the unit to HOST."""
    out_of_reach = homes.of(unit, Kind.PARAM) is Tier.DEVICE and not placement.device_is_host
    return homes.of_states(unit) is Tier.NVME or (out_of_reach and placement.optimizer is not Tier.DEVICE)


def _stay(homes: Homes, units: list[Unit], tier: Tier) -> int:
    return sum(n for (t, _), n in homes.resident(units).items() if t is tier)
