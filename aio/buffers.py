"""From whatever holds bytes to an address and a length."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _aio


class Memory(NamedTuple):
    """Where the bytes are; ``owner`` keeps them there."""

    address: int
    nbytes: int
    owner: object


def memory_of(buffer: Any, *, writable: bool) -> Memory:
    """Accepts the buffer protocol, or an object with ``data_ptr()`` and ``nbytes`` (a tensor on the CPU).

    Raises TypeError for anything else, ValueError where the bytes are not contiguous, not in host memory, or
    read-only although they are to be written.
    """
    if hasattr(buffer, "data_ptr"):
        return _memory_of_tensor(buffer)
    try:
        view = _aio.View(buffer, writable)
    except BufferError as error:
        raise ValueError(
            f"buffer: {error} (a read needs writable memory, and both need it contiguous)"
        ) from None
    except TypeError:
        raise TypeError(
            f"buffer: {type(buffer).__name__} has neither the buffer protocol nor data_ptr() and nbytes"
        ) from None
    except ValueError as error:  # what numpy raises for memory that may not be written or is not contiguous
        raise ValueError(f"buffer: {error}") from None
    return Memory(view.address, view.nbytes, view)


def _memory_of_tensor(tensor: Any) -> Memory:
    device = getattr(tensor, "device", None)
    kind = getattr(device, "type", device)
    if kind not in (None, "cpu"):
        raise ValueError(f"buffer: the tensor is on {device}, and transfers go to and from host memory")
    if not tensor.is_contiguous():
        raise ValueError("buffer: the tensor is not contiguous")
    return Memory(int(tensor.data_ptr()), int(tensor.nbytes), tensor)
