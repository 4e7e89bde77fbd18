"""Loads on real stores: which bytes move, in which proportion, and what is left under way (nothing)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tierflow import aio
from tierflow.tune import load
from tierflow.tune.budget import Budget, NotEnough, check_memory, check_space
from tierflow.tune.floor import FORMATS
from tierflow.tune.knobs import Setting
from tierflow.tune.load import Limits
from tierflow.tune.pages import Pages
from tierflow.tune.rig import TRANSFER, Rig
from tierflow.tune.stores import lay_out, open_store

SMALL = Setting("threads", 128 << 10, 4, 1, False)
MIB = 1 << 20


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    made = [tmp_path / "a", tmp_path / "b"]
    for folder in made:
        folder.mkdir()
    return [str(folder) for folder in made]


def test_a_fill_writes_every_place_once_and_a_load_stays_inside(folders: list[str]) -> None:
    store = open_store(folders[:1], 8 * MIB, SMALL, [1.0])
    with store:
        offsets = lay_out(store, MIB)
        assert sorted(offsets) == [n * MIB for n in range(8)]
        pieces = Pages(4 * MIB, huge=False).pieces(MIB)
        assert load.fill(store, offsets, pieces) == offsets and store.bytes_written == 8 * MIB
        back = bytearray(MIB)
        wanted = {bytes(piece) for piece in pieces}
        for offset in offsets:
            aligned = Pages(MIB, huge=False).pieces(MIB)[0]
            store.read(aligned, offset).wait()
            back[:] = aligned
            assert bytes(back) in wanted


@pytest.mark.parametrize(("share", "kind"), [((7, 6), "mixed"), ((4, 3), "mixed"), ((1, 1), "mixed"), ((1, 1), "read"), ((1, 1), "write")])
def test_a_load_moves_what_the_store_counts_in_the_states_proportion(folders: list[str], share: tuple[int, int], kind: load.Kind) -> None:
    store = open_store(folders[:1], 16 * MIB, SMALL, [1.0])
    with store:
        offsets = lay_out(store, MIB)
        pieces = Pages(4 * MIB, huge=False).pieces(MIB)
        load.fill(store, offsets, pieces)
        read, written = store.bytes_read, store.bytes_written
        sample = load.run(kind, store, offsets, pieces, Limits(0.2, 24 * MIB), share)
        read, written = store.bytes_read - read, store.bytes_written - written
        assert (sample.nbytes, sample.written) == (read + written, written)
        assert len(sample.latencies) == sample.nbytes // MIB and min(sample.latencies) > 0
        assert sample.written <= 24 * MIB + MIB
        if kind == "mixed":
            r, w = share
            assert abs(read * w - written * r) <= max(share) * MIB * (r + w)
            assert sample.read > 0 and sample.write > 0
        else:
            assert (sample.read > 0, sample.write > 0) == (kind == "read", kind == "write")


def test_two_paths_get_bytes_in_proportion_to_their_weights(folders: list[str]) -> None:
    before = {folder: sum(sizes_below(folder)) for folder in folders}
    with open_store(folders, 32 * MIB, SMALL, [3.0, 1.0]) as store:
        sizes = [sum(sizes_below(folder)) - before[folder] for folder in folders]
        assert abs(sizes[0] - 32 * MIB) <= MIB and abs(sizes[0] - 3 * sizes[1]) <= 4 * MIB
        assert sum(sizes) - MIB <= store.capacity <= sum(sizes)
        offsets = lay_out(store, MIB)
        assert len(set(offsets)) == len(offsets) >= 41
        pieces = Pages(4 * MIB, huge=False).pieces(MIB)
        for count in (8, len(offsets)):  # so has every start of the list, within one stripe a transfer
            written = [path.bytes_written for path in store.paths]
            load.fill(store, offsets[:count], pieces)
            moved = [path.bytes_written - b for path, b in zip(store.paths, written, strict=True)]
            assert sum(moved) == count * MIB and abs(moved[0] - 3 * moved[1]) <= 4 * SMALL.block_size


def sizes_below(folder: str) -> list[int]:
    """Of this process's open files in a folder, named or not."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        place = f"/proc/self/fd/{name}"
        if os.path.exists(place) and os.path.realpath(place).startswith(folder + "/"):
            found.append(os.stat(place).st_size)
    return found


def test_a_failed_transfer_ends_the_load_with_none_under_way(folders: list[str]) -> None:
    store = open_store(folders[:1], 16 * MIB, SMALL, [1.0])
    with store:
        offsets = lay_out(store, MIB)
        pieces = Pages(4 * MIB, huge=False).pieces(MIB)
        load.fill(store, offsets, pieces)
        fd = next(
            int(name) for name in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{name}") and os.path.realpath(f"/proc/self/fd/{name}").startswith(folders[0] + "/")
        )  # fmt: skip
        os.ftruncate(fd, 8 * MIB)  # behind the store's back
        with pytest.raises(aio.AioError, match="the file ends before it"):
            load.run("read", store, offsets, pieces, Limits(5.0))
        for offset in offsets:
            store.free(aio.Extent(offset, MIB))  # which refuses while a transfer touches it


def test_nothing_stays_open_where_one_path_refuses(folders: list[str]) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        open_store([folders[0], folders[0] + "/none"], MIB, SMALL, [1.0, 1.0])
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize(("share", "rank"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_percentiles_are_nearest_rank(share: float, rank: int) -> None:
    assert load.percentile([float(n) for n in range(100, 0, -1)], share) == rank
    assert load.percentile([7.0], share) == 7.0


def test_pages_are_what_they_are_called() -> None:
    plain, huge = Pages(8 * MIB, huge=False), Pages(8 * MIB, huge=True)
    assert plain.got_huge == 0.0
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if enabled.exists() and "[never]" not in enabled.read_text():
        assert huge.got_huge > 0.5
    for pages in (plain, huge):
        pieces = pages.pieces(3 * MIB)
        assert [len(p) for p in pieces] == [3 * MIB] * 2
        assert len(set(bytes(pieces[0][:4096]))) > 200  # nothing that compresses


def test_too_little_space_is_refused_with_the_numbers_before_anything_is_written(folders: list[str]) -> None:
    stat = os.statvfs(folders[0])
    free = stat.f_bavail * stat.f_frsize
    with pytest.raises(NotEnough, match=r"need .* and .* are free.*smaller --size"):
        check_space(folders[:1], free, "give a smaller --size")
    # two paths of one file system share its room
    check_space(folders[:1], free // 3, "")
    with pytest.raises(NotEnough):
        check_space(folders, free // 2, "")
    with pytest.raises(NotEnough, match="buffers need"):
        check_memory(1 << 50)


def test_a_candidate_counts_all_that_it_writes(folders: list[str]) -> None:
    rig = Rig(folders, ("read", "write", "mixed"), FORMATS["lossless"], Budget(60.0))
    with rig:
        with rig.candidate(SMALL, 16 * TRANSFER) as candidate:
            candidate.visit(0.02, 32 * MIB)
            before = [path.bytes_written for path in candidate.store.paths]
            assert len(candidate.latencies("write", 0.02, 8 * MIB)) >= SMALL.queue_depth
            blocks = [(path.bytes_written - b) // SMALL.block_size for path, b in zip(candidate.store.paths, before, strict=True)]
            assert abs(blocks[0] - blocks[1]) <= 1  # single blocks too go to every path
            assert rig.budget.written == candidate.store.bytes_written
            assert candidate.score() > 0
            held = len(os.listdir("/proc/self/fd"))
        assert candidate.store.capacity <= sum(map(sum, map(sizes_below, folders)))  # kept, so that no drive hears of it
    assert not any(map(sizes_below, folders)) and len(os.listdir("/proc/self/fd")) < held
