"""What is said of a path before anything is measured."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from outcome import child_environment

from tierflow import aio
from tierflow.tune.device import Device
from tierflow.tune.facts import Facts, PathFacts, cautions, look

DISK = Device("nvme0n1", "disk", "Example", False, pcie="16.0 GT/s x4", numa_node=0)


def facts(device: Device | None = DISK, file_system: str = "ext4", direct: bool = True, **others: object) -> Facts:
    path = PathFacts("/mnt/a", file_system, "/mnt/a", 10**12, direct, 512, "", device)
    return dataclasses.replace(Facts((path,), ("io_uring", "threads"), {}, None, False, "madvise"), **others)  # type: ignore[arg-type]


def test_a_plain_drive_raises_no_doubt() -> None:
    assert cautions(facts()) == []


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (facts(None, "tmpfs"), ["tmpfs", "memory"]),
        (facts(None, "ramfs"), ["ramfs", "memory"]),
        (facts(Device("zram0", "zram")), ["zram0", "in memory"]),
        (facts(Device("dm-0", "dm-crypt", members=(Device("ram1", "ram"),))), ["ram1", "in memory"]),
        (facts(direct=False), ["O_DIRECT", "page cache"]),
        (facts(Device("vda", "disk", "virtio disk", True)), ["virtual disk", "host may cache"]),
        (facts(Device("sda", "disk", "Example", True)), ["rotating"]),
        (facts(dataclasses.replace(DISK, pcie="8.0 GT/s x2 (the device could do 16.0 GT/s x4)")), ["PCIe", "below"]),
        (facts(Device("md0", "md", members=(DISK, dataclasses.replace(DISK, numa_node=1)))), ["NUMA nodes [0, 1]"]),
        (facts(Device("loop0", "loop")), ["loop device"]),
        (facts(None, "nfs4"), ["nfs4", "cache"]),
        (facts(refused={"io_uring": "sysctl kernel.io_uring_disabled is 2"}), ["io_uring", "io_uring_disabled is 2"]),
        (facts(huge_pages="never"), ["transparent huge pages are off"]),
        (facts(memlock=65536), ["RLIMIT_MEMLOCK"]),
    ],
    ids=str,
)  # fmt: skip
def test_each_doubt_is_named(case: Facts, words: list[str]) -> None:
    (line,) = cautions(case)
    assert all(word in line for word in words), line


def test_what_makes_figures_void_comes_first() -> None:
    mixed = facts(None, "tmpfs", huge_pages="never")
    assert "memory" in cautions(mixed)[0] and len(cautions(mixed)) == 2


def test_memory_is_told_from_a_drive_here(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no /dev/shm")
    found = look([str(shm)])
    assert found.paths[0].file_system == "tmpfs" and "no drive's" in cautions(found)[0]
    on_disk = look([str(tmp_path)])
    assert on_disk.paths[0].free > 0 and on_disk.engines[-1] == "threads"
    assert on_disk.refused.keys() == (set() if aio.probe().io_uring else {"io_uring"})


REFUSE = """
import ctypes, struct, sys
# a classic seccomp filter: io_uring_setup (425) answers EPERM, all else passes
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)]
raw = b"".join(struct.pack("HBBI", *c) for c in code)
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(raw)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
program = Program(len(code), ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0
from tierflow.tune.facts import cautions, look
found = look([sys.argv[1]])
print(found.engines, *cautions(found), sep="\\n")
"""


def test_a_seccomp_filter_that_refuses_io_uring_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSE, str(tmp_path)], env=child_environment(), capture_output=True, text=True, timeout=60
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "('threads',)" in done.stdout and "io_uring cannot run here" in done.stdout
    assert "seccomp" in done.stdout or "io_uring_disabled is" in done.stdout
