"""The CUDA path: placements agree in every bit, streams do not race, memory stays where it was planned."""

from __future__ import annotations

import copy
import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import tierflow
from tierflow.scheduler import memory as scheduler_memory
from tierflow.swap import Arena, CudaArena, CudaLane, DebugMemory, Kind, Lane, Pool, Tier

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
#: An emulated device (tests/support/emulated_cuda) computes on the processor, so models are smaller there, and caps.
EMULATED = torch.version.cuda is None
WIDTH = 512 if EMULATED else 1024


def mb(count: float) -> str:
    """That much beside layers of 1024 x 1024."""
    return str(int(count * 1e6 * (WIDTH / 1024) ** 2))


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()


class Wide(nn.Module):
    """Terrible density: every weight is read once for one row, so that transfers take longer than compute."""

    def __init__(self, width: int = WIDTH, depth: int = 6):
        super().__init__()
        self.mix = nn.Parameter(torch.full((width,), 0.5))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(x + block(x) * self.mix)
        return x


def wide(dtype: torch.dtype = torch.float32, **kw: int) -> Wide:
    torch.manual_seed(11)
    return Wide(**kw).to(dtype)


def wide_loss(model: nn.Module, seed: int) -> torch.Tensor:
    parameter = next(model.parameters())
    x = torch.randn(1, parameter.shape[0], generator=torch.Generator().manual_seed(seed))
    return model(x.to(CUDA, parameter.dtype)).float().square().mean()


#: Room for one layer of ``wide()`` on its way in and four ahead of it: no layer has a place on the device for good.
ROOM = {torch.float32: mb(24), torch.bfloat16: mb(12)}
ON_NVME = ("nvme", "param_host_states_nvme", "everything")


def offload(model: nn.Module, path: Any, placement: str, debug: bool = False, **kw: Any) -> Any:
    """With NVMe in the placement the host has room for gradients, weights and staging, and hardly any tier for states."""
    weights = sum(p.nbytes for p in model.parameters())
    device, host = (weights + (1 << 20), mb(140)) if placement in ON_NVME else ("512MB", "1GB")
    options = {"device_memory": str(device), "host_memory": host, "nvme_capacity": "1GB", "device": "cuda:0"}
    accumulation, clip = kw.pop("accumulation", 1), kw.pop("clip", 0.0)
    config = tiny.config(placement, path, clip=clip, accumulation=accumulation, **(options | kw))
    memory = DebugMemory(random.Random(1)) if debug else None
    return tierflow.offload(model, config, debug_memory=memory)[1]


def train(model: nn.Module, optimizer: Any, loss_of: Callable, steps: int = 4, accumulation: int = 1) -> list[float]:
    losses = []
    for step in range(steps):
        for micro in range(accumulation):
            loss = loss_of(model, step * accumulation + micro)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def run(path: Any, placement: str, dtype: torch.dtype, accumulation: int = 1, **kw: Any) -> tuple[list[float], Any]:
    model = wide(dtype)
    optimizer = offload(model, path, placement, accumulation=accumulation, **kw)
    try:
        losses = train(model, optimizer, wide_loss, accumulation=accumulation)
        optimizer.engine.settle()
        manager = optimizer.engine.manager
        manager.ledger.check()
        assert (manager.traffic.nvme_read > 0) == (manager.traffic.nvme_written > 0) == (placement in ON_NVME)
        return losses, {k: v.cpu() for k, v in tiny.weights(model).items()}
    finally:
        optimizer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_placements_agree_in_every_bit(tmp_path, dtype, accumulation, clip) -> None:
    first = None
    for placement in ("host", "nvme", "param_host", "param_host_states_nvme", "everything"):
        streamed = {"device_memory": ROOM[dtype]} if placement.startswith(("param", "every")) else {}
        found = run(tmp_path, placement, dtype, accumulation, clip=clip, debug=True, **streamed)
        first = first or found
        assert found[0] == first[0], placement
        assert tiny.same(found[1], first[1]), placement


@pytest.mark.parametrize(
    ("state", "dtype"), [("bf16", torch.float32), ("int8", torch.float32), ("int8-24bit", torch.bfloat16)]
)
def test_lossy_formats_agree_in_every_bit(tmp_path, state, dtype) -> None:
    first = run(tmp_path, "host", dtype, optimizer_state=state)
    for placement in ("device", "nvme", "param_host", "everything"):
        found = run(tmp_path, placement, dtype, optimizer_state=state, host_memory=mb(60) if placement in ON_NVME else "1GB")
        assert found[0] == first[0] and tiny.same(found[1], first[1]), placement


@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_states_that_the_host_has_no_room_for_live_on_the_device(tmp_path, state) -> None:
    """A part of them there, a part on NVMe; all of them are updated by the host's kernels."""
    model = wide()
    weights, each = sum(p.nbytes for p in model.parameters()), {"fp32": 8, "int8": 2}[state]
    room = str(weights + weights // 4 * each // 2)
    first = run(tmp_path, "host", torch.float32, optimizer_state=state)
    found = run(tmp_path, "nvme", torch.float32, optimizer_state=state, device_memory=room, host_memory=mb(60))
    assert found[0] == first[0] and tiny.same(found[1], first[1])
    optimizer = offload(model, tmp_path, "nvme", optimizer_state=state, device_memory=room, host_memory=mb(60))
    resident = optimizer.engine.plan.resident
    assert resident[Tier.DEVICE, Kind.EXP_AVG] and resident[Tier.NVME, Kind.EXP_AVG]
    optimizer.close()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_on_nvme_agree_in_every_bit(tmp_path, dtype, accumulation) -> None:
    """They cross through the staging ring into memory that is not registered."""
    first = run(tmp_path, "host", dtype, accumulation, clip=0.01)
    for placement in ("nvme", "everything"):
        room = {"device_memory": ROOM[dtype]} if placement == "everything" else {}
        found = run(tmp_path, placement, dtype, accumulation, clip=0.01, gradients="nvme", host_memory=mb(60), **room)
        assert found[0] == first[0] and tiny.same(found[1], first[1]), placement


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_on_the_device_agrees_with_the_kernels(tmp_path, dtype) -> None:
    a, b = run(tmp_path, "device", dtype), run(tmp_path, "host", dtype)
    assert a[0] == b[0] and tiny.same(a[1], b[1])


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


def test_host_memory_of_an_engine_that_was_dropped_is_not_registered_any_more(monkeypatch) -> None:
    driver = _Refuses(1 << 30)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    arena = Arena(1 << 20)
    assert scheduler_memory.register(arena, CUDA) is None and driver.held
    del arena
    gc.collect()
    assert not driver.held


@pytest.mark.parametrize("checkpoint", [False, True])
def test_llama_with_and_without_checkpointing(tmp_path, checkpoint) -> None:
    def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
        ids = torch.randint(0, 160, (2, 12), generator=torch.Generator().manual_seed(seed)).to(CUDA)
        return model(input_ids=ids, labels=ids).loss

    results = []
    for placement in ("host", "everything"):
        model = tiny.llama(layers=4)
        model.set_attn_implementation("eager")
        caps = {} if placement == "host" else tiny.tight(model, placement, direct=False)
        if caps and checkpoint:  # what is recomputed keeps its weights
            caps["device_memory"] = tiny.tight(model, placement, slack=8.0, direct=False)["device_memory"]
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = offload(model, tmp_path, placement, debug=True, **caps)
        results.append((train(model, optimizer, loss_of), tiny.weights(model)))
        optimizer.close()
    assert results[0][0] == results[1][0] and tiny.same(results[0][1], results[1][1])


def test_no_device_memory_is_allocated_in_the_steady_state(tmp_path) -> None:
    model = wide()
    optimizer = offload(model, tmp_path, "everything", device_memory=ROOM[torch.float32], accumulation=2)
    train(model, optimizer, wide_loss, steps=3, accumulation=2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(CUDA)
    train(model, optimizer, wide_loss, steps=4, accumulation=2)
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats(CUDA)
    for name in ("num_device_alloc", "segment.all.allocated", "reserved_bytes.all.current"):
        assert after.get(name) == before.get(name), name
    optimizer.close()


def test_device_gradients_are_dropped_as_they_cross(tmp_path) -> None:
    model = wide(depth=8)
    optimizer = offload(model, tmp_path, "param_host", device_memory=ROOM[torch.float32])
    train(model, optimizer, wide_loss, steps=1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(CUDA)
    before = torch.cuda.memory_allocated(CUDA)
    wide_loss(model, 1).backward()
    torch.cuda.synchronize()
    torch.empty(1, device=CUDA)
    assert torch.cuda.memory_allocated(CUDA) - before < 8 << 20  # of 67 MB of gradients none is held
    optimizer.close()


def test_close_gives_device_memory_back(tmp_path) -> None:
    wide_loss(wide().to(CUDA), 0).backward()  # cuBLAS takes its workspaces, one a thread
    torch.cuda.empty_cache()
    free = torch.cuda.memory_reserved(CUDA)
    model = wide()
    optimizer = offload(model, tmp_path, "device")
    train(model, optimizer, wide_loss, steps=1)
    optimizer.close()
    del optimizer, model
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(CUDA) - free <= 32 << 20  # cuBLAS keeps a workspace


def test_leases_have_storages_of_their_own() -> None:
    pool = Pool("device", CudaArena(1 << 20, CUDA), 0, 1 << 20)
    a, b = pool.lease(4096), pool.lease(8192)
    assert a.aliases() == b.aliases() == 0
    view = a.view(torch.float32)[3:7].view(2, 2)
    assert a.aliases() == 2 and b.aliases() == 0 and view.device == CUDA  # the view, and what autograd takes it for a view of
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.data = view
    del view
    assert a.aliases() == 1 and parameter.is_cuda and parameter.data_ptr() == a.bytes().data_ptr() + 12
    assert not a.bytes().any() and a.bytes().data_ptr() % 256 == 0


def test_copies_are_cut_where_registrations_end(monkeypatch) -> None:
    arena = Arena(4 << 20)
    monkeypatch.setattr("tierflow.swap.lanes.REGISTER_BYTES", 1 << 20)
    monkeypatch.setattr(scheduler_memory, "REGISTER_BYTES", 1 << 20)
    assert scheduler_memory.register(arena, CUDA) is None
    lane = CudaLane(CUDA, Arena(1 << 20))
    host, device = arena.bytes_at(0, arena.nbytes), torch.zeros(4 << 20, dtype=torch.uint8, device=CUDA)
    host.random_()
    lane.fill(device, host).wait()
    assert torch.equal(device.cpu(), host)
    flipped = device.flip(0)
    lane.drain(host, flipped).wait()
    assert torch.equal(host, device.cpu().flip(0))
    lane.close()
    del host
    arena.close()


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


class _Refuses:
    """A driver that registers ``count`` pieces and no more."""

    def __init__(self, count: int):
        self.count, self.held, self._real = count, list[int](), torch.cuda.cudart()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if len(self.held) >= self.count:
            return 2
        self.held.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.held.remove(address)
        return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_refused_registration_is_undone_said_once_and_works(tmp_path, monkeypatch, caplog) -> None:
    expected = run(tmp_path, "everything", torch.float32, accumulation=2, device_memory=ROOM[torch.float32])
    driver = _Refuses(1)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(scheduler_memory, "REGISTER_BYTES", 16 << 20)
    monkeypatch.setattr(scheduler_memory, "_said", set())
    found = run(tmp_path, "everything", torch.float32, accumulation=2, device_memory=ROOM[torch.float32])
    assert expected[0] == found[0] and tiny.same(expected[1], found[1])
    assert not driver.held and sum("cudaHostRegister refused" in r.message for r in caplog.records) == 1


def test_a_refusal_by_the_driver_leaves_no_error_behind() -> None:
    arena = Arena(1 << 20)
    assert scheduler_memory.register(arena, CUDA) is None
    assert scheduler_memory.register(arena, CUDA) is not None  # registered already
    assert torch.ones(4, device=CUDA).sum().item() == 4
    arena.close()


def test_clipping_and_gradient_arithmetic_on_host_gradients(tmp_path) -> None:
    model, plain = wide(), wide().to(CUDA)
    optimizer = offload(model, tmp_path, "everything", device_memory=ROOM[torch.float32])
    for m in (plain, model):
        wide_loss(m, 0).backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert q.grad is not None and q.grad.device == p.grad.device and torch.equal(q.grad.clone(), p.grad)
    # managed gradients are on the host, and the processor's sum is not the device's: 2e-5 lies between them here
    expected = nn.utils.get_total_norm([p.grad.cpu() for p in plain.parameters()])
    nn.utils.clip_grads_with_norm_(plain.parameters(), 1e-3, expected.to(CUDA))
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm.device == CUDA and torch.allclose(expected.to(CUDA), norm, rtol=1e-6)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.allclose(q.grad.clone(), p.grad, rtol=1e-6)
    optimizer.step()
    optimizer.close()


def test_gradscaler_and_autocast(tmp_path) -> None:
    model = wide()
    optimizer = offload(model, tmp_path, "everything", device_memory=mb(64))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    before = None
    for step in range(3):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = wide_loss(model, step)
        scaler.scale(loss * (math.inf if step == 1 else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        before = tiny.weights(model) if step == 1 else before
        scaler.step(optimizer)
        if step == 1:
            assert tiny.same(before, tiny.weights(model))
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**9 and optimizer.steps_taken == 2
    optimizer.close()


def test_caps_are_of_the_device() -> None:
    from tierflow.settings import available
    from tierflow.swap import Tier

    assert available(CUDA, ())[Tier.DEVICE] <= torch.cuda.mem_get_info(CUDA)[1]
    with pytest.raises(tierflow.DoesNotFit, match="device"):
        tierflow.offload(wide(), tiny.config("device", "/tmp", device_memory="1MB", device="cuda:0"))
