"""Random weights, made one parameter at a time: the model never exists whole."""

from __future__ import annotations

import hashlib

import torch

from tierflow.fill import Source
from tierflow.scheduler.units import Slot


def random_weights(seed: int, std: float) -> Source:
    """A source of initial values that depend on ``seed`` and the parameter's name alone.

    As transformers initialises a model: matrices normal with standard deviation ``std``, norms one, biases zero.
    They are made in the parameter's own dtype, on the CPU, so every placement starts from the same bits.
    """

    def make(slot: Slot, param: torch.nn.Parameter) -> torch.Tensor:
        name = slot.names[0]
        if name.endswith("bias"):
            return torch.zeros(slot.shape, dtype=param.dtype)
        if len(slot.shape) < 2:
            return torch.ones(slot.shape, dtype=param.dtype)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.empty(slot.shape, dtype=param.dtype).normal_(0.0, std, generator=generator)

    return make
