"""Lanes carry bytes between one pair of tiers, in order; they decide nothing."""

from __future__ import annotations

from typing import Protocol

import torch


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


class HostLane:
    """HOST <-> DEVICE where both are ordinary memory: a copy made at once by the caller's thread."""

    def fill(self, dst: torch.Tensor, src: torch.Tensor) -> Ticket:
        """Copies host bytes to the device copy."""
        dst.copy_(src)
        return Done()

    def drain(self, dst: torch.Tensor, src: torch.Tensor) -> Ticket:
        """Copies device bytes to host memory."""
        dst.copy_(src)
        return Done()

    def before_use(self, ticket: Ticket) -> None:
        """Orders the compute after the ticket."""

    def after_use(self) -> object | None:
        """Marks the end of what the compute was given so far."""
        return None

    def reuse_after(self, mark: object | None) -> None:
        """Orders later fills after the mark."""


class _CudaTicket:
    def __init__(self, event: torch.cuda.Event, keep: tuple[torch.Tensor, ...]):
        self.event, self._keep = event, keep

    def done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()


class CudaLane:
    """HOST <-> DEVICE on a side stream each way; the compute stream waits on events, the host does not.

    [Note: reuse of device memory] Every write into leased device memory is a ``fill`` on one stream. A victim's
    last use is marked on the compute stream when it is unpinned, and the fill stream waits for that mark when
    the victim is evicted. So whatever is leased from the freed bytes later is filled after the last read.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._fill = torch.cuda.Stream(device)
        self._drain = torch.cuda.Stream(device)

    def fill(self, dst: torch.Tensor, src: torch.Tensor) -> Ticket:
        """Starts host -> device."""
        with torch.cuda.stream(self._fill):
            dst.copy_(src, non_blocking=True)
            return _CudaTicket(self._fill.record_event(), (dst, src))

    def drain(self, dst: torch.Tensor, src: torch.Tensor) -> Ticket:
        """Starts device -> host, after what the compute stream was given so far."""
        self._drain.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._drain):
            dst.copy_(src, non_blocking=True)
            # the source may go back to torch's allocator before the copy has run
            src.record_stream(self._drain)
            return _CudaTicket(self._drain.record_event(), (dst, src))

    def before_use(self, ticket: Ticket) -> None:
        """Makes the compute stream wait for the ticket without blocking the host."""
        if isinstance(ticket, _CudaTicket):
            torch.cuda.current_stream(self.device).wait_event(ticket.event)

    def after_use(self) -> object | None:
        """An event behind everything the compute stream was given so far."""
        return torch.cuda.current_stream(self.device).record_event()

    def reuse_after(self, mark: object | None) -> None:
        """Fills given from now on run after the mark."""
        if isinstance(mark, torch.cuda.Event):
            self._fill.wait_event(mark)


DeviceLane = HostLane | CudaLane
