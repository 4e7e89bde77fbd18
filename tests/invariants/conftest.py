"""What these tests share: child processes and a small file system."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from outcome import child_environment
from tmpfs import mounted


@pytest.fixture
def python() -> Callable[..., str]:
    """``python(source, *args, **environment)`` runs a program that can import tierflow; returns what it printed."""

    def run(source: str, *args: object, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", source, *map(str, args)],
            env=child_environment(**environment), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    with mounted(tmp_path / "small", "2m") as directory:
        yield directory
