"""NVMe bytes of a step: counted by tierflow and by the kernel, equal to the plan when nothing can be cached."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from outcome import Stack
from torch import nn

import tierflow
from tierflow.scheduler import placement
from tierflow.swap import Kind, Tier

WIDTH = 256
PADDED = (WIDTH * WIDTH + WIDTH + 2047) // 2048 * 2048  # a layer's elements, to whole I/O blocks of 2-byte kinds
MIB = 1 << 20


def config(path: Path, param: str, optim: str, **block: object) -> dict:
    return {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {
            "offload_param": {"device": param, "nvme_path": str(path)},
            "offload_optimizer": {"device": optim, "nvme_path": str(path)},
        },
        "tierflow": {"device_memory": 64 * MIB, "host_memory": 64 * MIB, "nvme_capacity": 256 * MIB, "gradients": "host"} | block,
    }


def kernel_counts() -> tuple[int, int]:
    """(read, written) bytes of this process that reached a block device."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(found["read_bytes"]), int(found["write_bytes"])


def measure(model: nn.Module, optimizer, loss_of, steps: int = 3) -> tuple[float, float]:
    """(read, written) bytes a step by tierflow's count, once the order is known; held against the kernel's."""
    engine = optimizer.engine
    for i in range(2):
        once(model, optimizer, loss_of, i)
    engine.settle()
    engine.take_report()
    engine.updates.ahead.forgotten = 0
    before = kernel_counts()
    for i in range(steps):
        once(model, optimizer, loss_of, i)
    weights = {u.index: engine.plan.homes.bytes_in(u, Kind.PARAM, Tier.NVME) for u in engine.units}
    alone = sum(weights[u.index] for u in engine.units if read_for_the_update_alone(engine, u))
    engine.settle()
    after = kernel_counts()
    traffic = engine.take_report().traffic
    if engine.manager.store is not None and engine.manager.store.direct:
        for counted, was, now in zip((traffic.nvme_read, traffic.nvme_written), before, after, strict=True):
            # besides, the kernel counts a page of code or a log line, and not the padding that was never written
            assert abs(now - was - counted) <= 0.02 * counted + (1 << 17)
    return (traffic.nvme_read - alone - engine.updates.ahead.forgotten) / steps, traffic.nvme_written / steps


def read_for_the_update_alone(engine, unit) -> bool:
    """Settled without a use to come, an update reads the weights for itself, where no copy is there: not so in a loop."""
    job = engine.updates.job(unit)
    there = engine.manager.ledger.valid(unit.chunk, Tier.DEVICE) or unit.chunk in engine.manager.fetches
    return job is not None and not job.begun and engine.manager.home(unit.chunk) is Tier.NVME and not there


def once(model: nn.Module, optimizer, loss_of, i: int) -> None:
    loss_of(model, i).backward()
    optimizer.step()
    optimizer.zero_grad()


def stack_loss(model: Stack, i: int) -> torch.Tensor:
    return model(model.input(i))


FORMATS = {  # dtype -> (states on NVMe, R + W; the weight's own bytes)
    torch.float32: (8, 4),
    torch.bfloat16: (10, 2),
}


@pytest.mark.parametrize("dtype", FORMATS, ids=["fp32", "lossless"])
@pytest.mark.parametrize("param", ["none", "cpu"])
def test_optimizer_on_nvme_moves_its_states_once_each_way(tmp_path: Path, dtype: torch.dtype, param: str) -> None:
    model = Stack(layers=12, width=WIDTH, dtype=dtype)
    (_, optimizer), _ = tiny.least(lambda caps: tierflow.offload(model, config(tmp_path, param, "nvme", **caps)))
    plan = optimizer.engine.plan
    states = FORMATS[dtype][0] * 12 * PADDED
    assert (plan.nvme_read, plan.nvme_written) == (states, states)
    assert measure(model, optimizer, stack_loss) == (states, states)
    optimizer.close()


#: (format, dtype) -> bytes of state an element of a matrix, and of a bias, which stays exact
LOSSY = {
    ("bf16", torch.float32): (4, 8), ("bf16", torch.bfloat16): (6, 10), ("int8", torch.float32): (2.125, 8),
    ("int8", torch.bfloat16): (4.125, 10), ("int8-24bit", torch.bfloat16): (3.125, 10),
}  # fmt: skip


@pytest.mark.parametrize(("state", "dtype"), LOSSY, ids=[f"{s}-{str(d)[6:]}" for s, d in LOSSY])
@pytest.mark.parametrize("param", ["none", "nvme"])
def test_lossy_formats_move_their_bytes(tmp_path: Path, state: str, dtype: torch.dtype, param: str) -> None:
    layers, matrix, bias = 6, WIDTH * WIDTH, 2048
    model = Stack(layers=layers, width=WIDTH, dtype=dtype)

    def offer(caps: dict):
        return tierflow.offload(model, config(tmp_path, param, "nvme", optimizer_state=state, **caps))

    (_, optimizer), _ = tiny.least(offer)
    plan = optimizer.engine.plan
    of_matrix, of_bias = LOSSY[state, dtype]
    states = layers * (matrix * of_matrix + bias * of_bias)
    read, written = measure(model, optimizer, stack_loss)
    if param == "none":
        assert (plan.nvme_read, plan.nvme_written) == (read, written) == (states, states)
    else:
        weights = layers * (matrix + bias) * dtype.itemsize
        assert written == plan.nvme_written == states + weights
        assert abs(read - plan.nvme_read) <= 0.02 * plan.nvme_read and read > states + weights
    optimizer.close()


@pytest.mark.parametrize("share", [0.1, 0.37, 0.5, 0.99])
def test_states_are_split_between_host_and_nvme_by_bytes(tmp_path: Path, share: float) -> None:
    """Room for a part of the states, at any fraction, spares the drive that part both ways."""
    layers = 12
    (_, optimizer), least = tiny.least(
        lambda caps: tierflow.offload(Stack(layers=layers, width=WIDTH), config(tmp_path, "none", "nvme", **caps))
    )
    optimizer.close()
    model, states = Stack(layers=layers, width=WIDTH), 8 * layers * PADDED
    staging = 12 * layers * PADDED  # the update's pieces come before any cache
    room = {"host_memory": 4 * layers * PADDED + staging + int(share * states)}
    _, optimizer = tierflow.offload(model, config(tmp_path, "none", "nvme", **(least | room)))
    plan = optimizer.engine.plan
    assert plan.nvme_read == plan.nvme_written and plan.total(Tier.HOST) <= room["host_memory"]
    spared = states - plan.nvme_read
    assert share * states - 8 * 4096 < spared  # to the grain of a cut
    assert measure(model, optimizer, stack_loss) == (plan.nvme_read, plan.nvme_written)
    optimizer.close()


def tight_caps(layers: int, dtype: torch.dtype, device_layers: float, host_layers: float) -> dict[str, int]:
    """Caps that leave room for so many layers' weights, and for so many layers' staging beside the gradients."""
    layer = PADDED * dtype.itemsize
    staged = 12 * PADDED
    return {"device_memory": int(device_layers * layer), "host_memory": int(layers * layer + host_layers * staged)}


@pytest.mark.parametrize("share", [0.1, 0.37, 0.6])
def test_weights_are_split_between_host_and_nvme_by_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Room for a part of the weights, at any fraction, spares the drive that part: two reads and a write."""
    monkeypatch.setattr(placement, "PIECE_ELEMENTS", 1 << 13)
    layers = 12
    caps = tight_caps(layers, torch.float32, 2.5, 0)
    weights, staging = 4 * layers * PADDED, placement.PIECES * (1 << 13) * 12
    caps["host_memory"] += staging + int(share * weights)
    model = Stack(layers=layers, width=WIDTH)
    _, optimizer = tierflow.offload(model, config(tmp_path, "nvme", "nvme", **caps))
    plan = optimizer.engine.plan
    kept = plan.resident[Tier.HOST, Kind.PARAM]
    assert share * weights - 4 * 4096 < kept <= share * weights
    read, written = measure(model, optimizer, stack_loss)
    assert written == plan.nvme_written == 12 * layers * PADDED - kept
    assert abs(read - plan.nvme_read) <= 0.02 * plan.nvme_read
    assert read <= 16 * layers * PADDED - 2 * kept
    optimizer.close()


@pytest.mark.parametrize("share", [0.1, 0.37, 0.9])
def test_a_part_of_a_unit_on_the_device_spares_the_drive_as_much(tmp_path: Path, share: float) -> None:
    """Room on DEVICE for less than a unit, beside the three that a step works with: two reads and a write of it are spared."""
    layers = 12
    caps = tight_caps(layers, torch.float32, 3 + share, 2.5)
    model = Stack(layers=layers, width=WIDTH)
    _, optimizer = tierflow.offload(model, config(tmp_path, "nvme", "nvme", **caps))
    plan = optimizer.engine.plan
    kept = plan.resident[Tier.DEVICE, Kind.PARAM]
    assert share * 4 * PADDED - 4 * 4096 < kept <= share * 4 * PADDED
    read, written = measure(model, optimizer, stack_loss)
    assert written == plan.nvme_written == 12 * layers * PADDED - kept
    assert abs(read - plan.nvme_read) <= 0.02 * plan.nvme_read
    assert read <= 16 * layers * PADDED - 2 * kept
    optimizer.close()


@pytest.mark.parametrize("dtype", FORMATS, ids=["fp32", "lossless"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_everything_on_nvme_equals_the_plan(tmp_path: Path, dtype: torch.dtype, prefetch: bool) -> None:
    layers = 12
    caps = tight_caps(layers, dtype, 2.5, 2.5)
    model = Stack(layers=layers, width=WIDTH, dtype=dtype)
    config_ = config(tmp_path, "nvme", "nvme", prefetch=prefetch, **caps)
    _, optimizer = tierflow.offload(model, config_)
    plan = optimizer.engine.plan
    assert plan.total(Tier.DEVICE) <= caps["device_memory"]
    read, written = measure(model, optimizer, stack_loss)
    states, weight = FORMATS[dtype]
    assert written == plan.nvme_written == (states + weight) * layers * PADDED
    assert abs(read - plan.nvme_read) <= 0.02 * plan.nvme_read
    # the table's figure: the weight for the forward and the backward, and the states; less what the caps still hold
    table = (states + 2 * weight) * layers * PADDED
    assert table * 0.85 < read <= table
    optimizer.close()


@pytest.mark.parametrize("host_layers", [3, 6, 15, 20])
@pytest.mark.parametrize("device_layers", [2, 5])
def test_what_the_caps_can_cache_is_in_the_plan_too(tmp_path: Path, device_layers: int, host_layers: int) -> None:
    """Nearly: the plan does not know of holes between leases, nor of copies that an update under way holds."""
    layers = 14
    model = Stack(layers=layers, width=WIDTH)
    caps = tight_caps(layers, torch.float32, device_layers, host_layers)
    _, optimizer = tierflow.offload(model, config(tmp_path, "nvme", "nvme", **caps))
    plan = optimizer.engine.plan
    read, written = measure(model, optimizer, stack_loss)
    assert written == plan.nvme_written
    assert abs(read - plan.nvme_read) <= 0.05 * plan.nvme_read, (read, plan.nvme_read)
    optimizer.close()


def test_generous_caps_leave_nothing_on_the_drive(tmp_path: Path) -> None:
    model = Stack(layers=8, width=WIDTH)
    _, optimizer = tierflow.offload(model, config(tmp_path, "nvme", "nvme"))
    plan = optimizer.engine.plan
    assert (plan.nvme_read, plan.nvme_written) == (0, 0) and optimizer.engine.manager.store is None
    optimizer.close()


@pytest.mark.parametrize("tied", [False, True])
def test_a_transformer_under_tight_caps_equals_the_plan(tmp_path: Path, tied: bool) -> None:
    model = tiny.llama(layers=10, hidden=64, tied=tied)
    (_, optimizer), caps = tiny.least(lambda caps: tierflow.offload(model, tiny.config("everything", tmp_path, **caps)))
    plan = optimizer.engine.plan
    assert plan.total(Tier.DEVICE) <= caps["device_memory"] and plan.total(Tier.HOST) <= caps["host_memory"]

    def loss_of(m: nn.Module, i: int) -> torch.Tensor:
        ids = torch.randint(0, 160, (2, 12), generator=torch.Generator().manual_seed(i))
        return m(input_ids=ids, labels=ids).loss

    read, written = measure(model, optimizer, loss_of)
    assert written == plan.nvme_written
    assert abs(read - plan.nvme_read) <= 0.02 * plan.nvme_read, (read, plan.nvme_read)
    optimizer.close()


def test_frozen_layers_are_read_and_never_written(tmp_path: Path) -> None:
    layers = 12
    model = Stack(layers=layers, width=WIDTH)
    for layer in model.layers[:6]:
        layer.requires_grad_(False)
    caps = tight_caps(6, torch.float32, 2.5, 2.5)  # gradients of so many
    _, optimizer = tierflow.offload(model, config(tmp_path, "nvme", "nvme", **caps))
    plan = optimizer.engine.plan
    _, written = measure(model, optimizer, stack_loss)
    assert written == plan.nvme_written == 12 * 6 * PADDED
    optimizer.close()


def test_accumulation_fetches_again_and_updates_once(tmp_path: Path) -> None:
    layers, counts = 12, []
    for accumulation in (1, 3):
        model = Stack(layers=layers, width=WIDTH)
        caps = tight_caps(layers, torch.float32, 2.5, 2.5)
        _, optimizer = tierflow.offload(model, config(tmp_path, "nvme", "nvme", **caps))

        def loss_of(m: Stack, i: int, times: int = accumulation) -> torch.Tensor:
            for k in range(times - 1):
                m(m.input(100 + k)).backward()
            return m(m.input(i))

        counts.append(measure(model, optimizer, loss_of))
        optimizer.close()
    assert counts[0][1] == counts[1][1]  # writes
    weights = 4 * layers * PADDED
    assert counts[0][0] + 2.5 * weights < counts[1][0] <= counts[0][0] + 4.5 * weights
