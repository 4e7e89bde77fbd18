"""The block devices beneath a path, as the kernel describes them in /sys and /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tierflow.machine import PROC, SYS, existing


@dataclass(frozen=True)
class Mounted:
    """A file system: ``number`` as "major:minor", its type, and what it was mounted from."""

    number: str
    point: str
    type: str
    source: str
    options: str


@dataclass(frozen=True)
class Device:
    """A block device and what it lies on. Sizes in bytes; None or "" where the kernel does not say.

    ``kind``: disk, partition, md, lvm, dm-crypt, multipath, dm, loop, zram or ram (brd). ``stripe``: bytes on one
    member before the next one follows. ``pcie``: the link of the slot, and what it could be if that is more.
    """

    name: str
    kind: str
    model: str = ""
    rotational: bool | None = None
    logical_block: int | None = None
    physical_block: int | None = None
    max_request: int | None = None
    max_segments: int | None = None
    scheduler: str = ""
    write_cache: str = ""
    level: str = ""
    stripe: int | None = None
    numa_node: int | None = None
    pcie: str = ""
    members: tuple[Device, ...] = field(default=())

    def leaves(self) -> Iterator[Device]:
        """The devices at the bottom, partitions resolved to their disks; a disk may come up twice."""
        if not self.members:
            yield self
        for member in self.members:
            yield from member.leaves()

    def walk(self) -> Iterator[tuple[int, Device]]:
        """(depth, device), this one first."""
        yield 0, self
        for member in self.members:
            yield from ((depth + 1, device) for depth, device in member.walk())


def mounted(path: str | os.PathLike[str], proc: Path = PROC) -> Mounted | None:
    """The file system that holds ``path``; None where /proc/self/mountinfo does not show it."""
    where, best = os.path.realpath(existing(path)), None
    for line in _text(proc / "self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) < 6 or len(right) < 2:
            continue
        point = _unescape(left[4])
        inside = where == point or where.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best.point)):  # a later mount hides an earlier one
            best = Mounted(left[2], point, right[0], _unescape(right[1]), left[5])
    return best


def device_of(mount: Mounted, sys: Path = SYS) -> Device | None:
    """The block device of a file system; None where there is none (tmpfs, overlay, a network) or it is hidden."""
    node = sys / "dev/block" / mount.number
    if mount.number.startswith("0:"):  # the file system numbers itself, as btrfs and zfs do
        source = Path(mount.source)
        if not mount.source.startswith("/dev/"):
            return None
        node = sys / "class/block" / (source.resolve().name if source.exists() else source.name)
    return describe(node.resolve(), sys) if node.exists() else None


def describe(node: Path, sys: Path = SYS) -> Device:
    """The device whose folder in sysfs is ``node``, with its members."""
    if (node / "partition").exists():
        whole = describe(node.parent, sys)
        return Device(node.name, "partition", members=(whole,))
    slaves = sorted((node / "slaves").iterdir()) if (node / "slaves").is_dir() else []
    members = tuple(describe(slave.resolve(), sys) for slave in slaves)
    queue, kind = node / "queue", _kind(node)
    stripe = _number(node / "md/chunk_size") if kind == "md" else None
    if kind in ("lvm", "dm") and len(members) > 1:
        # a striped target tells its chunk as the least good request and the whole stripe as the best
        least, best = _number(queue / "minimum_io_size"), _number(queue / "optimal_io_size")
        stripe = least if least and best and best > least else None
    pci = None if members else _pci(node)
    requests = _number(queue / "max_sectors_kb")
    return Device(
        node.name, kind, _model(node, kind), _flag(queue / "rotational"), _number(queue / "logical_block_size"),
        _number(queue / "physical_block_size"), None if requests is None else requests * 1024,
        _number(queue / "max_segments"), _chosen(_text(queue / "scheduler")), _text(queue / "write_cache").strip(),
        _text(node / "md/level").strip(), stripe or None, _numa(pci), _link(pci), members,
    )  # fmt: skip


_NAMED = {"md": "md", "zram": "zram", "ram": "ram", "loop": "loop"}
_MAPPED = {"CRYPT": "dm-crypt", "LVM": "lvm", "mpath": "multipath"}


def _kind(node: Path) -> str:
    if (node / "dm").is_dir():
        return _MAPPED.get(_text(node / "dm/uuid").partition("-")[0].strip(), "dm")
    if (node / "md").is_dir():
        return "md"
    return _NAMED.get(node.name.rstrip("0123456789"), "disk")


def _model(node: Path, kind: str) -> str:
    if kind == "loop":
        return _text(node / "loop/backing_file").strip()
    if (node / "dm").is_dir():
        return _text(node / "dm/name").strip()
    words = [_text(node / "device" / name).strip() for name in ("vendor", "model")]
    if words[0].startswith("0x"):  # a number of the bus and no maker's name
        words[0] = ""
    if not any(words) and node.name.startswith("vd"):
        return "virtio disk"
    return " ".join(word for word in words if word)


def _pci(node: Path) -> Path | None:
    """The PCI function that the device hangs on: the nearest folder above it that has a link or a vendor and class."""
    for start in (node, *_controllers(node)):
        for folder in start.resolve().parents:
            if (folder / "vendor").exists() and (folder / "class").exists() and ":" in folder.name:
                return folder
    return None


def _controllers(node: Path) -> list[Path]:
    """With NVMe multipath the namespace hangs on no bus, and its subsystem's folder links to the controllers."""
    return sorted(p for p in node.parent.glob("nvme*") if p.is_symlink())


def _numa(pci: Path | None) -> int | None:
    node = _text(pci / "numa_node").strip() if pci else ""
    return int(node) if node.isdigit() else None  # -1 is "none"


def _link(pci: Path | None) -> str:
    if pci is None:
        return ""
    speed, width = (_text(pci / f"current_link_{what}").strip() for what in ("speed", "width"))
    top, most = (_text(pci / f"max_link_{what}").strip() for what in ("speed", "width"))
    if not speed or speed.startswith("Unknown") or width in ("", "0"):
        return ""
    now = f"{speed.removesuffix(' PCIe')} x{width}"
    could = f"{top.removesuffix(' PCIe')} x{most}"
    return now if now == could or not top or not most else f"{now} (the device could do {could})"


def _chosen(text: str) -> str:
    start, end = text.find("["), text.find("]")
    return text[start + 1 : end] if 0 <= start < end else text.strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _flag(path: Path) -> bool | None:
    number = _number(path)
    return None if number is None else bool(number)


def _unescape(text: str) -> str:
    for code, char in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        text = text.replace(code, char)
    return text
