"""Memory outside the tiers: activations, logits and what autograd holds in passing. An estimate, said to be one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Saved activations of a transformer layer without attention matrices: 34 bytes per token and hidden element in
#: 16 bits (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022).
_PER_HIDDEN = 34
#: The logits, their log-softmax and its gradient are alive together.
_LOGIT_COPIES = 3
#: A tied head's gradient is held from the first layer's backward on; the embedding's and the sum make two more.
_GRADIENT_COPIES = 3


@dataclass(frozen=True)
class Transients:
    """Bytes that a micro-batch needs beside what the plan counts."""

    activations: int
    logits: int
    gradients: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.logits + self.gradients


def transients(model: Any, micro_batch: int, length: int) -> Transients:
    """The estimate for a Hugging Face causal language model without activation checkpointing."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    params = list(model.parameters())
    itemsize = params[0].element_size()
    tokens = micro_batch * length
    layers, hidden = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
    activations = tokens * layers * hidden * _PER_HIDDEN * itemsize // 2
    logits = tokens * getattr(config, "vocab_size", 0) * 4 * _LOGIT_COPIES
    largest = max(p.numel() * p.element_size() for p in params)
    return Transients(activations, logits, _GRADIENT_COPIES * largest)
