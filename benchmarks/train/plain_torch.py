"""Plain torch: everything in memory, fused AdamW, clip_grad_norm_."""

from __future__ import annotations

from typing import Any

import torch

from train.measure import Phases
from train.model import build, parameters
from train.spec import ADAMW, CLIP, Spec


class Trainer:
    """The loop that all others are compared with."""

    def __init__(self, spec: Spec):
        self.model = build(spec.shape)
        options: dict[str, Any] = {**ADAMW, "betas": tuple(ADAMW["betas"])}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **options)

    def step(self, micro_batches: list[torch.Tensor], phases: Phases) -> float:
        """One optimizer step; the mean of the micro-batches' losses."""
        total = 0.0
        for ids in micro_batches:
            with phases("forward"):
                loss = self.model(input_ids=ids, labels=ids).loss
            with phases("backward"):
                (loss / len(micro_batches)).backward()
            total += loss.item()
        with phases("step"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return total / len(micro_batches)

    def counts(self) -> dict[str, float]:
        """Nothing is counted beside what the kernel counts."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Settings and versions."""
        return {"parameters": parameters(self.model), "optimizer": "torch.optim.AdamW(fused=True)"}

    def close(self) -> None:
        """Nothing to give back."""
