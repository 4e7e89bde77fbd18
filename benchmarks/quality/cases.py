"""What is compared: how each run keeps its weights and its optimizer's states."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """``state_format`` None is torch's own AdamW; ``bf16`` says what the weights of the forward are."""

    name: str
    bf16: bool
    state_format: str | None
    seed: int = 0


CASES = [
    Case("torch, fp32, seed 0", False, None, 0),
    Case("torch, fp32, seed 1", False, None, 1),
    Case("fp32", False, "fp32"),
    Case("bf16 moments, fp32 weights", False, "bf16"),
    Case("int8, fp32 weights", False, "int8"),
    Case("torch, bf16-rounded, seed 0", True, None, 0),
    Case("torch, bf16-rounded, seed 1", True, None, 1),
    Case("lossless", True, "lossless"),
    Case("bf16", True, "bf16"),
    Case("int8", True, "int8"),
    Case("int8-24bit", True, "int8-24bit"),
]


class Weights:
    """The optimizer's weights beside the model's fp32 ones: the same, or in bf16 (torch: fp32, rounded)."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.of_model, self.rounded, self.own = list(model.parameters()), case.bf16, case.state_format is not None
        self.trained = self.of_model
        if self.rounded:
            dtype = torch.bfloat16 if self.own else torch.float32
            # Both begin at the same bf16 values.
            self.trained = [nn.Parameter(p.detach().bfloat16().to(dtype)) for p in self.of_model]
        self.show()

    @torch.no_grad()
    def show(self) -> None:
        if self.rounded:
            for p, t in zip(self.of_model, self.trained, strict=True):
                p.copy_(t.bfloat16())

    @torch.no_grad()
    def gradients(self) -> None:
        if self.rounded:
            for p, t in zip(self.of_model, self.trained, strict=True):
                assert p.grad is not None
                t.grad = p.grad.bfloat16().to(t.dtype)
                p.grad = None


def verdicts(rows: list[dict[str, Any]]) -> None:
    """Adds to each row how far it is above the mean of the exact runs on like weights, and whether within their spread."""
    by_name = {row["case"]: row for row in rows}
    for case in CASES:
        exact = [
            by_name[c.name]["final"]
            for c in CASES
            if c.name in by_name and c.bf16 == case.bf16 and c.state_format in (None, "fp32", "lossless")
        ]
        if case.name in by_name and len(exact) > 1:
            row = by_name[case.name]
            row["above_mean"], row["spread"] = row["final"] - statistics.fmean(exact), max(exact) - min(exact)
            row["within"] = row["above_mean"] <= row["spread"]
