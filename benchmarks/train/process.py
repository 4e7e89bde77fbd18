"""One contender's process: ``python -m train.process SPEC RESULT`` trains and writes what it measured as JSON.

The result holds ``error``, and ``where`` it was raised, instead where the driver raised; the exit status is then 1.
"""

from __future__ import annotations

import importlib
import json
import platform
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from train.measure import Phases, kernel_io, peak_resident, resident
from train.model import micro_batches
from train.spec import Spec

#: Steps over which bytes are counted from one settled state to another, none of them timed.
WHOLE_STEPS = 2


def measure(spec: Spec) -> dict[str, Any]:
    """Seconds by step and phase, losses of all steps (the warm-up's first), bytes and memory."""
    driver = importlib.import_module(f"train.{spec.driver}")
    imported = resident()
    trainer = driver.Trainer(spec)
    batches = micro_batches(spec)
    losses = [trainer.step(next(batches), Phases()) for _ in range(spec.warmup)]
    trainer.counts()
    steps: list[dict[str, float]] = []
    before, began = kernel_io(), time.monotonic()
    for _ in range(spec.steps):
        ids, phases, start = next(batches), Phases(), time.perf_counter()
        losses.append(trainer.step(ids, phases))
        steps.append({"seconds": time.perf_counter() - start, **phases.seconds})
    ended, after = time.monotonic(), kernel_io()
    floor = trainer.floor() if hasattr(trainer, "floor") else None
    counts = trainer.counts()
    result = {
        "steps": steps,
        "floor": floor,
        "losses": losses,
        "window": [began, ended],  # on the clock that all processes share
        "kernel_read": (after[0] - before[0]) / spec.steps,
        "kernel_written": (after[1] - before[1]) / spec.steps,
        "engine": {name: value / spec.steps for name, value in counts.items()},
        "imported_bytes": imported,
        "peak_bytes": peak_resident(),
        "facts": facts() | trainer.facts(),
    }
    if hasattr(trainer, "settle"):
        _count_whole_updates(trainer, batches, result)
    trainer.close()
    return result


def _count_whole_updates(trainer: Any, batches: Iterator[list[torch.Tensor]], result: dict[str, Any]) -> None:
    """Bytes of steps whose updates begin and end within the window, as those of timed steps need not."""
    trainer.settle()
    trainer.counts()
    before = kernel_io()
    for _ in range(WHOLE_STEPS):
        trainer.step(next(batches), Phases())
    trainer.settle()
    for name, was, now in zip(("kernel_read", "kernel_written"), before, kernel_io(), strict=True):
        result[name] = (now - was) / WHOLE_STEPS
    counts = trainer.counts()
    result["engine"] |= {name: counts[name] / WHOLE_STEPS for name in ("nvme_read", "nvme_written")}


def facts() -> dict[str, Any]:
    """Versions and threads of this process."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def where(error: Exception) -> list[str]:
    """The innermost calls that led to it, without this machine's folders."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return [f"{re.split('-packages/|benchmarks/', f.filename)[-1]}:{f.lineno} {f.name}" for f in frames]


def main() -> int:
    spec, path = Spec.read(Path(sys.argv[1])), Path(sys.argv[2])
    try:
        result = measure(spec)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}".strip(), "where": where(error)}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main())
