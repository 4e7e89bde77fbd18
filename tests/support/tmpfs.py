"""A file system of its own for a test: its size is known, and no other process changes its usage."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DETACH = 2  #: umount2's MNT_DETACH


@contextmanager
def mounted(directory: Path, size: str) -> Iterator[Path]:
    """``size`` as mount takes it. Skips the test where none can be mounted."""
    directory.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(directory), b"tmpfs", 0, f"size={size}".encode()) != 0:
        pytest.skip(f"no tmpfs can be mounted: {os.strerror(ctypes.get_errno())}")
    try:
        yield directory
    finally:
        libc.umount2(os.fsencode(directory), DETACH)
