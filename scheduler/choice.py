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

from collections.abc import Callable, Collection
from functools import partial

from tierflow.scheduler.homes import Homes, needs_of
from tierflow.scheduler.placement import Caps, Needs, Placement, Together
from tierflow.scheduler.units import Unit
from tierflow.swap import Kind, Tier


def choose_homes(units: list[Unit], placement: Placement, caps: Caps, together: Together, order: list[int]) -> Homes:
    """The homes that leave the drive least to do. ``order``: unit indices in order of use.

    A byte of weights takes more off the drive than one of states. But once memory has all states, no update needs room on
    their way, and weights get that.
    """
    by_use = sorted(units, key=lambda u: order.index(u.index) if u.index in order else len(order))
    found = [_fill_tiers(by_use, placement, caps, together, all_states) for all_states in (False, True)]
    return min(found, key=lambda homes: _traffic(homes, units))


def _traffic(homes: Homes, units: list[Unit]) -> int:
    """Bytes of a step to and from NVMe, nearly: all is read and written, weights are read twice, frozen ones not written."""
    everything = sum(homes.bytes_in(u, kind, Tier.NVME) for u in units for kind in u.chunks)
    trained_weights = sum(homes.bytes_in(u, Kind.PARAM, Tier.NVME) for u in units if u.trainable)
    return 2 * everything + trained_weights


def _fill_tiers(units: list[Unit], placement: Placement, caps: Caps, together: Together, all_states: bool) -> Homes:
    """``units``: in order of first use. ``all_states``: all of them come before weights, if there is room."""
    homes = Homes({(u.index, kind): placement.home(kind) for u in units for kind in u.chunks})

    def room(tier: Tier) -> int:
        needs = needs_of(homes, units, placement, together)
        good = needs.device_good if tier is Tier.DEVICE else needs.host_good
        return caps.of(tier) - homes.stay(units, tier) - good

    def weights_to(tier: Tier, slower: list[Unit]) -> None:
        _fill(homes, [[(u.index, Kind.PARAM)] for u in slower], tier, partial(room, tier))

    def weights_to_host() -> None:
        weights_to(Tier.HOST, homes.from_nvme(units))
        _keep(homes, homes.from_nvme(units), Kind.PARAM, partial(room, Tier.HOST))

    weights_to(Tier.DEVICE, homes.streamed(units))
    _spill_gradients(homes, units, placement, caps, together)
    if all_states:
        _fill_all(homes, _states(homes, units, (Tier.NVME,)), Tier.HOST, partial(room, Tier.HOST))
    weights_to_host()
    if placement.gradients == "auto":
        _keep(homes, homes.spilled(units), Kind.GRAD, partial(room, Tier.HOST))
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


def _keep(homes: Homes, units: list[Unit], kind: Kind, room: Callable[[], int]) -> None:
    """Gives HOST the first bytes of what lives on NVMe, as far as there is room; a little stays there of each."""
    for unit in units:
        grain, chunk = unit.grain, unit.chunks[kind]
        kept = homes.kept.get((unit.index, kind), 0)
        more = min(max(room(), 0) // chunk.bytes_of(grain) * grain, (chunk.numel - 1) // grain * grain - kept)
        if more > 0:
            homes.kept[unit.index, kind] = kept + more


def _fill_with_states(
    homes: Homes, units: list[Unit], tier: Tier, slower: Collection[Tier], room: Callable[[], int]
) -> None:
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
