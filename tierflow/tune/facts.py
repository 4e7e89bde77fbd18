"""What is known of each path before anything is measured, and what speaks against the measurement."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from tierflow import aio, machine
from tierflow.sizes import format_size
from tierflow.tune.device import Device, device_of, mounted
from tierflow.tune.knobs import Engine


@dataclass(frozen=True)
class PathFacts:
    """One path. ``direct``: whether I/O bypasses the page cache; ``alignment`` and ``free`` in bytes.

    ``note``: what ``tierflow.aio`` said of it.
    """

    path: str
    file_system: str
    mount: str
    free: int
    direct: bool
    alignment: int
    note: str
    device: Device | None


@dataclass(frozen=True)
class Facts:
    """All paths and the machine. ``refused``: engines that cannot run, and why. ``memlock``: bytes, None: no limit."""

    paths: tuple[PathFacts, ...]
    engines: tuple[Engine, ...]
    refused: dict[str, str]
    memlock: int | None
    may_lock_more: bool
    huge_pages: str


def look(paths: list[str]) -> Facts:
    """Looks at every path. Raises the OSError with which a path refuses a store."""
    found = tuple(_look_at(path) for path in paths)
    refused, engines = {}, ["io_uring", "threads"]
    for path in paths:
        try:
            aio.open(path, 1 << 20, engine="io_uring").close()
        except OSError as error:  # EngineUnavailable, and whatever else this path has against it
            refused["io_uring"] = error.strerror or str(error)
            engines.remove("io_uring")
            break
    return Facts(
        found, tuple(engines), refused, machine.memlock_limit(), machine.may_exceed_memlock(), machine.huge_pages()  # type: ignore[arg-type]
    )  # fmt: skip


def _look_at(path: str) -> PathFacts:
    with aio.open(path, 1 << 20, engine="threads") as store:
        direct, alignment, note = store.direct, store.alignment, store.note or ""
    mount = mounted(path)
    device = device_of(mount) if mount else None
    kind = mount.type if mount else machine.file_system(path)
    return PathFacts(
        os.path.abspath(path), kind, mount.point if mount else "", machine.disk_free(path), direct, alignment, note, device
    )


_MEMORY = {"tmpfs", "ramfs"}
_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "lustre", "gpfs"}


def cautions(facts: Facts) -> list[str]:
    """Sentences about what makes the figures mean less than they say, the worst first."""
    worst = [line for path in facts.paths for line in _void(path)]
    return worst + [line for path in facts.paths for line in _doubts(path)] + list(_machine_doubts(facts))


def _void(path: PathFacts) -> Iterator[str]:
    leaves = list(path.device.leaves()) if path.device else []
    if path.file_system in _MEMORY:
        yield f"{path.path} is on {path.file_system}, which is memory: the figures are no drive's, and mean nothing for offload"
    elif any(leaf.kind in ("zram", "ram") for leaf in leaves):
        names = ", ".join(leaf.name for leaf in leaves if leaf.kind in ("zram", "ram"))
        yield f"{path.path} is on {names}, a disk in memory: the figures are no drive's, and mean nothing for offload"
    elif not path.direct:
        yield (
            f"{path.path} ({path.file_system}) takes no O_DIRECT, so all goes through the page cache: the figures are "
            "those of memory, and of the drive only where they are low"
        )


def _doubts(path: PathFacts) -> Iterator[str]:
    if path.file_system in _REMOTE:
        yield f"{path.path} is on {path.file_system}: the other side may cache, so the drive may be slower than this"
    if path.file_system in ("btrfs", "zfs", "bcachefs"):
        yield f"{path.path} is on {path.file_system}, which checksums or copies on write: ext4 or xfs is faster for swap"
    leaves = list(path.device.leaves()) if path.device else []
    if any(leaf.kind == "loop" for leaf in leaves):
        yield f"{path.path} is on a loop device, a file of another file system"
    if any(leaf.model == "virtio disk" for leaf in leaves):
        yield f"{path.path} is on a virtual disk: its host may cache and may limit, and others may share the drive beneath"
    elif any(leaf.rotational for leaf in leaves):
        yield f"{path.path} is on a rotating disk by the kernel's word: offload needs an NVMe drive to be of use"
    if any("could do" in leaf.pcie for leaf in leaves):
        yield f"{path.path}: a PCIe link runs below what the drive could do"
    nodes = {leaf.numa_node for leaf in leaves if leaf.numa_node is not None}
    if len(nodes) > 1:
        yield f"{path.path}: its members hang on NUMA nodes {sorted(nodes)}, so some traffic crosses between them"


def _machine_doubts(facts: Facts) -> Iterator[str]:
    for engine, why in facts.refused.items():
        yield f"{engine} cannot run here, and the thread pool serves instead: {why}"
    if facts.huge_pages not in ("always", "madvise"):
        yield (
            "transparent huge pages are off (/sys/kernel/mm/transparent_hugepage/enabled): I/O buffers are on 4 KiB pages"
        )
    if facts.memlock is not None and not facts.may_lock_more and facts.memlock < 8 << 20:
        yield f"RLIMIT_MEMLOCK is {format_size(facts.memlock)}: kernels before 5.12 count io_uring's memory against it"
