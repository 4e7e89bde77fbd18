"""Setting a store up: what is refused, and that it is gone afterwards however the process ends."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

import tierflow.aio as aio
from tierflow.aio import scratch

MIB = 1 << 20


def used(path: Path) -> int:
    info = os.statvfs(path)
    return (info.f_blocks - info.f_bfree) * info.f_frsize


def test_what_a_store_says_of_itself(disk: Path, engine: str) -> None:
    with aio.open(disk, MIB + 1, engine=engine) as store:  # type: ignore[arg-type]
        assert store.path == str(disk)
        assert store.capacity == MIB + 4096
        assert store.direct and store.engine == engine and store.note is None
        assert store.alignment >= 512 and 4096 % store.alignment == 0
        assert store.allocated == store.bytes_read == store.bytes_written == 0


def test_auto_takes_io_uring_where_it_can(disk: Path) -> None:
    with aio.open(disk, MIB) as store:
        assert store.engine == ("io_uring" if aio.probe().io_uring else "threads")
        assert (store.note is None) == aio.probe().io_uring


def test_the_space_is_reserved_on_disk(disk: Path, backing: Any) -> None:
    with aio.open(disk, 3 * MIB):
        (link,) = backing(disk)
        assert os.stat(link).st_size == 3 * MIB
        assert os.stat(link).st_blocks * 512 >= 3 * MIB
        assert os.listdir(disk) == []


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist") as raised:
        aio.open(tmp_path / "nowhere", MIB)
    assert raised.value.filename == str(tmp_path / "nowhere")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="needs a directory"):
        aio.open(tmp_path / "file", MIB)


def test_not_writable(tmp_path: Path, python: Any) -> None:
    source = """
import os, sys
import tierflow.aio as aio
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
try:
    aio.open(sys.argv[1], 4096)
except PermissionError as error:
    assert "not writable" in str(error) and error.filename == sys.argv[1], error
    print("refused")
"""
    for parent in itertools.takewhile(lambda p: p != Path(tempfile.gettempdir()), tmp_path.parents):
        parent.chmod(parent.stat().st_mode | 0o011)
    tmp_path.chmod(0o555)
    done = python(source, tmp_path)
    assert done.stdout == "refused\n", done.stderr


def test_a_full_disk_is_found_at_set_up(small_tmpfs: Path, engine: str) -> None:
    before = used(small_tmpfs)
    with pytest.raises(aio.DiskFull) as raised:
        aio.open(small_tmpfs, 16 * MIB, engine=engine)  # type: ignore[arg-type]
    error = raised.value
    assert (error.errno, error.filename) == (errno.ENOSPC, str(small_tmpfs))
    assert error.needed == 16 * MIB and 0 < error.free <= 8 * MIB
    assert str(error.needed) in str(error) and str(error.free) in str(error)
    assert used(small_tmpfs) == before


def test_more_than_any_disk_has(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:
        aio.open(tmp_path, 1 << 55)
    assert raised.value.errno in (errno.ENOSPC, errno.EFBIG) and raised.value.filename == str(tmp_path)


def test_memory_is_buffered_and_says_so(small_tmpfs: Path, engine: str) -> None:
    with aio.open(small_tmpfs, MIB, engine=engine) as store:  # type: ignore[arg-type]
        assert not store.direct and store.alignment == store.memory_alignment == 1
        assert store.note is not None and "tmpfs" in store.note


def test_two_stores_in_one_directory(disk: Path, engine: str, memory: Any) -> None:
    with aio.open(disk, MIB, engine=engine) as one, aio.open(disk, MIB, engine=engine) as other:  # type: ignore[arg-type]
        for store, byte in ((one, b"1"), (other, b"2")):
            store.allocate(4096)
            store.write(memory(byte * 4096), 0).wait()
        back = memory(4096)
        one.read(back, 0).wait()
        assert back[:] == b"1" * 4096


@pytest.mark.parametrize(
    "argument",
    [{"block_size": 0}, {"queue_depth": 0}, {"threads": 0}, {"capacity": 0}, {"block_size": 1 << 40}],
)
def test_an_argument_out_of_range(tmp_path: Path, argument: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(argument))} is"):
        aio.open(tmp_path, **{"capacity": MIB, **argument})  # type: ignore[arg-type]


def test_an_argument_of_another_type(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="capacity"):
        aio.open(tmp_path, "1GB")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="engine is 'fast'"):
        aio.open(tmp_path, MIB, engine="fast")  # type: ignore[arg-type]


def test_the_logical_block_size_serves_where_statx_is_silent(disk: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(scratch._aio, "direct_alignment", lambda fd: None)
    with aio.open(disk, MIB) as store:
        assert store.direct and store.alignment in (512, 4096)


def test_a_file_that_takes_no_direct_io_is_buffered(disk: Path, monkeypatch: Any, memory: Any) -> None:
    monkeypatch.setattr(scratch._aio, "direct_alignment", lambda fd: (0, 0))
    with aio.open(disk, MIB) as store:
        assert not store.direct and store.note is not None and "no O_DIRECT" in store.note
        store.allocate(MIB)
        store.write(memory(b"x" * MIB), 0).wait()
        back = memory(MIB)
        store.read(back, 0).wait()
        assert back[:] == b"x" * MIB


def test_fuse_is_not_for_io_uring(faulty: Any, monkeypatch: Any) -> None:
    refuses_uring = scratch.refuses_uring
    monkeypatch.undo()
    assert scratch.refuses_uring is not refuses_uring
    directory, _ = faulty()
    with aio.open(directory, MIB) as store:
        assert store.engine == "threads" and store.note is not None and "FUSE" in store.note
    with pytest.raises(aio.EngineUnavailable, match="FUSE"):
        aio.open(directory, MIB, engine="io_uring")


def test_nothing_is_left_after_close_or_an_exception(small_tmpfs: Path, engine: str, memory: Any) -> None:
    gc.collect()
    before, descriptors = used(small_tmpfs), len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyError), aio.open(small_tmpfs, 4 * MIB, engine=engine) as store:  # type: ignore[arg-type]
        store.allocate(MIB)
        store.write(memory(MIB), 0)
        raise KeyError
    assert used(small_tmpfs) == before
    assert os.listdir(small_tmpfs) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


KEEP_WRITING = """
import mmap, sys
import tierflow.aio as aio
store = aio.open(sys.argv[1], 4 << 20, engine=sys.argv[2])
store.allocate(4 << 20)
buffer = mmap.mmap(-1, 4 << 20)
tickets = [store.write(buffer, 0) for _ in range(4)]
print("writing", flush=True)
while True:
    store.write(buffer, 0).wait()
"""


def test_nothing_is_left_after_kill(small_tmpfs: Path, engine: str, environment: dict[str, str]) -> None:
    before = used(small_tmpfs)
    child = subprocess.Popen(
        [sys.executable, "-c", KEEP_WRITING, str(small_tmpfs), engine],
        env=environment,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert os.listdir(small_tmpfs) == []
    deadline = time.monotonic() + 20  # the kernel takes a dead process's ring apart in the background
    while used(small_tmpfs) != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert used(small_tmpfs) == before
