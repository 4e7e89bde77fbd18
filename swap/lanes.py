"""Lanes carry bytes between one pair of tiers, in order; they decide nothing."""

from __future__ import annotations

import time
from typing import Any

import torch

from tierflow.swap.arena import REGISTER_BYTES, Arena
from tierflow.swap.staging import StagedTicket, Staging
from tierflow.swap.tickets import Done, Take, Ticket
from tierflow.swap.timeline import Timed


class HostLane:
    """HOST <-> DEVICE where both are ordinary memory: a copy made at once by the caller's thread.

    ``direct``: a file is read into DEVICE memory itself; False goes through HOST, as with an accelerator.
    """

    def __init__(self, direct: bool = True):
        self.direct = direct

    def fill(self, dst: torch.Tensor, src: torch.Tensor) -> Ticket:
        """Copies bytes of either tier to the device copy."""
        began = time.perf_counter()
        dst.copy_(src)
        return Done(began)

    def drain(self, dst: torch.Tensor, src: torch.Tensor, transient: bool = False, settled: bool = False) -> Ticket:
        """Copies device bytes to host memory."""
        began = time.perf_counter()
        dst.copy_(src)
        return Done(began)

    def drain_pieces(self, src: torch.Tensor, take: Take) -> Ticket:
        """Gives ``take`` the bytes where they are."""
        began = time.perf_counter()
        if src.numel():
            take(0, src.view(-1))
        return Done(began)

    def before_use(self, ticket: Ticket) -> Stretch | None:
        """Orders the compute after the ticket; returns how long the compute stands still for it, if it may."""
        return None

    def after_use(self) -> object | None:
        """Marks the end of what the compute was given so far."""
        return None

    def reuse_after(self, mark: object | None) -> None:
        """Orders later fills after the mark."""

    def stamp(self) -> Any:
        """The compute's place now, which ``stretch`` takes as its beginning."""
        return time.perf_counter()

    def stretch(self, begin: Any) -> Timed:
        """What the compute did from ``begin`` to now."""
        return Done(begin)

    def close(self) -> None:
        """Nothing is under way."""


#: How long an anchor serves.
ANCHOR_SECONDS = 60.0


class _Anchor:
    """An event whose time on the host's clock is known: what turns other events' distances from it into times."""

    def __init__(self, stream: torch.cuda.Stream):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(stream)
        self.event.synchronize()
        self.seconds = time.perf_counter()

    def time_of(self, event: torch.cuda.Event) -> float | None:
        """Seconds of ``time.perf_counter()`` at which the device reached the event, None if it has not."""
        return self.seconds + self.event.elapsed_time(event) / 1e3 if event.query() else None


class Stretch:
    """From one mark on a stream to another; both times are None until the device has got there."""

    def __init__(self, anchor: _Anchor, begin: torch.cuda.Event, end: torch.cuda.Event):
        self._anchor, self._begin, self._end = anchor, begin, end

    @property
    def began(self) -> float | None:
        return self._anchor.time_of(self._begin)

    @property
    def ended(self) -> float | None:
        return self._anchor.time_of(self._end)


class _CudaTicket:
    def __init__(self, times: Stretch, event: torch.cuda.Event, keep: torch.Tensor):
        self.times, self.event, self._keep = times, event, keep

    def done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()


class CudaLane:
    """HOST <-> DEVICE on a side stream each way; the compute stream waits on events, the host does not.

    [Note: reuse of device memory] Every write into memory that a pool leased is a ``fill`` on one stream (or one by value,
    which the host waits for), and before the first one into bytes that somebody else had, that stream waits for their
    last read. Where the end of the last use is known (a module has run and nothing else looks at the weights) a mark was
    set there. Elsewhere, as after a backward's use through an alias, it waits for all that the compute streams were given
    until the eviction: an alias that is gone by then was used by work that has been issued.
    """

    direct = False  # files are read into host memory

    def __init__(self, device: torch.device, staging: Arena):
        self.device = device
        self._fill = torch.cuda.Stream(device)
        self._drain = torch.cuda.Stream(device)
        self._staging_arena = staging
        self._staging: Staging | None = None
        self._compute: dict[int, torch.cuda.Stream] = {}
        self._clock = torch.cuda.Stream(device)
        self._last_anchor = _Anchor(self._clock)

    @property
    def _anchor(self) -> _Anchor:
        """A recent one: clocks drift apart, and distances are floats of milliseconds."""
        if time.perf_counter() - self._last_anchor.seconds > ANCHOR_SECONDS:
            self._last_anchor = _Anchor(self._clock)
        return self._last_anchor

    def _begin(self, stream: torch.cuda.Stream) -> tuple[_Anchor, torch.cuda.Event]:
        """The stream's place now, and an anchor that is before it."""
        return self._anchor, self._mark(stream)

    def _ticket(
        self, begin: tuple[_Anchor, torch.cuda.Event], stream: torch.cuda.Stream, keep: torch.Tensor
    ) -> _CudaTicket:
        end = self._mark(stream)
        return _CudaTicket(Stretch(*begin, end), end, keep)

    def _mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def stamp(self) -> Any:
        """The compute stream's place now, which ``stretch`` takes as its beginning."""
        return self._begin(self._now())

    def stretch(self, begin: Any) -> Stretch:
        """What the compute stream does from ``begin`` to what it was given last."""
        anchor, event = begin
        return Stretch(anchor, event, self._mark(self._now()))

    def fill(self, dst: torch.Tensor, src: torch.Tensor) -> Ticket:
        """Starts host or device -> device. The caller keeps both sides leased until the ticket is done."""
        with torch.cuda.stream(self._fill):
            begin = self._begin(self._fill)
            copy_pinned(dst, src)
            return self._ticket(begin, self._fill, src)

    def drain(self, dst: torch.Tensor, src: torch.Tensor, transient: bool = False, settled: bool = False) -> Ticket:
        """Starts device -> host, after what the compute stream was given so far.

        ``transient``: the source is of torch's allocator and may be dropped before the copy has run; else the
        caller keeps it leased until the ticket is done. ``settled``: the compute never writes there, and the tickets of
        those who do were waited for.
        """
        if not settled:
            self._drain.wait_stream(self._now())
        with torch.cuda.stream(self._drain):
            begin = self._begin(self._drain)
            copy_pinned(dst, src)
            if transient:  # not held by the ticket: the memory is free for others as soon as the copy has run
                src.record_stream(self._drain)
            return self._ticket(begin, self._drain, dst)

    def drain_pieces(self, src: torch.Tensor, take: Take) -> Ticket:
        """Carries a transient source through staging memory of fixed size; ``take`` gets its pieces in order.

        A piece is taken when its memory is needed again, by the thread that needs it, or when the ticket is waited
        for.
        """
        first = last = None
        flat = src.view(-1)
        staging = self._staging_ring()
        step = max(staging.piece_bytes // flat.itemsize, 1)
        for at in range(0, flat.numel(), step):
            part = flat[at : at + step]
            piece = staging.place(part.nbytes).view(part.dtype)
            last = staging.enter(self.drain(piece, part, transient=True), at, piece, take)
            first = first or last
        return Done(time.perf_counter()) if first is None or last is None else StagedTicket(staging, first, last)

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

    def before_use(self, ticket: Ticket) -> Stretch | None:
        """Makes the compute stream wait for the ticket without blocking the host; returns how long it stands still."""
        if not isinstance(ticket, _CudaTicket):
            return None
        begin = self.stamp()
        self._now().wait_event(ticket.event)
        return self.stretch(begin)

    def after_use(self) -> object | None:
        """An event behind everything the compute stream was given so far."""
        return self._now().record_event()

    def reuse_after(self, mark: object | None) -> None:
        """Fills given from now on run after the mark, or without one after all compute given so far.

        A mark is of one stream, the last that used the copy; others may have used it before.
        """
        if isinstance(mark, torch.cuda.Event) and len(self._compute) == 1:
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


def copy_pinned(dst: torch.Tensor, src: torch.Tensor) -> None:
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
