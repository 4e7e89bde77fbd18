"""Where each kind of each unit lives for good, and what follows from that: its chunks' places, its working memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, count

from tierflow.cpu_adam.formats import KindLayout
from tierflow.scheduler.placement import Needs, Placement, Together, staged_kinds, working_needs
from tierflow.scheduler.units import STATES, Unit
from tierflow.swap import Chunk, Kind, Manager, Tier, paged_bytes


@dataclass(frozen=True)
class Homes:
    """The tier of every (unit index, kind).

    ``ahead``: how many of its elements are in other tiers ahead of the rest, in this order; of all states of a unit alike.
    """

    tiers: dict[tuple[int, Kind], Tier]
    ahead: dict[tuple[int, Kind], dict[Tier, int]] = field(default_factory=dict)

    def of(self, unit: Unit, kind: Kind) -> Tier:
        """Where the kind lives; of one that is split, the last of it."""
        return self.tiers[unit.index, kind]

    def of_states(self, unit: Unit) -> Tier | None:
        """Where the optimizer states live, or the last of them; None for a unit that has none."""
        return next((self.of(unit, chunk.kind) for chunk in unit.states), None)

    def parts(self, unit: Unit, kind: Kind) -> Iterator[tuple[Tier, int]]:
        """(tier, elements) of the parts that the kind is split into, in order."""
        last, left = self.of(unit, kind), unit.chunks[kind].numel
        for tier, elements in self.ahead.get((unit.index, kind), {}).items():
            if tier is not last:
                yield tier, elements
                left -= elements
        yield last, left

    def cuts(self, unit: Unit, kind: Kind) -> list[int]:
        """The elements at which the kind is cut."""
        return list(accumulate(n for _, n in self.parts(unit, kind)))[:-1]

    def split(self, unit: Unit) -> bool:
        """Whether any kind of the unit is in several tiers."""
        return any(self.cuts(unit, kind) for kind in unit.chunks)

    def bytes_in(self, unit: Unit, kind: Kind, tier: Tier) -> int:
        """Bytes of the kind that live in the tier."""
        if (unit.index, kind) not in self.ahead:  # a plan asks so often that it pays
            return unit.chunks[kind].nbytes if self.of(unit, kind) is tier else 0
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
        return window + sum(self.bytes_in(unit, kind, tier) for unit in units for kind in unit.chunks)


def create_chunks(manager: Manager, units: list[Unit], homes: Homes) -> None:
    """Gives every chunk its permanent place or places. States that have several are cut into a chunk for each.

    Weights and gradients stay one chunk, for torch wants them in one piece; an update of weights that are all in memory is cut
    where their parts end.
    """
    ids = count(1 + max(chunk.id for unit in units for chunk in unit.chunks.values()))
    for unit in units:
        unit.split_states(homes.cuts(unit, unit.states[0].kind) if unit.states else [], ids)
        if homes.of(unit, Kind.PARAM) is not Tier.NVME:
            unit.cut_pieces(homes.cuts(unit, Kind.PARAM))
        for kind, chunk in unit.chunks.items():
            places = [(tier, chunk.bytes_of(n)) for tier, n in homes.parts(unit, kind)]
            if kind in STATES:
                for part, place in zip(unit.parts(kind), places, strict=True):
                    manager.create(part, [place])
            else:
                manager.create(chunk, places)


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
    return _bytes_per_element(tuple(unit.layouts[kind] for kind in kinds))


@lru_cache
def _bytes_per_element(layouts: tuple[KindLayout, ...]) -> Fraction:
    return sum((layout.bytes_per_element for layout in layouts), Fraction(0))


def second_slots(unit: Unit, homes: Homes) -> list[Chunk]:
    """What an update of the unit overwrites, if it may run in the backward: its states are on NVMe, all of them, its weights
    in one tier, and its gradient in memory.
    """
    if homes.of_states(unit) is not Tier.NVME or homes.split(unit) or homes.of(unit, Kind.GRAD) is Tier.NVME:
        return []
    return [chunk for kind, chunk in unit.chunks.items() if kind is not Kind.GRAD]
