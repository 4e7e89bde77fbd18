"""The loss scale over sequences of overflows, against tables worked out by hand from DeepSpeed's rules."""

from __future__ import annotations

import json

import pytest

from tierflow.config import load_config
from tierflow.loss_scale import LossScale, ScaleAtMinimum

# (steps, the scale after each): o is an overflow, g a good step
PLAIN = [
    # the first step does not count towards the window of 3, the next three do; then every third doubles
    ("gggg ggg", [16, 16, 16, 32, 32, 32, 64]),
    # the first overflow is let pass, every later one halves; nothing but doubling lets one pass again
    ("o g o o g g g g o o", [16, 16, 8, 4, 4, 4, 4, 8, 8, 4]),
    # an overflow starts the window anew, whether or not it lowered the scale
    ("ggg o ggg g", [16, 16, 16, 16, 16, 16, 16, 32]),
]
CONSECUTIVE = [
    # a good step lets the next overflow pass
    ("o g o g o o o g o", [16, 16, 16, 16, 16, 8, 4, 4, 4]),
    ("o o g g g g o o", [16, 8, 8, 8, 8, 16, 16, 8]),
]
AT_ONCE = [("o o g o", [8, 4, 4, 2]), ("gggg o gggg", [16, 16, 16, 32, 16, 16, 16, 16, 32])]


def run(scale: LossScale, steps: str) -> list[float]:
    found = []
    for step in steps.replace(" ", ""):
        scale.update(overflow=step == "o")
        found.append(scale.scale)
    return found


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        *[({}, *case) for case in PLAIN],
        *[({"consecutive_hysteresis": True}, *case) for case in CONSECUTIVE],
        *[({"hysteresis": 1}, *case) for case in AT_ONCE],
        ({"hysteresis": 3}, "o o o o g g g g o o o", [16, 16, 8, 4, 4, 4, 4, 8, 8, 8, 4]),
        ({"window": 1}, "g g g o g g g", [16, 32, 64, 64, 64, 128, 256]),
        ({"hysteresis": 1, "minimum": 3.0}, "o o o", [8, 4, 3]),
    ],
)
def test_sequences(settings: dict, steps: str, expected: list[float]) -> None:
    assert run(LossScale(16.0, **({"window": 3} | settings)), steps) == expected
    for cut in range(1, len(expected)):  # through JSON at any point
        whole = steps.replace(" ", "")
        first, second = (LossScale(16.0, **({"window": 3} | settings)) for _ in range(2))
        run(first, whole[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert run(second, whole[cut:]) == expected[cut:]


def test_an_overflow_at_the_minimum_raises_and_changes_nothing() -> None:
    scale = LossScale(2.0, hysteresis=2)
    assert run(scale, "o o") == [2, 1]
    before = scale.state_dict()
    with pytest.raises(ScaleAtMinimum, match="1, its minimum"):
        scale.update(overflow=True)
    assert scale.state_dict() == before


def test_what_the_config_says() -> None:
    made = LossScale.of(load_config({"fp16": {"enabled": True}}).fp16)
    assert made == LossScale(65536.0, True, 1000, 2, False, 1.0)
    block = {"enabled": True, "initial_scale_power": 3, "loss_scale_window": 7, "hysteresis": 4, "min_loss_scale": 2,
             "consecutive_hysteresis": True}  # fmt: skip
    assert LossScale.of(load_config({"fp16": block}).fp16) == LossScale(8.0, True, 7, 4, True, 2.0)
    constant = LossScale.of(load_config({"fp16": {"enabled": True, "loss_scale": 100}}).fp16)
    assert run(constant, "gog") == [100, 100, 100] and constant.state_dict() == {}
    constant.load_state_dict(made.state_dict())
    assert constant.scale == 100
