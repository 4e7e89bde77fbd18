"""The order of a step's micro-batches: one after the other, or in turns at every unit (scheduler/rotation.py)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from tierflow import machine
from tierflow.config_models import TierflowBlock
from tierflow.scheduler.activations import Gauge
from tierflow.scheduler.ambient import DrawProbe, not_carried
from tierflow.scheduler.engine import Engine
from tierflow.scheduler.rotation import Job, Rotation
from tierflow.scheduler.traffic import default_order, estimate
from tierflow.scheduler.units import Unit
from tierflow.sizes import format_size as size
from tierflow.swap import Tier

log = logging.getLogger("tierflow")

Order = Literal["layer_major", "micro_batch"]

#: Bytes that a waiting micro-batch may take for each byte of activations: the C allocator of the host keeps gaps
#: (197 MB of activations were seen to take 435 MB), the device's hardly any.
HOST_SLACK, DEVICE_SLACK = 2.0, 1.2
#: Of what is free, the share that waiting activations may take.
SHARE = 0.8
#: Without an accelerator taking turns costs the processor time (threads, and caches that the others have emptied: a
#: quarter of the step was seen). It pays where at least this share of the plain order is waits for fetches.
WORTH_TURNS = 0.3


@dataclass(frozen=True)
class Choice:
    """How micro-batches run: ``at_once`` of them take turns (1: one after the other), and why."""

    order: Order
    at_once: int
    why: str

    def __str__(self) -> str:
        turns = f", {self.at_once} micro-batches in turns" if self.at_once > 1 else ""
        return f"accumulation: {self.order}{turns} ({self.why})"


@dataclass(frozen=True)
class Learned:
    """What a step in the plain order showed: bytes that one micro-batch leaves for its backward, of how many
    bytes of input, and whether random numbers were drawn."""

    activations: int
    inputs: int
    drew: bool
    waited: float  # share of the time that went into waits for fetches


class Accumulation:
    """Runs the micro-batches of each step in the order that the config names, or in the one that serves best.

    The first step runs in the plain order: it shows how often each gradient is delivered, what a micro-batch
    leaves in memory, and whether random numbers are drawn. So does a step with larger inputs than any before.
    """

    def __init__(self, engine: Engine, block: TierflowBlock):
        self._engine, self._wanted, self._prefetch = engine, block.accumulation, block.prefetch
        self._immediate = block.update == "immediate"
        self._rotation = Rotation(engine)
        self._learned: Learned | None = None
        self._count = 0
        self._said: set[str] = set()
        self.choice: Choice | None = None  # None: not made yet

    def close(self) -> None:
        """Takes the hooks off the parameters."""
        self._rotation.close()

    def phase(self, name: str) -> None:
        """The running micro-batch says whether it is in its "forward" or "backward"."""
        self._rotation.phase(name)

    def run(self, jobs: Sequence[Job], inputs: int, observer: Callable[[str | None], None] | None) -> list[Any]:
        """Runs every job (a micro-batch's forward and backward); returns what they returned, in order.

        ``inputs``: bytes of the largest micro-batch, 0 if unknown. Raises what a job raised.
        """
        fixed = self._fixed(len(jobs))
        if fixed is not None:
            self._choose(fixed, len(jobs))
            return self._rotation.run(jobs, 1, observer)
        if self._learned is None or self._count != len(jobs) or inputs > self._learned.inputs:
            return self._run_learning(jobs, inputs, observer)
        missing = not_carried()
        if missing is not None:
            self._say(f"{missing} is active around train_batch and would be missing in the threads of layer-major "
                      "order: micro-batches run one after the other")  # fmt: skip
        assert self.choice is not None
        results = self._rotation.run(jobs, 1 if missing else self.choice.at_once, observer)
        if self._rotation.drew and self._wanted == "auto":
            self._learned = replace(self._learned, drew=True)
            self._choose(self._auto(len(jobs)), len(jobs))
        return results

    def _run_learning(
        self, jobs: Sequence[Job], inputs: int, observer: Callable[[str | None], None] | None
    ) -> list[Any]:
        hooks, gauge, probe = self._engine.hooks, Gauge(), DrawProbe(self._engine.device)
        assert hooks is not None
        hooks.gauge = gauge
        began, waited = time.perf_counter(), self._engine.manager.traffic.wait_read
        try:
            results = self._rotation.run(jobs, 1, observer)
        finally:
            hooks.gauge = None
        share = (self._engine.manager.traffic.wait_read - waited) / (time.perf_counter() - began)
        self._learned, self._count = Learned(gauge.nbytes, inputs, probe.drew(), share), len(jobs)
        self._choose(self._auto(len(jobs)), len(jobs))
        return results

    # ---- the choice

    def _fixed(self, count: int) -> Choice | None:
        """The plain order where nothing else can be."""
        if self._wanted == "micro_batch":
            return Choice("micro_batch", 1, "as the config says")
        if count == 1:
            return Choice("micro_batch", 1, "one micro-batch makes a step")
        if not self._engine.plan.homes.streamed(self._engine.units):
            return Choice("micro_batch", 1, "weights stay on the device, nothing is fetched")
        return None

    def _auto(self, count: int) -> Choice:
        assert self._learned is not None
        one, free = self._learned.activations + tied_gradients(self._engine.units), self._free()
        at_once = fitting(count, one, free, DEVICE_SLACK if self._engine.device.type == "cuda" else HOST_SLACK)
        room = f"each that waits takes {size(one)}, {size(free)} are free"
        if self._wanted == "layer_major":
            return Choice("layer_major", max(at_once, 2), f"as the config says; {room}")
        if self._learned.drew:
            return Choice("micro_batch", 1, "the model draws random numbers, which another order would change")
        weights = sum(u.chunk.nbytes for u in self._engine.plan.homes.streamed(self._engine.units))
        if weights <= self._engine.plan.working[Tier.DEVICE]:
            return Choice("micro_batch", 1, "tierflow.device_memory caches all weights between micro-batches")
        if self._engine.device.type == "cpu" and self._learned.waited < WORTH_TURNS:
            waited = f"only {self._learned.waited:.0%} of the time are waits for fetches"
            return Choice("micro_batch", 1, f"{waited}, and turns would cost the processor more")
        if at_once < 2:
            return Choice("micro_batch", 1, f"two at once do not fit: {room}")
        return Choice("layer_major", at_once, f"a fetched unit serves {at_once} of {count}; {room}")

    def _free(self) -> int:
        device = self._engine.device
        if device.type != "cuda":
            return machine.mem_available()
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept

    def _choose(self, choice: Choice, count: int) -> None:
        if self.choice == choice:
            return
        self.choice = choice
        self._plan_traffic(math.ceil(count / choice.at_once))
        self._say(str(choice))

    def _plan_traffic(self, passes: int) -> None:
        """The plan's NVMe bytes for a step in which every unit is used in ``passes`` passes."""
        engine = self._engine
        order = default_order(engine.model, engine.units)
        read, written = estimate(engine.units, engine.plan, order, self._prefetch, self._immediate, passes)
        engine.plan = replace(engine.plan, nvme_read=read, nvme_written=written)

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            log.info(line)


def tied_gradients(units: list[Unit]) -> int:
    """Bytes that autograd holds in each backward between the first and the last use of tied weights."""
    tied = ((u, s) for u in units if u.trainable for s in u.slots if len(s.names) > 1)
    return sum(s.numel * u.dtype.itemsize for u, s in tied)


def fitting(count: int, one: int, free: int, slack: float) -> int:
    """How many of ``count`` micro-batches to run at once, each leaving ``one`` bytes, so that those that wait fit
    ``free``; in groups as equal as can be, since fewer at once than possible may need no more passes."""
    waiting = int(free * SHARE / (one * slack)) if one else count
    most = min(count, 1 + waiting)
    return math.ceil(count / math.ceil(count / most))
