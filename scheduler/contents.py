"""Reading and writing whole chunks by value: loading, saving, write-back. Host memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tierflow.cpu_adam import kernels
from tierflow.scheduler.units import Slot, Unit
from tierflow.swap import IO_BYTES, CapacityError, Chunk, Kind, Manager, Tier
from tierflow.swap.manager import Victims
from tierflow.swap.tickets import finish

#: Bytes moved at a time between a home on NVMe and anything else.
SPAN_BYTES = 8 << 20


def read_bytes(manager: Manager, unit: Unit, kind: Kind, begin: int, end: int, victims: Victims) -> torch.Tensor:
    """Bytes [begin, end) of a kind's true content as a new uint8 CPU tensor."""
    out = torch.empty(end - begin, dtype=torch.uint8)
    for chunk, first, low, high in _parts(unit, kind, begin, end):
        _read_part(manager, chunk, low - first, out[low - begin : high - begin], victims)
    return out


def write_bytes(manager: Manager, unit: Unit, kind: Kind, begin: int, data: torch.Tensor, victims: Victims) -> None:
    """Replaces bytes of the home; the caller answers for other copies (``Manager.wrote``)."""
    manager.reclaim()  # states that were read ahead, which go first, may be these
    for chunk, first, low, high in _parts(unit, kind, begin, begin + data.nbytes):
        _write_part(manager, chunk, low - first, data[low - begin : high - begin], victims)


def _parts(unit: Unit, kind: Kind, begin: int, end: int) -> Iterator[tuple[Chunk, int, int, int]]:
    """Of each chunk that holds any of the kind's bytes [begin, end): where it begins, and those that it holds."""
    first = 0
    for chunk in unit.parts(kind):
        low, high = max(begin, first), min(end, first + chunk.nbytes)
        if low < high:
            yield chunk, first, low, high
        first += chunk.nbytes


def _read_part(manager: Manager, chunk: Chunk, begin: int, out: torch.Tensor, victims: Victims) -> None:
    end, done = begin + out.nbytes, 0
    for there in manager.at_home(chunk, begin, end):
        out[done : done + there.nbytes].copy_(there)
        done += there.nbytes
    if done == out.nbytes:
        return
    for low, high, scratch in _spans(manager, chunk, begin, end, victims):
        finish(manager.nvme.read(chunk, scratch, low))
        a, b = max(low, begin), min(high, end)
        out[a - begin : b - begin] = scratch[a - low : b - low]


def _write_part(manager: Manager, chunk: Chunk, begin: int, data: torch.Tensor, victims: Victims) -> None:
    manager.fetches.settle_chunk(chunk)  # a prefetch under way would keep the old bytes, or half of them
    end, done = begin + data.nbytes, 0
    for there in manager.at_home(chunk, begin, end):
        there.copy_(data[done : done + there.nbytes])
        done += there.nbytes
    if done == data.nbytes:
        return
    for low, high, scratch in _spans(manager, chunk, begin, end, victims):
        a, b = max(low, begin), min(high, end)
        if (a, b) != (low, high):
            finish(manager.nvme.read(chunk, scratch, low))
        scratch[a - low : b - low] = data[a - begin : b - begin]
        finish(manager.nvme.write(chunk, scratch, low))


def _spans(manager: Manager, chunk: Chunk, begin: int, end: int, victims: Victims):  # type: ignore[no-untyped-def]
    """(low, high, staging) over the aligned spans that cover [begin, end)."""
    if begin >= end:
        return
    first = begin // IO_BYTES * IO_BYTES
    size = min(SPAN_BYTES, -(-(end - first) // IO_BYTES) * IO_BYTES)
    lease = None
    while lease is None:
        try:
            lease = manager.scratch(Tier.HOST, size, victims)
        except CapacityError:
            if size <= IO_BYTES:
                raise
            size = size // 2 // IO_BYTES * IO_BYTES  # under the least memory the update's staging is all there is
    try:
        for low in range(first, end, size):
            high = min(low + size, chunk.nbytes, -(-end // IO_BYTES) * IO_BYTES)
            yield low, high, lease.bytes()[: high - low]
    finally:
        manager.drop_scratch(Tier.HOST, lease)


def read_parameter(manager: Manager, unit: Unit, slot: Slot, victims: Victims) -> torch.Tensor:
    """A copy of one parameter from its home, on the CPU."""
    return read_bytes(manager, unit, Kind.PARAM, *slot_bytes(unit.chunk, slot), victims).view(unit.dtype).view(slot.shape)


def slot_bytes(chunk: Chunk, slot: Slot) -> tuple[int, int]:
    """Where the parameter's bytes begin and end in a whole kind of its unit."""
    begin = chunk.bytes_of(slot.offset)
    return begin, begin + chunk.bytes_of(slot.numel)


def store_parameter(manager: Manager, unit: Unit, slot: Slot, values: torch.Tensor, victims: Victims) -> None:
    """Writes ``values`` (any float dtype, on the CPU) to the parameter's home, and what MASTER holds of them.

    The caller answers for other copies of the weights.
    """
    master = unit.chunks.get(Kind.MASTER)
    values = values.detach().contiguous().view(-1)
    working = values.to(unit.dtype)
    if master is not None:
        kept = unit.layouts[Kind.MASTER].dtype
        rest = values.float() if kept == torch.float32 else torch.zeros(slot.numel, dtype=kept)
        if kept != torch.float32 and values.dtype != torch.bfloat16:  # a bf16 value is its own master: nothing is left
            working, rest = _split(values.float(), kept)
        _put(manager, unit, Kind.MASTER, slot, rest, victims)
    _put(manager, unit, Kind.PARAM, slot, working, victims)


def _split(master: torch.Tensor, kept: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The bf16 half of an fp32 master, and the int16 remainder or the int8 correction nearest to it."""
    half, remainder = (torch.empty(master.numel(), dtype=d) for d in (torch.bfloat16, torch.int16))
    kernels.split(master, half, remainder)
    if kept == torch.int16:
        return half, remainder
    return half, ((remainder.int() + 0x80) >> 8).clamp_(max=0x7F).to(torch.int8)


def join_master(half: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """The fp32 master of a weight and what MASTER holds of it; flat."""
    if rest.dtype == torch.float32:
        return rest
    out = torch.empty(rest.numel())
    remainder = rest if rest.dtype == torch.int16 else rest.to(torch.int16) << 8
    kernels.join(half.view(-1), remainder, out)
    return out


def follow_user(manager: Manager, unit: Unit, slot: Slot, weights: torch.Tensor, victims: Victims) -> None:
    """Makes MASTER agree with ``weights`` that were written in place: nothing left, or the value where it differs."""
    master, weights = unit.chunks[Kind.MASTER], weights.contiguous().view(-1)
    kept = unit.layouts[Kind.MASTER].dtype
    if kept != torch.float32:
        _put(manager, unit, Kind.MASTER, slot, torch.zeros(slot.numel, dtype=kept), victims)
        return
    held = read_bytes(manager, unit, Kind.MASTER, *slot_bytes(master, slot), victims).view(torch.float32)
    changed = held.to(unit.dtype) != weights
    _put(manager, unit, Kind.MASTER, slot, torch.where(changed, weights.float(), held), victims)


class UserWrites:
    """Weights on DEVICE whose master is kept elsewhere: a user can write them at any time (load_state_dict, say).

    One that was written in place since the last ``note`` is the new master.
    """

    def __init__(self, manager: Manager, units: list[Unit]):
        self._manager, self._units = manager, units
        self._versions: dict[int, int] = {}

    def _split_on_device(self) -> Iterator[tuple[Unit, Slot, torch.Tensor]]:
        for unit in self._units:
            if Kind.MASTER in unit.chunks and self._manager.home(unit.chunk) is Tier.DEVICE:
                yield from ((unit, s, p) for s, p in zip(unit.slots, unit.params, strict=True))

    def note(self) -> None:
        """What the weights are now is what their masters say."""
        self._versions = {id(p): p._version for _, _, p in self._split_on_device()}

    def follow(self, victims: Victims) -> None:
        """Makes masters agree with what was written."""
        for unit, slot, p in self._split_on_device():
            if p._version != self._versions[id(p)]:
                follow_user(self._manager, unit, slot, p.detach().cpu(), victims)

    def master_came_too(self, unit: Unit) -> None:
        """The unit's weights were replaced together with their master."""
        self._versions.update({id(p): p._version for p in unit.params if id(p) in self._versions})


def _put(manager: Manager, unit: Unit, kind: Kind, slot: Slot, values: torch.Tensor, victims: Victims) -> None:
    begin, _ = slot_bytes(unit.chunks[kind], slot)
    write_bytes(manager, unit, kind, begin, values.contiguous().view(torch.uint8), victims)


def write_back(manager: Manager, unit: Unit, victims: Victims) -> bool:
    """Carries the DEVICE copy home if it differs; zeroes what MASTER held of the weights that changed."""
    chunk = unit.chunk
    now = manager.memory(chunk, Tier.DEVICE).bytes()[: chunk.nbytes].to("cpu")
    home = manager.home(chunk)
    before = now if home is Tier.DEVICE else read_bytes(manager, unit, Kind.PARAM, 0, chunk.nbytes, victims)
    if home is not Tier.DEVICE and torch.equal(now, before):
        return False
    if home is not Tier.DEVICE:
        write_bytes(manager, unit, Kind.PARAM, 0, now, victims)
        manager.wrote(chunk, Tier.DEVICE)
        manager.ledger.renew(chunk, home)
    if Kind.MASTER in unit.chunks:
        _follow(manager, unit, now.view(unit.dtype), before.view(unit.dtype), victims)
    return True


def _follow(manager: Manager, unit: Unit, now: torch.Tensor, before: torch.Tensor, victims: Victims) -> None:
    """Makes MASTER agree with weights that a user set: nothing left, or the fp32 value."""
    kept, nbytes = unit.layouts[Kind.MASTER].dtype, unit.chunks[Kind.MASTER].nbytes
    held = read_bytes(manager, unit, Kind.MASTER, 0, nbytes, victims)
    if kept != torch.float32:
        held.view(kept)[now != before] = 0
    else:
        changed = now.float() != held.view(torch.float32).to(unit.dtype).float()
        held.view(torch.float32)[changed] = now.float()[changed]
    write_bytes(manager, unit, Kind.MASTER, 0, held, victims)
