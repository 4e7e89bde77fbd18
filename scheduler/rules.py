"""What the optimizer kernels need to know about one parameter at one step."""

from __future__ import annotations

from dataclasses import dataclass

from tierflow.cpu_adam.rules import Hyper


@dataclass(frozen=True)
class Rule:
    """Hyperparameters at the call of ``step()``; ``step`` counts this parameter's updates from 1."""

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    unscale: float
    clip: float

    @property
    def hyper(self) -> Hyper:
        """As the kernels take them."""
        return Hyper(self.step, self.lr, self.beta1, self.beta2, self.eps, self.weight_decay, self.decoupled)
