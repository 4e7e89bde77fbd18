"""What this machine has: memory under its limits, disk, processor, huge pages. Imports no torch."""

from __future__ import annotations

import os
import posixpath
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
SYS = Path("/sys")
#: A v1 limit from here on means none: the kernel writes the largest multiple of a page.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Cgroup:
    """The tightest memory limit that a control group puts on this process; all in bytes."""

    path: str
    limit: int
    used: int
    #: File pages in ``used`` that the kernel drops when memory is asked for.
    reclaimable: int

    @property
    def free(self) -> int:
        return max(0, self.limit - max(0, self.used - self.reclaimable))


@dataclass(frozen=True)
class Cpu:
    """``flags``: those of the processor's vector extensions that matter here, as the kernel names them."""

    name: str
    cores: int
    flags: tuple[str, ...]


def mem_available(proc: Path = PROC) -> int:
    """Bytes that can be allocated now: the kernel's MemAvailable, or what the control group leaves if that is less."""
    free = meminfo(proc)["MemAvailable"]
    group = cgroup(proc)
    return free if group is None else min(free, group.free)


def mem_total(proc: Path = PROC) -> int:
    """Bytes of memory, or the control group's limit if that is less."""
    total = meminfo(proc)["MemTotal"]
    group = cgroup(proc)
    return total if group is None else min(total, group.limit)


def meminfo(proc: Path = PROC) -> dict[str, int]:
    """The kernel's figures for the whole machine, in bytes (plain numbers as they are)."""
    found: dict[str, int] = {}
    for line in _read(proc / "meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    if "MemAvailable" not in found or "MemTotal" not in found:
        import psutil  # not Linux, or a sandbox that hides /proc/meminfo

        memory = psutil.virtual_memory()
        found |= {"MemAvailable": int(memory.available), "MemTotal": int(memory.total)}
    return found


def cgroup(proc: Path = PROC) -> Cgroup | None:
    """The control group that leaves least, of this process's own and all above it; None without a limit."""
    groups = [group for folder in _memory_folders(proc) for group in _limits(folder)]
    return min(groups, key=lambda group: group.free, default=None)


def _memory_folders(proc: Path) -> Iterator[Path]:
    """Folders of this process's memory control groups, from its own up to the mount point."""
    paths: dict[str, str] = {}
    for line in _read(proc / "self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for mount in mounts(proc):
        if mount.type not in paths or (mount.type == "cgroup" and "memory" not in mount.options.split(",")):
            continue
        inside = posixpath.relpath(posixpath.normpath(paths[mount.type] or "/"), mount.root)
        # A container may see its path from the host's root while only its own subtree is mounted.
        parts = [] if inside == "." or inside.startswith("..") else inside.split("/")
        for depth in range(len(parts), -1, -1):
            yield Path(mount.point, *parts[:depth])


def _limits(folder: Path) -> Iterator[Cgroup]:
    stat = _numbers(folder / "memory.stat")
    for limit_name, use_name, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.high", "memory.current", ""),  # above it the kernel throttles, which is no place to train
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        limit, used = _number(folder / limit_name), _number(folder / use_name)
        if limit is not None and used is not None and limit < _NO_LIMIT:
            # active file pages are in use by somebody; the kernel's own estimate too counts half of them
            reclaimable = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0) // 2
            yield Cgroup(str(folder), limit, used, reclaimable)


@dataclass(frozen=True)
class Mount:
    root: str
    point: str
    type: str
    options: str


def mounts(proc: Path = PROC) -> list[Mount]:
    """The mounted file systems that this process sees."""
    found = []
    for line in _read(proc / "self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) >= 5 and right:
            options = right[2] if len(right) > 2 else ""
            found.append(Mount(_unescape(left[3]), _unescape(left[4]), right[0], options))
    return found


def _unescape(text: str) -> str:
    for code, char in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        text = text.replace(code, char)
    return text


def file_system(path: str | os.PathLike[str], proc: Path = PROC) -> str:
    """The type of the file system that holds ``path``, such as "ext4"; "unknown" if it cannot be told."""
    where = os.path.realpath(existing(path))
    best = Mount("", "", "unknown", "")
    for mount in mounts(proc):
        inside = where == mount.point or where.startswith(mount.point.rstrip("/") + "/")
        if inside and len(mount.point) >= len(best.point):  # a later mount hides an earlier one
            best = mount
    return best.type


def existing(path: str | os.PathLike[str]) -> Path:
    """``path``, or the nearest folder above it that exists."""
    where = Path(path).absolute()
    while not where.exists() and where != where.parent:
        where = where.parent
    return where


def disk_free(path: str | os.PathLike[str]) -> int:
    """Bytes that this user may still write where ``path`` is, or will be once it is made. Raises OSError."""
    stat = os.statvfs(existing(path))
    return stat.f_bavail * stat.f_frsize


def memlock_limit() -> int | None:
    """RLIMIT_MEMLOCK in bytes, or None if there is no limit."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def may_exceed_memlock(proc: Path = PROC) -> bool:
    """Whether this process holds CAP_IPC_LOCK, which lifts RLIMIT_MEMLOCK."""
    for line in _read(proc / "self/status").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> 14 & 1)
    return False


def huge_pages(sys: Path = SYS) -> str:
    """Transparent huge pages: "always", "madvise" or "never"; "" where the kernel has none."""
    text = _read(sys / "kernel/mm/transparent_hugepage/enabled")
    start, end = text.find("["), text.find("]")
    return text[start + 1 : end] if 0 <= start < end else ""


_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_bf16",
    "asimd", "bf16", "sve", "sve2",
)  # fmt: skip


def cpu(proc: Path = PROC) -> Cpu:
    """The processor's name, the cores this process may use, and its vector extensions."""
    fields: dict[str, str] = {}
    for line in _read(proc / "cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    present = set(fields.get("flags", fields.get("features", "")).split())
    name = fields.get("model name") or fields.get("hardware") or os.uname().machine
    return Cpu(name, usable_cores(), tuple(flag for flag in _FLAGS if flag in present))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _numbers(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
