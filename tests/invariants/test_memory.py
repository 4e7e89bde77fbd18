"""Memory: equal to the plan to the byte while training, and nothing is held after an exception."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
import torch
from outcome import Stack, states_of, step

import tierflow
from tierflow.swap import DebugMemory, Kind, Tier

MEMORY_TIERS = (Tier.DEVICE, Tier.HOST)


def config(path: Path, param: str = "nvme", optim: str = "nvme", **block: object) -> dict:
    caps = {"device_memory": 1 << 20, "host_memory": 4 << 20, "nvme_capacity": 64 << 20}
    return {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "zero_optimization": {
            "offload_param": {"device": param, "nvme_path": str(path)},
            "offload_optimizer": {"device": optim, "nvme_path": str(path)},
        },
        "tierflow": caps | block,
    }


def pins(engine) -> int:
    """Of every copy, once no update holds one any more."""
    engine.settle()
    return sum(
        engine.manager.ledger.pins(chunk, tier) for u in engine.units for chunk in u.chunks.values() for tier in Tier
    )


class Watch:
    """Compares ledger, pools and plan at every moment that memory changes hands."""

    def __init__(self, engine):
        self.engine, self.moments = engine, 0
        self.most = dict.fromkeys(MEMORY_TIERS, 0)
        engine.manager.observer = self.look
        self.look()

    def look(self) -> None:
        manager, plan = self.engine.manager, self.engine.plan
        self.moments += 1
        for tier in MEMORY_TIERS:
            pools = manager.pools[tier]
            leased = pools.resident.leased + pools.working.leased
            assert manager.ledger.held(tier) == leased <= plan.total(tier)
            assert pools.working.leased <= plan.working[tier]
            self.most[tier] = max(self.most[tier], leased)


@pytest.mark.parametrize("placement", list(tiny.PLACEMENTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "lossless"])
def test_arena_pools_and_ledger_equal_the_plan(tmp_path: Path, placement: str, dtype: torch.dtype) -> None:
    model = tiny.llama(layers=4, hidden=32, dtype=dtype)
    caps = {} if placement in ("device", "host", "nvme") else tiny.tight(model, placement)
    debug = DebugMemory(random.Random(1))
    _, optimizer = tierflow.offload(model, tiny.config(placement, tmp_path, **caps), debug_memory=debug)
    engine = optimizer.engine
    manager, plan = engine.manager, engine.plan
    for tier in MEMORY_TIERS:
        pools = manager.pools[tier]
        assert plan.total(tier) == pools.resident.arena.nbytes == pools.resident.nbytes + pools.working.nbytes
        assert pools.working.arena is pools.resident.arena
        assert manager.ledger.budgets[tier] == plan.total(tier) <= plan.caps.of(tier)
        # the kinds that live here, and nothing else, are resident: chunk by chunk, to the byte
        homes = [c for u in engine.units for kind in u.chunks for c in u.parts(kind) if manager.home(c) is tier]
        assert pools.resident.leased == pools.resident.nbytes == sum(c.nbytes for c in homes)
    stored = [c for u in engine.units for c in u.chunks.values() if manager.home(c) is Tier.NVME]
    assert plan.total(Tier.NVME) == sum(c.nbytes for c in stored) == manager.ledger.held(Tier.NVME)
    if stored:
        assert manager.store.capacity == plan.total(Tier.NVME)
    watch = Watch(engine)
    tiny.train(model, optimizer, 8)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    watch.look()
    if plan.placement.param is not Tier.DEVICE:
        assert watch.moments > 50
        assert watch.most[Tier.DEVICE] > plan.resident_bytes(Tier.DEVICE)
    optimizer.close()
    for tier in Tier:
        assert manager.ledger.held(tier) == 0


def test_kinds_have_the_bytes_that_the_format_says(tmp_path: Path) -> None:
    per_element = {torch.float32: {Kind.PARAM: 4, Kind.GRAD: 4, Kind.EXP_AVG: 4, Kind.EXP_AVG_SQ: 4}}
    per_element[torch.bfloat16] = per_element[torch.float32] | {Kind.PARAM: 2, Kind.GRAD: 2, Kind.MASTER: 2}
    for dtype, kinds in per_element.items():
        model = Stack(layers=6, width=64, dtype=dtype)  # 64 * 64 + 64 elements pad to 6144 a layer
        _, optimizer = tierflow.offload(model, config(tmp_path, **tiny.tight(model)))
        plan = optimizer.engine.plan
        assert plan.resident == {
            (plan.placement.home(kind), kind): 6 * 6144 * nbytes for kind, nbytes in kinds.items()
        }
        optimizer.close()


def test_a_budget_is_never_exceeded(tmp_path: Path) -> None:
    model = Stack(layers=8, width=64)
    _, optimizer = tierflow.offload(model, config(tmp_path, device_memory=24576 * 3, host_memory=24576 * 12))
    engine = optimizer.engine
    assert engine.plan.working[Tier.DEVICE] == 24576 * 3
    watch = Watch(engine)
    for i in range(3):
        step(model, optimizer, i)
    assert watch.most[Tier.DEVICE] == engine.plan.total(Tier.DEVICE)  # the cap is used to the full, and no further
    with pytest.raises(tierflow.CapacityError), tierflow.gathered(model):
        pass
    watch.look()
    assert pins(engine) == 0
    optimizer.close()


# ---- an exception in mid-step


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "backward", "no_grad"])
def test_an_exception_in_mid_step_leaves_no_pin_and_training_goes_on(tmp_path: Path, where: str) -> None:
    models = [Stack(layers=6, width=64) for _ in range(2)]
    caps = {"device_memory": 24576 * 3, "host_memory": 24576 * 11}
    optimizers = [tierflow.offload(m, config(tmp_path, **caps))[1] for m in models]

    def stop(*_: object) -> None:
        raise Stop

    for i in range(4):
        losses = []
        for m, o in zip(models, optimizers, strict=True):
            if m is models[1] and i in (1, 2):
                layer = m.layers[3]
                hooked = layer.register_full_backward_hook if where == "backward" else layer.register_forward_hook
                handle = hooked(stop)
                with pytest.raises(Stop), torch.set_grad_enabled(where != "no_grad"):
                    m(m.input(i)).backward()
                handle.remove()
                o.zero_grad()
            losses.append(step(m, o, i))
            assert not any(o.engine._pins.values())
            o.engine.manager.ledger.check()
        assert losses[0] == losses[1]
    assert [pins(o.engine) for o in optimizers] == [0, 0]
    assert tiny.same(*(states_of(o.engine) for o in optimizers))
    for o in optimizers:
        o.close()
