"""What tierflow adds to a step where everything fits: plain torch and tierflow in one process, step by step.

    python benchmarks/bench_resident.py [--batch N] [--accumulation N] [--steps N] [--json PATH]

Both train the model of bench_train.py, which gives each contender a process of its own and so also compares what its heap
became. Here they share one, and take turns in going first; a ratio is between two steps on the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from train import plain_torch, with_tierflow
from train.measure import Phases
from train.model import micro_batches
from train.spec import LLAMA_134M, TINY, Spec

from tierflow import machine

WARMUP = 2
#: glibc's settings that keep freed memory for the next operator, where they are set.
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def arguments() -> argparse.Namespace:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--batch", type=int, default=4, help="sequences of 128 tokens a micro-batch")
    found.add_argument("--accumulation", type=int, default=4, help="micro-batches a step")
    found.add_argument("--steps", type=int, default=10, help=f"timed steps of each, after {WARMUP}")
    found.add_argument("--json", type=Path, metavar="PATH")
    found.add_argument("--smoke", action="store_true", help="a tiny model: shows that it works, measures nothing")
    return found.parse_args()


def timed(trainer: Any, ids: list[torch.Tensor]) -> dict[str, float]:
    """Seconds of one step, whole and by phase, its page faults and the loss."""
    phases, faults, began = Phases(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    loss = trainer.step(ids, phases)
    seconds = time.perf_counter() - began
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {"seconds": seconds, **phases.seconds, "page_faults": faults, "loss": loss}


def measure(spec: Spec) -> dict[str, list[dict[str, float]]]:
    """The timed steps of each."""
    trainers: dict[str, Any] = {"torch": plain_torch.Trainer(spec), "tierflow": with_tierflow.Trainer(spec)}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    batches = micro_batches(spec)
    for n in range(spec.warmup + spec.steps):
        ids = next(batches)
        for name in list(trainers)[:: -1 if n % 2 else 1]:
            steps[name].append(timed(trainers[name], ids))
    for trainer in trainers.values():
        trainer.close()
    return {name: all_steps[spec.warmup :] for name, all_steps in steps.items()}


def summary(steps: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, and the spread of the ratios."""
    ratios = sorted(ours["seconds"] / theirs["seconds"] for ours, theirs in zip(steps["tierflow"], steps["torch"], strict=True))
    medians = {n: {k: statistics.median(step[k] for step in s) for k in s[0] if k != "loss"} for n, s in steps.items()}
    return {"medians": medians, "ratio": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}}


def main() -> None:
    args = arguments()
    sizes = args.batch, args.accumulation, 16 if args.smoke else 128, WARMUP, args.steps
    spec = Spec("", TINY if args.smoke else LLAMA_134M, *sizes, {"param": "none", "optimizer": "none"}, "auto")
    words = ["PATH" if i and sys.argv[i - 1] == "--json" else word for i, word in enumerate(sys.argv)][1:]
    cpu, malloc = machine.cpu(), {name: os.environ[name] for name in MALLOC if name in os.environ}
    result: dict[str, Any] = {
        "benchmark": "resident",
        "command": shlex.join(["python", "benchmarks/bench_resident.py", *words]),
        "environment": malloc,
        "machine": {"cpu": cpu.name, "cores": cpu.cores, "memory": machine.mem_total(), "kernel": platform.release()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps": measure(spec),
    }
    result["summary"] = summary(result["steps"])
    print(json.dumps(result["summary"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
