"""Which tier each kind of each unit lives in for good, under the caps.

The placement names the slowest tier that a kind may live in. Room that is left in a faster tier is filled in the order
of first use, with weights and then with gradients and optimizer states, each cut where the room ends: any number of bytes
of a kind is in each tier. What lives in memory crosses no link at all; a cache of the same size would spare the reads only.
The first units of the order are those that the next forward and its updates need before anything could be brought up.
States go to DEVICE once all weights live there.

[Note: a part of a unit's weights on DEVICE] lies there beside the copy of the whole that torch needs while it computes. It
spares the drive two reads and a write of each byte, or takes it from HOST, where other things find room then. But it takes
room from copies that would be cached, and on an accelerator it is staged in HOST for its update, as weights that live there
whole are (and its states are not read ahead of the step): where that costs the drive more, no unit is cut.

[Note: states on an accelerator] They are updated by the processor's kernels, so that the caps decide no bit. In HOST they
cross no link, on the DEVICE they cross the bus, which is still faster than a drive. So HOST is filled with states first,
and DEVICE takes what would live on NVMe. Without an accelerator the two are one memory, and DEVICE comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from tierflow.scheduler.cache import Cache
from tierflow.scheduler.homes import Homes, needs_of
from tierflow.scheduler.placement import Caps, Needs, Placement, Together
from tierflow.scheduler.trace import Trace
from tierflow.scheduler.units import Unit
from tierflow.swap import IO_BYTES, Kind, Tier


def choose_homes(units: list[Unit], placement: Placement, caps: Caps, together: Together, order: list[int]) -> Homes:
    """The homes that leave the drive least to do. ``order``: unit indices in order of use.

    A byte of weights takes more off the drive than one of states. But once memory has all states, no update needs room on
    their way, and weights get that.
    """
    by_use = sorted(units, key=lambda u: order.index(u.index) if u.index in order else len(order))
    found = [_fill_tiers(by_use, placement, caps, together, all_states, True) for all_states in (False, True)]
    if any(homes.bytes_in(u, Kind.PARAM, Tier.DEVICE) for homes in found for u in homes.streamed(units)):
        found += [_fill_tiers(by_use, placement, caps, together, all_states, False) for all_states in (False, True)]

    def cost(homes: Homes) -> tuple[int, int]:
        need = homes.stay(units, Tier.HOST) + needs_of(homes, units, placement, together).host_min
        return max(need - caps.host, 0), _traffic(homes, units, caps, order)

    return min(found, key=cost)


def _traffic(homes: Homes, units: list[Unit], caps: Caps, order: list[int]) -> int:
    """Bytes of a step to and from NVMe, nearly: weights are read as often as DEVICE lacks them, all else once; all but frozen
    weights is written once.
    """
    weights = {u.index: homes.bytes_in(u, Kind.PARAM, Tier.NVME) for u in units}
    others = sum(homes.bytes_in(u, kind, Tier.NVME) for u in units for kind in u.chunks if kind is not Kind.PARAM)
    cache = Cache(caps.device - homes.stay(units, Tier.DEVICE), homes.streamed(units))
    _, fetched = cache.passes(Trace(list(order)), prefetch=True)
    return 2 * others + sum(weights[u.index] for u in units if u.trainable) + sum(weights[i] for i in fetched)


def _fill_tiers(
    units: list[Unit], placement: Placement, caps: Caps, together: Together, all_states: bool, cut_on_device: bool
) -> Homes:
    """``units``: in order of first use. ``all_states``: all of them come before weights in HOST, if there is room.
    ``cut_on_device``: DEVICE takes a part of a unit's weights where it has no room for a whole unit.
    """
    homes = Homes({(u.index, kind): placement.home(kind) for u in units for kind in u.chunks})

    def room(tier: Tier) -> int:
        needs = needs_of(homes, units, placement, together)
        good = needs.device_good if tier is Tier.DEVICE else needs.host_good
        return caps.of(tier) - homes.stay(units, tier) - good

    def weights_to(tier: Tier, slower: list[Unit]) -> None:
        _fill(homes, [[(u.index, Kind.PARAM)] for u in slower], tier, partial(room, tier))

    def weights_to_host() -> None:
        weights_to(Tier.HOST, homes.from_nvme(units))
        _keep(homes, homes.from_nvme(units), Kind.PARAM, Tier.HOST, partial(room, Tier.HOST))

    weights_to(Tier.DEVICE, homes.streamed(units))
    # a large one that went there leaves the room that it needed on its way to those before it
    while (streamed := homes.streamed(units)) and room(Tier.DEVICE) >= min(u.chunk.nbytes for u in streamed):
        weights_to(Tier.DEVICE, streamed)
    if cut_on_device:
        _keep(homes, homes.streamed(units), Kind.PARAM, Tier.DEVICE, partial(room, Tier.DEVICE))
    _spill_gradients(homes, units, placement, caps, together)
    if all_states:
        _fill_all(homes, _states(homes, units, (Tier.NVME,)), Tier.HOST, partial(room, Tier.HOST))
    weights_to_host()
    if placement.gradients == "auto":
        _keep(homes, homes.spilled(units), Kind.GRAD, Tier.HOST, partial(room, Tier.HOST))
    on_device = () if homes.streamed(units) else (Tier.HOST, Tier.NVME) if placement.device_is_host else (Tier.NVME,)
    turns = [(Tier.DEVICE, on_device), (Tier.HOST, (Tier.NVME,))]
    for tier, slower in turns if placement.device_is_host else reversed(turns):
        _fill_with_states(homes, units, tier, slower, partial(room, tier))
    weights_to_host()
    return homes


def _spill_gradients(homes: Homes, units: list[Unit], placement: Placement, caps: Caps, together: Together) -> None:
    """Moves gradients from HOST to NVMe, where states are too: none that fits, unless that was asked for.

    The last units in order of use come first: theirs are the first gradients of a backward and wait longest.
    """
    if placement.optimizer is not Tier.NVME or placement.gradients == "host":
        return

    def short(of_working: Callable[[Needs], int]) -> bool:
        return homes.stay(units, Tier.HOST) + of_working(needs_of(homes, units, placement, together)) > caps.host

    if placement.gradients == "auto" and not short(lambda needs: needs.host_min):
        return
    for unit in reversed([u for u in units if u.trainable]):
        if placement.gradients == "auto" and not short(lambda needs: needs.host_good):
            return
        homes.tiers[unit.index, Kind.GRAD] = Tier.NVME


def _keep(homes: Homes, units: list[Unit], kind: Kind, tier: Tier, room: Callable[[], int]) -> None:
    """Gives a tier bytes of what lives in slower ones, as far as there is room; a little of each unit stays in its last tier."""
    for unit in units:
        if room() < IO_BYTES:
            return
        grain, chunk = unit.grain, unit.chunks[kind]
        kept = homes.ahead.get((unit.index, kind), {})
        more = min(room() // chunk.bytes_of(grain) * grain, (chunk.numel - 1) // grain * grain - sum(kept.values()))
        if more > 0:
            homes.ahead[unit.index, kind] = kept | {tier: kept.get(tier, 0) + more}


def _fill_with_states(
    homes: Homes, units: list[Unit], tier: Tier, slower: Collection[Tier], room: Callable[[], int]
) -> None:
    """Moves what lives in ``slower`` tiers: units in order as they fit, then a part of the first that did not."""
    _fill(homes, _states(homes, units, slower), tier, room)
    for cut in [u for u in units if homes.of_states(u) in slower][:1]:
        part = room() // sum(chunk.bytes_of(cut.grain) for chunk in cut.states) * cut.grain
        for chunk in cut.states if part > 0 else ():
            ahead = homes.ahead.setdefault((cut.index, chunk.kind), {})
            ahead[tier] = part


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
