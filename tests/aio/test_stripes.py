"""Several paths as one store: what goes where, and that a slow path gets less."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tierflow.aio as aio
from tierflow.aio import striping

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture
def two(disk: Path) -> list[Path]:
    directories = [disk / "a", disk / "b"]
    for directory in directories:
        directory.mkdir()
    return directories


@given(st.lists(st.floats(0.01, 1e10), min_size=1, max_size=9))
def test_shares_follow_weights(weights: list[float]) -> None:
    turns = striping.pattern(weights)
    count = Counter(turns)
    assert sorted(count) == list(range(len(weights)))
    for path, weight in enumerate(weights):
        wanted = max(weight / sum(weights), 1 / 128)
        assert abs(count[path] / len(turns) - wanted) <= len(weights) / 128


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=4), st.integers(0, 500), st.integers(1, 64))
def test_any_run_of_stripes_is_spread(weights: list[float], begin: int, run: int) -> None:
    """A tensor anywhere in the store meets the weights nearly as well as the whole store does."""
    turns = striping.pattern(weights)
    there = Counter(turns[at % len(turns)] for at in range(begin, begin + run))
    for path in range(len(weights)):
        assert abs(there[path] - run * turns.count(path) / len(turns)) <= len(weights)


@given(
    st.integers(1, 5000),
    st.integers(1, 7),
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
)
def test_files_are_as_long_as_their_stripes(granules: int, unit: int, shares: list[int]) -> None:
    turns = striping.pattern([float(share) for share in shares])
    stripe = unit * 4096
    held: Counter[int] = Counter()
    for number in range(-(-granules * 4096 // stripe)):
        held[turns[number % len(turns)]] += stripe
    assert striping.file_sizes(granules * 4096, stripe, turns, len(shares)) == [held[p] for p in range(len(shares))]


def stripes(path: Path, backing: Any, stripe: int) -> list[bytes]:
    """What lies on one path, read behind the store's back."""
    (link,) = backing(path)
    with open(link, "rb") as file:
        content = file.read()
    return [content[at : at + stripe] for at in range(0, len(content), stripe)]


def test_where_the_bytes_are(two: list[Path], engine: str, memory: Any, backing: Any) -> None:
    stripe = 64 * KIB
    with aio.open(two, 9 * stripe, engine=engine, block_size=stripe, weights=[2, 1]) as store:  # type: ignore[arg-type]
        store.allocate(9 * stripe)
        parts = [bytes([65 + number]) * stripe for number in range(9)]
        store.write(memory(b"".join(parts)), 0).wait()
        first, second = (stripes(path, backing, stripe) for path in two)
        assert sorted(first + second) == parts
        assert len(first) == 6 and len(second) == 3
        # each run of three stripes has two here and one there
        for begin in range(0, 9, 3):
            assert sum(part in second for part in parts[begin : begin + 3]) == 1
        assert [path.bytes_written for path in store.paths] == [6 * stripe, 3 * stripe]
        back = memory(9 * stripe)
        store.read(back, 0).wait()
        assert back[:] == b"".join(parts)
        assert [path.bytes_read for path in store.paths] == [6 * stripe, 3 * stripe]


def test_the_default_unit_is_one_system_call(two: list[Path]) -> None:
    with aio.open(two, 16 * MIB) as store:
        assert store.stripe == aio.DEFAULT_BLOCK_SIZE
        assert [path.path for path in store.paths] == [str(path) for path in two]


def test_an_error_names_the_path_and_the_offset_in_the_store(
    disk: Path, faulty: Any, engine: str, memory: Any
) -> None:
    stripe = 64 * KIB
    bad, _ = faulty({"op": "read", "from": stripe, "to": 2 * stripe, "errno": errno.EIO})
    with aio.open([disk, bad], 8 * stripe, engine=engine, block_size=stripe) as store:  # type: ignore[arg-type]
        store.allocate(8 * stripe)
        store.write(memory(8 * stripe), 0).wait()
        with pytest.raises(aio.AioError) as raised:
            store.read(memory(8 * stripe), 0).wait()
        # the second stripe of the second path is the fourth of the store
        assert (raised.value.filename, raised.value.offset, raised.value.length) == (str(bad), 3 * stripe, stripe)
        store.read(memory(3 * stripe), 0).wait()


def test_a_path_that_vanishes(disk: Path, faulty: Any, engine: str, memory: Any) -> None:
    stripe = 64 * KIB
    gone, server = faulty()
    with aio.open([disk, gone], 8 * stripe, engine=engine, block_size=stripe) as store:  # type: ignore[arg-type]
        store.allocate(8 * stripe)
        server.kill()
        server.wait()
        for start in (store.write, store.read):
            with pytest.raises(aio.AioError) as raised:
                start(memory(8 * stripe), 0).wait()
            assert raised.value.filename == str(gone)
        content = os.urandom(stripe)  # what lies on the other path alone still serves
        store.write(memory(content), 0).wait()
        back = memory(stripe)
        store.read(back, 0).wait()
        assert back[:] == content


def test_a_throttled_path_is_measured_and_gets_its_share(disk: Path, faulty: Any, memory: Any) -> None:
    slow, _ = faulty({"op": "read", "delay": 0.01}, {"op": "write", "delay": 0.01})
    speeds = aio.measure([disk, slow], seconds=0.2, nbytes=8 * MIB, engine="threads", block_size=MIB, threads=2)
    assert [speed.path for speed in speeds] == [str(disk), str(slow)]
    # a megabyte takes at least 10 ms there, one after the other
    assert 0 < speeds[1].read < 105e6 and 0 < speeds[1].write < 105e6
    assert speeds[0].weight > speeds[1].weight
    weights = [speed.weight for speed in speeds]
    stripe = 64 * KIB
    with aio.open([disk, slow], 16 * MIB, engine="threads", weights=weights, stripe=stripe) as store:
        store.allocate(16 * MIB)
        content = os.urandom(16 * MIB)
        store.write(memory(content), 0).wait()
        back = memory(16 * MIB)
        store.read(back, 0).wait()
        assert back[:] == content
        for moved in ([p.bytes_written for p in store.paths], [p.bytes_read for p in store.paths]):
            assert sum(moved) == 16 * MIB
            share = max(weights[1] / sum(weights), 1 / 128)
            assert abs(moved[1] / sum(moved) - share) <= 2 / 128
    with aio.open([disk, slow], MIB, engine="threads", weights="measure", block_size=256 * KIB) as store:
        turns = Counter(striping.pattern(weights))
        assert turns[0] > turns[1] and len(store.paths) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": [1.0]}, "weights has 1 entries"),
        ({"weights": [1.0, 0.0]}, r"weights\[1\] is 0.0"),
        ({"weights": [1.0, float("nan")]}, r"weights\[1\] is nan"),
        ({"weights": "fast"}, "weights is 'fast'"),
        ({"stripe": 5000}, "stripe is 5000: a multiple of 4096"),
        ({"stripe": 0}, "stripe is 0"),
        ({"queue_depth": [4]}, "queue_depth has 1 entries"),
        ({"queue_depth": [4, 0]}, "queue_depth is 0"),
        ({"queue_depth": [4, 8], "rings": 5}, "rings is 5: between 1 and 4"),
        ({"durability": "some"}, "durability is 'some'"),
    ],
)
def test_what_cannot_be(two: list[Path], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        aio.open(two, MIB, **arguments)


def test_no_path_at_all() -> None:
    with pytest.raises(ValueError, match="path is empty"):
        aio.open([], MIB)


def test_a_missing_directory_among_several(disk: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        aio.open([disk, disk / "nowhere"], MIB)
    assert raised.value.filename == str(disk / "nowhere")


def test_one_full_path_leaves_nothing_on_the_others(disk: Path, small_tmpfs: Path, backing: Any) -> None:
    with pytest.raises(aio.DiskFull) as raised:
        aio.open([disk, small_tmpfs], 32 * MIB)
    assert raised.value.filename == str(small_tmpfs)
    assert backing(disk) == backing(small_tmpfs) == []
