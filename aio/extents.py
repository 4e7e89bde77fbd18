"""Which bytes of a store are whose. Pure bookkeeping: no file, no threads."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass

from .errors import OutOfSpace


@dataclass(frozen=True, order=True)
class Extent:
    """A contiguous range of a store, in bytes."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """The offset of the first byte behind it."""
        return self.offset + self.nbytes


def round_up(nbytes: int, granularity: int) -> int:
    """The least multiple of ``granularity`` that is at least ``nbytes``."""
    return -(-nbytes // granularity) * granularity


class ExtentAllocator:
    """Best fit, the lowest offset among equals; neighbours that are free are always one piece.

    Offsets and sizes are multiples of ``granularity``; sizes asked for are rounded up to it.
    """

    def __init__(self, capacity: int, granularity: int) -> None:
        self.granularity = granularity
        self.capacity = capacity - capacity % granularity
        self._free = [Extent(0, self.capacity)] if self.capacity else []  # by offset
        self._live: list[Extent] = []  # by offset
        self._starts: list[int] = []  # their offsets

    @property
    def allocated(self) -> int:
        """Bytes in live extents, rounding included."""
        return sum(extent.nbytes for extent in self._live)

    @property
    def largest(self) -> int:
        """Bytes of the largest free piece."""
        return max((extent.nbytes for extent in self._free), default=0)

    def allocate(self, nbytes: int) -> Extent:
        """Takes at least ``nbytes`` bytes.

        Raises ValueError unless positive, OutOfSpace when no piece is large enough.
        """
        if nbytes <= 0:
            raise ValueError(f"nbytes is {nbytes}: an extent has at least 1 byte")
        size = round_up(nbytes, self.granularity)
        fits = [index for index, piece in enumerate(self._free) if piece.nbytes >= size]
        if not fits:
            raise OutOfSpace(requested=size, free=self.capacity - self.allocated, largest=self.largest)
        best = min(fits, key=lambda index: self._free[index].nbytes)
        piece = self._free[best]
        rest = [Extent(piece.offset + size, piece.nbytes - size)] if piece.nbytes > size else []
        self._free[best : best + 1] = rest
        extent = Extent(piece.offset, size)
        insort(self._live, extent)
        insort(self._starts, extent.offset)
        return extent

    def free(self, extent: Extent) -> None:
        """Gives a live extent back. Raises ValueError for anything else, an extent freed before among it."""
        index = bisect_left(self._live, extent)
        if index == len(self._live) or self._live[index] != extent:
            raise ValueError(f"{extent} is not allocated in this store")
        del self._live[index], self._starts[index]
        start, end = extent.offset, extent.end
        at = bisect_left(self._free, extent)
        after = at
        if at > 0 and self._free[at - 1].end == start:
            at -= 1
            start = self._free[at].offset
        if after < len(self._free) and self._free[after].offset == end:
            end = self._free[after].end
            after += 1
        self._free[at:after] = [Extent(start, end - start)]

    def covers(self, offset: int, nbytes: int) -> bool:
        """Whether the range lies inside one live extent."""
        index = bisect_right(self._starts, offset)
        return index > 0 and offset + nbytes <= self._live[index - 1].end
