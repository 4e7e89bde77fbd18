"""What one measured process is to do: written by the runner, read by the process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: The optimizer of every contender.
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
#: The 2-norm to which every contender clips its gradients.
CLIP = 1.0


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model with tied embeddings, in fp32."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int


LLAMA_134M = Shape(hidden=576, layers=30, heads=9, kv_heads=3, intermediate=1536, vocab=49152)
TINY = Shape(hidden=64, layers=24, heads=4, kv_heads=2, intermediate=128, vocab=256)


@dataclass(frozen=True)
class Spec:
    """One run: the driver's module and options, the model, and how many steps of what size.

    ``batch`` and ``sequence`` shape a micro-batch; ``accumulation`` of them make a step. ``folder``, of the
    run alone, is on the drive: the runner makes and removes it.
    """

    driver: str
    shape: Shape
    batch: int
    accumulation: int
    sequence: int
    warmup: int
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    folder: str = ""

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Spec:
        """What ``write`` wrote."""
        values = json.loads(path.read_text())
        return cls(**values | {"shape": Shape(**values["shape"])})
