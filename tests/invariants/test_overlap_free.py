"""The update pipeline alone: however it cuts, stages and overlaps, the result is that of an update done at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tierflow.cpu_adam import kernels
from tierflow.cpu_adam.rules import ADAGRAD, ADAM, LION, Hyper, Rule
from tierflow.scheduler.contents import read_bytes, write_bytes
from tierflow.scheduler.gradients import GradContext, GradSlot
from tierflow.scheduler.homes import Homes, create_chunks
from tierflow.scheduler.jobs import Job
from tierflow.scheduler.memory import build_manager
from tierflow.scheduler.param_step import ParamStep
from tierflow.scheduler.placement import Caps, Placement, kinds_of
from tierflow.scheduler.plan import MemoryPlan
from tierflow.scheduler.stager import Stager
from tierflow.scheduler.units import ShardGeometry, Unit, make_chunks, partition
from tierflow.scheduler.update import UpdateQueue
from tierflow.swap import CopyState, DebugMemory, Kind, Manager, Tier

TIERS = [(p, o) for o in Tier for p in Tier if list(Tier).index(p) <= list(Tier).index(o)]

F32, BF16 = torch.float32, torch.bfloat16
FORMATS = [("fp32", F32), ("lossless", BF16), ("bf16", F32), ("bf16", BF16), ("int8", F32), ("int8", BF16), ("int8-24bit", BF16)]

SPAN = 16384  #: what the helpers move at a time: the pool for it may be that small


@st.composite
def cases(draw: st.DrawFn) -> dict:
    return {
        "sizes": draw(st.lists(st.lists(st.integers(1, 50_000), min_size=1, max_size=3), min_size=1, max_size=5)),
        "format": draw(st.sampled_from(FORMATS)),
        "rule": draw(st.sampled_from([ADAM, ADAM, LION, ADAGRAD])),
        "tiers": draw(st.sampled_from(TIERS)),
        "piece": draw(st.sampled_from([4096, 8192, 20480, 1 << 20])),
        "depth": draw(st.integers(1, 6)),
        "room": draw(st.sampled_from([1, 2, 3, 20])),  # host memory for staging and caching, in largest pieces
        "cached": draw(st.lists(st.sampled_from(["none", "both", "host", "device"]), min_size=5, max_size=5)),
        "without": draw(st.sets(st.integers(0, 14), max_size=6)),  # parameters that have no gradient
        "seed": draw(st.integers(0, 1 << 20)),
        "on_device": draw(st.booleans()),
        "ahead": draw(st.lists(st.dictionaries(st.sampled_from([Tier.DEVICE, Tier.HOST]), st.sampled_from([1, 3, 100])), min_size=5, max_size=5)),
        "worker": draw(st.booleans()),
        "whole": draw(st.booleans()),
        "through_host": draw(st.booleans()),
        "calls": draw(st.lists(st.tuples(st.sampled_from(["advance", "finish", "end", "rest"]), st.integers(0, 4)), max_size=8)),
    }


class Blocks(nn.Module):
    def __init__(self, sizes: list[list[int]], dtype: torch.dtype):
        super().__init__()
        self.blocks = nn.ModuleList()
        for block in sizes:
            made = nn.Module()
            for i, n in enumerate(block):
                made.register_parameter(f"p{i}", nn.Parameter(torch.zeros(n, dtype=dtype)))
            self.blocks.append(made)


def fill_with_noise(manager: Manager, units: list[Unit], generator: torch.Generator) -> None:
    """Weights, remainders and moments as a run would have them."""
    for unit in units:
        for kind, chunk in unit.chunks.items():
            if kind is Kind.GRAD:
                continue
            dtype, count = unit.layouts[kind].dtype, unit.layouts[kind].numel(chunk.numel)
            if dtype.is_floating_point:
                values = torch.randn(count, generator=generator)
                data = (values if kind in (Kind.PARAM, Kind.EXP_AVG) else values.square()).to(dtype)
            else:
                data = torch.randint(-(1 << 14), 1 << 14, (count,), generator=generator).to(dtype)
            for at in range(0, chunk.nbytes, SPAN):
                write_bytes(manager, unit, kind, at, data.view(torch.uint8)[at : at + SPAN], no_victims)


def no_victims(_tier: Tier):
    return ()


def homes(manager: Manager, units: list[Unit]) -> dict[tuple[int, Kind], torch.Tensor]:
    found = {}
    for unit in units:
        for kind, chunk in unit.chunks.items():
            if kind is not Kind.GRAD:
                spans = [(at, min(at + SPAN, chunk.nbytes)) for at in range(0, chunk.nbytes, SPAN)]
                data = torch.cat([read_bytes(manager, unit, kind, *span, no_victims) for span in spans])
                found[unit.index, kind] = data.view(unit.layouts[kind].dtype)
    return found


def at_once(jobs: list[Job], update: Rule, held: dict[tuple[int, Kind], torch.Tensor]) -> None:
    """The same update, parameter by parameter, on copies."""
    for job in jobs:
        unit = job.unit
        for slot, entry in zip(unit.slots, job.entries, strict=True):
            if entry is None:
                continue
            grad, step = entry
            part = {k: held[unit.index, k][slot.offset : slot.offset + slot.numel] for k in unit.chunks if k not in (Kind.GRAD, Kind.SCALE)}
            scale = held.get((unit.index, Kind.SCALE))
            if scale is not None:
                each = len(update.moments)
                scale = scale[slot.offset // 64 * each : -(-(slot.offset + slot.numel) // 64) * each]
            kernels.rule_step(
                update, part[Kind.PARAM], grad.memory.view(-1).clone(), {name: part[Kind(name)] for name in update.moments},
                master=part.get(Kind.MASTER), scale=scale, maximize=step.maximize, unscale=step.unscale, clip=step.clip,
                hyper=step.hyper,
                seed=slot.order,
            )  # fmt: skip


def cache(manager: Manager, unit: Unit, how: str) -> None:
    """Brings copies of a unit up, as a forward would have left them."""
    if how == "none" or manager.home(unit.chunk) is not Tier.NVME:
        return
    manager.fetches.start(unit.chunk, no_victims)
    manager.fetches.settle()
    for tier, other in ((Tier.HOST, "device"), (Tier.DEVICE, "host")):
        if how == other:
            manager.evict(unit.chunk, tier)


def ahead_of(case: dict, units: list[Unit], placement: Placement) -> dict[int, dict[Tier, int]]:
    """What of the states is in faster tiers than the rest, in whole grains, as far as the unit goes."""
    found: dict[int, dict[Tier, int]] = {}
    for unit, wanted in zip(units, case["ahead"], strict=False):
        left = unit.chunk.numel // unit.grain - 1
        for tier, grains in wanted.items() if unit.states else ():
            faster = list(Tier).index(tier) < list(Tier).index(placement.optimizer)
            if faster and left > 0:
                found.setdefault(unit.index, {})[tier] = min(grains, left) * unit.grain
                left -= min(grains, left)
    return found


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_the_pipeline_equals_an_update_done_at_once(tmp_path_factory: pytest.TempPathFactory, case: dict) -> None:
    run_case(tmp_path_factory.getbasetemp(), case)


def run_case(path: Path, case: dict) -> int:
    """Returns the bytes read, for tests that want to know that something was."""
    generator = torch.Generator().manual_seed(case["seed"])
    state_format, dtype = case["format"]
    model = Blocks(case["sizes"], dtype)
    units = partition(model)
    placement = Placement(*case["tiers"], state_format, rule=case["rule"])
    make_chunks(units, {u.index: kinds_of(u, placement) for u in units}, ShardGeometry())
    grain = units[0].grain
    piece_elements = -(-case["piece"] // grain) * grain
    biggest = min(piece_elements, max(u.chunk.numel for u in units)) * 12
    weights = max(sum(u.chunk.nbytes for u in units), 1 << 20)
    homes_ = Homes({(u.index, k): placement.home(k) for u in units for k in u.chunks}, ahead_of(case, units, placement))
    host = biggest * case["room"] + (weights if any(c != "none" for c in case["cached"]) else 0)
    plan = MemoryPlan(
        placement, homes_, Caps(1 << 30, 1 << 30, 1 << 30), homes_.resident(units),
        {Tier.HOST: host, Tier.DEVICE: weights}, {}, piece_elements, case["depth"], 0,
    )  # fmt: skip
    manager = build_manager(plan, torch.device("cpu"), str(path), {}, DebugMemory(random.Random(case["seed"]), through_host=True))
    try:
        create_chunks(manager, units, homes_)
        fill_with_noise(manager, units, generator)
        expected = homes(manager, units)
        jobs, index = [], 0
        for unit in units:
            entries: list[tuple[GradSlot, ParamStep] | None] = []
            for slot, p in zip(unit.slots, unit.params, strict=True):
                memory = torch.randn(slot.numel, generator=generator).to(unit.dtype)
                grad = GradSlot(slot.names[0], p, memory, GradContext(manager.lane))
                hyper = Hyper(index + 1, 1e-2 / (index + 1), 0.9, 0.99, 1e-8, 0.1, index % 2 == 0)
                step = ParamStep(hyper, index % 3 == 0, 1.0, 0.7)
                entries.append(None if index in case["without"] else (grad, step))
                index += 1
            if any(entries):
                jobs.append(Job(unit, entries, whole=case["whole"]))
        at_once(jobs, placement.rule, expected)
        for unit, how in zip(units, case["cached"], strict=False):
            cache(manager, unit, how)
        manager.traffic.nvme_read = 0
        everything = [u.chunk for u in units]
        on_device = case["on_device"] or placement.optimizer is Tier.DEVICE
        manager.lane.direct = not case["through_host"]
        stager = Stager(manager, on_device, case["worker"], placement.rule)

        def victims(_beyond: Unit | None):
            return lambda tier: [c for c in everything if manager.ledger.state(c, tier) is not CopyState.ABSENT]

        queue = UpdateQueue(stager, piece_elements, case["depth"], victims)
        manager.reclaim = queue.reclaim
        queue.add(jobs)
        for call, index in case["calls"]:
            unit = units[index % len(units)]
            getattr(queue, call)(*([unit] if call in ("finish", "end") else []))
            manager.ledger.check()
            if call in ("finish", "end"):
                assert not queue.pending(unit)
                check_copies(manager, unit, expected)
        queue.settle()
        stager.close()
        read = manager.traffic.nvme_read
        check(manager, units, expected)
        return read
    finally:
        manager.close()
        for tier in (Tier.DEVICE, Tier.HOST):
            manager.pools[tier].resident.arena.close()


def check(manager: Manager, units: list[Unit], expected: dict[tuple[int, Kind], torch.Tensor]) -> None:
    manager.ledger.check()
    assert not any(manager.ledger._scratch.values())
    found = homes(manager, units)
    for unit in units:
        for kind, chunk in unit.chunks.items():
            assert not any(manager.ledger.pins(chunk, t) for t in Tier)
            if kind is Kind.GRAD:
                continue
            want = expected[unit.index, kind].view(torch.uint8)
            for slot in unit.slots:  # padding is nobody's
                begin = chunk.bytes_of(slot.offset)
                end = begin + chunk.bytes_of(slot.numel)
                assert torch.equal(found[unit.index, kind].view(torch.uint8)[begin:end], want[begin:end]), (unit.index, kind)
        check_copies(manager, unit, expected)


def check_copies(manager: Manager, unit: Unit, expected: dict[tuple[int, Kind], torch.Tensor]) -> None:
    """Every copy of the weights in memory that calls itself valid is."""
    want = expected[unit.index, Kind.PARAM].view(torch.uint8)
    for slot in unit.slots:
        begin, end = slot.offset * unit.chunk.itemsize, (slot.offset + slot.numel) * unit.chunk.itemsize
        for tier in (Tier.DEVICE, Tier.HOST):
            if manager.ledger.valid(unit.chunk, tier):
                assert torch.equal(manager.memory(unit.chunk, tier).bytes()[begin:end], want[begin:end]), (unit.index, tier)


@pytest.mark.parametrize("depth", [1, 2, 6])
@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_what_is_staged_is_read_once(tmp_path: Path, depth: int, on_device: bool, whole: bool) -> None:
    case = {
        "sizes": [[20_000, 5], [9_000]], "format": ("fp32", F32), "rule": ADAM, "tiers": (Tier.NVME, Tier.NVME), "piece": 8192,
        "depth": depth, "room": 6, "cached": ["none"] * 5, "without": set(), "seed": 1, "on_device": on_device,
        "ahead": [], "worker": False, "whole": whole, "through_host": True, "calls": [],
    }  # fmt: skip
    padded = [20480, 10240]
    assert run_case(tmp_path, case) == 12 * sum(padded)
    # a copy in memory spares its unit the reading, where the kernel may use it
    assert run_case(tmp_path, case | {"cached": ["host", *["none"] * 4]}) == 12 * sum(padded) - 4 * padded[0]
    spared = 4 * padded[0] if on_device else 0
    assert run_case(tmp_path, case | {"cached": ["device", *["none"] * 4]}) == 12 * sum(padded) - spared
