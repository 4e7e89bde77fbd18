"""The learning rate over the steps, as a factor of the one that was set."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

KINDS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A pure function of the step, for ``torch.optim.lr_scheduler.LambdaLR``; resuming needs only the step.

    `warmup` steps rise evenly to 1, the first of them already above 0; then the factor stays, or falls to
    `floor` along a line or half a cosine, which it would reach at step `total`.
    """

    kind: str = "cosine"
    warmup: int = 0
    total: int = 1
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = difflib.get_close_matches(self.kind, KINDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown schedule {self.kind!r}, one of {', '.join(KINDS)}{hint}")
        if self.total < 1:
            raise ValueError(f"a schedule needs 1 step or more, not {self.total}")
        if self.warmup < 0:
            raise ValueError(f"warm-up steps cannot be negative ({self.warmup})")
        if self.warmup >= self.total and self.kind != "constant":
            raise ValueError(f"{self.warmup} warm-up steps leave none of {self.total} for the {self.kind} part")
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"the floor is a share of the learning rate, between 0 and 1, not {self.floor}")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return 1.0
        gone = min(1.0, (step - self.warmup) / (self.total - self.warmup))
        left = 1.0 - gone if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * gone))
        return self.floor + (1.0 - self.floor) * left
