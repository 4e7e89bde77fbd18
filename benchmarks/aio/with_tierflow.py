"""tierflow.aio: one Python call for each request. ``python -m aio.with_tierflow SPEC`` serves runs; see worker.py.

SPEC: JSON with "paths", "bytes" (of each file) and "options" of ``aio.open``. The stores' files have no name; the
hello tells where under /proc the other contenders find them.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import cycle

from aio.worker import Run, serve
from tierflow import aio

HUGE = 2 << 20


def memory(nbytes: int, huge: bool) -> memoryview:
    """Memory that begins on a huge page's border and lies on huge pages, or on 4 KiB pages."""
    made = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(made)) % HUGE
    content = os.urandom(1 << 20)
    for at in range(0, nbytes, len(content)):
        made[begin + at : begin + at + len(content)] = content
    return memoryview(made)[begin : begin + nbytes]


class Contender:
    """Stores with one extent over the whole file, and a window of requests under way."""

    def __init__(self, paths: list[str], nbytes: int, options: dict[str, object], window: int):
        self.stores = [aio.open(path, nbytes, **options) for path in paths]
        self.begins = [store.allocate(nbytes).offset for store in self.stores]
        self.nbytes, self.window = nbytes, window

    def files(self) -> list[str]:
        """Where another process can open the stores' files, in the order of the paths."""
        found = []
        for store in self.stores:
            for fd in os.listdir("/proc/self/fd"):
                place = f"/proc/{os.getpid()}/fd/{fd}"
                if os.path.exists(place) and os.path.realpath(place).startswith(store.path.rstrip("/") + "/"):
                    found.append(place)
                    break
        return found

    def prepare(self, run: Run) -> Callable[[], int]:
        """Fresh memory: which physical pages lie beside each other is luck that no contender should keep for good."""
        return partial(self.measure, run, memory(self.window, run["huge"]))

    def measure(self, run: Run, buffer: memoryview) -> int:
        """Keeps "in_flight" requests under way until "nbytes" have been moved."""
        request, count = run["request"], run["in_flight"]
        pieces = [buffer[at : at + request] for at in range(0, request * count, request)]
        under_way: deque[aio.Ticket] = deque()
        todo = self._requests(run["kind"], request)
        for number in range(run["nbytes"] // request):
            if number >= count:
                under_way.popleft().wait()
            start, offset = next(todo)
            under_way.append(start(pieces[number % count], offset))
        for ticket in under_way:
            ticket.wait()
        return run["nbytes"] // request * request

    def _requests(self, kind: str, request: int):  # type: ignore[no-untyped-def]
        whole = range(0, self.nbytes - request + 1, request)
        halves = whole[: len(whole) // 2], whole[len(whole) // 2 :]
        starts = {"read": [("read", whole)], "write": [("write", whole)], "mixed": list(zip(("read", "write"), halves, strict=True))}
        # paths in turn, and on each path reads and writes in turn
        ways = [
            (getattr(store, op), ((begin + at) for at in cycle(places)))
            for op, places in starts[kind]
            for store, begin in zip(self.stores, self.begins, strict=True)
        ]
        for start, offsets in cycle(ways):
            yield start, next(offsets)

    def fill(self) -> None:
        """Writes every byte once: unwritten blocks are not read from the drive."""
        for store, begin in zip(self.stores, self.begins, strict=True):
            buffer = memory(self.window, huge=True)
            for at in range(0, self.nbytes, len(buffer)):
                store.write(buffer[: min(len(buffer), self.nbytes - at)], begin + at).wait()


def main() -> None:
    spec = json.loads(sys.argv[1])
    contender = Contender(spec["paths"], spec["bytes"], spec["options"], spec["window"])
    contender.fill()
    store = contender.stores[0]
    serve({"files": contender.files(), "engine": store.engine, "direct": store.direct, "note": store.note}, contender.prepare)


if __name__ == "__main__":
    main()
