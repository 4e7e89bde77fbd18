"""A training step of tierflow, plain torch and DeepSpeed's ZeRO-3, interleaved.

    python benchmarks/bench_train.py [--deepspeed-python PATH] [--nvme-path DIR] [--json PATH]

A Llama-shaped model of 134,515,008 parameters with random weights trains in fp32 on the CPU. Every contender runs in
a process and session of its own, one after the other, round after round; each warms up, then times its steps. DeepSpeed
needs an environment of its own (benchmarks/peers/install_deepspeed.sh); without one its rows say so. Only ratios within
one run carry over, and only from a machine that does nothing else.
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
from pathlib import Path
from typing import Any

from rich.console import Console
from train.contenders import CONTENDERS, Contender, choose
from train.runner import Environment, rounds
from train.spec import ADAMW, CLIP, LLAMA_134M, TINY, Shape, Spec
from train.summary import rows
from train.table import show

from tierflow import machine

#: What --smoke changes unless it is given: a tiny model that shows the benchmark still works.
SMOKE: dict[str, Any] = {"batches": [1], "accumulations": [1], "sequence": 16, "warmup": 1, "steps": 2, "rounds": 1}
#: On disk by the usual rules, where /tmp may be memory.
DRIVE = Path("/var/tmp")
MISSING = {"deepspeed": "no --deepspeed-python was given; benchmarks/peers/install_deepspeed.sh makes what it needs"}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    names = ", ".join(c.name for c in CONTENDERS)
    add("--contenders", nargs="+", default=["torch", "deepspeed", "tierflow"], metavar="NAME",
        help=f"names, or an engine for all of its own: {names}")  # fmt: skip
    add("--batches", nargs="+", type=positive, default=[1, 4], metavar="N", help="sequences a micro-batch")
    add("--accumulations", nargs="+", type=positive, default=[1, 4], metavar="N", help="micro-batches a step")
    add("--sequence", type=positive, default=128, metavar="N", help="tokens a sequence")
    add("--warmup", type=positive, default=2, metavar="N", help="steps before the timed ones")
    add("--steps", type=positive, default=5, metavar="N", help="timed steps of each process")
    add("--rounds", type=positive, default=3, metavar="N", help="times that each contender is started")
    add("--threads", type=positive, metavar="N", help="OMP_NUM_THREADS of every contender (default: not set)")
    add("--timeout", type=float, default=1200.0, metavar="SECONDS", help="of one process")
    add("--nvme-path", type=Path, default=DRIVE, metavar="DIR", help="folder on the drive (default: %(default)s)")
    add("--deepspeed-python", metavar="PYTHON", help="the Python of an environment that has DeepSpeed")
    add("--json", type=Path, metavar="PATH", help="written anew after every batch and accumulation")
    add("--smoke", action="store_true", help="a tiny model and few steps: shows that it works, measures nothing")
    return found


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def arguments() -> argparse.Namespace:
    found = parser()
    if "--smoke" in sys.argv[1:]:
        found.set_defaults(**SMOKE)
    args = found.parse_args()
    try:
        args.chosen = choose(args.contenders)
    except ValueError as error:
        found.error(str(error))
    if not args.nvme_path.is_dir():
        found.error(f"--nvme-path {args.nvme_path} is no folder: make it, or name another")
    if args.deepspeed_python and not os.access(args.deepspeed_python, os.X_OK):
        found.error(f"--deepspeed-python {args.deepspeed_python} is no program: name an environment's bin/python")
    return args


def command() -> str:
    """The command line with this machine's folders left out."""
    words, hide = [], ""
    for word in sys.argv[1:]:
        option, _, value = word.partition("=")
        words.append(hide or (f"{option}={_PLACES[option]}" if value and option in _PLACES else word))
        hide = "" if hide else _PLACES.get(word, "")
    return shlex.join(["python", "benchmarks/bench_train.py", *words])


#: Options whose values are this machine's folders.
_PLACES = {"--nvme-path": "DIR", "--deepspeed-python": "PYTHON"}


def head(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that a result needs beside its rows."""
    cpu = machine.cpu()
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "benchmark": "train",
        "command": command(),
        "commit": commit,
        "machine": {
            "cpu": cpu.name, "cores": cpu.cores, "flags": cpu.flags, "memory": machine.mem_total(),
            "kernel": platform.release(), "file_system": machine.file_system(args.nvme_path),
            "huge_pages": machine.huge_pages(), "load_average": os.getloadavg(),
        },
        "shape": vars(shape(args)),
        "optimizer": {"type": "AdamW", **ADAMW, "gradient_clipping": CLIP},
        "dtype": "float32",
        "sequence": args.sequence,
        "warmup": args.warmup,
        "steps": args.steps,
        "rounds": args.rounds,
        "units": "seconds and bytes; kernel_*, engine: per optimizer step; kernel_*: block device, /proc/self/io",
    }  # fmt: skip


def environment(args: argparse.Namespace) -> Environment:
    """The Python of every engine that can run."""
    pythons = {"torch": sys.executable, "tierflow": sys.executable}
    if args.deepspeed_python:
        pythons["deepspeed"] = os.path.abspath(args.deepspeed_python)
    return Environment(pythons, args.nvme_path.absolute(), args.threads, args.timeout)


def cell(args: argparse.Namespace, batch: int, accumulation: int, console: Console) -> dict[str, Any]:
    """All rounds of all contenders at one batch size and accumulation; prints as it goes, and the table."""
    title = f"batch {batch}, accumulation {accumulation}, sequence {args.sequence}"
    console.print(f"[bold]{title}")

    def spec_of(contender: Contender) -> Spec:
        sizes = batch, accumulation, args.sequence, args.warmup, args.steps
        return Spec(contender.driver, shape(args), *sizes, contender.options)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    results = rounds(args.chosen, spec_of, environment(args), args.rounds, say)
    found = rows(args.chosen, results, MISSING)
    show(console, title, found)
    return {"batch": batch, "accumulation": accumulation, "rows": found}


def shape(args: argparse.Namespace) -> Shape:
    return TINY if args.smoke else LLAMA_134M


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the contender and its folder too
    console = Console(width=None if sys.stdout.isatty() else 200)
    result: dict[str, Any] = head(args) | {"cells": []}
    for batch in args.batches:
        for accumulation in args.accumulations:
            result["cells"].append(cell(args, batch, accumulation, console))
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
