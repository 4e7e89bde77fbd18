"""What the command was asked for, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tierflow.sizes import format_size, parse_size
from tierflow.tune.budget import MOST_WRITTEN
from tierflow.tune.floor import FORMATS, parse_parameters

#: A shorter run can look at nothing twice; a file must hold two queues.
SHORTEST, SMALLEST = 2.0, 128 << 20


@dataclass(frozen=True)
class Options:
    """The options of ``tierflow tune`` as they were written."""

    paths: tuple[Path, ...]
    time: float = 60.0
    size: str = "1GiB"
    read_only: bool = False
    json: bool = False
    output: Path = Path("aio_profile.json")
    parameters: str | None = None
    optimizer_state: str = "lossless"
    sustained: str | None = None


@dataclass(frozen=True)
class Job:
    """The same, understood. Sizes in bytes, of each path's file."""

    paths: list[str]
    size: int
    parameters: int | None
    sustained: int | None


def understand(options: Options) -> Job:
    """Raises ValueError or OSError naming the option, what was given, and what is possible."""
    if not options.time >= SHORTEST:
        raise ValueError(f"--time is {options.time:g}: at least {SHORTEST:g} seconds are needed")
    if options.optimizer_state not in FORMATS:
        raise ValueError(f"--optimizer-state is {options.optimizer_state!r}: one of {', '.join(FORMATS)}")
    size = _size("--size", options.size)
    if not SMALLEST <= size <= MOST_WRITTEN // 8:
        raise ValueError(f"--size is {options.size}: from {format_size(SMALLEST)} to {format_size(MOST_WRITTEN // 8)} is possible")
    sustained = None if options.sustained is None else _size("--sustained", options.sustained)
    if sustained is not None and options.read_only:
        raise ValueError("--sustained writes and --read-only forbids it: leave one of them out")
    paths = [os.path.abspath(path) for path in options.paths]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(f"{twice[0]} is named twice")
    for what in (options.output.parent, *options.paths):
        if not what.is_dir():
            raise ValueError(f"{what} is no folder: name one that exists" + (", on the drive" if what in options.paths else ""))
    parameters = None if options.parameters is None else parse_parameters(options.parameters)
    return Job(paths, size // 4096 * 4096, parameters, sustained)


def _size(option: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ValueError(f"{option} is {text}: {error}") from None
