"""Which tier each kind of each unit lives in for good, under the caps.

The placement names the slowest tier that a kind may live in. Room that is left in a faster tier is filled in the order
of first use, with weights and then with gradients and optimizer states, each cut where the room ends: DEVICE takes weights
by the unit, all else is in any number of bytes in each tier. What lives in memory crosses no link at all; a cache of the
same size would spare the reads only. The first units of the order are those that the next forward and its updates need
before anything could be brought up. While weights stream through DEVICE, what is left there is their cache, and serves what
no plan can know (a view that is kept, a checkpoint within a block); states go there once all weights live there.

[Note: states on an accelerator] They are updated by the processor's kernels, so that the caps decide no bit. In HOST they
cross no link, on the DEVICE they cross the bus, which is still faster than a drive. So HOST is filled with states first,
and DEVICE takes what would live on NVMe. Without an accelerator the two are one memory, and DEVICE comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, count

from tierflow.scheduler.placement import Caps, Needs, Placement, Together, working_needs
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


def choose_homes(
    units: list[Unit], placement: Placement, caps: Caps, together: Together, order: list[int]
) -> Homes:
    """The homes that leave the drive least to do. ``order``: unit indices in order of use.

    A byte of weights takes more off the drive than one of states. But once memory has all states, no update needs room on
    their way, and weights get that.
    """
    first = sorted(units, key=lambda u: order.index(u.index) if u.index in order else len(order))
    found = [_fill_caps(units, first, placement, caps, together, all_states) for all_states in (False, True)]
    return min(found, key=lambda homes: _traffic(homes, units))


def _traffic(homes: Homes, units: list[Unit]) -> int:
    """Bytes of a step to and from NVMe, nearly: all is read and written, weights are read twice, frozen ones not written."""
    twice = sum(homes.bytes_in(u, kind, Tier.NVME) for u in units for kind in u.chunks)
    return 2 * twice + sum(homes.bytes_in(u, Kind.PARAM, Tier.NVME) for u in units if u.trainable)


def _fill_caps(
    units: list[Unit], first: list[Unit], placement: Placement, caps: Caps, together: Together, all_states: bool
) -> Homes:
    """``first``: the units in order of first use. ``all_states``: all of them come before weights, if there is room."""
    homes = Homes({(u.index, kind): placement.home(kind) for u in units for kind in u.chunks})

    def room(tier: Tier) -> int:
        needs = needs_of(homes, units, placement, together)
        good = needs.device_good if tier is Tier.DEVICE else needs.host_good
        return caps.of(tier) - _stay(homes, units, tier) - good

    def weights_to(tier: Tier, slower: list[Unit]) -> None:
        _fill(homes, [[(u.index, Kind.PARAM)] for u in slower], tier, partial(room, tier))

    def weights_to_host() -> None:
        weights_to(Tier.HOST, homes.from_nvme(first))
        _keep(homes, homes.from_nvme(first), Kind.PARAM, partial(room, Tier.HOST))

    weights_to(Tier.DEVICE, homes.streamed(first))
    _spill_gradients(homes, first, placement, caps, together)
    if all_states:
        _fill_all(homes, _states(homes, first, (Tier.NVME,)), Tier.HOST, partial(room, Tier.HOST))
    weights_to_host()
    if placement.gradients == "auto":
        _keep(homes, homes.spilled(first), Kind.GRAD, partial(room, Tier.HOST))
    on_device = () if homes.streamed(units) else (Tier.HOST, Tier.NVME) if placement.device_is_host else (Tier.NVME,)
    turns = [(Tier.DEVICE, on_device), (Tier.HOST, (Tier.NVME,))]
    for tier, slower in turns if placement.device_is_host else reversed(turns):
        _fill_with_states(homes, first, tier, slower, partial(room, tier))
    weights_to_host()
    return homes


def _spill_gradients(homes: Homes, units: list[Unit], placement: Placement, caps: Caps, together: Together) -> None:
    """Moves gradients from HOST to NVMe, where states are too: none that fits, unless that was asked for.

    The last units in order of use come first: theirs are the first gradients of a backward and wait longest.
    """
    if placement.optimizer is not Tier.NVME or placement.gradients == "host":
        return

    def short(of_working: Callable[[Needs], int]) -> bool:
        return _stay(homes, units, Tier.HOST) + of_working(needs_of(homes, units, placement, together)) > caps.host

    if placement.gradients == "auto" and not short(lambda needs: needs.host_min):
        return
    for unit in reversed([u for u in units if u.trainable]):
        if placement.gradients == "auto" and not short(lambda needs: needs.host_good):
            return
        homes.tiers[unit.index, Kind.GRAD] = Tier.NVME


def _keep(homes: Homes, units: list[Unit], kind: Kind, room: Callable[[], int]) -> None:
    """Gives HOST the first bytes of what lives on NVMe, as far as there is room; a little stays there of each."""
    for unit in units:
        grain, chunk = unit.grain, unit.chunks[kind]
        kept = homes.kept.get((unit.index, kind), 0)
        more = min(max(room(), 0) // chunk.bytes_of(grain) * grain, (chunk.numel - 1) // grain * grain - kept)
        if more > 0:
            homes.kept[unit.index, kind] = kept + more


def _fill_with_states(homes: Homes, units: list[Unit], tier: Tier, slower: Collection[Tier], room: Callable[[], int]) -> None:
    """Moves what lives in ``slower`` tiers: units in order as they fit, then a part of the first that did not."""
    _fill(homes, _states(homes, units, slower), tier, room)
    for cut in [u for u in units if homes.of_states(u) in slower][:1]:
        part = room() // sum(chunk.bytes_of(cut.grain) for chunk in cut.states) * cut.grain
        if part > 0:
            homes.ahead[cut.index] = homes.ahead.get(cut.index, {}) | {tier: part}


def _states(homes: Homes, units: list[Unit], tiers: Collection[Tier]) -> list[list[tuple[int, Kind]]]:
    """By unit, the states that live in these tiers."""
    return [[(u.index, chunk.kind) for chunk in u.states] for u in units if homes.of_states(u) in tiers]


def _fill(homes: Homes, items: list[list[tuple[int, Kind]]], tier: Tier, room: Callable[[], int]) -> None:
    """Gives all items a faster home, or else those that fit one after the other.

    There may be room for all and not for all but one: what still comes and goes needs room on its way.
    """
    if not _fill_all(homes, items, tier, room):
        for item in items:
            _fill_all(homes, [item], tier, room)


def _fill_all(homes: Homes, items: list[list[tuple[int, Kind]]], tier: Tier, room: Callable[[], int]) -> bool:
    """Gives all items a faster home, or none; whether there was room."""
    before = {chunk: homes.tiers[chunk] for item in items for chunk in item}
    homes.tiers.update(dict.fromkeys(before, tier))
    fits = room() >= 0
    if not fits:
        homes.tiers.update(before)
    return fits


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
    staging = [(u, kinds) for u in units if (kinds := staged_kinds(homes, u, placement))]
    return working_needs(placement, together, homes.streamed(units), homes.from_nvme(units), staging)


def staged_kinds(homes: Homes, unit: Unit, placement: Placement) -> list[Kind]:
    """What an update may have to bring to HOST: what lives where no kernel reaches, if that is more than weights on NVMe,
    which are brought up whole and updated then.
    """
    on_device = placement.device_is_host or placement.optimizer is Tier.DEVICE
    far = (Tier.NVME,) if on_device else (Tier.NVME, Tier.DEVICE)
    kinds = [kind for kind in unit.chunks if any(n and tier in far for tier, n in homes.parts(unit, kind))]
    if not unit.trainable or (kinds == [Kind.PARAM] and homes.of(unit, Kind.PARAM) is Tier.NVME):
        return []
    # an update that may be undone keeps the old weights there, where memory has them
    kept = placement.speculative and second_slots(unit, homes) and homes.of(unit, Kind.PARAM) is not Tier.NVME
    return [Kind.PARAM, *kinds] if kept else kinds


def second_slots(unit: Unit, homes: Homes) -> list[Chunk]:
    """What an update of the unit overwrites, if it may run in the backward: its states are on NVMe, all of them, its weights
    in one tier, and its gradient in memory.
    """
    if homes.of_states(unit) is not Tier.NVME or homes.split(unit) or homes.of(unit, Kind.GRAD) is Tier.NVME:
        return []
    return [chunk for kind, chunk in unit.chunks.items() if kind is not Kind.GRAD]


def _stay(homes: Homes, units: list[Unit], tier: Tier) -> int:
    window = homes.window(units) if tier is Tier.HOST else 0
    return window + sum(n for (t, _), n in homes.resident(units).items() if t is tier)
