"""What the tests of tune share: made-up sysfs trees, and the command in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import child_environment


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[str], Path]:
    """``tree(text)`` makes files and links below a folder: "path: content" or "path -> target", one a line."""

    def make(text: str) -> Path:
        root = tmp_path / "tree"
        for line in filter(str.strip, text.splitlines()):
            link = " -> " in line
            name, _, content = line.strip().partition(" -> " if link else ": ")
            place = root / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if link:
                place.symlink_to(content)
            else:
                place.write_text(content + "\n")
        return root

    return make


@pytest.fixture
def tune() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``tune(arguments...)``: the command, to its end."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "tierflow", "tune", *map(str, arguments)]
        return subprocess.run(words, env=child_environment(COLUMNS="120"), capture_output=True, text=True, timeout=300)

    return run
