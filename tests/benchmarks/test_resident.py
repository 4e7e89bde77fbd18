"""The benchmark of plain torch and tierflow in one process, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from outcome import ROOT, child_environment


def test_both_take_the_same_steps(tmp_path: Path) -> None:
    path = tmp_path / "resident.json"
    command = [sys.executable, ROOT / "benchmarks" / "bench_resident.py", "--smoke", "--steps", "3", "--json", path]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert str(tmp_path) not in result["command"]
    ours, theirs = result["steps"]["tierflow"], result["steps"]["torch"]
    assert len(ours) == len(theirs) == 3
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in theirs], rel=1e-3)
    assert all(step["forward"] + step["backward"] + step["step"] <= step["seconds"] for step in ours + theirs)
    ratio = result["summary"]["ratio"]
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
