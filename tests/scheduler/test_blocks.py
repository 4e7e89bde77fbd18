"""Gradients delivered in blocks equal autograd's own, and autograd holds none of them whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

import tierflow
from tierflow.scheduler.blocks import deliver_in_blocks


def run(path: Path, dtype: torch.dtype, accumulation: int, placement: str, blocks: bool, tied: bool = True):
    model = tiny.llama(layers=2, hidden=32, dtype=dtype, tied=tied)
    config = tiny.config(placement, path, clip=0.5, accumulation=accumulation)
    _, optimizer = tierflow.offload(model, config)
    if blocks:  # 37 rows a block: the last one is shorter
        names = deliver_in_blocks(model, optimizer.engine.gradients.slots, large=150 * 32 * dtype.itemsize, block=37 * 32 * dtype.itemsize)
        assert names == ["model.embed_tokens", "lm_head"]
    try:
        return *tiny.train(model, optimizer, 4, accumulation), tiny.weights(model)
    finally:
        optimizer.close()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_blocks_give_the_bits_of_autograd(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    losses, norms, weights = run(tmp_path, dtype, 1, "everything", False, tied)
    again = run(tmp_path, dtype, 1, "everything", True, tied)
    assert (losses, norms) == again[:2] and tiny.same(weights, again[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_with_several_micro_batches_all_placements_agree(tmp_path: Path, dtype: torch.dtype) -> None:
    losses, norms, weights = run(tmp_path, dtype, 3, "device", True)
    again = run(tmp_path, dtype, 3, "everything", True)
    assert (losses, norms) == again[:2] and tiny.same(weights, again[2])
    plain = run(tmp_path, dtype, 3, "everything", False)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain[0]), rtol=2e-3, atol=0)


def test_no_grad_and_a_frozen_head_go_the_ordinary_way(tmp_path: Path) -> None:
    model = tiny.llama(layers=2, hidden=32, tied=False)
    model.lm_head.weight.requires_grad_(False)
    _, optimizer = tierflow.offload(model, tiny.config("everything", tmp_path))
    try:
        assert deliver_in_blocks(model, optimizer.engine.gradients.slots, large=1 << 14) == ["model.embed_tokens"]
        ids = torch.arange(6)[None]
        with torch.no_grad():
            before = model(input_ids=ids).logits
        assert torch.equal(before, model(input_ids=ids).logits)
    finally:
        optimizer.close()


def test_autograd_holds_a_block_and_not_the_whole(tmp_path: Path) -> None:
    """What the allocator hands out at most during the backward, as torch's own profiler counts it."""
    whole = 40_000 * 32 * 4
    most = {blocks: _peak(tmp_path, blocks) for blocks in (False, True)}
    assert most[False] > 2 * whole
    assert most[True] < whole


def _peak(path: Path, blocks: bool) -> int:
    model = tiny.llama(layers=1, hidden=32, vocab=40_000)
    _, optimizer = tierflow.offload(model, tiny.config("everything", path))
    try:
        if blocks:
            deliver_in_blocks(model, optimizer.engine.gradients.slots, large=1 << 20, block=1 << 17)
        loss = model(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None]).loss
        with torch.profiler.profile(profile_memory=True) as profile:
            loss.backward()
        totals, now, most = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"], 0, 0
        for event in sorted(totals, key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most
    finally:
        optimizer.close()
