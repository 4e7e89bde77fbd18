"""The aio benchmark, small: every contender moves the bytes it reports, and ratios are what they say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from outcome import ROOT, child_environment

BENCHMARK = ROOT / "benchmarks" / "bench_aio.py"


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *map(str, arguments)],
        env=child_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drive")


@pytest.fixture(scope="module")
def result(drive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("result") / "aio.json"
    done = bench("--smoke", "--peers", "fio,deepspeed", "--path", drive, "--tune", 2, "--priorities", "--json", path)
    assert done.returncode == 0, done.stderr
    assert "no --deepspeed-python" in done.stdout
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_every_load_is_there_for_every_contender(result: dict[str, Any]) -> None:
    loads = {(c["files"], c["kind"], c["request"]) for c in result["cells"]}
    assert loads == {(n, k, 1 << 20) for n in (1, 2) for k in ("read", "write", "mixed")}
    for cell in result["cells"]:
        assert {"tierflow, huge", "tierflow, 4k"} <= cell["rows"].keys()
        for key, row in cell["rows"].items():
            assert "error" not in row, (key, row)
            assert 0 < row["low"] <= row["rate"] <= row["high"] and len(row["samples"]) == result["rounds"]
            assert row["kernel_per_gib"] <= row["cpu_per_gib"]


def test_fio_runs_with_both_engines_on_the_same_file(result: dict[str, Any]) -> None:
    if shutil.which("fio") is None:
        assert "apt-get install fio" in result["missing"]["fio"]
        pytest.skip("no fio")
    rows = result["cells"][0]["rows"]
    assert {"fio io_uring, 4k", "fio libaio, 4k"} <= rows.keys()
    got = result["facts"]["fio"]["huge_page_bytes"]
    assert ("fio io_uring, huge" in rows) == (got > 0) != ("fio, huge" in result["missing"])


def test_ratios_are_those_of_the_medians(result: dict[str, Any]) -> None:
    for cell in result["cells"]:
        rows, ratios = cell["rows"], cell["ratios"]
        assert ratios["pages"] == rows["tierflow, huge"]["rate"] / rows["tierflow, 4k"]["rate"]
        others = [row["rate"] for key, row in rows.items() if key.startswith("fio") and key.endswith("4k")]
        if others:
            assert ratios["to_best_4k"] == rows["tierflow, 4k"]["rate"] / max(others)


def test_the_profile_was_run_plainly(result: dict[str, Any]) -> None:
    loads = result["profile"]["loads"]
    assert loads.keys() == {"read", "write", "mixed"}
    for load in loads.values():
        plain = next(row for key, row in load["rows"].items() if key.startswith("tierflow"))
        assert load["ratio"] == plain["rate"] / load["profile"]


def test_priorities_were_looked_at_with_both_directions_moving(result: dict[str, Any]) -> None:
    assert [(load["reads"], load["writes"]) for load in result["priorities"]] == [(2, 24), (4, 24), (16, 16)]
    for load in result["priorities"]:
        for row in load["rows"].values():
            assert row["read"] > 0 and 0 < row["p50"] <= row["p99"] and len(row["samples"]) == result["rounds"]


def test_nothing_is_left_and_no_folder_of_this_machine_is_told(result: dict[str, Any], drive: Path) -> None:
    assert list(drive.iterdir()) == []
    assert str(drive) not in result["command"] and "DIR" in result["command"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--peers", "dd"), "--peers dd is not known"),
        (("--path", "/none"), "/none is no folder"),
        (("--requests", "1000"), "--requests 1000"),
        (("--file-size", "1MB"), "--file-size must be at least 64MiB"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, ...], words: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2 and words in done.stderr
