"""How far ahead of its use each unit is brought up: bandwidth times time.

A link carries units one after the other, in order of use. So the last of them must start its transfer's time before its
use, the one before it early enough to be done then, and so on back; what the compute takes between two uses is known
from the step before, and so are the rates. Where the links are slower than the compute this leads ever further back,
and memory is what ends it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tierflow.scheduler.placement import AHEAD
from tierflow.scheduler.plan import MemoryPlan
from tierflow.scheduler.trace import Trace
from tierflow.scheduler.units import Unit
from tierflow.swap import Kind, Lane, Lanes, Tier

#: A transfer is given so many times its time: rates and compute vary from step to step.
MARGIN = 2.0
#: Seconds from a request to its first byte, whatever its size.
LATENCY = 1e-3
#: Fewer fetches than this never keep a link busy: one ends while nobody looks.
AT_LEAST = 2


def leads(seconds: Sequence[float], transfers: Sequence[float]) -> list[int]:
    """Per position of a cyclic order of use: how many uses before its own its transfer is to start.

    ``seconds``: of compute from the position's use to the next one; ``transfers``: seconds that bringing its unit up takes,
    0 where it is there for good. At most a whole round.
    """
    count = len(seconds)
    begins = [0.0]
    for second in list(seconds) * 3:
        begins.append(begins[-1] + second)
    found = [0] * count
    start = begins[-1]
    for at in range(3 * count - 1, count - 1, -1):
        start = min(start, begins[at]) - transfers[at % count]
        if at < 2 * count:
            ahead = at
            while ahead > at - count + 1 and begins[ahead] > start:
                ahead -= 1
            found[at % count] = at - ahead
    return found


class LookAhead:
    """What is to be on its way now. Until a step was seen, and in another order than its, AHEAD units."""

    def __init__(self, units: list[Unit], plan: MemoryPlan):
        self._units = units
        self._routes = [_route(plan, unit) for unit in units]
        self._trace: Trace | None = None
        self.leads: list[int] = []
        self.in_flight = 0  # bytes that keep the links busy from one use to the next

    def learn(self, trace: Trace, lanes: Lanes) -> None:
        """Takes over the times of the step whose order the trace is."""
        rates = {lane: lanes.nbytes[lane] / lanes.busy[lane] for lane in Lane if lanes.busy[lane] and lanes.nbytes[lane]}
        if not trace.order or not rates:
            return
        times = Counter(trace.order)
        each = {i: lanes.computed.get(self._units[i].label, 0.0) / times[i] for i in times}
        transfers = {
            i: sum(MARGIN * self._units[i].chunk.nbytes / rates[lane] + LATENCY for lane in self._routes[i] if lane in rates)
            for i in times
        }
        self._trace = trace
        self.leads = leads([each[i] for i in trace.order], [transfers[i] for i in trace.order])
        self.in_flight = int(MARGIN * max(each.values()) * max(rates.values()))

    def due(self, trace: Trace) -> Iterator[int]:
        """Units that are to be there or on their way now, in order of use."""
        known = trace is self._trace
        for ahead, unit in enumerate(trace.upcoming(len(trace.order) if known else 2 * AHEAD), 1):
            if known and self.leads[(trace.cursor + ahead) % len(trace.order)] < ahead:
                return
            yield unit

    def enough(self, trace: Trace, fetches: int, nbytes: int) -> bool:
        """Whether no more need be on its way than there is."""
        return fetches >= AHEAD if trace is not self._trace else fetches >= AT_LEAST and nbytes >= self.in_flight


def _route(plan: MemoryPlan, unit: Unit) -> list[Lane]:
    """The lanes by which the unit's weights come to DEVICE."""
    home = plan.homes.of(unit, Kind.PARAM)
    if home is Tier.DEVICE:
        return []
    if home is Tier.HOST:
        return [Lane.TO_DEVICE]
    return [Lane.READ] if plan.placement.direct else [Lane.READ, Lane.TO_DEVICE]
