"""Arena, pools and leases: exact sizes, no overlap, memory given back, fork."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierflow.swap import Arena, CapacityError, DebugMemory, Pool
from tierflow.swap.arena import HUGE_PAGE

MIB = 1 << 20


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40_000), st.integers(0, 5)), max_size=60), st.booleans())
def test_leases_never_overlap_and_everything_comes_back(steps: list[tuple[int, int]], randomly: bool) -> None:
    arena = Arena(MIB)
    pool = Pool("test", arena, 4096, 200 * 1024, DebugMemory(random.Random(0)) if randomly else None)
    held: list = []
    for nbytes, drop in steps:
        try:
            held.append(pool.lease(nbytes))
        except CapacityError as error:
            assert error.requested == nbytes and error.free == pool.free and error.largest < nbytes + 4096
        if held and drop == 0:
            held.pop(drop % len(held)).release()
        spans = sorted((h.offset, h.offset + h.nbytes) for h in held)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert all(a >= 4096 and b <= 4096 + 200 * 1024 and a % 4096 == 0 for a, b in spans)
        assert pool.leased == sum(b - a for a, b in spans)
    for h in held:
        h.release()
        h.release()
    assert pool.leased == 0 and pool.largest == pool.nbytes
    arena.close()


def test_arena_is_aligned_exact_and_asks_for_huge_pages() -> None:
    arena = Arena(8 * MIB)
    assert arena.address % HUGE_PAGE == 0
    whole = arena.bytes_at(0, 8 * MIB)
    assert whole.data_ptr() == arena.address and whole.sum() == 0
    whole.fill_(1)
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if setting.exists() and "[never]" not in setting.read_text():
        assert arena.huge_page_bytes() > 0
    arena.close()
    assert whole.sum() == 0  # memory went back; what still refers to it reads zeros


def test_an_alias_is_seen_and_a_released_lease_refuses() -> None:
    arena = Arena(MIB)
    pool = Pool("test", arena, 0, MIB)
    lease = pool.lease(4096)
    assert lease.aliases() == 0
    view = lease.view(torch.float32)[3:]
    assert lease.aliases() >= 1
    del view
    assert lease.aliases() == 0
    lease.release()
    with pytest.raises(AssertionError):
        lease.bytes()
    arena.close()


def test_freed_memory_is_poisoned_in_debug() -> None:
    arena = Arena(MIB)
    pool = Pool("test", arena, 0, MIB, DebugMemory(random.Random(0)))
    lease = pool.lease(4096)
    view = lease.view(torch.float32)
    view.fill_(1.0)
    lease.release()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert view.view(dtype).isnan().all()
    arena.close()


def test_close_gives_memory_back_and_a_fork_neither_copies_nor_frees_it() -> None:
    process = psutil.Process()
    arena = Arena(64 * MIB)
    before = process.memory_info().rss
    data = arena.bytes_at(0, 64 * MIB)
    data.fill_(7)
    assert process.memory_info().rss - before > 60 * MIB
    child = os.fork()
    if child == 0:
        arena.close()  # in the child this must be without effect
        rss = psutil.Process().memory_info().rss
        os._exit(0 if rss < before + 30 * MIB else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert int(data[-1]) == 7
    arena.close()
    assert process.memory_info().rss - before < 8 * MIB


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12_000)), max_size=60))
def test_a_pool_of_runs_that_come_and_go_leases_only_those(steps: list[tuple[int, int]]) -> None:
    arena = Arena(MIB)
    pool = Pool("test", arena, 0, 0)
    run, there, held = 8192, set(), []
    for which, nbytes in steps:
        begin = which * run
        used = any(h.offset < begin + run and begin < h.offset + h.nbytes for h in held)
        if which not in there:
            pool.add(begin, run)
            there.add(which)
        elif used:
            with pytest.raises(AssertionError, match="leased"):
                pool.remove(begin, run)
            held.pop(0).release()
        elif nbytes % 2:
            pool.remove(begin, run)
            there.discard(which)
        else:
            try:
                held.append(pool.lease(nbytes))
            except CapacityError:
                assert pool.largest < nbytes
        assert all({h.offset // run, (h.offset + h.nbytes - 1) // run} <= there for h in held)
        assert pool.nbytes == len(there) * run and pool.free == pool.nbytes - sum(h.nbytes for h in held)
    for h in held:
        h.release()
    assert sum(length for _, length in pool.runs) == pool.nbytes
    arena.close()
