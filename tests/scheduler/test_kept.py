"""Weights and gradients that live in several tiers: no byte of room is left, and no bit changes."""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from outcome import Stack, checkpoint_into_other_caps, states_of, step

import tierflow
from tierflow.config import load_config
from tierflow.offloading import make_run
from tierflow.scheduler import placement
from tierflow.scheduler.plan import MemoryPlan
from tierflow.swap import CopyState, DebugMemory, Kind, Tier
from tierflow.swap.timeline import Inline

#: An accelerator's files are read through HOST by themselves.
THROUGH_HOST = [False, True] if tiny.DEVICE.type == "cpu" else [False]
UNIT = 106496  # bytes of one layer of Stack(width=160), padded


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less staging memory than states: else there is room for these before there is any for weights."""
    monkeypatch.setattr(placement, "PIECE_ELEMENTS", 1 << 12)


def stack(dtype: torch.dtype = torch.float32, layers: int = 32) -> Stack:
    return Stack(layers=layers, width=160, dtype=dtype)


def run(
    path: Path, place: str, dtype: torch.dtype = torch.float32, debug: DebugMemory | None = None, layers: int = 32, **block: Any
) -> Any:
    """(losses, states, plan, bytes that the last step wrote to NVMe)."""
    made = tiny.config(place, path, clip=0.05, **block)
    model, optimizer = tierflow.offload(stack(dtype, layers), made, debug_memory=debug)
    engine, losses = optimizer.engine, []
    for seed in range(4):
        losses.append(step(model, optimizer, seed))
        engine.settle()
        engine.manager.ledger.check()
        moved = engine.take_report().traffic
    for tier in (Tier.DEVICE, Tier.HOST):
        pools = engine.manager.pools[tier]
        apart = engine.manager.ledger.held(tier) - pools.resident.leased - pools.working.leased
        assert 0 <= apart <= (engine.plan.window if tier is Tier.HOST else 0)
    found = losses, states_of(engine), engine.plan, moved.nvme_written
    optimizer.close()
    assert all(pool.leased == 0 for tier in (Tier.DEVICE, Tier.HOST) for pool in vars(engine.manager.pools[tier]).values())
    return found


def plan_of(
    place: str, dtype: torch.dtype = torch.float32, direct: bool = True, layers: int = 32, **block: Any
) -> MemoryPlan:
    """The plan alone; nothing is allocated."""
    model = stack(dtype, layers)
    trained = {id(p) for p in model.parameters()}
    return make_run(model, load_config(tiny.config(place, "/", 0.05, **block)), tiny.DEVICE, trained, None, direct=direct)[1]


def tiers_of(plan: MemoryPlan, kind: Kind) -> set[tuple[Tier, ...]]:
    """The tiers that the kind is in, of every unit that has it in several."""
    split = {at: ahead for at, ahead in plan.homes.ahead.items() if at[1] is kind}
    found = {at: [*(t for t in ahead if t is not plan.homes.tiers[at]), plan.homes.tiers[at]] for at, ahead in split.items()}
    return {tuple(tiers) for tiers in found.values() if len(tiers) > 1}


def caps(
    place: str, kind: Kind, tiers: tuple[Tier, ...] = (Tier.HOST, Tier.NVME), device: int = 0, **how: Any
) -> dict[str, Any]:
    """Caps with the least host memory under which some unit has the kind in these tiers. ``device``: bytes beyond the least."""
    _, block = tiny.least(lambda caps: plan_of(place, **(how | caps)))
    block["device_memory"] += device
    for _ in range(160):
        if tiers in tiers_of(plan_of(place, **(how | block)), kind):
            return block
        block["host_memory"] += UNIT // 4
    raise AssertionError(block)


@pytest.mark.parametrize("through_host", THROUGH_HOST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_two_tiers(tmp_path: Path, dtype: torch.dtype, through_host: bool) -> None:
    expected = run(tmp_path, "device", dtype)
    base = caps("everything", Kind.PARAM, dtype=dtype, direct=not through_host)
    for more in (0, 2 * UNIT):
        debug = DebugMemory(random.Random(more), through_host)
        block = base | {"host_memory": base["host_memory"] + more}
        losses, states, plan, written = run(tmp_path, "everything", dtype, debug, **block)
        assert tiers_of(plan, Kind.PARAM)
        assert losses == expected[0] and tiny.same(states, expected[1])
        assert written == plan.nvme_written


SPLITS = [  # what the placement names, and the tiers that one unit's weights are in
    ("everything", (Tier.DEVICE, Tier.NVME)), ("everything", (Tier.DEVICE, Tier.HOST, Tier.NVME)),
    ("everything", (Tier.DEVICE, Tier.HOST)), ("param_host", (Tier.DEVICE, Tier.HOST)),
    ("param_host_states_nvme", (Tier.DEVICE, Tier.HOST)),
]  # fmt: skip


@pytest.mark.parametrize("through_host", THROUGH_HOST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("place", "tiers"), SPLITS, ids=lambda v: v if isinstance(v, str) else "-".join(t.value for t in v))
def test_weights_that_are_partly_on_the_device(
    tmp_path: Path, place: str, tiers: tuple[Tier, ...], dtype: torch.dtype, through_host: bool
) -> None:
    expected = run(tmp_path, "device", dtype, layers=16)
    device = int(2.6 * UNIT) if dtype is torch.float32 else int(1.4 * UNIT)  # two more units, and a half
    block = caps(place, Kind.PARAM, tiers, device, dtype=dtype, direct=not through_host, layers=16)
    debug = DebugMemory(random.Random(0), through_host)
    losses, states, plan, written = run(tmp_path, place, dtype, debug, layers=16, **block)
    assert tiers in tiers_of(plan, Kind.PARAM)
    assert losses == expected[0] and tiny.same(states, expected[1])
    assert written == plan.nvme_written


def test_a_drive_that_takes_no_read_leaves_no_copy_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What DEVICE keeps is on its way to HOST then, into memory that is given back."""
    block = caps("everything", Kind.PARAM, (Tier.DEVICE, Tier.NVME), int(2.6 * UNIT), direct=False, layers=16)
    made = tiny.config("everything", tmp_path, **block)
    _, optimizer = tierflow.offload(stack(layers=16), made, debug_memory=DebugMemory(random.Random(0), True))
    engine, manager, waited = optimizer.engine, optimizer.engine.manager, list[bool]()
    cut = next(u for u in engine.units if manager.homes(u.chunk) == [Tier.DEVICE, Tier.NVME])
    drain = manager.lane.drain

    class Late(Inline):
        def done(self) -> bool:
            return bool(waited)

        def wait(self) -> None:
            waited.append(True)

        times = property(lambda self: self)

    def late(*args: Any, **how: Any) -> Late:
        drain(*args, **how).wait()
        return Late(time.perf_counter())

    def refuse(*_: Any) -> None:
        raise OSError("no more reads")

    monkeypatch.setattr(manager.lane, "drain", late)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no more"):
        patch.setattr(manager.store, "read", refuse)
        manager.fetches.start(cut.chunk, engine.victims())
    assert waited and manager.ledger.state(cut.chunk, Tier.HOST) is CopyState.ABSENT
    optimizer.close()


def test_a_further_block_of_device_memory_takes_as_much_weight_off_the_drive() -> None:
    base, block = caps("everything", Kind.PARAM, (Tier.DEVICE, Tier.NVME), int(2.6 * UNIT)), 1 << 14
    found = [plan_of("everything", **(base | {"device_memory": base["device_memory"] + at})) for at in range(0, 2 * UNIT, block)]
    on_nvme = [plan.resident[Tier.NVME, Kind.PARAM] for plan in found]
    assert on_nvme == sorted(on_nvme, reverse=True)
    assert all(abs(on_nvme[0] - n - at * block) < block for at, n in enumerate(on_nvme))


def test_a_further_block_of_host_memory_takes_as_much_weight_off_the_drive() -> None:
    base, block = caps("everything", Kind.PARAM), 1 << 14  # the grain of fp32 weights
    found = [plan_of("everything", **(base | {"host_memory": base["host_memory"] + at})) for at in range(0, 2 * UNIT, block)]
    on_nvme = [plan.resident[Tier.NVME, Kind.PARAM] for plan in found]
    assert on_nvme == sorted(on_nvme, reverse=True)
    assert all(abs(on_nvme[0] - n - at * block) < block for at, n in enumerate(on_nvme))


@pytest.mark.parametrize("through_host", THROUGH_HOST)
def test_gradients_in_two_tiers(tmp_path: Path, through_host: bool) -> None:
    """With all weights in memory, what room is left goes to gradients before states: accumulation moves them more often."""
    expected = run(tmp_path, "device")
    base = caps("nvme", Kind.GRAD, gradients="auto")
    for more in (0, UNIT, UNIT + UNIT // 2):
        block = base | {"host_memory": base["host_memory"] + more, "gradients": "auto"}
        losses, states, plan, written = run(tmp_path, "nvme", debug=DebugMemory(random.Random(more), through_host), **block)
        assert losses == expected[0] and tiny.same(states, expected[1])
        assert written == plan.nvme_written
        assert tiers_of(plan, Kind.GRAD)


def test_a_checkpoint_does_not_know_of_it(tmp_path: Path) -> None:
    plan = checkpoint_into_other_caps(tmp_path, "everything", stack, caps("everything", Kind.PARAM))
    assert tiers_of(plan, Kind.PARAM)


@pytest.mark.parametrize(("place", "tiers"), SPLITS[1:4], ids=["three", "memory", "named"])
def test_a_checkpoint_does_not_know_of_a_part_on_the_device(tmp_path: Path, place: str, tiers: tuple[Tier, ...]) -> None:
    tight = caps(place, Kind.PARAM, tiers, int(2.6 * UNIT), layers=16)
    plan = checkpoint_into_other_caps(tmp_path, place, partial(stack, layers=16), tight)
    assert tiers in tiers_of(plan, Kind.PARAM)
