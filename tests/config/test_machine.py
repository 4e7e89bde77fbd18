"""The machine's facts, read from made-up /proc and /sys trees, and `tierflow env` on this one."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from tierflow import env, machine

GB = 10**9


class Tree:
    """A /proc whose control groups are mounted in a folder beside it."""

    def __init__(self, folder: Path):
        self.proc, self.groups = folder / "proc", folder / "cgroup mount"
        (self.proc / "self").mkdir(parents=True)
        self.groups.mkdir()
        self.write(
            self.proc / "meminfo", f"MemTotal: {16 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\nHugePages_Total: 0\n"
        )

    def write(self, path: Path, text: str | int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))

    def mount(self, own: str, kind: str = "cgroup2", root: str = "/", options: str = "rw") -> None:
        self.write(self.proc / "self/cgroup", own)
        point = str(self.groups).replace(" ", r"\040")
        line = f"31 23 0:28 {root} {point} rw,nosuid shared:9 - {kind} none {options}\n"
        self.write(self.proc / "self/mountinfo", f"22 1 8:1 / / rw - ext4 /dev/root rw\n{line}")

    def limit(self, group: str, high: int | str, used: int, *, stat: str = "", name: str = "memory.max") -> None:
        folder = self.groups / group
        use = "memory.usage_in_bytes" if "limit" in name else "memory.current"
        self.write(folder / name, high)
        self.write(folder / use, used)
        self.write(folder / "memory.stat", stat)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_without_a_limit_memavailable_counts(tree: Tree) -> None:
    assert machine.mem_available(tree.proc) == 8 * 2**30 and machine.mem_total(tree.proc) == 16 * 2**30
    tree.mount("0::/a/b\n")
    tree.limit("a/b", "max", 5)
    assert machine.cgroup(tree.proc) is None
    assert machine.mem_available(tree.proc) == 8 * 2**30


def test_the_tightest_group_above_counts(tree: Tree) -> None:
    tree.mount("0::/a/b/c\n")
    tree.limit("a/b", 3 * GB, GB)
    tree.limit("a", 5 * GB, 4 * GB)
    tree.limit("a/b/c", "max", 0)
    group = machine.cgroup(tree.proc)
    assert group is not None and group.path.endswith("/a") and group.free == GB
    assert machine.mem_available(tree.proc) == GB
    assert machine.mem_total(tree.proc) == 5 * GB


def test_page_cache_that_can_go_is_not_counted_as_used(tree: Tree) -> None:
    tree.mount("0::/\n")
    tree.limit("", 4 * GB, 3 * GB, stat=f"anon 7\ninactive_file {GB}\nactive_file {GB}\n")
    assert machine.mem_available(tree.proc) == 4 * GB - 3 * GB + GB + GB // 2


def test_more_used_than_allowed_leaves_nothing(tree: Tree) -> None:
    tree.mount("0::/\n")
    tree.limit("", GB, 2 * GB)
    assert machine.mem_available(tree.proc) == 0


def test_a_throttling_threshold_is_a_limit(tree: Tree) -> None:
    tree.mount("0::/a\n")
    tree.limit("a", 2 * GB, GB, name="memory.high")
    assert machine.mem_available(tree.proc) == GB


def test_version_1(tree: Tree) -> None:
    tree.mount("9:cpu:/x\n4:hugetlb,memory:/box/one\n0::/\n", kind="cgroup", options="rw,memory")
    tree.limit("box/one", (1 << 63) - 4096, 0, name="memory.limit_in_bytes")
    tree.limit("box", 2 * GB, GB, stat=f"total_inactive_file {GB // 2}\n", name="memory.limit_in_bytes")
    assert machine.mem_available(tree.proc) == 2 * GB - GB // 2


@pytest.mark.parametrize(("root", "own"), [("/docker/abc", "/docker/abc"), ("/docker/abc", "/"), ("/", "/../..")])
def test_a_containers_view_of_its_own_group(tree: Tree, root: str, own: str) -> None:
    tree.mount(f"0::{own}\n", root=root)
    tree.limit("", 2 * GB, GB)
    assert machine.mem_available(tree.proc) == GB


def test_files_that_make_no_sense_are_passed_over(tree: Tree) -> None:
    tree.mount("nonsense\n0::\n::\n")
    tree.limit("", "what", 1)
    tree.write(tree.proc / "self/mountinfo", "short line\n - \n")
    assert machine.cgroup(tree.proc) is None
    (tree.proc / "meminfo").unlink()
    assert machine.mem_available(tree.proc) > 0  # psutil's


def test_this_machine() -> None:
    assert 0 < machine.mem_available() <= machine.mem_total()
    assert machine.usable_cores() == machine.cpu().cores >= 1
    assert machine.memlock_limit() is None or machine.memlock_limit() >= 0  # type: ignore[operator]
    assert machine.huge_pages() in ("", "always", "madvise", "never")


def test_disk_free_of_a_folder_that_is_still_to_be_made(tmp_path: Path) -> None:
    later = tmp_path / "not" / "yet"
    assert machine.existing(later) == tmp_path
    # other processes write meanwhile
    assert machine.disk_free(later) == pytest.approx(machine.disk_free(tmp_path), rel=0.2)


def test_the_file_system_of_a_path(tree: Tree) -> None:
    tree.mount("0::/\n")
    assert machine.file_system(tree.groups / "x", tree.proc) == "cgroup2"
    assert machine.file_system("/", tree.proc) == "ext4"
    assert machine.file_system("/", tree.proc / "none") == "unknown"


def test_processor_and_capabilities(tree: Tree) -> None:
    tree.write(tree.proc / "cpuinfo", "processor : 0\nmodel name : A\nflags : sse fma avx2\n\nmodel name : B\n")
    assert machine.cpu(tree.proc).name == "A" and machine.cpu(tree.proc).flags == ("avx2", "fma")
    tree.write(tree.proc / "self/status", "Name:\tx\nCapEff:\t0000000000004000\n")
    assert machine.may_exceed_memlock(tree.proc)
    tree.write(tree.proc / "self/status", "CapEff:\t0000000000000000\n")
    assert not machine.may_exceed_memlock(tree.proc)


def test_huge_pages(tmp_path: Path) -> None:
    setting = tmp_path / "kernel/mm/transparent_hugepage/enabled"
    setting.parent.mkdir(parents=True)
    setting.write_text("always [madvise] never\n")
    assert machine.huge_pages(tmp_path) == "madvise" and machine.huge_pages(tmp_path / "x") == ""


NAMES = [
    "Python", "torch", "CUDA", "processor", "update kernels", "host memory", "control group", "locked memory",
    "huge pages", "io_uring", "O_DIRECT", "disk", "finetune",
]  # fmt: skip


def test_env_on_this_machine(tmp_path: Path) -> None:
    checks = env.collect([tmp_path])
    assert [c.name for c in checks] == NAMES
    assert not [c for c in checks if "check itself failed" in c.detail]
    assert all(c.status == "ok" or c.remedy or c.name in ("io_uring", "O_DIRECT", "CUDA") for c in checks)
    assert list(tmp_path.iterdir()) == []


def test_env_prints_every_check(tmp_path: Path) -> None:
    out = io.StringIO()
    complete = env.render([str(tmp_path / "absent")], Console(file=out, width=200))
    text = out.getvalue()
    assert not complete and all(name in text for name in NAMES)
    assert "no swap store can be made" in text and "name a directory that exists" in text


def test_env_looks_at_each_folder(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    folders[0].mkdir()
    found = [c for c in env.collect(folders) if c.name in ("O_DIRECT", "disk")]
    assert [c.name for c in found] == ["O_DIRECT", "disk"] * 2
    assert str(folders[0]) in found[0].detail and found[0].status != "missing"
    assert str(folders[1]) in found[2].detail and found[2].status == "missing"


def test_env_tells_what_stands_in_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    group = machine.Cgroup("/box", 4 * GB, 3 * GB, 0)
    monkeypatch.setattr(machine, "cgroup", lambda proc=None: group)
    monkeypatch.setattr(machine, "memlock_limit", lambda: 65536)
    monkeypatch.setattr(machine, "may_exceed_memlock", lambda: False)
    monkeypatch.setattr(machine, "huge_pages", lambda: "never")
    monkeypatch.setattr(machine, "disk_free", lambda path: 1)
    monkeypatch.setenv("TIERFLOW_ISA", "scalar")
    found = {c.name: c for c in env.collect([tmp_path])}
    for name in ("control group", "locked memory", "huge pages", "disk", "update kernels"):
        assert found[name].status == "limited" and found[name].remedy, name
    assert "ulimit -l" in found["locked memory"].remedy


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise PermissionError("no")

    monkeypatch.setattr(machine, "mem_total", broken)
    (memory,) = [c for c in env.collect([os.curdir]) if c.name == "host memory"]
    assert memory.status == "missing" and "PermissionError: no" in memory.detail
