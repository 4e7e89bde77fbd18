"""The model and the tokens: the same bits in every process."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from train.spec import Shape, Spec


def build(shape: Shape) -> nn.Module:
    """Random fp32 weights from a fixed seed, ready to train."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.intermediate, vocab_size=shape.vocab,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).float().train()


def parameters(model: nn.Module) -> int:
    """Tied ones once."""
    return sum(p.numel() for p in model.parameters())


def micro_batches(spec: Spec) -> Iterator[list[torch.Tensor]]:
    """Token ids (batch, sequence) of every micro-batch, a list a step, without end.

    Low ids are far more frequent than high ones, so that a few steps already lower the loss: contenders that do not
    train the same thing then show it.
    """
    generator = torch.Generator().manual_seed(1)
    while True:
        draws = torch.rand(spec.accumulation, spec.batch, spec.sequence, generator=generator)
        yield list((draws**4 * spec.shape.vocab).long())
