"""What each step took, and what the tiers held over time."""

from __future__ import annotations

import resource
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from tierflow.scheduler.engine import Engine
from tierflow.scheduler.report import Report
from tierflow.swap import Lanes, Tier

#: Occupancy is noted at most this often (seconds): a plot has no more points than it can show.
SAMPLE_SECONDS = 0.05
#: Steps that a report leaves out: the order of use is learned, and memory is touched for the first time.
WARM_UP = 2


@dataclass
class StepRecord:
    """One optimizer step. Times in seconds, NVMe in bytes. ``loss_scale``: the loss was multiplied by it (fp16)."""

    step: int
    loss: float
    lr: float
    tokens: int
    grad_norm: float
    forward: float
    backward: float
    update: float
    waiting: float
    nvme_read: int
    nvme_written: int
    seconds: float
    loss_scale: float | None = None
    skipped: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens a second."""
        return self.tokens / self.seconds

    def line(self, total: int) -> str:
        """One line for the terminal."""
        scale = "" if self.loss_scale is None else f"  scale {self.loss_scale:g}"
        if self.skipped:
            scale += "  SKIPPED: a gradient overflowed"
        return (
            f"step {self.step + 1:>4}/{total}  loss {self.loss:7.4f}  {self.tokens_per_second:6.0f} tok/s  "
            f"fwd {self.forward:5.2f}  bwd {self.backward:5.2f}  upd {self.update:5.2f}  wait {self.waiting:5.2f} s  "
            f"NVMe {self.nvme_read / 1e9:5.2f}+{self.nvme_written / 1e9:4.2f} GB{scale}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class Meter:
    """Splits a step's time into its phases and samples occupancy whenever memory changes hands."""

    engine: Engine
    start: float = field(default_factory=time.perf_counter)
    seconds: list[float] = field(default_factory=list)
    held: dict[Tier, list[int]] = field(default_factory=lambda: {t: [] for t in Tier})
    _phases: dict[str, float] = field(default_factory=dict)
    _steps: int = 0
    _lanes: Lanes | None = None  # summed over the steps after the warm-up
    _running: str | None = None
    _since: float = 0.0

    def __post_init__(self) -> None:
        self.engine.manager.observer = self.sample
        self.sample()

    def sample(self) -> None:
        """Notes what every tier holds now."""
        now = time.perf_counter() - self.start
        if self.seconds and now - self.seconds[-1] < SAMPLE_SECONDS:
            return
        self.seconds.append(now)
        for tier in Tier:
            self.held[tier].append(self.engine.manager.ledger.held(tier))

    def enter(self, phase: str | None) -> None:
        """From now on time counts for this phase of the step, or for none."""
        now = time.perf_counter()
        if self._running is not None:
            self._phases[self._running] = self._phases.get(self._running, 0.0) + now - self._since
        self._running, self._since = phase, now

    def end_step(self, step: int, loss: float, lr: float, tokens: int, grad_norm: float) -> StepRecord:
        """The record of the step that just ended."""
        report, phases = self.engine.take_report(), self._phases
        self._phases = {}
        moved = report.traffic
        self._count_lanes()
        forward, backward, update = (phases.get(n, 0.0) for n in ("forward", "backward", "update"))
        return StepRecord(
            step, loss, lr, tokens, grad_norm, forward, backward, update, moved.wait_read + moved.wait_write,
            moved.nvme_read, moved.nvme_written, sum(phases.values()),
        )  # fmt: skip


    def _count_lanes(self) -> None:
        self._steps += 1
        last = self.engine.last_step
        if self._steps > WARM_UP and last is not None:
            self._lanes = last if self._lanes is None else self._lanes + last

    def report(self) -> Report:
        """Where the time of a mean step went, the first WARM_UP left out; of the last step if there were no more."""
        if self._lanes is None:
            return self.engine.report()
        count = self._steps - WARM_UP
        return self.engine.report(self._lanes / count, count)


def peak_rss() -> int:
    """The process's peak resident bytes so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
