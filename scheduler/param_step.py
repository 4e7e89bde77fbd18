"""What the optimizer kernels need to know about one parameter at one step."""

from __future__ import annotations

from dataclasses import dataclass

from tierflow.cpu_adam.rules import Hyper


@dataclass(frozen=True)
class ParamStep:
    """Fixed at the call of ``step()``; ``hyper.step`` counts this parameter's updates from 1."""

    hyper: Hyper
    maximize: bool
    unscale: float
    clip: float
