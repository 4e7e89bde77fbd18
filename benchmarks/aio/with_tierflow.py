"""tierflow.aio called from Python. ``python -m aio.with_tierflow SPEC`` serves runs; see worker.py.

SPEC: JSON with "paths", "bytes" (of each file) and "options" of ``aio.open``. The store's files have no name; the
hello tells where under /proc the other contenders find them.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice

from aio.pages import mapped, own
from aio.worker import Run, serve
from tierflow import aio

#: In the queue there are so many calls at least, so that it never drains; requests beyond that share a call.
CALLS = 8


class Contender:
    """A store with one extent over all that it holds, and a window of requests under way."""

    def __init__(self, paths: list[str], nbytes: int, options: dict[str, object], window: int):
        self.paths = paths
        self.nbytes, self.window = nbytes * len(paths), window
        self.store = aio.open(paths, self.nbytes, **options)
        self.begin = self.store.allocate(self.nbytes).offset

    def files(self) -> list[str]:
        """Where another process can open the store's files, in the order of the paths."""
        found = []
        for path in self.paths:
            for fd in os.listdir("/proc/self/fd"):
                place = f"/proc/{os.getpid()}/fd/{fd}"
                if os.path.exists(place) and os.path.dirname(os.path.realpath(place)) == os.path.realpath(path):
                    found.append(place)
                    break
        return found

    def prepare(self, run: Run) -> Callable[[], int]:
        """On fresh huge pages, or on everyone's small ones."""
        return partial(self.measure, run, mapped(run["scattered"]) if run["scattered"] else own(self.window))

    def measure(self, run: Run, buffer: memoryview) -> int:
        """Keeps "in_flight" requests under way until "nbytes" have been moved."""
        request, count = run["request"], run["in_flight"]
        pieces = [buffer[at : at + request] for at in range(0, request * count, request)]
        group = max(1, count // CALLS)
        count -= count % group
        under_way: deque[aio.Ticket] = deque()
        calls = self._calls(run["kind"], request, group)
        total = run["nbytes"] // (request * group)
        for number in range(total):
            if number >= count // group:
                under_way.popleft().wait()
            start, offsets = next(calls)
            at = number * group % count
            under_way.append(start(list(zip(pieces[at : at + group], offsets, strict=True))))
        for ticket in under_way:
            ticket.wait()
        return total * group * request

    def _calls(self, kind: str, request: int, group: int):  # type: ignore[no-untyped-def]
        """(method, offsets of the requests that it is to carry out)"""
        whole = range(0, self.nbytes - request + 1, request)
        halves = whole[: len(whole) // 2], whole[len(whole) // 2 :]
        read, write = self.store.readv, self.store.writev
        places = {"read": [(read, whole)], "write": [(write, whole)], "mixed": [(read, halves[0]), (write, halves[1])]}
        ways = [(start, (self.begin + at for at in cycle(part))) for start, part in places[kind]]
        for start, offsets in cycle(ways):
            yield start, list(islice(offsets, group))

    def fill(self) -> None:
        """Writes every byte once: unwritten blocks are not read from the drive."""
        buffer = own(self.window)
        for at in range(0, self.nbytes, len(buffer)):
            self.store.write(buffer[: min(len(buffer), self.nbytes - at)], self.begin + at).wait()


def main() -> None:
    spec = json.loads(sys.argv[1])
    contender = Contender(spec["paths"], spec["bytes"], spec["options"], spec["window"])
    contender.fill()
    store = contender.store
    serve({"files": contender.files(), "engine": store.engine, "direct": store.direct, "note": store.note}, contender.prepare)


if __name__ == "__main__":
    main()
