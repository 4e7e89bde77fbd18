"""Memory at fixed addresses for chunks that live on NVMe: the addresses stay, the pages behind them come and go.

So tensors over a chunk, and views that somebody made of them, remain what they are while its bytes are elsewhere.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from tierflow.swap.arena import HUGE_PAGE, Arena
from tierflow.swap.ledger import Event
from tierflow.swap.tickets import Ticket, finish
from tierflow.swap.timeline import Lane
from tierflow.swap.types import IO_BYTES, Chunk, CopyState, Tier

if TYPE_CHECKING:
    from tierflow.swap.manager import Manager


def paged_bytes(nbytes: int) -> int:
    """Bytes of memory that a chunk takes while it is there: whole pages, huge ones for a chunk of that size."""
    page = HUGE_PAGE if nbytes >= HUGE_PAGE else IO_BYTES
    return -(-nbytes // page) * page


class PagedMemory:
    """A HOST copy of each of ``chunks``, whose home is NVMe, as far as ``bring`` and ``drop`` say; decides nothing."""

    def __init__(self, manager: Manager, chunks: list[Chunk]):
        self._manager, self._ledger = manager, manager.ledger
        self._offsets: dict[int, int] = {}
        self._writes: dict[int, Ticket] = {}
        end = large = 0
        for chunk in sorted(chunks, key=lambda c: -c.nbytes):
            self._offsets[chunk.id] = end
            end += paged_bytes(chunk.nbytes)
            large = end if chunk.nbytes >= HUGE_PAGE else large
        self._arena = Arena(end)
        self._arena.use_small_pages(large, end - large)

    def bytes(self, chunk: Chunk) -> torch.Tensor:
        """The chunk's memory as uint8 of shape (nbytes,); what is in it counts from ``bring`` to ``drop``."""
        return self._arena.bytes_at(self._offsets[chunk.id], chunk.nbytes)

    def bring(self, chunk: Chunk, read: bool) -> None:
        """Makes the memory the chunk's copy, with what NVMe has or (not ``read``) undefined. Raises OSError, all undone."""
        self._ledger.apply(chunk, Tier.HOST, Event.BEGIN_FILL)
        try:
            if read:
                began = time.perf_counter()
                finish(self._manager.nvme.read(chunk, self.bytes(chunk)))
                self._manager.waited(Lane.READ, self._manager.timeline.name(chunk.id), began)
        except BaseException:
            self._ledger.apply(chunk, Tier.HOST, Event.ABORT_FILL)
            self._vacate(chunk)
            raise
        self._ledger.apply(chunk, Tier.HOST, Event.END_FILL)

    def write(self, chunk: Chunk) -> None:
        """Starts writing the copy home; until ``end_write`` it must not change."""
        self._writes[chunk.id] = self._manager.nvme.write(chunk, self.bytes(chunk))
        self._ledger.wrote(chunk, Tier.HOST)
        self._ledger.apply(chunk, Tier.NVME, Event.BEGIN_FILL)

    def end_write(self, chunk: Chunk) -> None:
        """Waits for the write, if there is one. Raises OSError; the copy is then the only true one."""
        ticket = self._writes.pop(chunk.id, None)
        if ticket is None:
            return
        began = time.perf_counter()
        try:
            finish(ticket)
        except BaseException:
            self._ledger.apply(chunk, Tier.NVME, Event.ABORT_FILL)
            raise
        self._ledger.apply(chunk, Tier.NVME, Event.END_FILL)
        self._manager.waited(Lane.WRITE, self._manager.timeline.name(chunk.id), began)

    def drop(self, chunk: Chunk) -> None:
        """Gives the pages back. What was not written is lost."""
        self.end_write(chunk)
        if self._ledger.state(chunk, Tier.NVME) is CopyState.STALE:  # nobody wants what either has
            self._ledger.renew(chunk, Tier.NVME)
        self._vacate(chunk)

    def _vacate(self, chunk: Chunk) -> None:
        self._ledger.apply(chunk, Tier.HOST, Event.EVICT)
        self._arena.discard(self._offsets[chunk.id], paged_bytes(chunk.nbytes))
        self._manager.observer()

    def close(self) -> None:
        """Ends the writes and gives the memory back; errors of writes that nobody waits for are dropped."""
        for ticket in self._writes.values():
            try:
                finish(ticket)
            except OSError:
                continue
        self._writes.clear()
        self._arena.close()
