"""Lanes carry bytes between one pair of tiers, in order; they decide nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from tierflow.swap.arena import REGISTER_BYTES, Arena

#: Called with the index of a piece's first element and the piece in host memory.
Take = Callable[[int, torch.Tensor], None]


class Ticket(Protocol):
    """A transfer under way. It keeps its memory alive; ``wait`` raises what went wrong."""

    def done(self) -> bool:
        """Whether the transfer has ended, well or not."""
        ...

    def wait(self) -> None:
        """Blocks until the end; raises the transfer's error."""
        ...


class Done:
    """The ticket of a transfer that ended before it was returned."""

    def done(self) -> bool:
        """Always."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""


def finish(ticket: Ticket) -> None:
    """Waits until the transfer no longer touches its memory; raises its error, or the interrupt that came meanwhile.

    Ctrl-C ends a wait and not the transfer: memory that is given back then would be written behind its next owner.
    """
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            ticket.wait()
            break
        except KeyboardInterrupt as caught:
            interrupt = caught
    if interrupt is not None:
        raise interrupt


class HostLane:
    """HOST <-> DEVICE where both are ordinary memory: a copy made at once by the caller's thread.

    ``direct``: a file is read into DEVICE memory itself; False goes through HOST, as with an accelerator.
    """

    def __init__(self, direct: bool = True):
        self.direct = direct

    def fill(self, dst: torch.Tensor, src: torch.Tensor) -> Ticket:
        """Copies host bytes to the device copy."""
        dst.copy_(src)
        return Done()

    def drain(self, dst: torch.Tensor, src: torch.Tensor, transient: bool = False) -> Ticket:
        """Copies device bytes to host memory."""
        dst.copy_(src)
        return Done()

    def drain_pieces(self, src: torch.Tensor, take: Take) -> Ticket:
        """Gives ``take`` the bytes where they are."""
        if src.numel():
            take(0, src.view(-1))
        return Done()

    def before_use(self, ticket: Ticket) -> None:
        """Orders the compute after the ticket."""

    def after_use(self) -> object | None:
        """Marks the end of what the compute was given so far."""
        return None

    def reuse_after(self, mark: object | None) -> None:
        """Orders later fills after the mark."""

    def close(self) -> None:
        """Nothing is under way."""


class _CudaTicket:
    def __init__(self, event: torch.cuda.Event, keep: torch.Tensor):
        self.event, self._keep = event, keep

    def done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()


@dataclass(eq=False)
class _Staged:
    """A piece on its way through staging memory: bytes [begin, end) there, and who takes it."""

    begin: int
    end: int
    ticket: Ticket
    at: int
    piece: torch.Tensor
    take: Take
    taken: bool = False


class Staging:
    """A ring of host memory of fixed size; pieces leave it in the order in which they came."""

    def __init__(self, memory: torch.Tensor):
        self._memory = memory
        self._under_way: deque[_Staged] = deque()
        self._next = 0
        #: Several pieces fit, so that one is carried while another is taken.
        self.piece_bytes = memory.numel() // 4

    def place(self, nbytes: int) -> torch.Tensor:
        """Memory for the next piece; takes the oldest pieces first where there is no room."""
        size = -(-nbytes // 256) * 256
        while (begin := self._spot(size)) is None:
            self.take_oldest()
        self._next = begin + size
        self._begin = begin
        return self._memory[begin : begin + nbytes]

    def enter(self, ticket: Ticket, at: int, piece: torch.Tensor, take: Take) -> _Staged:
        """The piece that is on its way to what ``place`` gave last."""
        staged = _Staged(self._begin, self._next, ticket, at, piece, take)
        self._under_way.append(staged)
        return staged

    def _spot(self, size: int) -> int | None:
        if not self._under_way:
            return 0
        first = self._under_way[0].begin
        if self._next > first:  # used: [first, next)
            if self._next + size <= self._memory.numel():
                return self._next
            return 0 if size <= first else None
        return self._next if self._next + size <= first else None  # used: all but [next, first)

    def take_oldest(self) -> None:
        """Waits for the oldest piece and hands it over."""
        staged = self._under_way[0]
        finish(staged.ticket)
        self._under_way.popleft()
        staged.taken = True
        staged.take(staged.at, staged.piece)

    def drop(self) -> None:
        """Forgets what is under way; the caller has waited for it."""
        self._under_way.clear()


class _StagedTicket:
    def __init__(self, staging: Staging, last: _Staged):
        self._staging, self._last = staging, last

    def done(self) -> bool:
        return self._last.taken

    def wait(self) -> None:
        while not self._last.taken:
            self._staging.take_oldest()


class CudaLane:
    """HOST <-> DEVICE on a side stream each way; the compute stream waits on events, the host does not.

    [Note: reuse of device memory] Every write into leased device memory is a ``fill`` on one stream, and before the
    first one into bytes that somebody else had, that stream waits for their last read. Where the end of the last use
    is known (a module has run and nothing else looks at the weights) a mark was set there. Elsewhere, as after a
    backward's use through an alias, it waits for all that the compute streams were given until the eviction: an
    alias that is gone by then was used by work that has been issued.
    """

    direct = False  # files are read into host memory

    def __init__(self, device: torch.device, staging: Arena):
        self.device = device
        self._fill = torch.cuda.Stream(device)
        self._drain = torch.cuda.Stream(device)
        self._staging_arena = staging
        self._staging: Staging | None = None
        self._compute: dict[int, torch.cuda.Stream] = {}

    def fill(self, dst: torch.Tensor, src: torch.Tensor) -> Ticket:
        """Starts host -> device. The caller keeps both sides leased until the ticket is done."""
        with torch.cuda.stream(self._fill):
            _copy(dst, src)
            return _CudaTicket(self._fill.record_event(), src)

    def drain(self, dst: torch.Tensor, src: torch.Tensor, transient: bool = False) -> Ticket:
        """Starts device -> host, after what the compute stream was given so far.

        ``transient``: the source is of torch's allocator and may be dropped before the copy has run; else the
        caller keeps it leased until the ticket is done.
        """
        self._drain.wait_stream(self._now())
        with torch.cuda.stream(self._drain):
            _copy(dst, src)
            if transient:  # not held by the ticket: the memory is free for others as soon as the copy has run
                src.record_stream(self._drain)
            return _CudaTicket(self._drain.record_event(), dst)

    def drain_pieces(self, src: torch.Tensor, take: Take) -> Ticket:
        """Carries a transient source through staging memory of fixed size; ``take`` gets its pieces in order.

        A piece is taken when its memory is needed again, by the thread that needs it, or when the ticket is waited
        for.
        """
        flat, last = src.view(-1), None
        staging = self._staging_ring()
        step = max(staging.piece_bytes // flat.itemsize, 1)
        for at in range(0, flat.numel(), step):
            part = flat[at : at + step]
            piece = staging.place(part.nbytes).view(part.dtype)
            last = staging.enter(self.drain(piece, part, transient=True), at, piece, take)
        return Done() if last is None else _StagedTicket(staging, last)

    def _staging_ring(self) -> Staging:
        if self._staging is None:
            arena = self._staging_arena
            self._staging = Staging(arena.bytes_at(0, arena.nbytes))
        return self._staging

    def _now(self) -> torch.cuda.Stream:
        """The current compute stream, remembered: memory may be reused only after its work."""
        stream = torch.cuda.current_stream(self.device)
        self._compute[stream.cuda_stream] = stream
        return stream

    def before_use(self, ticket: Ticket) -> None:
        """Makes the compute stream wait for the ticket without blocking the host."""
        if isinstance(ticket, _CudaTicket):
            self._now().wait_event(ticket.event)

    def after_use(self) -> object | None:
        """An event behind everything the compute stream was given so far."""
        return self._now().record_event()

    def reuse_after(self, mark: object | None) -> None:
        """Fills given from now on run after the mark, or without one after all compute given so far."""
        if isinstance(mark, torch.cuda.Event):
            self._fill.wait_event(mark)
            return
        self._now()
        for stream in self._compute.values():
            self._fill.wait_stream(stream)

    def close(self) -> None:
        """Waits for what is under way and gives the staging memory back."""
        self._fill.synchronize()
        self._drain.synchronize()
        if self._staging is not None:
            self._staging.drop()
            self._staging = None
        self._staging_arena.close()


def _copy(dst: torch.Tensor, src: torch.Tensor) -> None:
    """An asynchronous copy between contiguous tensors of one dtype, none across two registrations."""
    if src.numel() == 0:
        return
    there = dst.view(-1).view(torch.uint8)
    here = src.view(-1).view(torch.uint8)
    host = (there if there.device.type == "cpu" else here).data_ptr()
    at = 0
    while at < here.numel():
        size = min(REGISTER_BYTES - (host + at) % REGISTER_BYTES, here.numel() - at)
        there[at : at + size].copy_(here[at : at + size], non_blocking=True)
        at += size


DeviceLane = HostLane | CudaLane
