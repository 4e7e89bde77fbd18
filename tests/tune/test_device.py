"""What is read from sysfs: on made-up machines that this one is not, and on this one."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tierflow.tune.device import Device, Mounted, describe, device_of, mounted

Tree = Callable[[str], Path]

NVME = """
devices/pci0000:00/0000:01:00.0/vendor: 0x144d
devices/pci0000:00/0000:01:00.0/class: 0x010802
devices/pci0000:00/0000:01:00.0/numa_node: 1
devices/pci0000:00/0000:01:00.0/current_link_speed: 8.0 GT/s PCIe
devices/pci0000:00/0000:01:00.0/current_link_width: 4
devices/pci0000:00/0000:01:00.0/max_link_speed: 16.0 GT/s PCIe
devices/pci0000:00/0000:01:00.0/max_link_width: 4
devices/pci0000:00/0000:01:00.0/nvme/nvme0/model: Example SSD 980 1TB
devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/device -> ..
devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/queue/rotational: 0
devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/queue/logical_block_size: 512
devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/queue/physical_block_size: 4096
devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/queue/max_sectors_kb: 128
devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/queue/max_segments: 127
devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/queue/scheduler: [none] mq-deadline
devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/queue/write_cache: write back
devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/nvme0n1p2/partition: 2
dev/block/259:2 -> ../../devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/nvme0n1p2
class/block/nvme0n1p2 -> ../../devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/nvme0n1p2
"""
NVME_DISK = Device(
    "nvme0n1", "disk", "Example SSD 980 1TB", False, 512, 4096, 131072, 127, "none", "write back", "", None, 1,
    "8.0 GT/s x4 (the device could do 16.0 GT/s x4)",
)  # fmt: skip


def mount(number: str, type: str = "ext4", source: str = "/dev/x") -> Mounted:
    return Mounted(number, "/mnt", type, source, "rw")


def test_a_partition_of_an_nvme_drive(tree: Tree) -> None:
    found = device_of(mount("259:2"), tree(NVME))
    assert found == Device("nvme0n1p2", "partition", members=(NVME_DISK,))
    assert list(found.leaves()) == [NVME_DISK]


def test_a_file_system_with_a_number_of_its_own_is_found_by_its_source(tree: Tree) -> None:
    root = tree(NVME)
    assert device_of(mount("0:44", "btrfs", "/dev/nvme0n1p2"), root) == device_of(mount("259:2"), root)
    assert device_of(mount("0:45", "overlay", "overlay"), root) is None
    assert device_of(mount("0:46", "tmpfs", "tmpfs"), root) is None


def disk(name: str, bus: str, numa: int) -> str:
    base = f"devices/pci0000:00/{bus}/nvme/{name[:5]}/{name}"
    return f"""
devices/pci0000:00/{bus}/vendor: 0x144d
devices/pci0000:00/{bus}/class: 0x010802
devices/pci0000:00/{bus}/numa_node: {numa}
{base}/queue/rotational: 0
{base}/queue/logical_block_size: 4096
{base}/device -> ..
"""


TWO = disk("nvme0n1", "0000:01:00.0", 0) + disk("nvme1n1", "0000:81:00.0", 1)
MD = TWO + """
devices/virtual/block/md0/md/level: raid0
devices/virtual/block/md0/md/chunk_size: 524288
devices/virtual/block/md0/queue/logical_block_size: 4096
devices/virtual/block/md0/slaves/nvme0n1 -> ../../../../pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1
devices/virtual/block/md0/slaves/nvme1n1 -> ../../../../pci0000:00/0000:81:00.0/nvme/nvme1/nvme1n1
dev/block/9:0 -> ../../devices/virtual/block/md0
"""


def test_md_names_its_level_stripe_and_members_with_their_nodes(tree: Tree) -> None:
    found = device_of(mount("9:0"), tree(MD))
    assert found is not None
    assert (found.kind, found.level, found.stripe) == ("md", "raid0", 524288)
    assert [(leaf.name, leaf.numa_node, leaf.kind) for leaf in found.leaves()] == [
        ("nvme0n1", 0, "disk"), ("nvme1n1", 1, "disk")
    ]  # fmt: skip


CRYPT = TWO + """
devices/virtual/block/dm-0/dm/uuid: LVM-abcdef
devices/virtual/block/dm-0/dm/name: vg-swap
devices/virtual/block/dm-0/queue/minimum_io_size: 65536
devices/virtual/block/dm-0/queue/optimal_io_size: 131072
devices/virtual/block/dm-0/slaves/nvme0n1 -> ../../../../pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1
devices/virtual/block/dm-0/slaves/nvme1n1 -> ../../../../pci0000:00/0000:81:00.0/nvme/nvme1/nvme1n1
devices/virtual/block/dm-1/dm/uuid: CRYPT-LUKS2-0123-swap
devices/virtual/block/dm-1/dm/name: secret
devices/virtual/block/dm-1/queue/minimum_io_size: 65536
devices/virtual/block/dm-1/queue/optimal_io_size: 131072
devices/virtual/block/dm-1/slaves/dm-0 -> ../../dm-0
dev/block/253:1 -> ../../devices/virtual/block/dm-1
"""


def test_dm_crypt_over_striped_lvm(tree: Tree) -> None:
    found = device_of(mount("253:1"), tree(CRYPT))
    assert found is not None
    walked = [(depth, d.name, d.kind, d.model, d.stripe) for depth, d in found.walk()]
    assert walked == [
        (0, "dm-1", "dm-crypt", "secret", None), (1, "dm-0", "lvm", "vg-swap", 65536),
        (2, "nvme0n1", "disk", "", None), (2, "nvme1n1", "disk", "", None),
    ]  # fmt: skip


MULTIPATH = """
devices/pci0000:00/0000:05:00.0/vendor: 0x8086
devices/pci0000:00/0000:05:00.0/class: 0x010802
devices/pci0000:00/0000:05:00.0/numa_node: -1
devices/pci0000:00/0000:05:00.0/current_link_speed: 16.0 GT/s PCIe
devices/pci0000:00/0000:05:00.0/current_link_width: 4
devices/pci0000:00/0000:05:00.0/max_link_speed: 16.0 GT/s PCIe
devices/pci0000:00/0000:05:00.0/max_link_width: 4
devices/pci0000:00/0000:05:00.0/nvme/nvme3/serial: S
devices/virtual/nvme-subsystem/nvme-subsys3/model: Big
devices/virtual/nvme-subsystem/nvme-subsys3/nvme3 -> ../../../pci0000:00/0000:05:00.0/nvme/nvme3
devices/virtual/nvme-subsystem/nvme-subsys3/nvme3n1/device -> ..
devices/virtual/nvme-subsystem/nvme-subsys3/nvme3n1/queue/rotational: 0
"""


def test_an_nvme_namespace_that_hangs_on_a_subsystem_finds_its_controllers_link(tree: Tree) -> None:
    root = tree(MULTIPATH)
    found = describe(root / "devices/virtual/nvme-subsystem/nvme-subsys3/nvme3n1", root)
    assert (found.model, found.pcie, found.numa_node) == ("Big", "16.0 GT/s x4", None)


@pytest.mark.parametrize(("name", "kind"), [("zram0", "zram"), ("ram3", "ram"), ("loop7", "loop"), ("sda", "disk")])
def test_kinds_by_name(tree: Tree, name: str, kind: str) -> None:
    root = tree(f"devices/virtual/block/{name}/queue/rotational: 1")
    found = describe(root / "devices/virtual/block" / name, root)
    assert (found.kind, found.rotational, found.pcie, found.max_request) == (kind, True, "", None)


MOUNTS = """
self/mountinfo: 22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
"""


def test_the_mount_of_a_path_is_the_last_of_the_longest(tmp_path: Path, tree: Tree) -> None:
    here = os.path.realpath(tmp_path)
    root = tree(MOUNTS)
    lines = [
        "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw",
        f"30 22 0:50 / {here}/with\\040space rw - btrfs /dev/nvme0n1p2 rw",
        f"31 22 0:51 / {here} rw - xfs /dev/sdb rw",
        f"32 22 0:52 / {here} ro,noatime master:3 - ext4 /dev/sdc rw",
        "cut short",
    ]
    (root / "self/mountinfo").write_text("\n".join(lines))
    (tmp_path / "with space").mkdir()
    (tmp_path / "with spaces").mkdir()
    assert mounted(tmp_path / "with space" / "not there yet", root) == Mounted("0:50", f"{here}/with space", "btrfs", "/dev/nvme0n1p2", "rw")
    assert mounted(tmp_path / "with spaces", root) == Mounted("0:52", here, "ext4", "/dev/sdc", "ro,noatime")
    assert mounted("/", root) == Mounted("8:1", "/", "ext4", "/dev/sda1", "rw")
    assert mounted("/", tmp_path / "nowhere") is None


def test_this_machine_as_others_see_it(tmp_path: Path) -> None:
    mount = mounted(tmp_path)
    assert mount is not None
    partitions = {p.mountpoint: p.fstype for p in psutil.disk_partitions(all=True)}
    assert partitions[mount.point] == mount.type
    device = device_of(mount)
    if device is None:
        pytest.skip(f"{mount.type} has no block device that can be seen here")
    number = os.stat(tmp_path).st_dev
    if mount.type in ("ext4", "xfs"):
        assert mount.number == f"{os.major(number)}:{os.minor(number)}"
    for leaf in device.leaves():
        node = Path("/dev", leaf.name)
        if node.exists() and stat.S_ISBLK(node.stat().st_mode):
            assert Path(f"/sys/dev/block/{os.major(node.stat().st_rdev)}:{os.minor(node.stat().st_rdev)}").exists()
        assert leaf.logical_block in (512, 4096) and leaf.max_segments and leaf.max_request
