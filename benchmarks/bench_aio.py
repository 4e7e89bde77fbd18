"""tierflow.aio beside fio and DeepSpeed's aio engine, on the same files, interleaved.

    python benchmarks/bench_aio.py --peers fio,deepspeed --path DIR [--deepspeed-python PYTHON] [--json PATH]

Sequential reads, writes and a mixed load (as many reads as writes), one file and two, with requests of several sizes
and equally many bytes in flight for everyone, on huge pages and on the very same scattered 4 KiB pages for all.
tierflow is called from Python, once for each request or, where it takes several, once for an eighth of what is in
flight. Every contender works on the unnamed files that tierflow's stores made, in a session of its own whose
scheduling group is raised while it is measured. --tune SECONDS runs `tierflow tune` first and then checks that a plain
run with its profile gives the profile's figures, with fio beside it. --priorities adds what reads that go first are worth.
Only ratios within one run carry over.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from aio.contenders import Contender, Field
from aio.plain import check_profile
from aio.priorities import check_priorities
from aio.summary import ratios, row
from rich.console import Console
from rich.table import Table

from tierflow import machine
from tierflow.sizes import parse_size
from tierflow.tune.device import device_of, mounted

KINDS = ("read", "write", "mixed")
#: In flight for everyone, as requests of the size at hand; more than 256 requests help nobody.
IN_FLIGHT, MOST_REQUESTS = 32 << 20, 256
#: tierflow's store in every row: requests larger than a block are split, and depth never limits.
OPTIONS = {"engine": "io_uring", "block_size": 2 << 20, "queue_depth": MOST_REQUESTS}
SMOKE = {"file_size": 64 << 20, "requests": [1 << 20], "rounds": 1}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--peers", default="", metavar="LIST", help="fio, deepspeed, or both with a comma between them")
    add("--path", type=Path, default=Path("/var/tmp"), metavar="DIR", help="folder on the drive (default: %(default)s)")
    add("--second", type=Path, metavar="DIR", help="the second path (default: another folder of the same drive)")
    add("--deepspeed-python", metavar="PYTHON", help="the Python of an environment that has DeepSpeed")
    add("--file-size", type=parse_size, default=2 << 30, metavar="SIZE", help="of each path's file (default: 2GiB)")
    add("--requests", nargs="+", type=parse_size, metavar="SIZE",
        default=[128 << 10, 512 << 10, 2 << 20, 16 << 20], help="bytes of a request")  # fmt: skip
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="read, write, mixed")
    add("--files", nargs="+", type=int, choices=(1, 2), default=[1, 2], metavar="N", help="1, 2 or both")
    add("--rounds", type=int, default=5, metavar="N", help="times that each contender runs a load")
    add("--tune", type=float, metavar="SECONDS", help="run `tierflow tune` and check its profile by a plain run")
    add("--priorities", action="store_true", help="also a waiting reader beside many writes, with and without priorities")
    add("--json", type=Path, metavar="PATH")
    add("--smoke", action="store_true", help="small and once: shows that it works, measures nothing")
    return found


def arguments() -> argparse.Namespace:
    found = parser()
    if "--smoke" in sys.argv[1:]:
        found.set_defaults(**SMOKE)
    args = found.parse_args()
    args.chosen = [name for name in args.peers.split(",") if name]
    if unknown := [name for name in args.chosen if name not in ("fio", "deepspeed")]:
        found.error(f"--peers {unknown[0]} is not known: fio, deepspeed")
    for path in (args.path, args.second):
        if path is not None and not path.is_dir():
            found.error(f"{path} is no folder: make it, or name another")
    args.file_size -= args.file_size % (32 << 20)
    if args.file_size < 64 << 20 or args.rounds < 1:
        found.error("--file-size must be at least 64MiB and --rounds at least 1")
    if bad := [size for size in args.requests if size % 4096 or not 4096 <= size <= 16 << 20]:
        found.error(f"--requests {bad[0]}: multiples of 4096 up to 16MiB")
    return args


_PLACES = {"--path": "DIR", "--second": "DIR", "--deepspeed-python": "PYTHON", "--json": "PATH"}


def command() -> str:
    """The command line with this machine's folders left out."""
    words, hide = [], ""
    for word in sys.argv[1:]:
        words.append(hide or word)
        hide = "" if hide else _PLACES.get(word, "")
    return shlex.join(["python", "benchmarks/bench_aio.py", *words])


def head(args: argparse.Namespace) -> dict[str, Any]:
    cpu, mount = machine.cpu(), mounted(args.path)
    device = device_of(mount) if mount else None
    leaf = next(device.leaves()) if device else None
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "benchmark": "aio",
        "command": command(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "machine": {
            "cpu": cpu.name, "cores": cpu.cores, "memory": machine.mem_total(), "kernel": platform.release(),
            "file_system": machine.file_system(args.path), "huge_pages": machine.huge_pages(),
            "device": None if leaf is None else {
                "model": leaf.model, "max_request": leaf.max_request, "max_segments": leaf.max_segments,
                "scheduler": leaf.scheduler,
            },
            "load_average": os.getloadavg(),
        },
        "o_direct": True,
        "page_cache": "bypassed by all contenders; a virtual disk's host may cache",
        "file_size": args.file_size,
        "rounds": args.rounds,
        "in_flight_bytes": IN_FLIGHT,
        "options": OPTIONS,
        "units": "rates in bytes per second, both directions of a mixed load together; CPU in seconds per GiB",
    }  # fmt: skip


def in_flight(request: int, file_size: int) -> int:
    return max(1, min(MOST_REQUESTS, IN_FLIGHT // request, file_size // request // 2))


def measure(field: Field, kind: str, request: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Every contender once a round, each round beginning with another."""
    # as much of two files as of one; a byte written wears a drive: half of it shows as much
    nbytes = (field.file_bytes if kind == "read" else field.file_bytes // 2) // request * request
    run = field.run(kind, request, in_flight(request, field.file_bytes), nbytes)
    samples: dict[str, list[dict[str, Any]]] = {c.key: [] for c in field.contenders}
    for number in range(rounds):
        for contender in _rotated(field.contenders, number):
            samples[contender.key].append(contender.ask(run))
    return {key: row(taken) for key, taken in samples.items()}


def _rotated(contenders: list[Contender], by: int) -> list[Contender]:
    by %= len(contenders)
    return contenders[by:] + contenders[:by]


def show(console: Console, cells: list[dict[str, Any]]) -> None:
    """A row for each load, a column for each contender, and the ratios."""
    keys = list(cells[0]["rows"])
    table = Table(title=f"{cells[0]['files']} file(s), GB/s (kernel's CPU seconds per GiB)", title_justify="left")
    for heading in ("load", *keys, "to best, huge", "to best, 4k", "to DeepSpeed", "... huge", "... 4k", "pages"):
        table.add_column(heading, justify="left" if heading == "load" else "right")
    for cell in cells:
        words = [f"{cell['kind']} {cell['request'] >> 10} KiB x {cell['in_flight']}"]
        for key in keys:
            r = cell["rows"][key]
            words.append("failed" if "error" in r else f"{r['rate'] / 1e9:.2f} ({r['kernel_per_gib']:.3f})")
        for name in ("to_best_huge", "to_best_4k", "to_deepspeed", "to_deepspeed_huge", "to_deepspeed_4k", "pages"):
            words.append(f"{cell['ratios'][name]:.2f}" if name in cell["ratios"] else "")
        table.add_row(*words)
    console.print(table)
    for cell in cells:
        for key, r in cell["rows"].items():
            if "error" in r:
                console.print(f"{key}: {r['error']}", markup=False)


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the contenders and the folder too
    console = Console(width=None if sys.stdout.isatty() else 200)
    result: dict[str, Any] = head(args) | {"cells": []}

    def keep() -> None:
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="bench-aio-", dir=args.path) as second:
        both = [str(args.path), str(args.second or second)]
        if args.tune:
            result["profile"] = check_profile(both[0], args.tune, args.rounds, "fio" in args.chosen, console)
            keep()
        if args.priorities:
            result["priorities"] = check_priorities(both[0], args.file_size, args.rounds, console)
            keep()
        for count in args.files:
            with Field(both[:count], args.file_size, OPTIONS, IN_FLIGHT) as field:
                if "fio" in args.chosen:
                    field.add_fio()
                if "deepspeed" in args.chosen:
                    field.add_deepspeed(args.deepspeed_python)
                result["facts"], result["missing"] = field.facts, field.missing
                cells = []
                for kind in args.kinds:
                    for request in args.requests:
                        rows = measure(field, kind, request, args.rounds)
                        cells.append({
                            "files": count, "kind": kind, "request": request,
                            "in_flight": in_flight(request, args.file_size), "rows": rows, "ratios": ratios(rows),
                        })  # fmt: skip
                        console.print(f"{count} file(s), {kind} of {request >> 10} KiB: done", highlight=False)
                result["cells"] += cells
                show(console, cells)
                for name, why in field.missing.items():
                    console.print(f"{name}: {why}", markup=False)
            keep()


if __name__ == "__main__":
    main()
