"""Where each kind of each unit lives for good, and what follows from that: its chunks' places, its working memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, count

from tierflow.scheduler.placement import Needs, Placement, Together, staged_kinds, working_needs
from tierflow.scheduler.units import STATES, Unit
from tierflow.swap import Chunk, Kind, Manager, Tier, paged_bytes


@dataclass(frozen=True)
class Homes:
    """The tier of every (unit index, kind).

    ``ahead``: by unit index, how many elements of the states are in other tiers ahead of the rest, in this order.
    ``kept``: of weights and gradients on NVMe, how many of their first elements HOST keeps.
    """

    tiers: dict[tuple[int, Kind], Tier]
    ahead: dict[int, dict[Tier, int]] = field(default_factory=dict)
    kept: dict[tuple[int, Kind], int] = field(default_factory=dict)

    def of(self, unit: Unit, kind: Kind) -> Tier:
        """Where the kind lives; of one that is split, the last of it."""
        return self.tiers[unit.index, kind]

    def of_states(self, unit: Unit) -> Tier | None:
        """Where the optimizer states live, or the last of them; None for a unit that has none."""
        return next((self.of(unit, chunk.kind) for chunk in unit.states), None)

    def parts(self, unit: Unit, kind: Kind) -> Iterator[tuple[Tier, int]]:
        """(tier, elements) of the parts that the kind is split into, in order."""
        kept = self.kept_elements(unit, kind)
        ahead = self.ahead.get(unit.index, {}) if kind in STATES else {Tier.HOST: kept} if kept else {}
        yield from ahead.items()
        yield self.of(unit, kind), unit.chunks[kind].numel - sum(ahead.values())

    def kept_elements(self, unit: Unit, kind: Kind) -> int:
        """How many elements HOST keeps of weights or gradients that live on NVMe."""
        return self.kept.get((unit.index, kind), 0) if self.of(unit, kind) is Tier.NVME else 0

    def split(self, unit: Unit) -> bool:
        """Whether any kind of the unit is in several tiers."""
        return any(len(list(self.parts(unit, kind))) > 1 for kind in unit.chunks)

    def bytes_in(self, unit: Unit, kind: Kind, tier: Tier) -> int:
        """Bytes of the kind that live in the tier."""
        return sum(unit.chunks[kind].bytes_of(n) for t, n in self.parts(unit, kind) if t is tier)

    def spilled(self, units: list[Unit]) -> list[Unit]:
        """Units whose gradients live on NVMe."""
        return [u for u in units if self.tiers.get((u.index, Kind.GRAD)) is Tier.NVME]

    def window(self, units: list[Unit]) -> int:
        """Bytes of HOST through which their gradients go: one unit's arrives while another's is written."""
        sizes = sorted(paged_bytes(u.chunks[Kind.GRAD].nbytes) for u in self.spilled(units))
        return min(sum(sizes), 2 * sizes[-1]) if sizes else 0

    def streamed(self, units: list[Unit]) -> list[Unit]:
        """Units whose weights come and go."""
        return [u for u in units if self.of(u, Kind.PARAM) is not Tier.DEVICE]

    def from_nvme(self, units: list[Unit]) -> list[Unit]:
        """Units whose weights come from NVMe."""
        return [u for u in units if self.of(u, Kind.PARAM) is Tier.NVME]

    def resident(self, units: list[Unit]) -> dict[tuple[Tier, Kind], int]:
        """Bytes of every (tier, kind)."""
        table: dict[tuple[Tier, Kind], int] = {}
        for unit in units:
            for kind, chunk in unit.chunks.items():
                for tier, elements in self.parts(unit, kind):
                    if elements:
                        table[tier, kind] = table.get((tier, kind), 0) + chunk.bytes_of(elements)
        return table

    def stay(self, units: list[Unit], tier: Tier) -> int:
        """Bytes of the tier that are not working memory: what lives there, and the window of gradients on NVMe."""
        window = self.window(units) if tier is Tier.HOST else 0
        return window + sum(n for (t, _), n in self.resident(units).items() if t is tier)


def create_chunks(manager: Manager, units: list[Unit], homes: Homes) -> None:
    """Gives every chunk its permanent place, and cuts the states that have several."""
    ids = count(1 + max(chunk.id for unit in units for chunk in unit.chunks.values()))
    for unit in units:
        unit.split_states(list(accumulate(homes.ahead.get(unit.index, {}).values())), ids)
        for kind, chunk in unit.chunks.items():
            if kind not in STATES:
                manager.create(chunk, homes.of(unit, kind), chunk.bytes_of(homes.kept_elements(unit, kind)))
                continue
            for part, (tier, _) in zip(unit.parts(kind), homes.parts(unit, kind), strict=True):
                manager.create(part, tier)


def needs_of(homes: Homes, units: list[Unit], placement: Placement, together: Together) -> Needs:
    """Working memory for what the homes leave to be moved."""
    staging = [(u, each) for u in units if (each := _staged(homes, u, placement))]
    return working_needs(placement, together, homes.streamed(units), homes.from_nvme(units), staging)


def _staged(homes: Homes, unit: Unit, placement: Placement) -> Fraction:
    """Bytes per element that an update of the unit may bring to HOST."""
    undoable = placement.speculative and bool(second_slots(unit, homes))

    def tiers(kind: Kind) -> list[Tier]:
        return [tier for tier, n in homes.parts(unit, kind) if n]

    kinds = staged_kinds(unit, tiers, placement.kernels_reach_device, undoable) if unit.trainable else []
    if kinds == [Kind.PARAM] and homes.of(unit, Kind.PARAM) is Tier.NVME:
        return Fraction(0)  # they are brought up whole, and updated then
    return sum((unit.layouts[kind].bytes_per_element for kind in kinds), Fraction(0))


def second_slots(unit: Unit, homes: Homes) -> list[Chunk]:
    """What an update of the unit overwrites, if it may run in the backward: its states are on NVMe, all of them, its weights
    in one tier, and its gradient in memory.
    """
    if homes.of_states(unit) is not Tier.NVME or homes.split(unit) or homes.of(unit, Kind.GRAD) is Tier.NVME:
        return []
    return [chunk for kind, chunk in unit.chunks.items() if kind is not Kind.GRAD]
