"""The least time that a step can take: what its slowest resource needs. Arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from tierflow.scheduler.rates import Bandwidths

PROCESSOR, ACCELERATOR, DRIVE = "processor", "accelerator", "drive"
TO_DEVICE, TO_HOST = "host to device", "device to host"


@dataclass(frozen=True)
class Work:
    """What one step has to do: ``compute`` in seconds, ``updated`` in elements, everything else in bytes."""

    compute: float = 0.0
    updated: int = 0
    intake: int = 0
    read: int = 0
    written: int = 0
    to_device: int = 0
    to_host: int = 0


@dataclass(frozen=True)
class Floor:
    """Seconds that each resource needs by itself. The step cannot be faster than the slowest of them."""

    resources: dict[str, float]

    @property
    def bound(self) -> str:
        """The resource that needs longest; the first of equals."""
        return max(self.resources, key=lambda name: self.resources[name])

    @property
    def seconds(self) -> float:
        """What that one needs."""
        return self.resources[self.bound]

    @property
    def second(self) -> float:
        """What the slowest of the others needs."""
        return max((s for name, s in self.resources.items() if name != self.bound), default=0.0)


def floor(work: Work, rates: Bandwidths, accelerator: bool, update_on_device: bool = False) -> Floor:
    """The floor of a step.

    Without an ``accelerator`` forward, backward, gradients' intake, the update's kernels and copies between HOST and
    DEVICE share the processor and add up. With one, each is another resource's; ``update_on_device`` says whose the
    update's kernels are.
    """
    update = work.updated / rates.update
    intake = work.intake / rates.intake
    up, down = work.to_device / rates.to_device, work.to_host / rates.to_host
    drive = drive_seconds(work.read, work.written, rates)
    if not accelerator:
        return Floor({PROCESSOR: work.compute + intake + update + up + down, DRIVE: drive})
    on_device = update if update_on_device else 0.0
    return Floor(
        {
            ACCELERATOR: work.compute + on_device,
            PROCESSOR: intake + update - on_device,
            DRIVE: drive,
            TO_DEVICE: up,
            TO_HOST: down,
        }
    )


def drive_seconds(read: int, written: int, rates: Bandwidths) -> float:
    """Seconds for these bytes: both kinds at once until one is through and the rest alone, or one after the other.

    The faster of the two ways counts, for a step is free to choose either.
    """
    apart = read / rates.read + written / rates.write
    both = min(read / rates.mixed_read, written / rates.mixed_write)
    rest_read = max(read - both * rates.mixed_read, 0.0) / rates.read
    rest_written = max(written - both * rates.mixed_write, 0.0) / rates.write
    return min(apart, both + rest_read + rest_written)
