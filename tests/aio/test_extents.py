"""The extent allocator against a model that marks single granules."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tierflow.aio import Extent, ExtentAllocator, OutOfSpace

GRANULARITY = 4096
GRANULES = 24


class AllocatorMachine(RuleBasedStateMachine):
    """The model is a list of owners, one a granule: it knows nothing of free lists or of merging."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = ExtentAllocator(GRANULES * GRANULARITY + 17, GRANULARITY)
        self.owner: list[int | None] = [None] * GRANULES
        self.live: dict[int, Extent] = {}
        self.serial = 0

    def runs(self) -> list[int]:
        """Lengths of the free runs."""
        lengths = [0]
        for owner in self.owner:
            if owner is None:
                lengths[-1] += 1
            else:
                lengths.append(0)
        return [length for length in lengths if length]

    @rule(nbytes=st.integers(1, 8 * GRANULARITY))
    def allocate(self, nbytes: int) -> None:
        need = (nbytes - 1) // GRANULARITY + 1
        fitting = [length for length in self.runs() if length >= need]
        if not fitting:
            with pytest.raises(OutOfSpace) as raised:
                self.allocator.allocate(nbytes)
            assert raised.value.requested == need * GRANULARITY
            assert raised.value.free == self.owner.count(None) * GRANULARITY
            assert raised.value.largest == max(self.runs(), default=0) * GRANULARITY
            return
        before = sorted(self.runs())
        extent = self.allocator.allocate(nbytes)
        assert extent.offset % GRANULARITY == 0 and extent.nbytes == need * GRANULARITY
        self.serial += 1
        for granule in range(extent.offset // GRANULARITY, extent.end // GRANULARITY):
            assert self.owner[granule] is None
            self.owner[granule] = self.serial
        self.live[self.serial] = extent
        before.remove(min(fitting))
        rest = min(fitting) - need
        assert sorted(self.runs()) == sorted(before + ([rest] if rest else []))  # best fit

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.live)))
        extent = self.live.pop(key)
        self.allocator.free(extent)
        self.owner = [None if owner == key else owner for owner in self.owner]
        with pytest.raises(ValueError, match="not allocated"):
            self.allocator.free(extent)

    @rule(offset=st.integers(-GRANULARITY, 26 * GRANULARITY), nbytes=st.integers(1, 3 * GRANULARITY))
    def covers(self, offset: int, nbytes: int) -> None:
        first, last = offset // GRANULARITY, (offset + nbytes - 1) // GRANULARITY
        inside = first >= 0 and last < GRANULES
        owners = set(self.owner[first : last + 1]) if inside else {None}
        assert self.allocator.covers(offset, nbytes) == (len(owners) == 1 and None not in owners)

    @invariant()
    def books_agree(self) -> None:
        assert self.allocator.allocated == sum(owner is not None for owner in self.owner) * GRANULARITY
        assert self.allocator.largest == max(self.runs(), default=0) * GRANULARITY


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAllocator = AllocatorMachine.TestCase


def test_everything_freed_is_one_piece_again() -> None:
    allocator = ExtentAllocator(64 * GRANULARITY, GRANULARITY)
    extents = [allocator.allocate(GRANULARITY) for _ in range(64)]
    for extent in extents[1::2] + extents[0::2]:
        allocator.free(extent)
    assert allocator.allocate(64 * GRANULARITY) == Extent(0, 64 * GRANULARITY)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_extent_has_bytes(nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"nbytes is {nbytes}"):
        ExtentAllocator(1 << 20, GRANULARITY).allocate(nbytes)


def test_an_extent_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Extent(0, 1).offset = 3  # type: ignore[misc]


def test_a_foreign_extent_is_not_freed() -> None:
    allocator = ExtentAllocator(1 << 20, GRANULARITY)
    extent = allocator.allocate(3 * GRANULARITY)
    with pytest.raises(ValueError, match="not allocated"):
        allocator.free(Extent(extent.offset, GRANULARITY))
