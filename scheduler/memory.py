"""Arenas, pools and lanes as a plan asks for them."""

from __future__ import annotations

import logging
from typing import Any

import torch

from tierflow.scheduler.placement import MemoryPlan
from tierflow.swap import Arena, CudaArena, CudaLane, DebugMemory, HostLane, Pool, Tier, TierPools
from tierflow.swap.lanes import DeviceLane

log = logging.getLogger("tierflow")

#: cudaHostRegister takes this much at a time.
REGISTER_BYTES = 1 << 30


def make_lane(device: torch.device) -> DeviceLane:
    """The lane between HOST and DEVICE."""
    return HostLane() if device.type == "cpu" else CudaLane(device)


def make_pools(plan: MemoryPlan, device: torch.device, debug: DebugMemory | None) -> dict[Tier, TierPools]:
    """One arena a memory tier, of exactly the plan's size, cut into what stays and what comes and goes."""
    pools = {}
    for tier in (Tier.DEVICE, Tier.HOST):
        on_gpu = tier is Tier.DEVICE and device.type != "cpu"
        arena: Any = CudaArena(plan.total(tier), device) if on_gpu else Arena(plan.total(tier))
        if tier is Tier.HOST and device.type != "cpu":
            register(arena)
        stay = plan.resident_bytes(tier)
        pools[tier] = TierPools(
            Pool(f"{tier.value} (resident)", arena, 0, stay),
            Pool(f"{tier.value} (working)", arena, stay, plan.working[tier], debug),
        )
    return pools


def register(arena: Arena) -> str | None:
    """Pins the arena for DMA, in chunks; on refusal undoes it and says once that transfers are staged by the driver."""
    cudart = torch.cuda.cudart()
    done: list[int] = []
    for begin in range(0, arena.nbytes, REGISTER_BYTES):
        size = min(REGISTER_BYTES, arena.nbytes - begin)
        code = cudart.cudaHostRegister(arena.address + begin, size, 0)
        if int(code) != 0:
            for address in done:
                cudart.cudaHostUnregister(address)
            note = f"cudaHostRegister refused ({code}): host memory stays unpinned and copies to the device are slower"
            log.warning(note)
            return note
        done.append(arena.address + begin)
    arena.on_close(lambda: [cudart.cudaHostUnregister(a) for a in done])
    return None
