"""Layer-major accumulation against the plain order and against plain torch, bit for bit."""

from __future__ import annotations

import copy
import random
import threading

import pytest
import tiny
import torch
from loops import Tower
from torch import nn
from torch.utils.checkpoint import checkpoint

import tierflow
from tierflow import machine
from tierflow.cpu_adam import CPUAdamW
from tierflow.swap import DebugMemory, Tier

VOCAB = 128
COUNT = 4


def build(name: str) -> nn.Module:
    import transformers as t

    small = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=VOCAB)
    makers = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=True)),
        "untied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=False)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=VOCAB, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        ),
        "mixtral": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(**small, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=VOCAB, dropout_rate=0, decoder_start_token_id=0)
        ),
    }  # fmt: skip
    torch.manual_seed(5)
    return makers[name]().train()


def text(steps: int = 3, count: int = COUNT, same_length: bool = True) -> list[list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(11)
    found = []
    for _ in range(steps):
        rows = [torch.randint(1, VOCAB, (2, 10 if same_length else 6 + i), generator=generator) for i in range(count)]
        found.append([{"input_ids": r, "labels": r} for r in rows])
    return found


def plain(model: nn.Module, steps, loss=None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Plain torch: every micro-batch's forward and backward in order, one update a step."""
    optimizer = CPUAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for step in steps:
        parts = []
        for batch in step:
            part = loss(model, batch) if loss else model(**batch).loss / len(step)
            part.backward()
            parts.append(part.detach())
        losses.append(sum(parts[1:], parts[0]).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, tiny.weights(model)


def engine_for(model, path, placement="everything", order="layer_major", count=COUNT, **options):
    caps = tiny.tight(model) | options
    config = tiny.config(placement, path, 0.0, count, **caps)
    config["tierflow"]["accumulation"] = order
    return tierflow.initialize(model, config, debug_memory=DebugMemory(random.Random(1)))


def train(engine, steps, loss=None) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = []
    for step in steps:
        losses.append(engine.train_batch(step, loss).item())
        engine.optimizer.engine.manager.ledger.check()
        assert threading.active_count() == 1
    assert no_pins(engine)
    return losses, tiny.weights(engine.module)


def no_pins(engine) -> bool:
    inner = engine.optimizer.engine
    return not any(inner.manager.ledger.pins(u.chunk, t) for u in inner.units for t in (Tier.DEVICE, Tier.HOST)
                   if inner.manager.home(u.chunk) is not t)  # fmt: skip


def equal(a, b) -> None:
    assert a[0] == b[0]
    assert tiny.same(a[1], b[1])


@pytest.mark.parametrize("name", ["llama", "untied", "gpt2", "mixtral", "t5"])
@pytest.mark.parametrize("placement", ["everything", "param_host"])
def test_layer_major_equals_plain_torch(name: str, placement: str, tmp_path) -> None:
    model = build(name)
    expected = plain(copy.deepcopy(model), text())
    with engine_for(model, tmp_path, placement) as engine:
        equal(train(engine, text()), expected)
        assert engine.accumulation.at_once == COUNT


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_with_activation_checkpointing(name: str, reentrant: bool, tmp_path) -> None:
    model = build(name)
    other = copy.deepcopy(model)
    for m in (other, model):
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            m.enable_input_require_grads()
    expected = plain(other, text())
    with engine_for(model, tmp_path) as engine:
        equal(train(engine, text()), expected)
