"""What two priorities are worth: a reader that waits for its pieces while many writes queue, with and without them."""

from __future__ import annotations

import statistics
import time
from collections import deque
from itertools import count
from typing import Any

from rich.console import Console

from aio.pages import own
from tierflow import aio

#: As the offload engine moves them.
PIECE = 4 << 20
#: Pieces under way (reads, writes): a step that waits for what comes next; one that reads as much as it writes.
LOADS = ((2, 24), (4, 24), (16, 16))
SECONDS = 0.5


class Reader:
    """Reads in order and waits for the oldest read, behind ``writes`` that never run out."""

    def __init__(self, store: aio.Store, memory: memoryview, reads: int, writes: int):
        pieces = [memory[at : at + PIECE] for at in range(0, (reads + writes) * PIECE, PIECE)]
        self.store, self.reads, self.writes = store, pieces[:reads], pieces[reads:]
        self.places = store.capacity // PIECE // 2  # reads in the first half, writes in the second

    def run(self, urgent: bool) -> dict[str, float]:
        """Bytes per second by direction, and seconds from a read's request to its end; ``urgent``: reads go first."""
        reads: deque[tuple[aio.Ticket, float]] = deque()
        writes: deque[aio.Ticket] = deque()
        took, moved, next_read, next_write = [], {"read": 0, "write": 0}, count(), count()
        began = time.perf_counter()
        while time.perf_counter() - began < SECONDS:
            while len(reads) < len(self.reads):
                n = next(next_read)
                ticket = self.store.read(self.reads[n % len(self.reads)], n % self.places * PIECE, urgent=urgent)
                reads.append((ticket, time.perf_counter()))
            while len(writes) < len(self.writes):
                n = next(next_write)
                writes.append(self.store.write(self.writes[n % len(self.writes)], (self.places + n % self.places) * PIECE))
            ticket, asked = reads.popleft()
            ticket.wait()
            assert ticket.ended is not None
            took.append(ticket.ended - asked)
            moved["read"] += PIECE
            while writes and writes[0].done():
                writes.popleft().wait()
                moved["write"] += PIECE
        seconds = time.perf_counter() - began
        for left in (*(ticket for ticket, _ in reads), *writes):
            left.wait()
        took.sort()
        rates = {op: nbytes / seconds for op, nbytes in moved.items()}
        return rates | {"p50": took[len(took) // 2], "p99": took[len(took) * 99 // 100]}


def check_priorities(path: str, nbytes: int, rounds: int, console: Console) -> list[dict[str, Any]]:
    """Each load with reads first and with one line for all, in turn; aio's own block size and depth, huge pages."""
    memory = own(max(sum(load) for load in LOADS) * PIECE)
    found = []
    with aio.open(path, nbytes) as store:
        store.allocate(nbytes)
        for at in range(0, nbytes // PIECE * PIECE, PIECE):
            store.write(memory[:PIECE], at).wait()
        for reads, writes in LOADS:
            reader = Reader(store, memory, reads, writes)
            samples: dict[str, list[dict[str, float]]] = {"reads first": [], "one line": []}
            for _ in range(rounds):
                for name, taken in samples.items():
                    taken.append(reader.run(name == "reads first"))
            rows = {
                name: {key: statistics.median(s[key] for s in taken) for key in taken[0]} | {"samples": taken}
                for name, taken in samples.items()
            }
            found.append({"reads": reads, "writes": writes, "piece": PIECE, "rows": rows})
            for name, r in rows.items():
                rates = f"{r['read'] / 1e9:.2f} + {r['write'] / 1e9:.2f} GB/s"
                console.print(
                    f"{reads} reads and {writes} writes under way, {name}: {rates}, a read takes {r['p50'] * 1e3:.1f} ms "
                    f"(p99 {r['p99'] * 1e3:.1f})", highlight=False
                )  # fmt: skip
    return found
