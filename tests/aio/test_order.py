"""What goes before what: two priorities with bounded starvation, and writes around an fsync."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

import tierflow.aio as aio

BLOCK = 64 << 10


def began(tickets: list[tuple[str, aio.Ticket]]) -> list[str]:
    """Names in the order in which the kernel was asked."""
    for _, ticket in tickets:
        ticket.wait()
    return [name for name, _ in sorted(tickets, key=lambda entry: entry[1].began)]  # type: ignore[arg-type,return-value]


@pytest.fixture
def narrow(faulty: Any, engine: str, tmp_path: Path) -> Any:
    """A store with one block in flight, and a gate that the first read waits for."""
    gate = tmp_path / "gate"
    directory, _ = faulty({"op": "read", "from": 0, "to": 1, "hold": str(gate)})
    with aio.open(directory, 128 * BLOCK, engine=engine, block_size=BLOCK, queue_depth=1, threads=1) as store:  # type: ignore[arg-type]
        store.allocate(128 * BLOCK)
        yield store, gate
        gate.touch()


def hold(store: aio.Store, memory: Any) -> aio.Ticket:
    first = store.read(memory(BLOCK), 0)
    while first.began is None:
        pass
    return first


def test_a_write_waits_for_so_many_reads_and_no_more(narrow: Any, memory: Any) -> None:
    store, gate = narrow
    first = hold(store, memory)
    tickets = [("w", store.write(memory(BLOCK), (100 + i) * BLOCK)) for i in range(3)]
    tickets += [("r", store.read(memory(BLOCK), (1 + i) * BLOCK)) for i in range(40)]
    gate.touch()
    assert "".join(began(tickets)) == "r" * 16 + "w" + "r" * 16 + "w" + "r" * 8 + "w"
    first.wait()


def test_a_large_read_lets_a_write_through_between_its_blocks(narrow: Any, memory: Any) -> None:
    store, gate = narrow
    first = hold(store, memory)
    write = store.write(memory(BLOCK), 100 * BLOCK)
    read = store.read(memory(64 * BLOCK), BLOCK)
    gate.touch()
    read.wait()
    write.wait()
    first.wait()
    assert read.began < write.began and write.ended < read.ended


def test_urgency_is_the_callers_to_say(narrow: Any, memory: Any) -> None:
    store, gate = narrow
    first = hold(store, memory)
    tickets = [
        ("write", store.write(memory(BLOCK), 100 * BLOCK)),
        ("later read", store.read(memory(BLOCK), BLOCK, urgent=False)),
        ("urgent write", store.write(memory(BLOCK), 101 * BLOCK, urgent=True)),
        ("read", store.read(memory(BLOCK), 2 * BLOCK)),
        ("vector", store.writev([(memory(BLOCK), 102 * BLOCK)], urgent=True)),
    ]
    gate.touch()
    assert began(tickets) == ["urgent write", "read", "vector", "write", "later read"]
    first.wait()


@pytest.fixture
def durable(faulty: Any, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``durable(rule, ...)``: a store that takes fsync, on a file system that fails, and the gate of its rules."""
    # This file system has no O_TMPFILE, so that nothing on it could be given a name; fsync does not need one.
    monkeypatch.setattr(aio.scratch, "_open_linkable", aio.scratch._open_unnamed)
    gate = tmp_path / "gate"

    def make(*rules: dict[str, Any]) -> tuple[aio.Store, Path]:
        directory, _ = faulty(*rules)
        store = aio.open(
            directory, 8 * BLOCK, engine=engine, block_size=BLOCK, threads=4, durability="fdatasync"  # type: ignore[arg-type]
        )
        store.allocate(8 * BLOCK)
        return store, gate

    yield make
    gate.touch()


def test_an_fsync_stands_between_writes(durable: Any, memory: Any, tmp_path: Path) -> None:
    store, gate = durable({"op": "write", "from": 0, "to": 1, "hold": str(tmp_path / "gate")})
    if store.engine == "io_uring":
        gate.touch()
        store.close()
        pytest.skip("over FUSE it waits for each request in its own thread; test_injected.py has this for both")
    with store:
        before = [store.write(memory(BLOCK), at * BLOCK) for at in (0, 1)]
        barrier = store.fsync()
        after = store.write(memory(BLOCK), 2 * BLOCK)
        second = store.fsync()
        last = store.write(memory(BLOCK), 3 * BLOCK)
        store.read(memory(BLOCK), 4 * BLOCK).wait()  # reads pass
        before[1].wait()
        assert not barrier.done() and after.began is None and last.began is None
        assert repr(barrier) == "<fsync, under way>"
        gate.touch()
        last.wait()
        assert barrier.done() and after.done() and second.done()
        assert before[0].ended <= barrier.began <= barrier.ended <= after.began  # type: ignore[operator]
        assert after.ended <= second.began <= second.ended <= last.began  # type: ignore[operator]


def test_an_fsync_that_fails_says_so_and_lets_writes_go_on(durable: Any, memory: Any) -> None:
    store, _ = durable({"op": "fsync", "errno": errno.EIO, "times": 1})
    with store:
        failing = store.fsync()
        store.write(memory(BLOCK), 0).wait()
        with pytest.raises(aio.AioError) as raised:
            failing.wait()
        assert (raised.value.errno, raised.value.op, raised.value.filename) == (errno.EIO, "fsync", store.path)
        store.fsync().wait()


def test_a_failed_write_does_not_hold_the_barrier(durable: Any, memory: Any) -> None:
    store, _ = durable({"op": "write", "from": 0, "to": 1, "errno": errno.ENOSPC})
    with store:
        lost = store.write(memory(3 * BLOCK), 0)
        store.fsync().wait()
        with pytest.raises(aio.AioError):
            lost.wait()


def test_a_swap_store_has_no_fsync(store: aio.Store) -> None:
    for call in (store.fsync, lambda: store.publish("somewhere")):
        with pytest.raises(ValueError, match="durability='fdatasync'"):
            call()


def test_a_published_file_is_whole_and_replaces_the_old_one(disk: Path, engine: str, memory: Any) -> None:
    target = disk / "checkpoint"
    for number in range(2):
        content = os.urandom(100_000)
        with aio.open(disk, 1 << 20, engine=engine, durability="fdatasync") as store:  # type: ignore[arg-type]
            extent = store.allocate(len(content))
            ticket = store.write(memory(content), extent.offset)
            store.publish(target, len(content))
            assert ticket.done()
        assert target.read_bytes() == content, number
        assert os.listdir(disk) == ["checkpoint"]


def test_what_cannot_be_published(disk: Path, small_tmpfs: Path, tmp_path: Path) -> None:
    with aio.open(disk, 1 << 20, durability="fdatasync") as store:
        with pytest.raises(OSError, match="different file systems") as raised:
            store.publish(small_tmpfs / "there")
        assert raised.value.errno == errno.EXDEV
        with pytest.raises(FileNotFoundError):
            store.publish(disk / "nowhere" / "there")
        with pytest.raises(ValueError, match="nbytes is -1"):
            store.publish(disk / "there", -1)
        (disk / "folder").mkdir()
        with pytest.raises(OSError, match="cannot get this name"):
            store.publish(disk / "folder")
        assert os.listdir(disk / "folder") == [] and not any(n.endswith(".tierflow") for n in os.listdir(disk))
    with (
        aio.open([disk, small_tmpfs], 1 << 20, durability="fdatasync") as store,
        pytest.raises(ValueError, match="2 paths"),
    ):
        store.publish(disk / "there")


def test_a_file_system_without_names_for_it_is_refused(faulty: Any) -> None:
    directory, _ = faulty()
    with pytest.raises(OSError, match="O_TMPFILE") as raised:
        aio.open(directory, 1 << 20, durability="fdatasync")
    assert raised.value.filename == str(directory)
