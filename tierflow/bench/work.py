"""The arithmetic of a training step, counted as the field does, so that figures can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Work:
    """What a step's floating-point operations follow from.

    ``matrices``: parameters that take part in matrix products, which is all but an input embedding that is not the
    head as well. ``recomputed``: those inside checkpointed blocks, 0 without checkpointing. ``attention``: layers x
    heads x head size.
    """

    matrices: int
    recomputed: int
    attention: int

    def operations(self, tokens: int, length: int) -> int:
        """Floating-point operations for ``tokens`` tokens in sequences of ``length``."""
        forward = 2 * self.matrices + 4 * self.attention * length
        again = 2 * self.recomputed + 4 * self.attention * length if self.recomputed else 0
        return tokens * (3 * forward + again)

    def formula(self) -> str:
        """The formula in words, with the figures of this model."""
        text = (
            f"tokens x (6 P + 12 A S): P = {self.matrices:,} parameters in matrix products, "
            f"A = {self.attention:,} (layers x heads x head size), S = sequence length, attention counted without a mask"
        )
        if self.recomputed:
            text += f"; recomputed under checkpointing: + 2 B + 4 A S, B = {self.recomputed:,} parameters of the blocks"
        return text


def count_work(model: Any, checkpointing: bool) -> Work:
    """The work of a Hugging Face causal language model. All experts of a mixture are counted."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    config = model.config.get_text_config()
    parameters = {id(p): p.numel() for p in model.parameters()}
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    if inner is not None and outer is not None and inner.weight is not outer.weight:
        parameters.pop(id(inner.weight), None)
    blocks: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {id(p): p.numel() for block in blocks for p in block.parameters()} if checkpointing else {}
    heads = getattr(config, "num_attention_heads", 0)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return Work(sum(parameters.values()), sum(inside.values()), config.num_hidden_layers * heads * size)
