"""tierflow: train models whose state does not fit the accelerator.

    model, optimizer = tierflow.offload(model, "offload.json")

Names are resolved on first use, so that ``import tierflow`` and every ``--help`` work without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tierflow.checkpoint import load_checkpoint, save_checkpoint, save_weights
    from tierflow.config import Config, ConfigError, load_config
    from tierflow.loading import load
    from tierflow.offloading import engine_of, gathered, offload
    from tierflow.optimizer import NonFiniteGradient, OffloadOptimizer
    from tierflow.scheduler.guard import EvictedParameterError
    from tierflow.scheduler.placement import DoesNotFit
    from tierflow.swap.types import CapacityError
    from tierflow.training import TrainingEngine, initialize

__version__ = "0.1.0"

_WHERE = {
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "save_weights": "checkpoint",
    "Config": "config",
    "ConfigError": "config",
    "load_config": "config",
    "load": "loading",
    "engine_of": "offloading",
    "gathered": "offloading",
    "offload": "offloading",
    "NonFiniteGradient": "optimizer",
    "OffloadOptimizer": "optimizer",
    "EvictedParameterError": "scheduler.guard",
    "DoesNotFit": "scheduler.placement",
    "CapacityError": "swap.types",
    "TrainingEngine": "training",
    "initialize": "training",
}

__all__ = [
    "CapacityError",
    "Config",
    "ConfigError",
    "DoesNotFit",
    "EvictedParameterError",
    "NonFiniteGradient",
    "OffloadOptimizer",
    "TrainingEngine",
    "engine_of",
    "gathered",
    "initialize",
    "load",
    "load_checkpoint",
    "load_config",
    "offload",
    "save_checkpoint",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tierflow' has no attribute {name!r}")
    module = importlib.import_module(f"tierflow.{_WHERE[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
