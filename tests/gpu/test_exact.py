"""Placements on a GPU agree in every bit, whatever the states' format and wherever gradients live."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import nn
from wide import CUDA, ON_NVME, ROOM, mb, offload, run, train, wide, wide_loss

from tierflow.swap import Kind, Tier

pytestmark = pytest.mark.gpu


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
