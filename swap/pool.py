"""Pools hand out leases of an arena's bytes."""

from __future__ import annotations

import bisect
import random
import sys
from dataclasses import dataclass

import torch

from tierflow.swap.arena import Arena, CudaArena
from tierflow.swap.types import IO_BYTES, CapacityError

AnyArena = Arena | CudaArena


def _use_count(data: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(data.untyped_storage()._cdata)


def _own_uses() -> int:
    """What a storage with a single tensor counts: 1 or 2, as this torch keeps the handle made for the question."""
    return _use_count(torch.zeros(1))


_OWN_USES = _own_uses()


def aliases(data: torch.Tensor) -> int:
    """How many live tensors beside this one refer to its memory."""
    return _use_count(data) - _OWN_USES


@dataclass(eq=False)
class Lease:
    """Sole ownership of ``nbytes`` at ``offset`` of a pool's arena until ``release``."""

    pool: Pool
    offset: int
    nbytes: int
    data: torch.Tensor | None  # uint8, shape (nbytes,)

    def bytes(self) -> torch.Tensor:
        """The leased memory as uint8 of shape (nbytes,)."""
        assert self.data is not None, "lease was released"
        return self.data

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        """The leased memory as a flat tensor of ``dtype``."""
        return self.bytes().view(dtype)

    def aliases(self) -> int:
        """How many live tensors beside this lease's own refer to the memory."""
        return aliases(self.bytes())

    def release(self) -> None:
        """Returns the memory to its pool; idempotent."""
        if self.data is not None:
            self.pool._give_back(self)
            self.data = None


@dataclass
class DebugMemory:
    """Test aid: leases at random places, freed memory filled with NaN patterns.

    ``through_host``: files are read into HOST memory first, as with an accelerator.
    """

    rng: random.Random
    through_host: bool = False


class Pool:
    """A best-fit allocator over ``[start, start + nbytes)`` of an arena, in multiples of IO_BYTES.

    Large leases grow from the low end and small ones from the high end, so that a big embedding and the
    blocks that stream past it do not fragment each other.
    """

    def __init__(self, name: str, arena: AnyArena, start: int, nbytes: int, debug: DebugMemory | None = None):
        self.name, self.arena, self.start, self.nbytes, self.debug = name, arena, start, nbytes, debug
        self._free: list[tuple[int, int]] = [(start, nbytes)] if nbytes else []
        self.leased = 0
        self.peak = 0
        self.large = nbytes // 4

    def lease(self, nbytes: int, lowest: bool = False) -> Lease:
        """Leases ``nbytes`` (rounded up to IO_BYTES). Raises CapacityError when no free run is that long.

        ``lowest``: at the smallest offset there is, for moving leases together.
        """
        size = -(-nbytes // IO_BYTES) * IO_BYTES
        fits = [i for i, (_, length) in enumerate(self._free) if length >= size]
        if not fits or size == 0:
            raise CapacityError(self.name, nbytes, self.free, self.largest, 0)
        index, offset = (fits[0], self._free[fits[0]][0]) if lowest else self._choose(fits, size)
        begin, length = self._free[index]
        rest = [(begin, offset - begin), (offset + size, begin + length - offset - size)]
        self._free[index : index + 1] = [r for r in rest if r[1]]
        self.leased += size
        self.peak = max(self.peak, self.leased)
        return Lease(self, offset, size, self.arena.bytes_at(offset, size))

    def _choose(self, fits: list[int], size: int) -> tuple[int, int]:
        if self.debug is not None:
            index = self.debug.rng.choice(fits)
            begin, length = self._free[index]
            return index, begin + self.debug.rng.randrange((length - size) // IO_BYTES + 1) * IO_BYTES
        index = min(fits, key=lambda i: self._free[i][1])
        begin, length = self._free[index]
        return index, begin if size > self.large else begin + length - size

    def _give_back(self, lease: Lease) -> None:
        if self.debug is not None:
            lease.bytes().fill_(0xFF)  # NaN in fp32, bf16 and fp16
        self.leased -= lease.nbytes
        self._insert(lease.offset, lease.offset + lease.nbytes)

    def add(self, offset: int, nbytes: int) -> None:
        """Enlarges the pool by a run of the arena that nobody else leases out meanwhile."""
        self.nbytes += nbytes
        self._insert(offset, offset + nbytes)

    def remove(self, offset: int, nbytes: int) -> None:
        """Takes a run out of the pool again; all of it must be free."""
        at = bisect.bisect(self._free, (offset, sys.maxsize)) - 1
        begin, length = self._free[at]
        assert at >= 0 and begin <= offset and offset + nbytes <= begin + length, "the run is leased"
        rest = [(begin, offset - begin), (offset + nbytes, begin + length - offset - nbytes)]
        self._free[at : at + 1] = [r for r in rest if r[1]]
        self.nbytes -= nbytes

    def _insert(self, begin: int, end: int) -> None:
        at = bisect.bisect(self._free, (begin, 0))
        if at < len(self._free) and self._free[at][0] == end:
            end += self._free.pop(at)[1]
        if at > 0 and sum(self._free[at - 1]) == begin:
            at -= 1
            begin = self._free.pop(at)[0]
        self._free.insert(at, (begin, end - begin))

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(offset, bytes) of every free run."""
        return list(self._free)

    @property
    def free(self) -> int:
        """Bytes not leased."""
        return self.nbytes - self.leased

    @property
    def largest(self) -> int:
        """Bytes of the longest free run."""
        return max((length for _, length in self._free), default=0)
