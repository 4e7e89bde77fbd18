"""Where io_uring is refused: the reason is named, and the thread pool takes over."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import pytest

import tierflow.aio as aio

MODULE = sys.modules["tierflow.aio.probe"]  # as an attribute, `probe` is the function

# Makes io_uring_setup (425 on every architecture) answer an errno, then opens stores.
WITHOUT_IO_URING = """
import ctypes, mmap, struct, sys
import tierflow.aio as aio
libc = ctypes.CDLL(None, use_errno=True)
code = int(sys.argv[2])
program = [  # load the number; 425: answer errno; else allow
    (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | code), (0x06, 0, 0, 0x7FFF0000),
]
code_bytes = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
filter = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code_bytes)))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filter, 0, 0):
    print("no seccomp")
    sys.exit()
found = aio.probe()
assert not found.io_uring
print(found.reason)
with aio.open(sys.argv[1], 1 << 20) as store:
    assert store.engine == "threads" and found.reason in store.note, store.note
    store.allocate(4096)
    store.write(mmap.mmap(-1, 4096), 0).wait()
try:
    aio.open(sys.argv[1], 1 << 20, engine="io_uring")
except aio.EngineUnavailable as error:
    assert error.errno == code and found.reason in str(error)
    print("refused")
"""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EPERM, ["io_uring_disabled"]),
        (errno.ENOSYS, ["ENOSYS"]),
        (errno.ENOMEM, ["RLIMIT_MEMLOCK"]),
        (errno.EMFILE, ["RLIMIT_NOFILE"]),
        (errno.EINVAL, ["EINVAL"]),
    ],
)
def test_io_uring_blocked_by_the_kernel(disk: Path, python: Any, code: int, words: list[str]) -> None:
    if not aio.store._aio.BUILT_WITH_IO_URING:
        pytest.skip("built without liburing")
    done = python(WITHOUT_IO_URING, disk, code)
    if done.stdout.startswith("no seccomp"):
        pytest.skip("no seccomp filter can be installed here")
    reason, refused = done.stdout.strip().split("\n") if done.returncode == 0 else ("", done.stderr)
    assert refused == "refused"
    assert all(word in reason for word in words)


@pytest.mark.parametrize(
    ("value", "words"), [("2", "for everyone"), ("1", "io_uring_group"), ("0", "seccomp")]
)
def test_the_sysctl_is_named(tmp_path: Path, monkeypatch: Any, value: str, words: str) -> None:
    (tmp_path / "sysctl").write_text(f"{value}\n")
    monkeypatch.setattr(MODULE, "_SYSCTL", tmp_path / "sysctl")
    reason = MODULE.explain(errno.EPERM)
    assert "kernel.io_uring_disabled" in reason and words in reason


def test_a_build_without_liburing(disk: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(MODULE._aio, "BUILT_WITH_IO_URING", False)
    assert "liburing" in aio.probe().reason
    with aio.open(disk, 4096) as store:
        assert store.engine == "threads" and store.note is not None and "liburing" in store.note
    with pytest.raises(aio.EngineUnavailable, match="liburing"):
        aio.open(disk, 4096, engine="io_uring")


def test_a_probe_is_a_value() -> None:
    assert aio.Probe(True, "") == aio.Probe(True, "")
    assert aio.probe().io_uring == (aio.probe().reason == "")
