"""The words of the swap layer: tiers, kinds, chunks and typed failures."""

from __future__ import annotations

import enum
from dataclasses import dataclass

#: Every parameter, shard and lease starts on a multiple of this, in every placement: batch-1 matrix
#: products give other bits when a weight sits at a smaller alignment.
ALIGN_BYTES = 256
#: Offsets and sizes of anything that crosses the NVMe link (O_DIRECT's usual requirement).
IO_BYTES = 4096


class Tier(enum.Enum):
    """Where bytes can be, fastest first. Without an accelerator DEVICE is ordinary memory under a cap."""

    __hash__ = object.__hash__  # members are what they are: the inherited one hashes their name, in Python

    DEVICE = "device"
    HOST = "host"
    NVME = "nvme"


class Kind(enum.Enum):
    """What a chunk holds. MASTER is what PARAM lacks of fp32 (absent when PARAM is fp32), SCALE what 8-bit moments are in
    units of; which of these and of the moments there are is the state format's and the update rule's."""

    __hash__ = object.__hash__  # members are what they are: the inherited one hashes their name, in Python

    PARAM = "param"
    GRAD = "grad"
    MASTER = "master"
    EXP_AVG = "exp_avg"
    EXP_AVG_SQ = "exp_avg_sq"
    SCALE = "scale"


class CopyState(enum.Enum):
    """State of one chunk's copy in one tier."""

    __hash__ = object.__hash__  # members are what they are: the inherited one hashes their name, in Python

    ABSENT = "absent"
    FILLING = "filling"
    VALID = "valid"
    STALE = "stale"


@dataclass(frozen=True)
class Chunk:
    """One rank's shard of one kind of one unit, or what of it lives in one tier.

    It serves the elements ``[begin, begin + numel)`` of the rank's share of the unit's padded flat buffer, with ``itemsize``
    bytes for each ``group`` of them. All kinds of a unit share the element layout.
    """

    id: int
    unit: int
    kind: Kind
    itemsize: int
    numel: int
    rank: int = 0
    world: int = 1
    group: int = 1
    begin: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of this shard; a multiple of IO_BYTES."""
        return self.bytes_of(self.numel)

    def bytes_of(self, elements: int) -> int:
        """Bytes for so many elements from the beginning of a group on; the last group may be short."""
        return -(-elements // self.group) * self.itemsize


class CapacityError(RuntimeError):
    """A tier has no room: names the tier, and the bytes requested, free, largest free run and pinned."""

    def __init__(self, tier: str, requested: int, free: int, largest: int, pinned: int, remedy: str = ""):
        self.tier, self.requested, self.free, self.largest, self.pinned = tier, requested, free, largest, pinned
        text = (
            f"{tier} memory: {requested:,} bytes requested, {free:,} free (largest run {largest:,}), "
            f"{pinned:,} pinned"
        )
        super().__init__(f"{text}. {remedy}" if remedy else text)


class LedgerError(RuntimeError):
    """A transition that the residency table does not allow: a defect of tierflow, never of its user."""
