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
    """An open file without a name. ``alignment`` in bytes; ``note``: why I/O is buffered, or None."""

    fd: int
    alignment: int
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


def create(path: str, capacity: int) -> Scratch:
    """Makes the file in the directory ``path`` with ``capacity`` bytes reserved on disk.

    Raises DiskFull, or the OSError of a file system that refuses.
    """
    fd = _open_unnamed(path)
    try:
        direct, alignment, reason = _go_direct(fd, path)
        notes = [reason] if reason else []
        if not _reserve(fd, path, capacity):
            notes.append(
                f"the file system of {path} cannot reserve space, so a full disk shows only on writing."
            )
    except BaseException:
        os.close(fd)
        raise
    return Scratch(fd, alignment, direct, " ".join(notes) or None)


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


def _go_direct(fd: int, path: str) -> tuple[bool, int, str]:
    """Turns O_DIRECT on where there is a device behind the file. Returns (direct, alignment, why not)."""
    in_memory = _IN_MEMORY.get(_aio.filesystem_magic(fd))
    if in_memory:
        return False, _LEAST_ALIGNMENT, f"{path} is on {in_memory}, which is memory: I/O is buffered."
    found = _aio.direct_alignment(fd)
    refused = found is not None and 0 in found
    if not refused:
        try:
            _set_direct(fd)
        except OSError:
            refused = True
    if refused:
        return False, _LEAST_ALIGNMENT, f"the file system of {path} has no O_DIRECT: I/O is buffered."
    alignment = max(found) if found else _logical_block_size(fd)
    return True, max(alignment, _LEAST_ALIGNMENT), ""


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
