"""The training benchmark on a tiny model: every process runs, and what it writes was measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from outcome import ROOT, child_environment

BENCHMARK = ROOT / "benchmarks" / "bench_train.py"
STEPS, ROUNDS = 2, 2
BLOCK = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64  # q, o; k, v; the three of the MLP; norms
PARAMETERS = 256 * 64 + 24 * BLOCK + 64


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *map(str, arguments)],
        env=child_environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drive")


@pytest.fixture(scope="module")
def result(drive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("result") / "train.json"
    done = bench(
        "--smoke", "--contenders", "torch", "deepspeed-nvme", "tierflow", "--rounds", ROUNDS, "--accumulations", 2,
        "--threads", 1, "--nvme-path", drive, "--json", path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "optimizer on NVMe" in done.stdout
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    (cell,) = result["cells"]
    assert (cell["batch"], cell["accumulation"]) == (1, 2)
    return {row["contender"]: row for row in cell["rows"]}


def test_the_result_says_what_ran_where(result: dict[str, Any], drive: Path) -> None:
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["memory"] > 0
    assert result["command"].startswith("python benchmarks/bench_train.py --smoke")
    assert str(drive) not in json.dumps(result)


def test_every_step_of_every_round_was_timed(rows: dict[str, dict[str, Any]]) -> None:
    ran = [row for row in rows.values() if row["status"] == "ok"]
    assert len(ran) == 6
    for row in ran:
        steps = [step for r in row["rounds"] for step in r["steps"]]
        assert len(steps) == ROUNDS * STEPS
        seconds = [step["seconds"] for step in steps]
        assert row["seconds"]["min"] == min(seconds) <= row["seconds"]["median"] <= max(seconds) == row["seconds"]["max"]
        for step in steps:
            phases = [step[name] for name in ("forward", "backward", "step")]
            assert all(p > 0 for p in phases)
            assert sum(phases) <= step["seconds"]
        assert row["ratio_to_torch"]["median"] > 0
        # python with torch is some hundred megabytes; the model adds less than it
        assert 100e6 < row["imported_bytes"] <= row["peak_bytes"] < 2e9
        assert 100e6 < row["peak_sampled_bytes"] < row["peak_bytes"] + 1e6  # the kernel rounds the two differently
        assert row["facts"]["parameters"] == PARAMETERS
        assert row["facts"]["threads"] == 1
    assert rows["torch"]["ratio_to_torch"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def test_all_train_the_same_thing(rows: dict[str, dict[str, Any]]) -> None:
    for row in (row for row in rows.values() if row["status"] == "ok"):
        assert len(row["losses"]) == 1 + STEPS
        assert row["losses"][-1] < row["losses"][0] < 2 * math.log(256)
        assert row["loss_difference"] < 1e-5


def test_bytes_are_those_of_the_placement(rows: dict[str, dict[str, Any]]) -> None:
    states = 2 * 4 * PARAMETERS
    for name in ("tierflow-resident", "tierflow-cpu"):
        assert rows[name]["engine"]["nvme_read"] == rows[name]["engine"]["nvme_written"] == 0
    one = rows["tierflow-nvme"]["engine"]
    # units are padded to whole blocks; what the caps round up to holds some states
    assert 0.7 * states <= one["nvme_written"] <= 1.3 * states
    assert one["nvme_read"] == pytest.approx(one["nvme_written"], rel=0.1)
    every = rows["tierflow-all-nvme"]["engine"]
    assert every["nvme_written"] >= 0.7 * 1.5 * states
    assert every["nvme_read"] >= 0.7 * 1.5 * states  # the caps leave no room to keep all weights
    for name, row in rows.items():
        if row["status"] == "ok" and row["facts"].get("io") and row["facts"]["io"]["direct"]:
            written = row["engine"]["nvme_written"]
            assert abs(row["kernel_written"] - written) <= 0.1 * written + (1 << 17), name


def test_a_contender_that_cannot_run_says_why(rows: dict[str, dict[str, Any]]) -> None:
    row = rows["deepspeed-nvme"]
    assert row["status"] == "not run"
    assert "--deepspeed-python" in row["error"]


def test_nothing_is_left_on_the_drive(rows: dict[str, dict[str, Any]], drive: Path) -> None:
    assert not list(drive.iterdir())


def test_a_failure_is_a_row_and_ends_nothing_else(tmp_path: Path) -> None:
    """Without DeepSpeed in the environment that is named, its process fails; the others' rows are there."""
    path = tmp_path / "train.json"
    drive = tmp_path / "drive"
    drive.mkdir()
    done = bench(
        "--smoke", "--contenders", "torch", "deepspeed-cpu", "--threads", 1, "--nvme-path", drive, "--json", path,
        "--deepspeed-python", sys.executable,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torch_row, failed = json.loads(path.read_text())["cells"][0]["rows"]
    assert torch_row["status"] == "ok"
    assert failed["status"] == "failed"
    assert failed["error"].startswith("ModuleNotFoundError")
    assert failed["where"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--contenders", "torhc"], "no contender is called 'torhc'"),
        (["--nvme-path", "/does/not/exist"], "is no folder"),
        (["--deepspeed-python", "/does/not/exist"], "is no program"),
        (["--steps", "0"], "is not 1 or more"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(arguments: list[str], words: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
