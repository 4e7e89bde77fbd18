"""NVMe bytes of one optimizer step, by running the caching rule over an order of use without moving bytes."""

from __future__ import annotations

from torch import nn

from tierflow.scheduler.cache import Cache
from tierflow.scheduler.plan import MemoryPlan
from tierflow.scheduler.trace import Trace
from tierflow.scheduler.units import STATES, Unit, module_units
from tierflow.swap import Kind, Tier, paged_bytes


def estimate(
    units: list[Unit], plan: MemoryPlan, order: list[int], prefetch: bool = True, immediate: bool = False, passes: int = 1
) -> tuple[int, int]:
    """(read, written) NVMe bytes of one steady step with the given order of use, ``passes`` times over.

    ``immediate``: the update runs at the step, and reads the weights that no copy is left of for itself.
    """
    streamed = {u.index: plan.homes.bytes_in(u, Kind.PARAM, Tier.NVME) for u in plan.homes.from_nvme(units)}
    left, fetched = Cache(plan.working[Tier.DEVICE], plan.homes.streamed(units)).passes(Trace(order * passes), prefetch)
    read = sum(streamed.get(i, 0) for i in fetched)
    written = 0
    for unit in units:
        if not unit.trainable:
            continue
        states = sum(plan.homes.bytes_in(unit, kind, Tier.NVME) for kind in STATES if kind in unit.chunks)
        weights = streamed.get(unit.index, 0)
        read += states + (weights if immediate and unit.index not in left else 0)
        written += states + weights
    read_back, spilled = _gradients(units, plan, order, passes)
    return read + read_back, written + spilled


def _gradients(units: list[Unit], plan: MemoryPlan, order: list[int], passes: int) -> tuple[int, int]:
    """(read, written) bytes of gradients that live on NVMe, by the rule of their window over ``passes`` backwards.

    The gradient of a weight that is used twice is there when its first use was differentiated.
    """
    spilled = plan.homes.spilled(units)
    sizes = {u.index: plan.homes.bytes_in(u, Kind.GRAD, Tier.NVME) for u in spilled}
    memory = {u.index: paged_bytes(u.chunks[Kind.GRAD].nbytes) for u in spilled}
    here, changed = list[int](), set[int]()
    read = written = 0

    def free() -> int:
        return plan.window - sum(memory[i] for i in here)

    def write(unit: int) -> int:
        nbytes = sizes[unit] if unit in changed else 0
        changed.discard(unit)
        return nbytes

    arriving = [i for i in reversed(list(dict.fromkeys(order))) if i in sizes]
    for at, unit in enumerate(arriving * passes):
        if unit in here:
            here.remove(unit)
        else:
            while free() < memory[unit]:
                written += write(here.pop(0))
            read += sizes[unit] if at >= len(arriving) else 0
        here.append(unit)
        changed.add(unit)
        if free() < max(memory.values()) and here[0] != unit:
            written += write(here[0])
    return read + sum(sizes[i] for i in sizes if i not in here), written


def default_order(model: nn.Module, units: list[Unit]) -> list[int]:
    """The order of use that is assumed before one is seen: modules as registered, then back.

    The backward of an embedding does not look at its weight.
    """
    forward, backward = list[int](), list[int]()
    for module, needed in module_units(model, units).items():
        indices = [u.index for u in needed]
        forward += indices
        if not isinstance(module, nn.Embedding):
            backward += indices
    order = forward + backward[::-1]
    return [u for i, u in enumerate(order) if i == 0 or order[i - 1] != u]
