"""What can be turned: a setting, and which settings there are to choose from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

Engine = Literal["io_uring", "threads"]

#: More in flight at once has no use that was ever seen, and would ask for as much memory in buffers.
MOST_IN_FLIGHT = 32 << 20
#: From here on the drive has something to do while the next request is made.
LEAST_IN_FLIGHT = 256 << 10


@dataclass(frozen=True, order=True)
class Setting:
    """One way to read and write. ``queue_depth``: blocks in flight on a path, which its ``rings`` share (threads, for
    that engine)."""

    engine: Engine
    block_size: int
    queue_depth: int
    rings: int
    huge_pages: bool

    @property
    def in_flight(self) -> int:
        """Bytes that the kernel has at once, on each path."""
        return self.block_size * self.queue_depth

    def aio_options(self) -> dict[str, Any]:
        """The keyword arguments of ``tierflow.aio.open``, but for rings."""
        depth = "threads" if self.engine == "threads" else "queue_depth"
        return {"engine": self.engine, "block_size": self.block_size, depth: self.queue_depth}

    def __str__(self) -> str:
        rings = f" on {self.rings} rings" if self.rings > 1 else ""
        pages = "huge pages" if self.huge_pages else "4 KiB pages"
        return f"{self.engine} {size(self.block_size)} x {self.queue_depth}{rings}, {pages}"


@dataclass(frozen=True)
class Space:
    """The values of each knob, in order where they have one. What fails nowhere else but here is left out of it."""

    engine: tuple[Engine, ...] = ("io_uring", "threads")
    block_size: tuple[int, ...] = tuple((128 << 10) << n for n in range(8))
    queue_depth: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    rings: tuple[int, ...] = (1, 2)
    huge_pages: tuple[bool, ...] = (False, True)
    most_in_flight: int = MOST_IN_FLIGHT  #: a power of two

    def allows(self, setting: Setting) -> bool:
        """Whether it lies inside, its bytes in flight included."""
        inside = all(getattr(setting, knob) in getattr(self, knob) for knob in KNOBS)
        shared = setting.rings == 1 or (setting.engine == "io_uring" and setting.rings <= setting.queue_depth)
        return inside and shared and LEAST_IN_FLIGHT <= setting.in_flight <= self.most_in_flight

    def within(self, setting: Setting) -> Setting:
        """The same with fewer blocks in flight, and if need be smaller ones, so that ``most_in_flight`` allows it."""
        block = min(setting.block_size, self.most_in_flight)
        return replace(setting, block_size=block, queue_depth=min(setting.queue_depth, self.most_in_flight // block))

    def starts(self, count: int, seed: int = 0) -> list[Setting]:
        """``count`` different settings, each value of each knob about equally often among them."""
        rng = random.Random(seed)
        found: list[Setting] = []
        for _ in range(200):  # ample, and an end where the space has fewer than were asked for
            columns = [_column(getattr(self, knob), count, rng) for knob in KNOBS]
            for row in zip(*columns, strict=True):
                setting = Setting(*row)
                if self.allows(setting) and setting not in found and len(found) < count:
                    found.append(setting)
            if len(found) == count:
                break
        return found

    def neighbours(self, setting: Setting) -> Iterator[tuple[str, Setting]]:
        """(knob, setting) for each that differs in one knob: by one place where values have an order."""
        for knob in KNOBS:
            values = getattr(self, knob)
            place = values.index(getattr(setting, knob))
            for other in (place - 1, place + 1):
                if 0 <= other < len(values):
                    near = replace(setting, **{knob: values[other]})
                    if self.allows(near):
                        yield knob, near


KNOBS = tuple(field.name for field in fields(Setting))


def _column(values: tuple[Any, ...], count: int, rng: random.Random) -> list[Any]:
    first = rng.randrange(len(values))  # which values come once more than others is chance
    column = [values[(first + n) % len(values)] for n in range(count)]
    rng.shuffle(column)
    return column


def size(nbytes: int) -> str:
    """As block sizes are written: 128 KiB, 4 MiB."""
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= factor and nbytes % factor == 0:
            return f"{nbytes // factor} {unit}"
    return f"{nbytes} B"
