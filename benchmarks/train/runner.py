"""Starts contenders one after the other, each in a process and session of its own, round after round."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.contenders import Contender
from train.measure import resident
from train.spec import Spec

HERE = Path(__file__).parents[1]
#: Resident memory is read this often (seconds): rarely enough to cost the contender nothing that shows.
SAMPLE_SECONDS = 0.05
#: Of a process's output, what is kept when it ends without a word of its own.
TAIL_CHARACTERS = 600


@dataclass(frozen=True)
class Environment:
    """Which Python runs which engine, on how many threads (None: each engine's own choice), and for how long."""

    pythons: dict[str, str]
    drive: Path
    threads: int | None
    timeout: float

    def variables(self, contender: Contender) -> dict[str, str]:
        """The process's environment: no GPU, and no module path of this process in another environment."""
        found = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}
        python = self.pythons[contender.engine]
        if python != self.pythons["torch"]:
            found.pop("PYTHONPATH", None)
        # DeepSpeed looks for ninja there
        found["PATH"] = os.pathsep.join([os.path.dirname(python), found.get("PATH", "")])
        if self.threads is not None:
            found["OMP_NUM_THREADS"] = str(self.threads)
        return found


def run(contender: Contender, spec: Spec, environment: Environment) -> dict[str, Any]:
    """One process from start to end: what it measured, or ``error`` and what is known of it."""
    folder = Path(tempfile.mkdtemp(prefix="bench-train-", dir=environment.drive))
    try:
        os.sync()  # what the one before left to be written is not this one's
        return _run(contender, spec, environment, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(contender: Contender, spec: Spec, environment: Environment, folder: Path) -> dict[str, Any]:
    todo, result, log = (folder / name for name in ("spec.json", "result.json", "output.txt"))
    replace(spec, folder=str(folder)).write(todo)
    with log.open("w") as output:
        process = subprocess.Popen(
            [environment.pythons[contender.engine], "-m", "train.process", str(todo), str(result)],
            cwd=HERE, env=environment.variables(contender), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,  # the scheduler's group of a session is its own
        )  # fmt: skip
    try:
        samples = _watch(process, environment.timeout)
    finally:
        _end(process)
    text = log.read_text(errors="replace")
    if result.exists():
        # folders of this machine stay out of results
        found = json.loads(result.read_text().replace(str(folder), "NVME_PATH"))
    else:
        found = {"error": _cause(process.returncode, environment.timeout), "output": text[-TAIL_CHARACTERS:]}
    if "error" not in found:
        found["peak_sampled_bytes"] = _peak(samples, *found.pop("window"))
    return found


def _watch(process: subprocess.Popen[bytes], timeout: float) -> list[tuple[float, int]]:
    """(time, resident bytes) until the process ends or its time is up."""
    samples, deadline = [], time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline:
        samples.append((time.monotonic(), resident(process.pid)))
        time.sleep(SAMPLE_SECONDS)
    return samples


def _peak(samples: list[tuple[float, int]], begin: float, end: float) -> int:
    """The most that was seen between two times; of a window too short for that, what was seen last before it."""
    within = [n for t, n in samples if begin <= t <= end]
    return max(within or [n for t, n in samples if t <= end][-1:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and what it started, if they have not ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _cause(status: int, timeout: float) -> str:
    if status == -signal.SIGKILL:
        return f"killed: by the kernel for want of memory, or after {timeout:.0f} s without an end"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"ended with status {status} and no result"


def rounds(
    contenders: list[Contender],
    spec_of: Callable[[Contender], Spec],
    environment: Environment,
    count: int,
    say: Callable[[str], None],
) -> dict[str, list[dict[str, Any]]]:
    """Every contender once a round, A B C A B C; one that failed is not started again. Results by name."""
    results: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contenders}
    for number in range(count):
        for contender in contenders:
            found = results[contender.name]
            if contender.engine not in environment.pythons or any("error" in r for r in found):
                continue
            began = time.monotonic()
            found.append(run(contender, spec_of(contender), environment))
            outcome = found[-1].get("error") or f"{min(s['seconds'] for s in found[-1]['steps']):.2f} s/step at best"
            took = time.monotonic() - began
            say(f"round {number + 1}/{count}  {contender.name:<20} {took:6.1f} s  {outcome.splitlines()[0][:150]}")
    return results
