"""The factor on an fp16 loss: constant, or moved by overflows as DeepSpeed's dynamic loss scaler moves it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tierflow.config_models import Fp16Block

#: What a dynamic scale is divided by after an overflow, and multiplied by after ``window`` good steps.
FACTOR = 2.0


class ScaleAtMinimum(FloatingPointError):
    """A gradient overflowed at the lowest scale that is allowed."""


@dataclass
class LossScale:
    """The scale and what decides its next value. Without ``dynamic`` it never moves.

    An overflow halves the scale once ``hysteresis`` overflows have been counted; ``window`` steps without one double
    it, where the step after an overflow (or the first of all) is not counted. Only doubling resets the count of
    overflows, or every good step does if ``consecutive_hysteresis``.
    """

    scale: float
    dynamic: bool = True
    window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    minimum: float = 1.0
    iteration: int = 0
    last_overflow: int = -1
    overflows_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.overflows_left = self.hysteresis

    @classmethod
    def of(cls, block: Fp16Block) -> LossScale:
        """As the config's ``fp16`` block says."""
        return cls(
            block.loss_scale or FACTOR**block.initial_scale_power, not block.loss_scale, block.loss_scale_window,
            block.hysteresis, block.consecutive_hysteresis, block.min_loss_scale,
        )  # fmt: skip

    def update(self, overflow: bool) -> None:
        """Notes one step. Raises ScaleAtMinimum, with nothing changed, if an overflow cannot lower the scale."""
        if not self.dynamic:
            return
        if overflow:
            self._lower()
            self.last_overflow = self.iteration
        else:
            self._raise()
        self.iteration += 1

    def _lower(self) -> None:
        if self.overflows_left > 1:
            self.overflows_left -= 1
            return
        if self.scale <= self.minimum:
            raise ScaleAtMinimum(f"the loss scale is {self.scale:g}, its minimum (fp16.min_loss_scale)")
        self.scale = max(self.scale / FACTOR, self.minimum)

    def _raise(self) -> None:
        good = self.iteration - self.last_overflow - 1
        doubles = good > 0 and good % self.window == 0
        if doubles:
            self.scale *= FACTOR
        if doubles or self.consecutive_hysteresis:
            self.overflows_left = self.hysteresis

    def state_dict(self) -> dict[str, Any]:
        """What moves; JSON-able. Empty if nothing does."""
        names = ("scale", "iteration", "last_overflow", "overflows_left") if self.dynamic else ()
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what ``state_dict`` gave; a constant scale stays, and so does a dynamic one that gets nothing."""
        if not self.dynamic or not state:
            return
        self.scale, self.iteration, self.last_overflow = state["scale"], state["iteration"], state["last_overflow"]
        self.overflows_left = min(state["overflows_left"], self.hysteresis)
