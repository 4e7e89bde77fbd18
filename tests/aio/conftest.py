"""What the aio tests share: both engines, page-aligned memory, a real disk, a file system that fails."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tmpfs import mounted

import tierflow.aio as aio

HERE = Path(__file__).parent
PACKAGES = Path(aio.__file__).parents[2]  # where this tierflow is: a test build has its own folder
IN_MEMORY = {"tmpfs", "ramfs", "overlay"}


@pytest.fixture(params=["io_uring", "threads"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "io_uring" and not aio.probe().io_uring:
        pytest.skip(f"io_uring cannot run here: {aio.probe().reason}")
    return str(request.param)


@pytest.fixture
def memory() -> Callable[..., mmap.mmap]:
    """``memory(nbytes)`` or ``memory(content)``: page-aligned, writable, private."""

    def make(content: int | bytes) -> mmap.mmap:
        nbytes = content if isinstance(content, int) else len(content)
        made = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if not isinstance(content, int):
            made[:] = content
        return made

    return make


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A directory on a file system with O_DIRECT."""
    with aio.open(tmp_path, 4096, engine="threads") as store:
        if not store.direct:
            pytest.skip(f"no O_DIRECT here: {store.note}")
    return tmp_path


@pytest.fixture
def store(disk: Path, engine: str) -> Iterator[aio.Store]:
    """16 MiB on disk, small blocks so that a transfer is several."""
    with aio.open(disk, 16 << 20, engine=engine, block_size=64 << 10, queue_depth=4, threads=3) as made:  # type: ignore[arg-type]
        yield made


@pytest.fixture
def faulty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Path, subprocess.Popen[str]]]]:
    """``faulty(rule, ...)`` mounts tests/aio/faulty_fs.py. Returns the directory and the server's process."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("mounting a FUSE file system needs root and /dev/fuse")
    # FUSE is refused to io_uring for what it does with short transfers; other faults reach it unchanged.
    monkeypatch.setattr(aio.scratch, "refuses_uring", lambda path: "")
    with ExitStack() as stack:

        def mount(*rules: dict[str, Any]) -> tuple[Path, subprocess.Popen[str]]:
            directory = tmp_path / "faulty"
            directory.mkdir()
            server = subprocess.Popen(
                [sys.executable, str(HERE / "faulty_fs.py"), str(directory), json.dumps(rules)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(_stop, server, directory)
            assert server.stdout is not None and server.stderr is not None
            if server.stdout.readline() != "mounted\n":
                pytest.skip(f"no FUSE here: {server.stderr.read().strip()}")
            return directory, server

        yield mount


def _stop(server: subprocess.Popen[str], directory: Path) -> None:
    assert server.stdin is not None
    server.stdin.close()
    try:
        server.wait(timeout=10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    for pipe in (server.stdout, server.stderr):
        if pipe is not None:
            pipe.close()
    ctypes.CDLL(None).umount2(os.fsencode(directory), 2)  # if it was killed


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    with mounted(tmp_path / "small", "8m") as directory:
        yield directory


@pytest.fixture
def environment() -> dict[str, str]:
    """Of a program that can import this tierflow."""
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{PACKAGES}{os.pathsep}{inherited}" if inherited else str(PACKAGES)}


@pytest.fixture
def python(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``python(source, *args)`` runs a program that can import tierflow."""

    def run(source: str, *args: object) -> subprocess.CompletedProcess[str]:
        environment.update({name: os.environ[name] for name in ("LD_PRELOAD",) if name in os.environ})
        return subprocess.run(
            [sys.executable, "-c", source, *map(str, args)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def backing() -> Callable[[Path], list[str]]:
    """``backing(directory)``: this process's descriptors of unnamed files in it, as paths to open them by."""

    def find(directory: Path, pid: int | str = "self") -> list[str]:
        found = []
        for name in os.listdir(f"/proc/{pid}/fd"):
            link = f"/proc/{pid}/fd/{name}"
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith(f"{directory}/") and target.endswith("(deleted)"):
                found.append(link)
        return found

    return find
