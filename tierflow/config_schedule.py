"""DeepSpeed's warm-up schedules, as pure functions of the optimizer step (0 is the first).

[Note: one step behind] DeepSpeed's schedulers count from the first call of their ``step()``, which follows the first
optimizer step. So that step runs at the bottom of the warm-up, and their iteration is always the optimizer step
less one. A run moved here from DeepSpeed gets the same rates.
"""

from __future__ import annotations

import math
from typing import Protocol


class WarmUp(Protocol):
    @property
    def warmup_num_steps(self) -> int: ...
    @property
    def warmup_type(self) -> str: ...
    @property
    def warmup_min_ratio(self) -> float: ...
    @property
    def cos_min_ratio(self) -> float: ...


def _steps(params: WarmUp) -> int:
    return max(2, params.warmup_num_steps)


def _rise(iteration: int, params: WarmUp) -> float:
    if params.warmup_type == "log":
        return math.log(iteration + 1) / math.log(_steps(params))
    return iteration / _steps(params)


def warmup_decay(step: int, params: WarmUp, total: int | None) -> float:
    """Between warmup_min_lr (0) and warmup_max_lr (1): rises, then falls along a line to ``total``, or stays."""
    iteration = step - 1  # [Note: one step behind]
    if iteration < 0:
        return 0.0
    if iteration < _steps(params):
        return _rise(iteration, params)
    if total is None:
        return 1.0
    return max(0.0, (total - iteration) / max(1.0, total - _steps(params)))


def warmup_cosine(step: int, params: WarmUp, total: int) -> float:
    """As a share of the optimizer's lr: rises from warmup_min_ratio, then falls along a half cosine."""
    iteration = step - 1  # [Note: one step behind]
    if iteration < 0:
        return 0.0
    if iteration < _steps(params):
        return params.warmup_min_ratio + (1.0 - params.warmup_min_ratio) * _rise(iteration, params)
    gone = min(1.0, (iteration - _steps(params) + 1) / max(1, total - _steps(params)))
    return params.cos_min_ratio + (1.0 - params.cos_min_ratio) * (1.0 + math.cos(math.pi * gone)) / 2
