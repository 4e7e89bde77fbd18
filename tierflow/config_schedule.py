"""DeepSpeed's warm-up schedules, as pure functions of the optimizer step (0 is the first).

[Note: one step behind] DeepSpeed's schedulers count from the first call of their ``step()``, which follows the first
optimizer step. So that step runs at the bottom of the warm-up, and their iteration is always the optimizer step
less one. A run moved here from DeepSpeed gets the same rates.
"""

from __future__ import annotations

import math


def _rise(iteration: int, warmup: int, kind: str) -> float:
    return math.log(iteration + 1) / math.log(warmup) if kind == "log" else iteration / warmup


def warmup_decay(step: int, warmup: int, kind: str, total: int | None) -> float:
    """Between warmup_min_lr (0) and warmup_max_lr (1): rises, then falls along a line to ``total``, or stays."""
    iteration, warmup = step - 1, max(2, warmup)  # [Note: one step behind]
    if iteration < 0:
        return 0.0
    if iteration < warmup:
        return _rise(iteration, warmup, kind)
    return 1.0 if total is None else max(0.0, (total - iteration) / max(1.0, total - warmup))


def warmup_cosine(step: int, warmup: int, kind: str, total: int, lowest: tuple[float, float]) -> float:
    """As a share of the optimizer's lr: rises from ``lowest[0]``, then falls along a half cosine to ``lowest[1]``."""
    iteration, warmup = step - 1, max(2, warmup)  # [Note: one step behind]
    if iteration < 0:
        return 0.0
    if iteration < warmup:
        return lowest[0] + (1.0 - lowest[0]) * _rise(iteration, warmup, kind)
    gone = min(1.0, (iteration - warmup + 1) / max(1, total - warmup))
    return lowest[1] + (1.0 - lowest[1]) * (1.0 + math.cos(math.pi * gone)) / 2
