"""Faults at the border to the kernel, alike for both engines: system calls that really move less, or nothing.

They need a build of the extension that ordinary ones are not (csrc/faults.hpp). The last test makes it and runs the
others there; ``./run sanitize`` runs them directly.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tierflow.aio as aio

BLOCK = 64 << 10
NBYTES = 8 * BLOCK
END = 1 << 62
EXTENSION = aio.store._aio
needs_hook = pytest.mark.skipif(not hasattr(EXTENSION, "inject"), reason="runs in a build with faults")
Inject = Callable[..., None]


@pytest.fixture
def inject() -> Iterator[Inject]:
    """``inject(op, begin, end, error=, length=, times=)`` adds a rule; the first that matches decides."""
    rules: list[tuple[bool, int, int, int, int, int]] = []

    def add(op: str, begin: int = 0, end: int = END, *, error: int = 0, length: int = -1, times: int = -1) -> None:
        rules.append((op == "write", begin, end, times, error, length))
        EXTENSION.inject(rules)

    yield add
    EXTENSION.inject([])


def round_trip(store: aio.Store, memory: Any, nbytes: int = NBYTES, shift: int = 0) -> None:
    """At an odd place if ``shift`` is odd."""
    content = os.urandom(nbytes)
    extent = store.allocate(NBYTES + 4096)
    out, back = memory(nbytes + shift), memory(nbytes + shift)
    out[shift:] = content
    store.write(memoryview(out)[shift:], extent.offset + shift).wait()
    store.read(memoryview(back)[shift:], extent.offset + shift).wait()
    assert back[shift:] == content
    store.free(extent)


@needs_hook
@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("length", [1, 511, 512, 513, 4095, 4096, 5000, 32768, BLOCK - 512, BLOCK - 1])
def test_a_short_transfer_goes_on_where_it_stopped(
    store: aio.Store, memory: Any, inject: Inject, op: str, length: int
) -> None:
    for block in range(12):  # each block's first three calls: fewer than make a torn sector hopeless
        inject(op, block * BLOCK, block * BLOCK + 1, length=length, times=3)
    round_trip(store, memory)


@needs_hook
@pytest.mark.parametrize("length", [0x200, 0x600, 0x1000, 0x3200])
def test_nothing_but_short_transfers(store: aio.Store, memory: Any, inject: Inject, length: int) -> None:
    for op in ("read", "write"):
        inject(op, length=length)
    round_trip(store, memory)
    round_trip(store, memory, nbytes=70001, shift=77)


@needs_hook
@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EINTR])
def test_a_storm_of_later(store: aio.Store, memory: Any, inject: Inject, code: int) -> None:
    for op in ("read", "write"):
        inject(op, error=code, times=300)
    round_trip(store, memory)
    round_trip(store, memory, nbytes=70001, shift=77)


@needs_hook
@pytest.mark.parametrize("op", ["read", "write"])
def test_later_for_one_holds_up_no_other(store: aio.Store, memory: Any, inject: Inject, op: str) -> None:
    """More blocks that the kernel puts off than there are places in the ring or threads, and one that goes through."""
    extent = store.allocate(17 * BLOCK)
    assert extent.offset == 0
    inject(op, 0, 16 * BLOCK, error=errno.EAGAIN)
    start = getattr(store, op)
    stuck = [start(memory(BLOCK), block * BLOCK) for block in range(16)]
    start(memory(BLOCK), 16 * BLOCK).wait()
    assert not any(ticket.done() for ticket in stuck)
    for ticket in stuck:
        with pytest.raises(aio.AioError) as raised:
            ticket.wait()
        assert raised.value.errno == errno.EAGAIN


@needs_hook
@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ENODEV])
def test_an_error_names_its_block_and_the_rest_is_not_issued(
    disk: Path, engine: str, memory: Any, inject: Inject, op: str, code: int
) -> None:
    with aio.open(disk, NBYTES * 8, engine=engine, block_size=BLOCK, queue_depth=2, threads=2) as store:  # type: ignore[arg-type]
        store.allocate(NBYTES * 8)
        inject(op, 5 * BLOCK, 5 * BLOCK + 1, error=code)
        with pytest.raises(aio.AioError) as raised:
            getattr(store, op)(memory(NBYTES * 8), 0).wait()
        assert (raised.value.errno, raised.value.filename) == (code, str(disk))
        assert (raised.value.offset, raised.value.length) == (5 * BLOCK, BLOCK)
        moved = store.bytes_read if op == "read" else store.bytes_written
        assert moved <= 8 * BLOCK  # five before it, and what was out beside it, of 64
        getattr(store, op)(memory(BLOCK), 0).wait()


@needs_hook
@pytest.mark.parametrize("fails", ["read", "write"])
def test_either_half_of_an_edge_may_fail(store: aio.Store, memory: Any, inject: Inject, fails: str) -> None:
    store.allocate(NBYTES)
    store.write(memory(b"k" * NBYTES), 0).wait()
    inject(fails, 4096, 4097, error=errno.EIO, times=1)
    edge = memoryview(memory(100))
    with pytest.raises(aio.AioError) as raised:
        store.write(edge, 4100).wait()
    assert (raised.value.offset, raised.value.length, raised.value.op) == (4100, 100, "write")
    store.write(edge, 4100).wait()  # nothing is left parked behind it
    back = memory(8192)
    store.read(back, 0).wait()
    assert back[:] == b"k" * 4100 + bytes(100) + b"k" * (8192 - 4200)


@needs_hook
def test_what_a_failed_write_left_is_not_taken_for_good(
    disk: Path, engine: str, memory: Any, inject: Inject
) -> None:
    with aio.open(disk, NBYTES, engine=engine, block_size=BLOCK, checksum=True) as store:  # type: ignore[arg-type]
        store.allocate(NBYTES)
        store.write(memory(b"o" * NBYTES), 0).wait()
        inject("write", BLOCK, BLOCK + 1, error=errno.EIO)
        with pytest.raises(aio.AioError):
            store.write(memory(b"n" * BLOCK), BLOCK).wait()
        with pytest.raises(aio.CorruptData) as raised:
            store.read(memory(BLOCK), BLOCK).wait()
        assert raised.value.offset == BLOCK


@needs_hook
def test_an_fsync_stands_between_writes(disk: Path, engine: str, memory: Any, inject: Inject) -> None:
    inject("write", 0, 1, error=errno.EAGAIN, times=60)  # a tenth of a second
    with aio.open(disk, NBYTES, engine=engine, block_size=BLOCK, durability="fdatasync") as store:  # type: ignore[arg-type]
        store.allocate(NBYTES)
        before = [store.write(memory(BLOCK), at * BLOCK) for at in (0, 1)]
        barrier = store.fsync()
        after = store.write(memory(BLOCK), 2 * BLOCK)
        second = store.fsync()
        last = store.write(memory(BLOCK), 3 * BLOCK)
        read = store.read(memory(BLOCK), 4 * BLOCK)
        order = [before[0], barrier, after, second, last]
        for ticket in [*order, before[1], read]:
            ticket.wait()
        times = [time for ticket in order for time in (ticket.began, ticket.ended)]
        assert times == sorted(times)  # type: ignore[type-var]
        assert read.ended < before[0].ended and before[1].ended < before[0].ended  # type: ignore[operator]


def test_in_a_build_with_faults(tmp_path: Path) -> None:
    if hasattr(EXTENSION, "inject"):
        pytest.skip("this is that build")
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    import variants

    try:
        folder = variants.build("faults")
    except (OSError, ImportError) as error:
        pytest.skip(f"nothing can be built here: {error}")
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{error.stdout}{error.stderr}")
    here = Path(__file__)
    done = variants.pytest(
        folder, str(here), "-q", f"--confcutdir={here.parent}", f"--basetemp={tmp_path / 'faults'}"
    )
    assert done.returncode == 0, done.stdout
    skipped = 1 if aio.probe().io_uring else None
    assert skipped is None or f" {skipped} skipped" in done.stdout, done.stdout
