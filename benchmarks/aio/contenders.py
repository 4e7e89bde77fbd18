"""Who is measured, and how to ask each for a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aio import with_fio
from aio.pages import PAGE, Scattered
from aio.worker import Run, Worker

HERE = Path(__file__).parents[1]
#: A call of DeepSpeed's engine moves tensors of this size; its queue is empty before the next call.
DEEPSPEED_TENSOR = 64 << 20


@dataclass(frozen=True)
class Contender:
    """``name``: as in the table. ``pages``: "huge", "4k" (the same ones for all) or "shipped" (its own, as they come).
    ``ask``: carries out a run."""

    name: str
    pages: str
    ask: Callable[[Run], dict[str, Any]]

    @property
    def key(self) -> str:
        return f"{self.name}, {self.pages}"


class Field:
    """All contenders on the same files, one for each path. A context manager: the files are gone with it."""

    def __init__(self, paths: list[str], file_bytes: int, options: dict[str, Any], window: int):
        self.file_bytes = file_bytes
        self._workers: list[Worker] = []
        self.contenders: list[Contender] = []
        self.missing: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        spec = {"paths": paths, "bytes": file_bytes, "options": options, "window": window}
        self._tierflow = self._start([sys.executable, "-m", "aio.with_tierflow", json.dumps(spec)], dict(os.environ))
        self.files: list[str] = self._tierflow.hello["files"]
        self.facts["tierflow"] = {k: v for k, v in self._tierflow.hello.items() if k != "files"}
        self._scattered = Scattered(max(window + PAGE, 2 * DEEPSPEED_TENSOR))  # fio takes a page more than it uses
        self.facts["contiguous 4k"] = self._scattered.contiguous
        self._add("tierflow", ("huge", "4k"), self._tierflow.ask)

    def add_fio(self) -> None:
        """fio with both engines, on both kinds of pages where it gets them."""
        if shutil.which("fio") is None:
            self.missing["fio"] = "fio is not installed (Debian: apt-get install fio)"
            return
        probe = self.run("read", 1 << 20, min(32, self.file_bytes >> 20), self.file_bytes)
        got = with_fio.huge_page_bytes(probe)
        version = subprocess.run(["fio", "--version"], capture_output=True, text=True).stdout.strip()
        self.facts["fio"] = {"version": version, "huge_page_bytes": got}
        if not got:
            self.missing["fio, huge"] = "fio gets no anonymous huge pages here: glibc.malloc.hugetlb needs glibc 2.35"
        for engine in ("io_uring", "libaio"):
            self._add(f"fio {engine}", ("huge", "4k") if got else ("4k",), partial(with_fio.measure, engine))

    def add_deepspeed(self, python: str | None) -> None:
        """DeepSpeed's engine as it comes, on everyone's small pages, and on huge pages by the same tunable as fio."""
        if python is None:
            self.missing["deepspeed"] = "no --deepspeed-python; benchmarks/peers/install_deepspeed.sh makes what it needs"
            return
        for pages in ("shipped", "4k", "huge"):
            environment = dict(os.environ) | (with_fio.TUNABLE if pages == "huge" else {})
            environment.pop("PYTHONPATH", None)
            # DeepSpeed looks for ninja there
            environment["PATH"] = os.pathsep.join([os.path.dirname(python), environment.get("PATH", "")])
            tensor = min(DEEPSPEED_TENSOR, self.file_bytes // 4)
            try:
                worker = self._start([python, "-m", "aio.with_deepspeed", json.dumps({"window": tensor})], environment)
            except RuntimeError as error:
                self.missing["deepspeed"] = str(error)
                return
            self.facts[f"deepspeed, {pages}"] = worker.hello
            self._add("deepspeed", (pages,), worker.ask)

    def run(self, kind: str, request: int, in_flight: int, nbytes: int) -> Run:
        """What a contender is asked."""
        return {
            "kind": kind, "request": request, "in_flight": in_flight, "nbytes": nbytes, "files": self.files,
            "file_bytes": self.file_bytes, "scattered": "",
        }  # fmt: skip

    def _add(self, name: str, pages: tuple[str, ...], ask: Callable[[Run], dict[str, Any]]) -> None:
        for kind in pages:
            more = {"scattered": self._scattered.path if kind == "4k" else ""}
            self.contenders.append(Contender(name, kind, lambda run, more=more: ask(run | more)))

    def _start(self, command: list[str], environment: dict[str, str]) -> Worker:
        self._workers.append(Worker(command, environment, str(HERE)))
        return self._workers[-1]

    def __enter__(self) -> Field:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            worker.close()
        self._scattered.close()
