"""The unnamed file of a store: made, sized, and asked what direct I/O needs of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import _aio
from .errors import DiskFull

# File systems in memory take O_DIRECT (some kernels' tmpfs does) and have no device to go to directly.
_IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}
_FUSE = 0x65735546
_LEAST_ALIGNMENT = 512
_USUAL_ALIGNMENT = 4096
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS, errno.ENOENT)


@dataclass(frozen=True)
class Scratch:
    """An open file without a name.

    ``alignment`` of offsets and lengths and ``memory_alignment`` of addresses, in bytes, 1 where any will do;
    ``note``: why I/O is buffered, or None.
    """

    fd: int
    alignment: int
    memory_alignment: int
    direct: bool
    note: str | None


def check_directory(path: str) -> None:
    """Raises FileNotFoundError, NotADirectoryError or PermissionError."""
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, "the directory for a swap store does not exist", path)
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, "a swap store needs a directory, and this is a file", path)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "the directory for a swap store is not writable", path)


def refuses_uring(path: str) -> str:
    """Why io_uring may not be used in the directory ``path``, in a sentence; empty if it may.

    io_uring resumes a short transfer by itself, and over FUSE's direct I/O (seen on Linux 6.18) from the
    transfer's start: the bytes are then wrong and the result says that all went well.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        on_fuse = _aio.filesystem_magic(fd) == _FUSE
    finally:
        os.close(fd)
    return f"{path} is on FUSE, where io_uring resumes short transfers in the wrong place." if on_fuse else ""


def create(path: str, capacity: int, *, linkable: bool = False) -> Scratch:
    """Makes the file in the directory ``path`` with ``capacity`` bytes reserved on disk.

    ``linkable``: it may be given a name later. Raises DiskFull, or the OSError of a file system that refuses.
    """
    fd = _open_linkable(path) if linkable else _open_unnamed(path)
    try:
        direct, alignment, memory_alignment, reason = _go_direct(fd, path)
        notes = [reason] if reason else []
        if not _reserve(fd, path, capacity):
            notes.append(
                f"the file system of {path} cannot reserve space, so a full disk shows only on writing."
            )
    except BaseException:
        os.close(fd)
        raise
    return Scratch(fd, alignment, memory_alignment, direct, " ".join(notes) or None)


def publish(fd: int, path: str, target: str, nbytes: int) -> None:
    """Cuts the file to ``nbytes`` and gives it the name ``target``, in the place of whatever has that name.

    Once this returns, file and name survive a crash; if it does not return, ``target`` is what it was.
    """
    os.ftruncate(fd, nbytes)
    os.fsync(fd)
    folder, name = os.path.split(os.path.abspath(target))
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    interim = f".{name}.{os.getpid()}.{fd}.tierflow"
    try:
        # With a directory given, Python calls linkat, which alone follows the link that /proc shows.
        os.link(f"/proc/self/fd/{fd}", interim, src_dir_fd=directory, dst_dir_fd=directory)
        try:
            os.rename(interim, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            os.unlink(interim, dir_fd=directory)
            raise
        os.fsync(directory)
    except OSError as error:
        reason = f"the file of the store in {path} cannot get this name: {error.strerror}"
        if error.errno == errno.EXDEV:
            reason += " (they are on different file systems)"
        raise OSError(error.errno, reason, target) from None
    finally:
        os.close(directory)


def _open_linkable(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in _NO_TMPFILE:
            error.strerror = "the file system has no O_TMPFILE, which a store with durability='fdatasync' needs"
        error.filename = path
        raise


def _open_unnamed(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC | os.O_EXCL, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            error.filename = path
            raise
    fd, name = tempfile.mkstemp(prefix=".tierflow-", dir=path)
    try:
        os.unlink(name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _go_direct(fd: int, path: str) -> tuple[bool, int, int, str]:
    """Turns O_DIRECT on where there is a device behind the file.

    Returns (direct, alignment of offsets, alignment of memory, why not direct).
    """
    in_memory = _IN_MEMORY.get(_aio.filesystem_magic(fd))
    if in_memory:
        return False, 1, 1, f"{path} is on {in_memory}, which is memory: I/O is buffered."
    found = _aio.direct_alignment(fd)
    refused = found is not None and 0 in found
    if not refused:
        try:
            _set_direct(fd)
        except OSError:
            refused = True
    if refused:
        return False, 1, 1, f"the file system of {path} has no O_DIRECT: I/O is buffered."
    if found is None:
        size = max(_logical_block_size(fd), _LEAST_ALIGNMENT)
        return True, size, size, ""
    memory, offset = found
    return True, max(offset, _LEAST_ALIGNMENT), memory, ""


def _set_direct(fd: int) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)


def _logical_block_size(fd: int) -> int:
    device = os.fstat(fd).st_dev
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (node / "queue", node.resolve().parent / "queue"):  # a partition's queue is its disk's
        with contextlib.suppress(OSError, ValueError):
            return int((queue / "logical_block_size").read_text())
    return _USUAL_ALIGNMENT


def _reserve(fd: int, path: str, capacity: int) -> bool:
    """Whether the bytes are really reserved; otherwise the file only has its length."""
    try:
        _aio.reserve(fd, capacity)
        return True
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(error.errno, path, needed=capacity, free=_free_bytes(fd)) from None
        if error.errno == errno.EFBIG:
            reason = (
                f"a file of {capacity} bytes is over a limit (ulimit -f, or the file system's largest file)"
            )
            raise OSError(error.errno, reason, path) from None
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(error.errno, f"reserving {capacity} bytes: {error.strerror}", path) from None
    if _free_bytes(fd) < capacity:
        raise DiskFull(errno.ENOSPC, path, needed=capacity, free=_free_bytes(fd))
    os.ftruncate(fd, capacity)
    return False


def _free_bytes(fd: int) -> int:
    info = os.fstatvfs(fd)
    return info.f_bavail * info.f_frsize
