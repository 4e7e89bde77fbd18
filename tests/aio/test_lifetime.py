"""Who keeps what alive: dropped tickets and buffers, close, fork and exit with transfers under way."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tierflow.aio as aio

KIB = 1 << 10


class Buffer(bytearray):
    """A bytearray that a weak reference can watch."""


class Watched:
    """Aligned memory, handed over as a tensor would be, whose end a weak reference can see."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.view = aio.store._aio.View(raw, True)
        self.nbytes = len(raw)

    def data_ptr(self) -> int:
        return self.view.address

    def is_contiguous(self) -> bool:
        return True


class Gated:
    """A store whose reads stay under way until the gate is opened."""

    def __init__(self, store: aio.Store, gate: Path) -> None:
        self.store = store
        self.gate = gate

    def open_gate(self) -> None:
        self.gate.touch()


@pytest.fixture
def gated(faulty: Callable[..., Any], engine: str, tmp_path: Path) -> Iterator[Gated]:
    gate = tmp_path / "gate"
    directory, _ = faulty({"op": "read", "hold": str(gate)})
    store = aio.open(directory, 1 << 20, engine=engine, block_size=64 * KIB, queue_depth=4, threads=3)  # type: ignore[arg-type]
    store.allocate(1 << 20)
    try:
        yield Gated(store, gate)
    finally:
        gate.touch()
        store.close()


def test_a_dropped_ticket_keeps_its_buffer_until_the_end(gated: Gated, memory: Any) -> None:
    content = os.urandom(256 * KIB)
    gated.store.write(memory(content), 0).wait()
    watched = Watched(memory(256 * KIB))
    raw, alive = watched.raw, weakref.ref(watched)
    gated.store.read(watched, 0)
    del watched
    gc.collect()
    assert alive() is not None
    gated.open_gate()
    gated.store.close()
    gc.collect()
    assert alive() is None
    assert raw[:] == content


def test_wait_lets_the_buffer_go(gated: Gated, memory: Any) -> None:
    watched = Watched(memory(64 * KIB))
    alive = weakref.ref(watched)
    ticket = gated.store.read(watched, 0)
    del watched
    assert not ticket.done()
    gated.open_gate()
    ticket.wait()
    gc.collect()
    assert alive() is None


def test_later_transfers_let_go_of_dropped_ones(store: aio.Store, memory: Any) -> None:
    store.allocate(4096)
    watched = Watched(memory(4096))
    alive = weakref.ref(watched)
    store.write(watched, 0)
    del watched
    store.write(memory(4096), 0).wait()
    while alive() is not None:  # the first may end after the second
        store.write(memory(4096), 0).wait()


def test_a_bytearray_cannot_be_resized_under_way(gated: Gated) -> None:
    raw = Buffer(64 * KIB + 4096)
    address = aio.store._aio.View(raw, True).address
    start = -address % 4096
    ticket = gated.store.read(memoryview(raw)[start : start + 64 * KIB], 0)
    with pytest.raises(BufferError):
        raw.clear()
    gated.open_gate()
    ticket.wait()
    del ticket
    gc.collect()
    raw.clear()


def test_an_extent_in_use_is_not_freed(gated: Gated, memory: Any) -> None:
    gated.store.free(aio.Extent(0, 1 << 20))
    extent, other = gated.store.allocate(64 * KIB), gated.store.allocate(64 * KIB)
    ticket = gated.store.read(memory(64 * KIB), extent.offset)
    gated.store.free(other)
    with pytest.raises(ValueError, match="cannot be freed: a <read"):
        gated.store.free(extent)
    gated.open_gate()
    ticket.wait()
    gated.store.free(extent)


def test_an_extent_of_a_vector_is_not_freed(gated: Gated, memory: Any) -> None:
    gated.store.free(aio.Extent(0, 1 << 20))
    extents = [gated.store.allocate(64 * KIB) for _ in range(3)]
    ticket = gated.store.readv([(memory(64 * KIB), extents[at].offset) for at in (0, 2)])
    gated.store.free(extents[1])
    with pytest.raises(ValueError, match="in 2 ranges, under way> touches it"):
        gated.store.free(extents[2])
    gated.open_gate()
    ticket.wait()
    gated.store.free(extents[2])


def test_close_waits_for_what_is_under_way(gated: Gated, memory: Any) -> None:
    tickets = [gated.store.read(memory(128 * KIB), i * 128 * KIB) for i in range(8)]
    assert not any(ticket.done() for ticket in tickets)
    closers = [threading.Thread(target=gated.store.close) for _ in range(2)]
    for closer in closers:
        closer.start()
    assert all(closer.is_alive() for closer in closers)
    gated.open_gate()
    for closer in closers:
        closer.join()
    assert all(ticket.done() for ticket in tickets)
    for ticket in tickets:
        ticket.wait()
    assert gated.store.bytes_read == 8 * 128 * KIB


def test_after_close(store: aio.Store, memory: Any) -> None:
    extent = store.allocate(4096)
    store.close()
    store.close()
    for use in (
        lambda: store.read(memory(4096), 0),
        lambda: store.write(memory(4096), 0),
        lambda: store.allocate(4096),
        lambda: store.free(extent),
        lambda: store.__enter__(),
    ):
        with pytest.raises(aio.StoreClosed, match="is closed"):
            use()
    assert store.bytes_read == 0 and store.read_seconds == 0


def test_a_dropped_store_waits_and_gives_its_descriptors_back(disk: Path, engine: str, memory: Any) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    store = aio.open(disk, 1 << 20, engine=engine)  # type: ignore[arg-type]
    store.allocate(1 << 20)
    ticket = store.write(memory(1 << 20), 0)
    del store
    gc.collect()
    assert ticket.done()
    del ticket
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_interrupt_ends_the_wait_and_not_the_transfer(gated: Gated, memory: Any) -> None:
    ticket = gated.store.read(memory(4096), 0)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        ticket.wait()
    timer.join()
    assert not ticket.done()
    gated.open_gate()
    ticket.wait()


def test_fork_with_transfers_under_way(gated: Gated, memory: Any, backing: Any) -> None:
    content = os.urandom(1 << 20)
    gated.store.write(memory(content), 0).wait()
    back = memory(1 << 20)
    ticket = gated.store.read(back, 0)
    directory = Path(gated.store.path)
    child = os.fork()
    if child == 0:
        try:
            os._exit(child_of_fork(gated.store, ticket, backing(directory)))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not ticket.done()
    gated.open_gate()
    ticket.wait()
    assert back[:] == content


def child_of_fork(store: aio.Store, ticket: aio.Ticket, inherited: list[str]) -> int:
    if inherited:
        return 1  # it would keep the disk space taken
    try:
        store.allocate(4096)
    except aio.StoreClosed as error:
        if "forked" not in str(error):
            return 2
    else:
        return 3
    store.close()
    store._finalizer()
    store.__dict__.clear()  # the engine and the file go
    del store, ticket
    gc.collect()
    return 0


def test_memory_lost_with_a_ring_is_never_freed(gated: Gated, memory: Any) -> None:
    """The kernel may still write to it, and nobody is left who could tell when it has."""
    if gated.store.engine != "io_uring":
        pytest.skip("threads cannot be lost")
    rings = [fd for fd in os.listdir("/proc/self/fd") if "io_uring" in read_link(f"/proc/self/fd/{fd}")]
    watched = Watched(memory(64 * KIB))
    raw, alive = watched.raw, weakref.ref(watched)
    ticket = gated.store.read(watched, 0)
    del watched
    while ticket.began is None:
        time.sleep(0.001)
    null = os.open("/dev/null", os.O_RDWR)
    for ring in rings:
        os.dup2(null, int(ring))
    os.close(null)
    gated.open_gate()  # what is out comes back, and the ring's thread finds its ring gone
    later = []
    with pytest.raises(aio.StoreClosed):
        while True:
            later.append(gated.store.read(memory(4096), 64 * KIB))
            time.sleep(0.01)
    for lost in [ticket, *later]:
        try:
            lost.wait()
        except aio.AioError as error:
            assert error.errno not in (0, errno.EAGAIN)
    gc.collect()
    assert ticket.times.orphaned == (alive() is not None)
    assert any(entry.times.orphaned for entry in [ticket, *later])
    assert len(raw) == 64 * KIB


def read_link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


EXIT_UNDER_WAY = """
import mmap, sys
import tierflow.aio as aio
store = aio.open(sys.argv[1], 8 << 20, engine=sys.argv[2])
store.allocate(8 << 20)
for _ in range(8):
    store.write(mmap.mmap(-1, 8 << 20), 0)
"""


def test_exit_with_transfers_under_way(disk: Path, engine: str, python: Any) -> None:
    done = python(EXIT_UNDER_WAY, disk, engine)
    assert (done.returncode, done.stderr) == (0, "")


FORK_AND_DIE = """
import os, sys, time
import tierflow.aio as aio
store = aio.open(sys.argv[1], 4 << 20, engine=sys.argv[2])
if os.fork() == 0:
    print("ready", flush=True)
    time.sleep(60)
time.sleep(60)
"""


def free(path: Path) -> int:
    info = os.statvfs(path)
    return info.f_bfree * info.f_frsize


def test_a_child_that_outlives_its_parent_keeps_no_space(
    small_tmpfs: Path, engine: str, environment: dict[str, str]
) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", FORK_AND_DIE, str(small_tmpfs), engine],
        env=environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20  # the kernel takes a dead process's ring apart in the background
    try:
        while free(small_tmpfs) < 7 << 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert free(small_tmpfs) >= 7 << 20
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()
