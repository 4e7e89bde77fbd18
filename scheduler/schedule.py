"""The schedule as text: what a step uses in order, what comes up when, what gives way, what is updated and written."""

from __future__ import annotations

from collections.abc import Iterator

from tierflow.scheduler.cache import Cache, Use
from tierflow.scheduler.lookahead import LookAhead
from tierflow.scheduler.plan import MemoryPlan
from tierflow.scheduler.trace import Trace
from tierflow.scheduler.units import STATES, Unit
from tierflow.swap import Kind, Tier


def schedule_text(units: list[Unit], plan: MemoryPlan, order: list[int], prefetch: bool, ahead: LookAhead) -> str:
    """A line for each use of a steady step. The same inputs give the same text; what the live engine drops also depends on
    which copies are in use just then.

    ``ahead`` knows how many uses before its own each transfer starts, once a step of this order was seen.
    """
    cache = Cache(plan.working[Tier.DEVICE], plan.homes.streamed(units))
    leads = ahead.leads if len(ahead.leads) == len(order) else None
    head = f"{'use':>4}  {'unit':32}{'weights':>9}{'MB':>9}{'starts':>8}  what comes, goes, is updated"
    seen: set[int] = set()
    lines = [head]
    for at, use in enumerate(cache.uses(Trace(order), prefetch)):
        unit = units[use.unit]
        home = plan.homes.of(unit, Kind.PARAM)
        starts = "" if home is Tier.DEVICE else "on use" if not prefetch else f"-{leads[at]}" if leads else "ahead"
        what = "; ".join(_events(units, plan, use, first=use.unit not in seen))
        seen.add(use.unit)
        lines.append(f"{at:>4}  {unit.label[-32:]:32}{home.name:>9}{unit.chunk.nbytes / 1e6:>9.2f}{starts:>8}  {what}".rstrip())
    return "\n".join(lines)


def _events(units: list[Unit], plan: MemoryPlan, use: Use, first: bool) -> Iterator[str]:
    unit = units[use.unit]
    if first and unit.trainable:
        written = sum(plan.homes.bytes_in(unit, kind, Tier.NVME) for kind in (Kind.PARAM, *STATES) if kind in unit.chunks)
        yield f"updated before, {written / 1e6:.2f} MB to NVMe behind it" if written else "updated before"
    if use.fetched:
        yield "brings " + ", ".join(units[i].label for i in use.fetched)
    if use.dropped:
        yield "drops " + ", ".join(units[i].label for i in use.dropped)
