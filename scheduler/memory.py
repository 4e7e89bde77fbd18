"""Arenas, pools and lanes as a plan asks for them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch

from tierflow import aio
from tierflow.scheduler.plan import MemoryPlan
from tierflow.swap import Arena, CudaArena, CudaLane, DebugMemory, HostLane, Ledger, Manager, Pool, Tier, TierPools
from tierflow.swap.arena import REGISTER_BYTES
from tierflow.swap.lanes import DeviceLane

log = logging.getLogger("tierflow")

#: Host memory through which gradients pass that are added to what is there, or change their dtype on the way.
STAGING_BYTES = 32 << 20

_said: set[str] = set()


def build_manager(
    plan: MemoryPlan, device: torch.device, nvme_path: str | Sequence[str] | None, aio_options: dict[str, Any],
    debug: DebugMemory | None = None,
) -> Manager:
    """Allocates the arenas and the store exactly as the plan says. Raises OSError naming the path."""
    store = None
    if plan.total(Tier.NVME):
        assert nvme_path is not None
        store = aio.open(nvme_path, plan.total(Tier.NVME), **aio_options)
    budgets = {t: plan.total(t) for t in Tier}
    try:
        pools = make_pools(plan, device, debug)
        return Manager(Ledger(budgets), pools, store, make_lane(device, debug))
    except BaseException:
        if store is not None:
            store.close()
        raise


def make_lane(device: torch.device, debug: DebugMemory | None = None) -> DeviceLane:
    """The lane between HOST and DEVICE."""
    if device.type == "cpu":
        return HostLane(direct=debug is None or not debug.through_host)
    staging = Arena(STAGING_BYTES)
    register(staging, device)
    return CudaLane(device, staging)


def make_pools(plan: MemoryPlan, device: torch.device, debug: DebugMemory | None) -> dict[Tier, TierPools]:
    """One arena a memory tier, of exactly the plan's size, cut into what stays and what comes and goes."""
    pools = {}
    for tier in (Tier.DEVICE, Tier.HOST):
        on_gpu = tier is Tier.DEVICE and device.type != "cpu"
        nbytes = plan.resident_bytes(tier) + plan.working[tier]
        arena: Any = CudaArena(nbytes, device) if on_gpu else Arena(nbytes)
        if tier is Tier.HOST and device.type != "cpu":
            register(arena, device)
        stay = plan.resident_bytes(tier)
        pools[tier] = TierPools(
            Pool(f"{tier.value} (resident)", arena, 0, stay),
            Pool(f"{tier.value} (working)", arena, stay, plan.working[tier], debug),
        )
    return pools


def register(arena: Arena, device: torch.device, cudart: Any = None) -> str | None:
    """Pins the arena for DMA, a piece at a time; what was pinned is undone if the driver refuses one.

    Unpinned memory works too: the driver then stages every copy, and the host waits for those to it. That is
    returned, and said once.
    """
    cudart = cudart or torch.cuda.cudart()
    done: list[int] = []
    begin, end = arena.address, arena.address + arena.nbytes
    with torch.cuda.device(device):
        while begin < end:
            size = min(REGISTER_BYTES - begin % REGISTER_BYTES, end - begin)
            code = int(cudart.cudaHostRegister(begin, size, 0))
            if code != 0:
                _unregister(cudart, done)
                _forget_error(device)
                return _refused(code)
            done.append(begin)
            begin += size

    def release() -> None:
        if done and torch.cuda.is_initialized():  # the device may be at work there
            torch.cuda.synchronize(device)
        _unregister(cudart, done)

    arena.on_close(release)  # else the driver would keep these pages for whoever gets the addresses next
    return None


def _unregister(cudart: Any, addresses: list[int]) -> None:
    while addresses:
        cudart.cudaHostUnregister(addresses.pop())


def _forget_error(device: torch.device) -> None:
    """The driver reports a refused call a second time, at the next kernel's launch: let that be this one."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


def _refused(code: int) -> str:
    note = (
        f"cudaHostRegister refused (error {code}): host memory stays unpinned, so copies to and from the device are "
        "slower and not overlapped; raise `ulimit -l`, or lower tierflow.host_memory"
    )
    if note not in _said:
        _said.add(note)
        log.warning(note)
    return note
