"""Streams do not race, updates in the backward have their gradients, and what streams did is timed."""

from __future__ import annotations

import copy
import time
from itertools import pairwise

import pytest
import tiny
import torch
from wide import CUDA, ROOM, mb, offload, run, wide, wide_loss

import tierflow
from tierflow.scheduler import memory as scheduler_memory
from tierflow.swap import Arena, CudaLane, Lane

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("seed", range(3))
def test_transfers_that_are_slower_than_compute_do_not_race(tmp_path, seed) -> None:
    """Against a reference computed apart: plain torch on the device, and the host's kernels for the update."""
    from tierflow.cpu_adam import CPUAdamW

    model = wide(depth=10)
    plain, shadow = copy.deepcopy(model).to(CUDA), copy.deepcopy(model)
    reference = CPUAdamW(shadow.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer = offload(model, tmp_path, "everything", device_memory=ROOM[torch.float32], debug=seed > 0)
    for step in range(8):
        losses = []
        for m in (plain, model):
            with torch.no_grad():
                wide_loss(m, step)
            loss = wide_loss(m, step)
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == losses[1], step
        for p, q in zip(plain.parameters(), shadow.parameters(), strict=True):
            q.grad, p.grad = p.grad.cpu(), None
        reference.step()
        with torch.no_grad():
            for p, q in zip(plain.parameters(), shadow.parameters(), strict=True):
                p.copy_(q)
        optimizer.step()
        optimizer.zero_grad()
    assert tiny.same({k: v.cpu() for k, v in tiny.weights(model).items()}, tiny.weights(shadow))
    optimizer.close()


@pytest.mark.parametrize(("placement", "caps"), [("everything", {"device_memory": ROOM[torch.float32]}), ("device", {})])
def test_forward_and_backward_on_a_stream_of_the_user(tmp_path, placement, caps) -> None:
    expected = run(tmp_path, placement, torch.float32, **caps)
    with torch.cuda.stream(torch.cuda.Stream(CUDA)):
        found = run(tmp_path, placement, torch.float32, **caps)
    assert expected[0] == found[0] and tiny.same(expected[1], found[1])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_updates_in_the_backward_have_all_of_their_gradients(tmp_path, accumulation) -> None:
    """They are tried once a few steps went by unclipped, while gradients are still on their way to the host."""
    found = {}
    for update in ("deferred", "speculative"):
        model = wide()
        config = tiny.config(
            "everything", tmp_path, accumulation=accumulation, update=update, device="cuda:0",
            device_memory=ROOM[torch.float32], host_memory=mb(140), nvme_capacity="1GB",
        )  # fmt: skip
        engine = tierflow.initialize(model, config)
        try:
            losses = [
                engine.train_batch([step * accumulation + i for i in range(accumulation)], wide_loss).item()
                for step in range(10)
            ]
            inner = engine.optimizer.engine
            inner.settle()
            assert inner.speculation is None or inner.speculation.committed > 0
            assert (inner.speculation is not None) == (update == "speculative")
            found[update] = losses, {k: v.cpu() for k, v in tiny.weights(model).items()}
        finally:
            engine.close()
    assert found["deferred"][0] == found["speculative"][0]
    assert tiny.same(found["deferred"][1], found["speculative"][1])


def test_weights_on_their_way_do_not_hold_up_updates_in_the_backward(tmp_path) -> None:
    """Host memory is full of copies that were fetched for the backward: they make room, step for step."""
    model = tiny.llama(layers=4, hidden=128, dtype=torch.bfloat16)
    caps = {"device_memory": "1MB", "host_memory": "2500KB", "device": "cuda:0"}
    engine = tierflow.initialize(model, tiny.config("everything", tmp_path, update="speculative", **caps))
    inner, committed = engine.optimizer.engine, []
    for (ids,) in tiny.batches(8):
        engine.train_batch([{"input_ids": ids.to(CUDA), "labels": ids.to(CUDA)}])
        committed.append(inner.speculation.committed)
    counts = [after - before for before, after in pairwise(committed)]
    assert min(counts) > len(inner.units) // 2, counts
    engine.close()


def test_transfers_and_stalls_are_timed_on_the_hosts_clock() -> None:
    host = Arena(64 << 20)
    assert scheduler_memory.register(host, CUDA) is None
    lane = CudaLane(CUDA, Arena(1 << 20))
    source, target = host.bytes_at(0, host.nbytes), torch.zeros(64 << 20, dtype=torch.uint8, device=CUDA)
    before = time.perf_counter()
    ticket = lane.fill(target, source)
    stall = lane.before_use(ticket)
    target.add_(1)
    ticket.wait()
    torch.cuda.synchronize()
    after = time.perf_counter()
    times = ticket.times
    assert times.began is not None and times.ended is not None and stall is not None
    assert before - 1e-3 <= times.began < times.ended <= after + 1e-3
    assert stall.began is not None and stall.ended is not None and times.ended - 1e-3 <= stall.ended <= after + 1e-3
    lane.close()
    del source
    host.close()


def test_a_report_has_the_accelerators_lanes(tmp_path) -> None:
    model = wide()
    _, optimizer = tierflow.offload(model, tiny.config("everything", tmp_path, device_memory=ROOM[torch.float32]))
    for step in range(3):
        wide_loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = optimizer.engine.report()
    assert set(report.floor.resources) == {"accelerator", "processor", "drive", "host to device", "device to host"}
    assert all(0 <= s <= report.seconds for s in report.lanes.busy.values())
    assert report.lanes.busy[Lane.COMPUTE] > 0 and report.lanes.nbytes[Lane.TO_DEVICE] > 0
    optimizer.close()
