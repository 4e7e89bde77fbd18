"""The loss with the logits of a few tokens at a time: they never exist whole."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def has_plain_head(model: Any) -> bool:
    """Whether the logits are the head's product alone: neither capped nor scaled."""
    config = model.config.get_text_config()
    extras = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    return not any(getattr(config, name, None) for name in extras) and model.get_output_embeddings() is not None


def chunked_loss(model: Any, ids: torch.Tensor, tokens: int, chunk: int) -> torch.Tensor:
    """Cross-entropy of each next token, summed, over ``tokens``; ``ids``: (batch, length) int64.

    The head runs on ``chunk`` tokens at a time, and again for them in the backward. With several chunks the sums over
    tokens have another order than the whole's.
    """
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = ids[:, 1:].reshape(-1)
    head = model.get_output_embeddings()

    def part(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(states).float(), wanted, reduction="sum")

    total = torch.zeros((), device=ids.device)
    for states, wanted in zip(rows.split(chunk), targets.split(chunk), strict=True):
        # reentrant: the head runs outside the model's forward here, and its saved-tensor hooks would lie on top of the
        # other kind's
        total = total + checkpoint(part, states, wanted, use_reentrant=True)
    return total / tokens
