"""Random interleavings of reads and writes of any alignment, against a plain array of bytes.

Ranges under way share no byte unless both are read, for those have no order; but they do share sectors, stripes and
checksummed pages all the time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import tierflow.aio as aio

CAPACITY = 192 << 10
GUARD = 64

OFFSETS = st.one_of(
    st.integers(0, CAPACITY - 1),
    st.integers(0, CAPACITY // 4096 - 1).map(lambda n: n * 4096),
    st.integers(0, CAPACITY // 512 - 1).map(lambda n: n * 512),
    st.integers(8000, 8400),  # one stripe's end: neighbours
)
LENGTHS = st.one_of(st.integers(1, 600), st.sampled_from([512, 4096, 8192, 65536]), st.integers(1, 70000))
SHIFTS = st.one_of(st.just(0), st.sampled_from([1, 4, 64, 512]), st.integers(0, 4095))
REQUEST = st.tuples(OFFSETS, LENGTHS, SHIFTS)


class Buffer:
    """``nbytes`` at an address that is ``shift`` past a page's beginning, between guards."""

    def __init__(self, nbytes: int, shift: int, content: bytes) -> None:
        self.raw = bytearray(b"G" * (8192 + GUARD + shift + nbytes + GUARD))
        address = aio.store._aio.View(self.raw, True).address
        self.begin = -address % 4096 + 4096 + shift
        self.view = memoryview(self.raw)[self.begin : self.begin + nbytes]
        self.view[:] = content

    def guarded(self) -> bool:
        end = self.begin + len(self.view)
        return set(self.raw[self.begin - GUARD : self.begin]) == set(self.raw[end : end + GUARD]) == {ord("G")}


class UnderWay:
    def __init__(self, ticket: aio.Ticket, parts: list[tuple[int, Buffer, bytes]]) -> None:
        self.ticket = ticket
        self.parts = parts  # offset, memory, what must be in it in the end

    def shares(self, offset: int, nbytes: int) -> bool:
        return any(at < offset + nbytes and offset < at + len(memory.view) for at, memory, _ in self.parts)


class StoreMachine(RuleBasedStateMachine):
    options: dict[str, Any] = {}
    directories: list[Path] = []

    @initialize()
    def start(self) -> None:
        self.store = aio.open(
            self.directories, CAPACITY, block_size=16 << 10, queue_depth=3, threads=3, **self.options
        )
        self.store.allocate(CAPACITY)
        self.model = bytearray(CAPACITY)
        self.out: list[UnderWay] = []
        self.serial = 0
        self.moved = {"read": 0, "write": 0}
        self.go("write", [(0, CAPACITY, 0)])  # nothing is left to chance, nor to the checksums
        self.finish(self.out[0])

    def allowed(self, op: str, requests: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        kept: list[tuple[int, int, int]] = []
        for offset, length, shift in requests:
            nbytes = min(length, CAPACITY - offset)
            others = [o for o in self.out if op == "write" or o.ticket.op == "write"]
            if any(o.shares(offset, nbytes) for o in others):
                continue
            if op == "write" and any(a < offset + nbytes and offset < a + n for a, n, _ in kept):
                continue
            kept.append((offset, nbytes, shift))
        return kept

    def go(self, op: str, requests: list[tuple[int, int, int]], urgent: bool | None = None) -> None:
        parts = []
        for offset, nbytes, shift in self.allowed(op, requests):
            self.serial += 1
            if op == "write":
                unit = b"%06d." % self.serial
                content = (unit * (nbytes // len(unit) + 1))[:nbytes]
                self.model[offset : offset + nbytes] = content
                parts.append((offset, Buffer(nbytes, shift, content), content))
            else:
                wanted = bytes(self.model[offset : offset + nbytes])
                parts.append((offset, Buffer(nbytes, shift, b"?" * nbytes), wanted))
        if not parts:
            return
        pairs = [(memory.view, offset) for offset, memory, _ in parts]
        how = {} if urgent is None else {"urgent": urgent}
        if len(pairs) == 1:
            ticket = getattr(self.store, op)(*pairs[0], **how)
        else:
            ticket = getattr(self.store, f"{op}v")(pairs, **how)
        self.out.append(UnderWay(ticket, parts))
        self.moved[op] += ticket.nbytes

    def finish(self, under_way: UnderWay) -> None:
        self.out.remove(under_way)
        under_way.ticket.wait()
        for _, memory, wanted in under_way.parts:
            assert memory.view == wanted
            assert memory.guarded()

    @rule(request=REQUEST, urgent=st.sampled_from([None, True, False]))
    def read(self, request: tuple[int, int, int], urgent: bool | None) -> None:
        self.go("read", [request], urgent)

    @rule(request=REQUEST, urgent=st.sampled_from([None, True, False]))
    def write(self, request: tuple[int, int, int], urgent: bool | None) -> None:
        self.go("write", [request], urgent)

    @rule(begin=OFFSETS, lengths=st.lists(st.integers(1, 900), min_size=2, max_size=12), op=st.sampled_from(["read", "write"]))
    def neighbours(self, begin: int, lengths: list[int], op: str) -> None:
        """One after the other without a gap, each its own ticket."""
        for length in lengths:
            if begin < CAPACITY:
                self.go(op, [(begin, length, begin % 4096)])
            begin += length

    @rule(requests=st.lists(REQUEST, min_size=1, max_size=8), op=st.sampled_from(["read", "write"]))
    def vector(self, requests: list[tuple[int, int, int]], op: str) -> None:
        self.go(op, requests)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        self.finish(data.draw(st.sampled_from(self.out)))

    @precondition(lambda self: self.store.durability == "fdatasync")
    @rule()
    def fsync(self) -> None:
        before = [o.ticket for o in self.out if o.ticket.op == "write"]
        self.store.fsync().wait()
        assert all(ticket.done() for ticket in before)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        while self.out:
            self.finish(self.out[0])
        self.go("read", [(0, CAPACITY, 0)])
        self.finish(self.out[0])
        assert (self.store.bytes_read, self.store.bytes_written) == (self.moved["read"], self.moved["write"])
        self.store.close()


@pytest.mark.parametrize("checksum", [False, True], ids=["plain", "checksum"])
@pytest.mark.parametrize("paths", [1, 2], ids=["one path", "two paths"])
def test_random_interleavings(disk: Path, engine: str, paths: int, checksum: bool) -> None:
    options: dict[str, Any] = {"engine": engine, "checksum": checksum, "durability": "fdatasync"}
    if paths == 2:
        options |= {"stripe": 8192, "weights": [2, 1], "rings": 2 if engine == "io_uring" else 1}

    class Machine(StoreMachine):
        pass

    with tempfile.TemporaryDirectory(dir=disk) as other:
        Machine.options, Machine.directories = options, [disk, Path(other)][:paths]
        quick = settings(
            max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        )
        run_state_machine_as_test(Machine, settings=quick)
