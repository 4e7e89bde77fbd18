"""``tierflow tune`` as a user runs it: what it prints, writes, leaves behind, and how it stops."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import child_environment

from tierflow import aio
from tierflow.tune.profile import read_profile

Tune = Callable[..., "subprocess.CompletedProcess[str]"]
QUICK = ("--time", 2, "--size", "128MiB")


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    folder = tmp_path / "drive"
    folder.mkdir()
    return folder


def test_a_short_run_says_and_writes_all_that_it_promises(tune: Tune, drive: Path, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    done = tune(drive, *QUICK, "--output", output, "--parameters", "13B", "--optimizer-state", "lossless")
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_profile(output)
    assert list(drive.iterdir()) == []
    assert 0 < found.bytes_written < 20 * 10**9
    assert (found.read.samples == 5 or not found.complete) and found.write and found.mixed and found.mixed.read > 0 and found.mixed.write > 0
    if found.tried:  # a machine that is busy with others may have no time for any
        assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
        assert found.tried[0].score == max(t.score for t in found.tried)
        own = found.engine, found.block_size, found.queue_depth, found.rings, found.huge_pages
        assert own in {(t.engine, t.block_size, t.queue_depth, t.rings, t.huge_pages) for t in found.tried}
    for word in ("p99 ms", "CPU s per GiB", "13,000,000,000 parameters", "10 + 10 bytes", "14 + 12 bytes", '"overlap_events": true', "no file is left"):
        assert word in done.stdout, word
    block = json.loads(re.search(r'"aio": (\{.*?\})', done.stdout, re.DOTALL)[1])  # type: ignore[index]
    assert block["block_size"] == found.block_size and block["single_submit"] is False
    # and aio takes the setting as it stands
    with aio.open(drive, 1 << 20, engine=found.engine, block_size=found.block_size):
        pass


def test_bytes_written_are_those_that_the_kernel_counts(drive: Path, tmp_path: Path) -> None:
    code = (
        "from typer.testing import CliRunner; from tierflow.cli import app; import sys\n"
        f"words = ['tune', {str(drive)!r}, '--time', '2', '--size', '128MiB', '--output', {str(tmp_path / 'p.json')!r}]\n"
        "done = CliRunner().invoke(app, words)\n"
        "assert done.exit_code == 0, done.output\n"
        "assert 'torch' not in sys.modules\n"
        "print(next(line.split()[1] for line in open('/proc/self/io') if line.startswith('write_bytes')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = read_profile(tmp_path / "p.json")
    if told.machine["paths"][0]["direct"]:
        # the heat map's and the profile's own bytes are the kernel's alone
        assert told.bytes_written <= int(done.stdout) <= told.bytes_written + (8 << 20)


def test_read_only_and_json(tune: Tune, drive: Path, tmp_path: Path) -> None:
    done = tune(drive, *QUICK, "--read-only", "--json", "--output", tmp_path / "p.json", "--parameters", "1B")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "p.json").read_text())
    assert printed["write"] is None and printed["mixed"] is None and printed["read"]["write"] == 0
    assert "no step-time floor" in done.stderr and "what is there" in done.stderr


def test_two_paths_are_used_at_once(tune: Tune, drive: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    done = tune(drive, other, "--time", 6, "--size", "128MiB", "--output", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    found = read_profile(tmp_path / "p.json")
    assert found.paths == [str(drive), str(other)] and sum(found.weights) == pytest.approx(1.0)
    assert list(drive.iterdir()) == list(other.iterdir()) == []


def test_time_for_no_search_still_gives_figures_and_says_so(tune: Tune, drive: Path, tmp_path: Path) -> None:
    folders = [drive / str(n) for n in range(4)]
    for folder in folders:
        folder.mkdir()
    done = tune(*folders, "--time", 2, "--size", "512MiB", "--output", tmp_path / "p.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_profile(tmp_path / "p.json")
    assert found.read.read > 0 and (found.complete or "ran out" in done.stdout)
    assert found.tried or "no heat map" in done.stdout


def test_sustained_states_its_wear_first(tune: Tune, drive: Path, tmp_path: Path) -> None:
    done = tune(drive, *QUICK, "--sustained", "256MiB", "--output", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("--sustained writes 268 MB") < done.stdout.index("a first look")
    assert "sustained writes:" in done.stdout
    found = read_profile(tmp_path / "p.json")
    assert found.sustained is not None and found.sustained["before"] > 0


def test_memory_is_called_no_drive(tune: Tune, tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or os.statvfs(shm).f_bavail * os.statvfs(shm).f_frsize < 6 << 30:
        pytest.skip("no /dev/shm with room")
    done = tune(shm, *QUICK, "--read-only", "--output", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    assert "mean nothing for offload" in " ".join(done.stdout.split())
    assert any("tmpfs" in line for line in read_profile(tmp_path / "p.json").cautions)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--time", 1), ["--time is 1", "2 seconds"]),
        (("--size", "1MB"), ["--size is 1MB", "134 MB"]),
        (("--size", "1 elephant"), ["--size is 1 elephant", "size of at least 1 byte"]),
        (("--size", "100GB"), ["--size is 100GB", "2.5 GB"]),
        (("--optimizer-state", "int4"), ["--optimizer-state", "lossless, fp32, bf16, int8, int8-24bit"]),
        (("--parameters", "many"), ["--parameters", "13B"]),
        (("--sustained", "1GB", "--read-only"), ["--sustained", "--read-only"]),
        (("--output", "/nowhere/p.json"), ["/nowhere is no folder"]),
    ],
)
def test_bad_input_gets_one_sentence(tune: Tune, drive: Path, arguments: tuple[object, ...], words: list[str]) -> None:
    done = tune(drive, *arguments)
    text = " ".join(done.stdout.split())
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert text.startswith("error:") and all(word in text for word in words), text


def test_a_path_that_is_none(tune: Tune, drive: Path) -> None:
    assert "is no folder" in tune(drive / "none").stdout
    assert "named twice" in tune(drive, drive).stdout


def held_files(pid: int, folder: Path) -> bool:
    try:
        names = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return False
    return any(name.startswith(f"{folder}/") for name in names)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_the_files_gone_and_the_bytes_told(drive: Path, tmp_path: Path, number: int, code: int) -> None:
    output = tmp_path / "p.json"
    words = [sys.executable, "-m", "tierflow", "tune", str(drive), "--time", "30", "--size", "256MiB", "--output", str(output)]
    process = subprocess.Popen(words, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not held_files(process.pid, drive) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)  # into the middle of it, wherever that is
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, out + err
    assert "stopped;" in out and "no file is left" in out and "Traceback" not in err
    assert list(drive.iterdir()) == [] and not output.exists()


def test_without_matplotlib_the_rest_is_done_and_the_remedy_named(drive: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from tierflow.cli import app\n"
        f"app(['tune', {str(drive)!r}, '--time', '2', '--size', '128MiB', '--output', {str(tmp_path / 'p.json')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = read_profile(tmp_path / "p.json")
    assert 'pip install "matplotlib' in done.stdout or not found.tried
    assert found.read.read > 0 and not (tmp_path / "p.png").exists()
