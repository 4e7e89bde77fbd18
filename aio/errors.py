"""What can go wrong, one class a cause."""

from __future__ import annotations


class AioError(OSError):
    """A transfer failed. ``errno`` and ``filename`` as in every OSError; sizes in bytes.

    ``offset`` and ``length`` are those of the part that failed, which may be less than what was asked for.
    """

    def __init__(self, errno: int, reason: str, path: str, *, op: str, offset: int, length: int) -> None:
        super().__init__(errno, f"{op} of {length} bytes at offset {offset} failed: {reason}", path)
        self.op = op
        self.offset = offset
        self.length = length


class CorruptData(AioError):
    """What was read is not what was written: its checksum differs. ``offset`` and ``length`` name the first part."""


class DiskFull(OSError):
    """The file system has no room for a store. ``needed`` and ``free`` in bytes."""

    def __init__(self, errno: int, path: str, *, needed: int, free: int) -> None:
        super().__init__(errno, f"a swap store needs {needed} bytes here and {free} are free", path)
        self.needed = needed
        self.free = free


class OutOfSpace(RuntimeError):
    """No free extent of a store is large enough. ``requested``, ``free`` and ``largest`` in bytes."""

    def __init__(self, *, requested: int, free: int, largest: int) -> None:
        super().__init__(
            f"the store has no extent of {requested} bytes: {free} bytes are free, "
            f"the largest piece is {largest}"
        )
        self.requested = requested
        self.free = free
        self.largest = largest


class StoreClosed(ValueError):
    """The store was closed, or belongs to the process that this one was forked from."""


class EngineUnavailable(OSError):
    """The engine asked for cannot run here; the message says which setting refuses it."""
