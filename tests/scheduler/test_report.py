"""What a step says of itself: sums that must hold, bytes that must be equal, sentences that must follow."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch

import tierflow
from tierflow.scheduler import engine as engine_module
from tierflow.scheduler.rates import Bandwidths
from tierflow.scheduler.report import make_report
from tierflow.swap import Lane, Lanes, Tier

RATES = Bandwidths(3e9, 3e9, 2e9, 2e9, 1e10, 1e10, 1e9, 1e10)


def offloaded(tmp_path, placement: str, **options):
    model = tiny.llama(layers=3, hidden=64)
    caps = {} if placement == "device" else tiny.tight(model, placement)
    _, optimizer = tierflow.offload(model, tiny.config(placement, tmp_path, clip=1.0, **(caps | options)))
    optimizer.engine.bandwidths = RATES
    return model, optimizer


def settle(engine) -> None:
    """Ends all I/O that is under way or due."""
    engine.settle()
    engine.manager.fetches.settle()


@pytest.mark.parametrize("update", ["immediate", "deferred"])
@pytest.mark.parametrize("placement", ["device", "nvme", "everything"])
def test_sums_hold_in_every_placement(tmp_path, placement: str, update: str) -> None:
    model, optimizer = offloaded(tmp_path, placement, update=update)
    engine = optimizer.engine
    tiny.train(model, optimizer, 2)
    with torch.no_grad():  # an evaluation between two steps is neither's
        model(input_ids=next(tiny.batches(1))[0])
    settle(engine)
    engine.updates.advance = lambda **_: None  # a drive so slow that nothing is there before it is waited for
    began = time.perf_counter()
    engine.take_report()
    tiny.train(model, optimizer, 1)
    first = engine.last_step
    tiny.train(model, optimizer, 1)
    wall = time.perf_counter() - began
    report = engine.report()
    lanes = report.lanes
    settle(engine)
    rest = engine.manager.timeline.take()  # what crossed the end of the step
    traffic = engine.take_report().traffic
    optimizer.close()
    assert 0 < first.seconds < first.seconds + report.seconds <= wall
    assert 0 <= lanes.waited <= lanes.noted <= lanes.seconds
    assert all(0 <= s <= lanes.seconds for s in (*lanes.busy.values(), *lanes.waiting.values()))
    assert max(lanes.waiting.values()) <= lanes.waited <= sum(lanes.waiting.values()) + 1e-9
    # the caller's thread alone: what it computed, copied and waited for does not overlap, and is all that it did in lanes
    own = [Lane.COMPUTE, Lane.INTAKE, Lane.UPDATE, Lane.TO_DEVICE, Lane.TO_HOST]
    assert sum(lanes.busy[lane] for lane in own) + lanes.waited == pytest.approx(lanes.noted, abs=1e-6)
    assert report.elsewhere == pytest.approx(lanes.seconds - lanes.noted)
    assert lanes.busy[Lane.COMPUTE] > 0 and lanes.busy[Lane.UPDATE] > 0 and lanes.busy[Lane.INTAKE] > 0
    moved = [sum(part.nbytes[lane] for part in (first, lanes, rest)) for lane in (Lane.READ, Lane.WRITE)]
    assert moved == [traffic.nvme_read, traffic.nvme_written]
    assert (rest.nbytes[Lane.WRITE] > 0) == (update == "deferred" and placement != "device")
    assert (lanes.busy[Lane.READ] > 0) == (traffic.nvme_read > 0) == (placement != "device")


def test_a_step_with_several_micro_batches_holds_them_all(tmp_path) -> None:
    model, optimizer = offloaded(tmp_path, "everything", host_memory="64MB")
    engine = optimizer.engine
    tiny.train(model, optimizer, 1)
    engine.manager.timeline.record()
    tiny.train(model, optimizer, 1, accumulation=3)
    spans = engine.manager.timeline.recorded()
    optimizer.close()
    names = Counter(s.name for s in spans if s.lane is Lane.COMPUTE)
    assert names["forward"] == names["backward"] == names["between forward and backward"] == 3
    # once in each forward; in each backward from its first unpacking to the next unit's
    assert {n for name, n in names.items() if name.startswith("model.layers.")} == {6}, names
    assert names["model.embed_tokens"] == 9  # tied: the head's use of it too
    grads = Counter(s.name for s in spans if s.lane is Lane.INTAKE)
    assert set(grads.values()) == {3} and len(grads) == len(list(model.parameters()))


@pytest.mark.parametrize("update", ["immediate", "deferred"])
def test_compute_spans_lie_inside_the_forward_and_backward_of_their_step(tmp_path, update: str) -> None:
    model, optimizer = offloaded(tmp_path, "everything", update=update)
    timeline = optimizer.engine.manager.timeline
    tiny.train(model, optimizer, 1)
    timeline.record()
    tiny.train(model, optimizer, 2)
    spans = timeline.recorded()
    optimizer.close()
    compute = [s for s in spans if s.lane is Lane.COMPUTE]
    outer = [s for s in compute if s.name in ("forward", "backward", "between forward and backward")]
    assert [s.name for s in outer] == ["forward", "between forward and backward", "backward"] * 2
    assert all(a.end <= b.begin for a, b in itertools.pairwise(outer))
    for s in compute:
        assert any(o.begin <= s.begin and s.end <= o.end for o in outer), s
    updates = [s for s in spans if s.lane is Lane.UPDATE]
    inside = [any(o.begin <= u.begin and u.end <= o.end for o in outer) for u in updates]
    assert updates and (not any(inside) if update == "immediate" else any(inside))


def test_evaluation_and_an_interrupted_forward_leave_nothing_open(tmp_path) -> None:
    model, optimizer = offloaded(tmp_path, "everything")
    timeline = optimizer.engine.manager.timeline
    ids = next(tiny.batches(1))[0]
    with pytest.raises(RuntimeError, match="stop"):
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        model(input_ids=ids)
    handle.remove()
    timeline.record()
    with torch.no_grad():
        model(input_ids=ids)
    tiny.train(model, optimizer, 1)
    names = [s.name for s in timeline.recorded() if s.name in ("forward", "backward", "between forward and backward")]
    assert names == ["forward", "forward", "between forward and backward", "backward"]
    optimizer.close()


def test_saved_weights_that_a_user_looks_at_are_no_backward(tmp_path) -> None:
    model, optimizer = offloaded(tmp_path, "everything")
    timeline = optimizer.engine.manager.timeline
    tiny.train(model, optimizer, 1)
    timeline.record()
    ids = next(tiny.batches(1))[0]
    loss = model(input_ids=ids, labels=ids).loss
    assert sum(node._saved_mat2.numel() for node in nodes(loss.grad_fn) if hasattr(node, "_saved_mat2"))
    names = {s.name for s in timeline.recorded() if s.lane is Lane.COMPUTE}
    optimizer.close()
    assert "forward" in names and "backward" not in names and "between forward and backward" not in names


def nodes(root) -> list:
    """All nodes of a graph."""
    found, todo = {}, [root]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found[node] = None
            todo += [n for n, _ in node.next_functions]
    return list(found)


def test_the_first_report_measures_and_later_ones_do_not(tmp_path, monkeypatch) -> None:
    model, optimizer = offloaded(tmp_path, "nvme")
    engine, asked = optimizer.engine, []
    engine.bandwidths = None
    with pytest.raises(RuntimeError, match=r"before the first optimizer.step\(\)"):
        engine.report()
    tiny.train(model, optimizer, 1)

    def measured(paths):
        asked.append(paths)
        return RATES

    monkeypatch.setattr(engine_module, "probe", measured)
    first, second = engine.report(), engine.report()
    assert str(first) == str(second) and len(asked) == 1
    assert asked[0].nvme_path == [str(tmp_path)] and asked[0].format.param is torch.float32
    assert asked[0].format.master is None and not asked[0].update_on_device
    optimizer.close()


# ---- the sentence


def lanes(seconds: float, waited: float = 0.0, **figures: tuple[float, int]) -> Lanes:
    """``figures``: by name of lane (busy seconds, bytes)."""
    busy, nbytes = dict.fromkeys(Lane, 0.0), dict.fromkeys(Lane, 0)
    for name, (s, n) in figures.items():
        busy[Lane[name]], nbytes[Lane[name]] = s, n
    waiting = dict.fromkeys(Lane, 0.0) | {Lane.READ: waited}
    return Lanes(seconds, busy, nbytes, waiting, waited, seconds)


@pytest.fixture
def plan(tmp_path):
    _, optimizer = offloaded(tmp_path, "everything")
    found = optimizer.engine.plan
    optimizer.close()
    return found


def with_free_memory(plan, nbytes: int):
    beside = plan.total(Tier.HOST) + plan.total(Tier.DEVICE)
    return replace(plan, caps=replace(plan.caps, machine={Tier.HOST: beside + nbytes}))


def test_a_drive_that_bounds_asks_for_the_very_bytes_of_the_states_if_they_are_there(plan) -> None:
    step = lanes(10.0, 7.0, COMPUTE=(2.0, 0), READ=(9.0, 15 * 10**9), WRITE=(9.0, 15 * 10**9))
    states = sum(n for (tier, kind), n in plan.resident.items() if tier is Tier.NVME and kind.value != "param")
    assert states > 0
    found = make_report(step, with_free_memory(plan, states), RATES, 10**9)
    # both kinds at 2 GB/s; compute 2 s and 1e9 elements at 1e9 a second
    assert found.floor.resources == {"processor": 3.0, "drive": 7.5} and found.ratio == pytest.approx(10 / 7.5)
    assert f"{states / 1e6:.0f} MB more host_memory would keep the optimizer states off it" in found.advice
    short = make_report(step, with_free_memory(plan, states - 1), RATES, 10**9)
    # 7.5 s of the drive cover 1 s of update and 6.5 s of compute, which is 2 s now
    assert "3.3 times the tokens" in short.advice and "more host_memory" not in short.advice


def test_waits_without_a_slow_resource_are_named(plan) -> None:
    step = lanes(10.0, 4.0, COMPUTE=(5.0, 0), READ=(3.0, 3 * 10**9))
    found = make_report(step, plan, RATES, 10**9)
    assert found.floor.bound == "processor" and found.advice.startswith("4.000 s of the step are waits, 4.000 s of them for NVMe")


def test_a_processor_that_bounds_says_what_else_could_save(plan) -> None:
    found = make_report(lanes(6.5, 0.1, COMPUTE=(5.0, 0)), plan, RATES, 10**9, steps=3)
    assert found.advice == (
        "the processor bounds the step and compute is 77% of it; faster drives or more memory would save at most 0.500 s"
    )
    text = str(found)
    assert text.startswith("step 6.500 s (mean of 3 steps), floor 6.000 s by the processor: 1.08 times its floor")
    assert re.search(r"^compute +5\.000 +76\.9%", text, re.M) and "floor: processor" in text and "NVMe write" not in text
