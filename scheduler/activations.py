"""How many bytes a forward leaves alive for its backward.

The C allocator says nothing, and resident memory is noisy. So the storages that autograd saves and that modules
return are watched without keeping them: what is alive when the forward ends is what waits for the backward. What a
module hands to a checkpoint inside itself is not seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves


class Gauge:
    """Watches forwards; ``nbytes`` is the most that one of them left."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def note(self, tensor: torch.Tensor) -> None:
        """The tensor was saved, or came out of a module."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, or wrapped: its parts are not seen
            return
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def note_all(self, output: Any) -> None:
        """Every tensor in a module's output."""
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)

    def forward_ended(self) -> None:
        """Adds up what is still alive, and forgets the rest."""
        alive = sum(size for ref, size in self._seen.values() if not ref.expired())
        self.nbytes = max(self.nbytes, alive)
        self._seen.clear()
