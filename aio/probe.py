"""Whether io_uring can be used here, and if not, which setting stands in the way."""

from __future__ import annotations

import errno
import os
import resource
from dataclasses import dataclass
from pathlib import Path

from . import _aio

_SYSCTL = Path("/proc/sys/kernel/io_uring_disabled")


@dataclass(frozen=True)
class Probe:
    """``io_uring``: whether that engine can run. ``reason``: one sentence why not, or empty."""

    io_uring: bool
    reason: str


def probe() -> Probe:
    """Sets up a small ring and throws it away. Never raises."""
    if not _aio.BUILT_WITH_IO_URING:
        return Probe(
            False,
            "tierflow was built without liburing: install its headers and static library "
            "(Debian: liburing-dev) and build again.",
        )
    code = _aio.probe_io_uring()
    return Probe(True, "") if code == 0 else Probe(False, explain(code))


def explain(code: int) -> str:
    """One sentence for the errno with which a ring was refused."""
    if code == errno.EPERM:
        return _explain_eperm()
    if code == errno.ENOSYS:
        return "io_uring_setup answers ENOSYS: the kernel has no io_uring, or a sandbox hides it."
    if code == errno.ENOMEM:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        size = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
        return f"io_uring_setup answers ENOMEM: raise RLIMIT_MEMLOCK (ulimit -l), now {size}, or free memory."
    if code == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"io_uring_setup answers EMFILE: raise RLIMIT_NOFILE (ulimit -n), now {limit}."
    if code == errno.EOPNOTSUPP:
        return "The kernel's io_uring lacks the plain read and write operations (Linux 5.6 has them)."
    return f"io_uring_setup answers {errno.errorcode.get(code, code)}: {os.strerror(code)}."


def _explain_eperm() -> str:
    try:
        value = _SYSCTL.read_text().strip()
    except OSError:
        value = "0"
    if value == "2":
        return "io_uring is off for everyone: sysctl kernel.io_uring_disabled is 2 (0 allows it)."
    if value == "1":
        return (
            "io_uring is off for this user: sysctl kernel.io_uring_disabled is 1 (0 allows it, or "
            "CAP_SYS_ADMIN, or membership in the group of kernel.io_uring_group)."
        )
    return (
        "io_uring_setup answers EPERM although sysctl kernel.io_uring_disabled allows it: a seccomp filter, "
        "as container runtimes install one, or a security module refuses it."
    )
