"""A contender's process: it stays, takes one JSON line for each run on stdin, and answers with one on stdout.

Nothing here imports torch or tierflow: both sides of the pipe share it, in whatever environment they run.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

#: What each run needs to know: "kind" (read, write, mixed), "request" and "nbytes" in bytes, "in_flight" requests,
#: "files", and in "scattered" where everyone's 4 KiB pages are, or "" for memory of the contender's own.
Run = dict[str, Any]


def own_the_processor() -> None:
    """Raises the priority of this process's scheduling group, where that is allowed: others' work then counts less."""
    try:
        with open("/proc/self/autogroup", "w") as group:
            group.write("-20")
    except OSError:
        return


def serve(hello: dict[str, Any], prepare: Callable[[Run], Callable[[], int]]) -> None:
    """Says hello and runs what is asked for until stdin ends.

    ``prepare`` does what is not timed and returns what is: it moves the bytes and says how many.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print do so elsewhere
    _say(answers, hello)
    for line in sys.stdin:
        try:
            _say(answers, timed(prepare(json.loads(line))))
        except Exception as error:
            _say(answers, {"error": f"{type(error).__name__}: {error}"})


def timed(run: Callable[[], int]) -> dict[str, float]:
    """Bytes, seconds, and the process's CPU seconds in all and in the kernel."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    nbytes = run()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    kernel = after.ru_stime - before.ru_stime
    return {"bytes": nbytes, "seconds": seconds, "cpu": after.ru_utime - before.ru_utime + kernel, "kernel": kernel}


def _say(out: Any, value: dict[str, Any]) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()


class Worker:
    """The other end: starts the process in a session of its own and asks it. Raises RuntimeError when it is gone."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: str):
        self._process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True, preexec_fn=own_the_processor,
        )  # fmt: skip
        self.hello = self._answer()

    def ask(self, run: Run) -> dict[str, Any]:
        """One run's answer; "error" in it where the run failed."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(run) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout and self._process.stderr
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(self._process.stderr.read()[-800:] or f"ended with status {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
