"""Real architectures with random weights, everything on NVMe, against plain torch with the same update kernel."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from architectures import VOCAB, build


def steps(count: int = 3):
    generator = torch.Generator().manual_seed(11)
    batches = [torch.randint(1, VOCAB, (2, 10), generator=generator) for _ in range(count)]
    return [lambda m, ids=ids: m(input_ids=ids, labels=ids).loss for ids in batches]


ARCHITECTURES = ["llama", "qwen2", "gpt2", "opt", "mixtral", "bert", "t5"]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("placement", ["everything", "param_host"])
def test_offloaded_training_equals_plain_torch(name: str, placement: str, tmp_path) -> None:
    model = build(name)
    losses, expected = tiny.reference(copy.deepcopy(model), steps())
    got, weights, moved = tiny.offloaded(model, steps(), tmp_path, placement)
    assert got == losses
    assert tiny.same(weights, expected)
    assert moved.to_device + moved.nvme_read > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral", "opt"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(name: str, reentrant: bool, tmp_path) -> None:
    model = build(name)
    plain = copy.deepcopy(model)
    for m in (plain, model):
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            m.enable_input_require_grads()
    losses, expected = tiny.reference(plain, steps())
    caps = tiny.tight(model, slack=8.0, direct=False)  # what is recomputed keeps its weights
    got, weights, moved = tiny.offloaded(model, steps(), tmp_path, **caps)
    assert got == losses and moved.nvme_read and moved.nvme_written
    assert tiny.same(weights, expected)
