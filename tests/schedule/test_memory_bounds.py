"""How much memory is taken, in closed form, and that nothing of it grows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from outcome import Stack

import tierflow
from tierflow.swap import DebugMemory, Tier

BLOCK = 4096
LAYERS, WIDTH = 6, 64
NUMEL = 6144  #: of a layer: 64 * 64 + 64 elements, padded so that 2 bytes an element are whole blocks
UNIT = 4 * NUMEL
AHEAD = 2  #: units for which room is planned ahead of use
STATES = 2 * UNIT  #: two moments


def make(path: Path, update: str, through_host: bool = False, **caps: Any) -> tuple[Stack, Any]:
    model = Stack(LAYERS, WIDTH)
    debug = DebugMemory(random.Random(1), through_host)
    config = tiny.config("everything", path, update=update, **{name: str(n) for name, n in caps.items()})
    _, optimizer = tierflow.offload(model, config, owned_loop=update == "speculative", debug_memory=debug)
    return model, optimizer


def step(model: Stack, optimizer: Any, number: int, halved: bool = False) -> None:
    optimizer.expect_step()
    model(model.input(number, rows=2)).backward()
    if halved:  # stands against every update of the backward
        optimizer.param_groups[0]["lr"] *= 0.5
    optimizer.step()
    optimizer.zero_grad()


def staging(pieces: int, elements: int) -> int:
    """Bytes of HOST memory for pieces of an update: weights and two moments, 4 bytes each."""
    return pieces * elements * 12


@pytest.mark.parametrize("update", ["immediate", "deferred", "speculative"])
@pytest.mark.parametrize("units", [1, 2, 3])
@pytest.mark.parametrize("elements", [4096, 8192])
@pytest.mark.parametrize("through_host", [False, True])
def test_the_pools_are_what_the_formula_says(tmp_path: Path, update: str, units: int, elements: int, through_host: bool) -> None:
    host = LAYERS * UNIT + staging(2, elements)
    model, optimizer = make(tmp_path, update, through_host, device_memory=units * UNIT, host_memory=host)
    engine = optimizer.engine
    pools, plan = engine.manager.pools, engine.plan
    # DEVICE: one layer runs at a time, and AHEAD more may be on their way; no layer stays unless all of these fit beside it
    together = UNIT
    assert units * UNIT <= together + AHEAD * UNIT and pools[Tier.DEVICE].resident.nbytes == 0
    assert pools[Tier.DEVICE].working.nbytes == units * UNIT
    # HOST: gradients stay, two pieces come and go
    assert pools[Tier.HOST].resident.nbytes == LAYERS * UNIT
    assert pools[Tier.HOST].working.nbytes == staging(2, elements)
    assert (plan.piece_elements, plan.pieces_in_flight) == (elements, 2)
    for tier in (Tier.DEVICE, Tier.HOST):
        assert pools[tier].resident.arena.nbytes == plan.total(tier) <= plan.caps.of(tier)
    # NVMe: weights and moments once, and a second slot for each where an update may have to be undone
    slots = 2 if update == "speculative" else 1
    assert engine.manager.store.allocated == slots * LAYERS * (UNIT + STATES) == plan.total(Tier.NVME)
    for number in range(6):
        step(model, optimizer, number)
        engine.manager.ledger.check()
    assert pools[Tier.DEVICE].working.peak <= units * UNIT
    assert pools[Tier.HOST].working.peak <= staging(2, elements)
    if not through_host:  # else whole units pass there too
        assert pools[Tier.HOST].working.peak <= staging(2, min(elements, NUMEL))
    assert engine.manager.store.allocated == slots * LAYERS * (UNIT + STATES)
    optimizer.close()


def held(engine: Any) -> dict[str, int]:
    """Everything that could grow without end, as numbers, where nothing is under way."""
    engine.settle()
    manager, updates = engine.manager, engine.updates
    manager.fetches.settle()
    ledger = manager.ledger
    pinned = sum(ledger.pins(c, t) for u in engine.units for c in u.chunks.values() for t in Tier)
    found = {f"scratch {t.name}": ledger._scratch[t] for t in Tier} | {"pins": pinned}
    for tier in (Tier.DEVICE, Tier.HOST):
        pools = manager.pools[tier]
        assert pools.resident.leased + pools.working.leased == ledger.held(tier)
        found[f"resident {tier.name}"] = pools.resident.leased
    found["fetches"], found["extents"] = len(manager.fetches), manager.store.allocated
    found["pieces"] = len(updates._reading) + len(updates._computing) + len(updates._writing)
    found["jobs"] = len(updates._jobs) + len(updates._waiting)
    found["marks"] = len([i for i in manager._marks if (i, Tier.DEVICE) not in manager._leases])
    found["tickets"] = sum(not t.done() for t in manager.store._under_way.values())
    found["trace"] = len(engine.recorder.trace.order)
    found["attempts"] = 0 if engine.speculation is None else len(engine.speculation._attempts) + len(engine.speculation._ready)
    return found


@pytest.mark.parametrize("update", ["immediate", "deferred", "speculative"])
@pytest.mark.parametrize("through_host", [False, True])
def test_nothing_grows(tmp_path: Path, update: str, through_host: bool) -> None:
    host = LAYERS * UNIT + staging(2, 8192)
    model, optimizer = make(tmp_path, update, through_host, device_memory=3 * UNIT, host_memory=host)
    first: dict[str, int] = {}
    for number in range(30):
        step(model, optimizer, number, halved=number % 5 == 4)
        if number == 3:
            first = held(optimizer.engine)
    assert held(optimizer.engine) == first
    assert first["scratch HOST"] == first["scratch DEVICE"] == first["pins"] == first["pieces"] == first["jobs"] == 0
    if update == "speculative":
        assert optimizer.engine.speculation.undone > 0
        assert first["extents"] == 2 * LAYERS * (UNIT + STATES)
    optimizer.close()


def test_memory_is_given_back_at_the_close(tmp_path: Path) -> None:
    host = LAYERS * UNIT + staging(2, 8192)
    model, optimizer = make(tmp_path, "speculative", device_memory=3 * UNIT, host_memory=host)
    for number in range(4):
        step(model, optimizer, number)
    optimizer.expect_step()
    model(model.input(9)).backward()  # updates are under way
    pools = optimizer.engine.manager.pools
    optimizer.close()
    assert all(pair.working.leased == pair.resident.leased == 0 for pair in pools.values())
    assert optimizer.engine.manager.store is None
    assert all(p.grad is None for p in model.parameters())
