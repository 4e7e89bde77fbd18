"""DeepSpeed's schedules: the learning rates that its schedulers give, worked out step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tierflow.config import load_config
from tierflow.config_models import SchedulerBlock


def schedule(kind: str, **params: Any) -> SchedulerBlock:
    block = load_config({"scheduler": {"type": kind, "params": params}}).scheduler
    assert block is not None
    return block


def rates(block: SchedulerBlock, steps: int, **run: Any) -> list[float]:
    run = {"base_lr": 1.0, "total_steps": 10} | run
    return [block.lr(step, **run) for step in range(steps)]


def test_a_linear_warm_up_starts_one_step_late() -> None:
    block = schedule("WarmupLR", warmup_type="linear", warmup_num_steps=4, warmup_max_lr=0.4, warmup_min_lr=0.0)
    assert rates(block, 8) == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_the_default_warm_up_is_logarithmic_up_to_the_optimizers_lr() -> None:
    block = schedule("WarmupLR", warmup_num_steps=4, warmup_min_lr=0.1)
    rise = [0.1 + 0.9 * math.log(n) / math.log(4) for n in (1, 2, 3, 4)]
    assert rates(block, 7) == pytest.approx([0.1, *rise, 1.0, 1.0])


def test_decay_reaches_zero_at_the_end() -> None:
    block = schedule("WarmupDecayLR", warmup_type="linear", warmup_num_steps=2, total_num_steps=6)
    assert rates(block, 9) == pytest.approx([0.0, 0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_what_is_auto_comes_from_the_run() -> None:
    named = schedule("WarmupDecayLR", warmup_num_steps=2, total_num_steps=6, warmup_max_lr=3.0)
    auto = schedule("WarmupDecayLR", warmup_num_steps="auto", total_num_steps="auto", warmup_max_lr="auto")
    assert rates(auto, 9, base_lr=3.0, total_steps=6, warmup_steps=2) == rates(named, 9)


def test_cosine_stays_at_its_floor() -> None:
    block = schedule("WarmupCosineLR", warmup_type="linear", warmup_num_steps=2, total_num_steps=6, cos_min_ratio=0.1)
    fall = [0.1 + 0.9 * (1 + math.cos(math.pi * n / 4)) / 2 for n in (1, 2, 3, 4)]
    assert rates(block, 9, base_lr=2.0) == pytest.approx([0.0, 0.0, 1.0, *(2 * f for f in fall), 0.2, 0.2])
