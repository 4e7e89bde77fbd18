"""Faults beneath the real code: a FUSE file system that fails on purpose, and the kernel's own limits."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tierflow.aio as aio

BLOCK = 64 << 10
NBYTES = 8 * BLOCK
Mount = Callable[..., tuple[Path, subprocess.Popen[str]]]


def open_small(path: Path, engine: str) -> aio.Store:
    return aio.open(path, 2 * NBYTES, engine=engine, block_size=BLOCK, queue_depth=4, threads=3)  # type: ignore[arg-type]


def round_trip(store: aio.Store, memory: Any) -> None:
    content = os.urandom(NBYTES)
    extent = store.allocate(NBYTES)
    store.write(memory(content), extent.offset).wait()
    back = memory(NBYTES)
    store.read(back, extent.offset).wait()
    assert back[:] == content
    assert (store.bytes_written, store.bytes_read) == (NBYTES, NBYTES)


def test_a_file_system_without_tmpfile_and_fallocate(faulty: Mount, engine: str, memory: Any) -> None:
    directory, _ = faulty()
    with open_small(directory, engine) as store:
        assert os.listdir(directory) == []
        assert store.note is not None and "cannot reserve" in store.note
        round_trip(store, memory)


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EINTR])
def test_later_is_asked_again(faulty: Mount, engine: str, memory: Any, op: str, code: int) -> None:
    directory, _ = faulty({"op": op, "errno": code, "times": 40})
    with open_small(directory, engine) as store:
        round_trip(store, memory)


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("short", [4096, 5000, 61440])
def test_a_short_transfer_is_resumed(faulty: Mount, memory: Any, op: str, short: int) -> None:
    engine = "threads"  # over FUSE, io_uring resumes by itself, and wrongly: see scratch.refuses_uring
    directory, _ = faulty({"op": op, "short": short, "times": 12})
    with open_small(directory, engine) as store:
        round_trip(store, memory)


def test_later_for_ever_is_an_error(faulty: Mount, engine: str, memory: Any) -> None:
    directory, _ = faulty({"op": "read", "from": 0, "to": 1, "errno": errno.EAGAIN})
    with open_small(directory, engine) as store:
        store.allocate(NBYTES)
        with pytest.raises(aio.AioError) as raised:
            store.read(memory(NBYTES), 0).wait()
        assert raised.value.errno == errno.EAGAIN


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_error_names_its_block(faulty: Mount, engine: str, memory: Any, op: str, code: int) -> None:
    bad = 5 * BLOCK
    directory, _ = faulty({"op": op, "from": bad, "to": bad + BLOCK, "errno": code})
    with open_small(directory, engine) as store:
        store.allocate(NBYTES)
        ticket = getattr(store, op)(memory(NBYTES), 0)
        for _ in range(2):  # the same each time
            with pytest.raises(aio.AioError) as raised:
                ticket.wait()
            error = raised.value
            assert (error.errno, error.filename, error.op) == (code, str(directory), op)
            assert (error.offset, error.length) == (bad, BLOCK)
            assert f"{op} of {BLOCK} bytes at offset {bad}" in str(error)
        assert ticket.done()
        getattr(store, op)(memory(BLOCK), 0).wait()  # the store goes on


def test_a_device_that_vanishes_fails_what_is_under_way(
    faulty: Mount, engine: str, memory: Any, tmp_path: Path
) -> None:
    directory, server = faulty({"op": "read", "hold": str(tmp_path / "never")})
    with open_small(directory, engine) as store:
        store.allocate(NBYTES)
        tickets = [store.read(memory(BLOCK), i * BLOCK) for i in range(8)]
        assert not any(ticket.done() for ticket in tickets)
        server.kill()
        for ticket in tickets:
            with pytest.raises(aio.AioError):
                ticket.wait()


@pytest.mark.parametrize("cut", [0, 3 * BLOCK, 3 * BLOCK + 4096, 3 * BLOCK + 100])
def test_a_file_cut_behind_its_back_is_an_end_of_file(
    store: aio.Store, disk: Path, memory: Any, backing: Any, cut: int
) -> None:
    extent = store.allocate(NBYTES)
    store.write(memory(NBYTES), extent.offset).wait()
    (link,) = backing(disk)
    os.truncate(link, extent.offset + cut)
    with pytest.raises(aio.AioError, match="the file ends") as raised:
        store.read(memory(NBYTES), extent.offset).wait()
    assert raised.value.errno == errno.EIO
    assert extent.offset <= raised.value.offset < extent.offset + NBYTES
    assert raised.value.offset + raised.value.length > extent.offset + cut


def test_a_disk_that_fills_up_while_running(
    small_tmpfs: Path, engine: str, memory: Any, backing: Any
) -> None:
    with open_small(small_tmpfs, engine) as store:
        extent = store.allocate(NBYTES)
        (link,) = backing(small_tmpfs)
        punch_everything(link, store.capacity)
        with (small_tmpfs / "other").open("wb") as other, pytest.raises(OSError):
            while True:
                os.write(other.fileno(), bytes(1 << 16))
        with pytest.raises(aio.AioError) as raised:
            store.write(memory(NBYTES), extent.offset).wait()
        assert raised.value.errno == errno.ENOSPC
        (small_tmpfs / "other").unlink()
        store.write(memory(NBYTES), extent.offset).wait()


def punch_everything(link: str, nbytes: int) -> None:
    keep_size_and_punch = 3
    fd = os.open(link, os.O_RDWR)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate64(fd, keep_size_and_punch, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
            pytest.skip("holes cannot be punched here")
    finally:
        os.close(fd)


OVER_THE_FILE_LIMIT = """
import errno, mmap, resource, sys
import tierflow.aio as aio
with aio.open(sys.argv[1], 1 << 20, engine=sys.argv[2]) as store:
    store.allocate(1 << 20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 20))
    try:
        store.write(mmap.mmap(-1, 1 << 18), 1 << 15).wait()
    except aio.AioError as error:
        assert error.errno == errno.EFBIG, error
        # The kernel wrote up to the limit, a short transfer, and refused what was left.
        assert (error.offset, error.length) == (1 << 16, (1 << 18) - (1 << 15)), (error.offset, error.length)
        assert store.bytes_written == 1 << 15
        print("refused")
    try:
        aio.open(sys.argv[1], 1 << 20)
    except OSError as error:
        assert error.errno == errno.EFBIG and "ulimit -f" in str(error), error
        print("refused")
"""


def test_over_the_limit_of_file_size(disk: Path, engine: str, python: Any) -> None:
    done = python(OVER_THE_FILE_LIMIT, disk, engine)
    assert done.stdout.split() == ["refused", "refused"], done.stderr


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <unistd.h>
static int calls[64];  /* by block: each is with one thread at a time */
static ssize_t spoil(size_t* n, off_t at) {  /* in turn: EINTR, EAGAIN, a torn sector, half, whole */
  switch (calls[(at >> 16) & 63]++ % 5) {
    case 0: errno = EINTR; return -1;
    case 1: errno = EAGAIN; return -1;
    case 2: *n = *n < 100 ? *n : 100; return 1;
    case 3: *n = *n > 4096 ? *n / 2 : *n; return 1;
    default: return 0;
  }
}
/* Direct I/O cannot move 100 bytes: move all and own up to fewer. */
#define SHIM_OF(name, pointer)                                                        \
  ssize_t name(int fd, pointer p, size_t n, off_t at) {                               \
    ssize_t (*real)(int, pointer, size_t, off_t) = dlsym(RTLD_NEXT, #name);           \
    size_t told = n;                                                                  \
    ssize_t how = spoil(&told, at);                                                   \
    if (how < 0) return -1;                                                           \
    ssize_t moved = real(fd, p, n, at);                                               \
    return how == 1 && moved > (ssize_t)told ? (ssize_t)told : moved;                 \
  }
SHIM_OF(pread, void*) SHIM_OF(pread64, void*) SHIM_OF(pwrite, const void*) SHIM_OF(pwrite64, const void*)
"""

UNDER_THE_SHIM = """
import mmap, os, sys
import tierflow.aio as aio
content = os.urandom(1 << 20)
out, back = mmap.mmap(-1, 1 << 20), mmap.mmap(-1, 1 << 20)
out[:] = content
with aio.open(sys.argv[1], 1 << 20, engine="threads", block_size=1 << 16) as store:
    extent = store.allocate(1 << 20)
    store.write(out, extent.offset).wait()
    store.read(back, extent.offset).wait()
    print(back[:] == content, store.bytes_read, store.bytes_written)
"""


def test_spoilt_system_calls_without_any_privilege(
    disk: Path, tmp_path: Path, python: Any, monkeypatch: Any
) -> None:
    source, shim = tmp_path / "shim.c", tmp_path / "shim.so"
    source.write_text(SHIM)
    try:
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no C compiler: {error}")
    monkeypatch.setenv("LD_PRELOAD", f"{os.environ.get('LD_PRELOAD', '')} {shim}".strip())  # a sanitizer goes first
    done = python(UNDER_THE_SHIM, disk)
    assert done.stdout.split() == ["True", str(1 << 20), str(1 << 20)], done.stderr
