"""Where a step's time went, which resource bounds it, and what would help most."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tierflow.scheduler.floor import ACCELERATOR, DRIVE, PROCESSOR, Floor, Work, floor
from tierflow.scheduler.plan import MemoryPlan
from tierflow.scheduler.rates import Bandwidths
from tierflow.scheduler.units import STATES
from tierflow.swap import Kind, Lane, Lanes, Tier

#: A step this close to its floor is bound by that resource; above it, by what it waits for.
CLOSE = 1.15


@dataclass(frozen=True)
class Report:
    """A mean step. ``lanes`` holds its busy seconds, bytes and waits; ``floor`` what each resource needs at least.

    ``steps``: how many steps it is the mean of. ``advice``: one sentence on what would help most. ``notes``: further lines.
    """

    steps: int
    lanes: Lanes
    floor: Floor
    advice: str
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Wall time of the step."""
        return self.lanes.seconds

    @property
    def ratio(self) -> float:
        """The step's time over its floor."""
        return self.seconds / self.floor.seconds if self.floor.seconds else math.inf

    @property
    def elsewhere(self) -> float:
        """Seconds in which no thread was in a lane or waited for one: the loop, the data, the norm, Python."""
        return self.seconds - self.lanes.noted

    def text(self) -> str:
        """The table, a line for each lane and each resource."""
        mean = f" (mean of {self.steps} steps)" if self.steps > 1 else ""
        lines = [
            f"step {self.seconds:.3f} s{mean}, floor {self.floor.seconds:.3f} s by the {self.floor.bound}: "
            f"{self.ratio:.2f} times its floor",
            f"{'lane':18}{'busy s':>9}{'of step':>9}{'GB':>9}{'GB/s':>8}{'waited s':>10}",
        ]
        for lane in Lane:
            busy, nbytes, waited = self.lanes.busy[lane], self.lanes.nbytes[lane], self.lanes.waiting[lane]
            if not nbytes and max(busy, waited) < 0.0005:
                continue
            rate = f"{nbytes / busy / 1e9:8.2f}" if nbytes and busy else " " * 8
            moved = f"{nbytes / 1e9:9.3f}" if nbytes else " " * 9
            lines.append(f"{lane.value:18}{busy:9.3f}{busy / self.seconds:9.1%}{moved}{rate}{waited:10.3f}")
        lines.append(f"{'elsewhere':18}{self.elsewhere:9.3f}{self.elsewhere / self.seconds:9.1%}")
        for name, seconds in self.floor.resources.items():
            lines.append(f"floor: {name:18}{seconds:9.3f} s{'  <- bounds' if name == self.floor.bound else ''}")
        lines.append(f"what would help most: {self.advice}")
        lines += self.notes
        return "\n".join(lines)

    __str__ = text


def make_report(lanes: Lanes, plan: MemoryPlan, rates: Bandwidths, trained: int, steps: int = 1) -> Report:
    """The report of a step, or of the mean of ``steps``. ``trained``: elements that one update goes through."""
    placement = plan.placement
    work = Work(
        lanes.busy[Lane.COMPUTE], trained, lanes.nbytes[Lane.INTAKE], lanes.nbytes[Lane.READ],
        lanes.nbytes[Lane.WRITE], lanes.nbytes[Lane.TO_DEVICE], lanes.nbytes[Lane.TO_HOST],
    )  # fmt: skip
    found = floor(work, rates, not placement.device_is_host, placement.optimizer is Tier.DEVICE)
    return Report(steps, lanes, found, advise(lanes, found, plan))


def advise(lanes: Lanes, found: Floor, plan: MemoryPlan) -> str:
    """One sentence that follows from the numbers."""
    if found.bound == DRIVE:
        return _about_the_drive(lanes, found, plan)
    if lanes.seconds > CLOSE * found.seconds and lanes.waited > (CLOSE - 1) * found.seconds:
        return _about_waits(lanes, found)
    if found.bound == PROCESSOR:
        return _about_the_processor(lanes, found)
    return (
        f"the {found.bound} needs {found.seconds:.3f} s of the step and everything else at most {found.second:.3f} s, "
        "so other placements of the state would not make it faster"
    )


def _about_the_drive(lanes: Lanes, found: Floor, plan: MemoryPlan) -> str:
    states = sum(n for (tier, kind), n in plan.resident.items() if tier is Tier.NVME and kind in STATES)
    need = states or plan.resident.get((Tier.NVME, Kind.PARAM), 0)
    what = "optimizer states" if states else "weights"
    spare = plan.caps.machine.get(Tier.HOST, 0) - plan.total(Tier.HOST)
    if plan.placement.device_is_host:
        spare -= plan.total(Tier.DEVICE)
    head = f"the drive bounds the step with {found.seconds:.3f} s, everything else needs at most {found.second:.3f} s; "
    if need <= spare:
        return (
            f"{head}{_size(need)} more host_memory would keep the {what} off it, and the machine "
            f"had {_size(spare)} beside the plan"
        )
    head += f"the {what} on it take {_size(need)}, more than the {_size(max(spare, 0))} that the machine had beside the plan"
    compute = lanes.busy[Lane.COMPUTE]
    if not compute:
        return head
    rest = found.resources[PROCESSOR] - compute if ACCELERATOR not in found.resources else 0.0
    times = math.ceil(10 * max(found.seconds - rest, compute) / compute) / 10
    return f"{head}, but larger micro-batches add no traffic there, and {times:.1f} times the tokens would hide what there is"


def _about_waits(lanes: Lanes, found: Floor) -> str:
    lane = max(Lane, key=lambda one: lanes.waiting[one])
    return (
        f"{lanes.waited:.3f} s of the step are waits, {lanes.waiting[lane]:.3f} s of them for {lane.value}, although "
        f"no resource needs more than {found.seconds:.3f} s: these transfers have to start earlier, and nothing need be "
        "faster"
    )


def _about_the_processor(lanes: Lanes, found: Floor) -> str:
    own = (Lane.COMPUTE, Lane.INTAKE, Lane.UPDATE)
    lane = max(own, key=lambda one: lanes.busy[one])
    return (
        f"the processor bounds the step and {lane.value} is {lanes.busy[lane] / lanes.seconds:.0%} of it; faster drives "
        f"or more memory would save at most {max(lanes.seconds - found.seconds, 0.0):.3f} s"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.0f} MB"
