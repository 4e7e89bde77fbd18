"""What is trained: the small model of bytes, or a pretrained model in its own tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quality.byte_model import ByteModel


@dataclass(frozen=True)
class Subject:
    """``make`` gives a fresh model with a method ``loss(tokens)``; ``encode`` makes a text one row of tokens.

    Rows of ``context`` tokens, ``batch`` of them a step. ``threads``: torch's; 0 for its own choice. ``looks``: batches of
    a held-out loss, along the way and at the end.
    """

    make: Callable[[], nn.Module]
    encode: Callable[[bytes], Tensor]
    unit: str
    context: int
    batch: int
    lr: float
    warmup: int
    threads: int
    looks: tuple[int, int]


class Pretrained(nn.Module):
    """A causal language model of transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def loss(self, tokens: Tensor) -> Tensor:
        """Nats per token, the mean over rows of ``tokens``, an int64 tensor."""
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def tokens_of(folder: Path, text: bytes) -> Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.tensor(tokenizer(text.decode("utf-8", "replace"), verbose=False)["input_ids"])


def subject(folder: Path | None) -> Subject:
    """The small model of bytes, or the pretrained model in ``folder``."""
    if folder is None:
        return Subject(ByteModel, lambda text: torch.frombuffer(bytearray(text), dtype=torch.uint8), "byte",
                       context=128, batch=8, lr=2e-3, warmup=40, threads=1, looks=(10, 40))  # fmt: skip
    return Subject(lambda: Pretrained(folder), lambda text: tokens_of(folder, text), "token",
                   context=128, batch=2, lr=5e-5, warmup=20, threads=0, looks=(10, 40))  # fmt: skip
