"""AdamW on fp32 masters in numpy, every operation rounded once: it shares no code with the kernels."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

LR, DECAY, EPS = 1e-2, 0.1, 1e-8
BETA1, BETA2 = 0.9, 0.999


def f32(exact: Fraction) -> np.float32:
    """The fp32 value nearest to an exact number, ties to even: one rounding."""
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    distance = {n: abs(Fraction(float(n)) - exact) for n in near}
    best = min(distance.values())
    nearest = [n for n in near if distance[n] == best]
    return next((n for n in nearest if int(n.view(np.int32)) % 2 == 0), nearest[0])


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded once, in exact fractions: no arithmetic is shared with the kernels."""
    a, b, c = np.broadcast_arrays(a, b, c)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    return np.array([f32(e) for e in exact], np.float32)


class Master:
    """One parameter's fp32 AdamW, every operation rounded once in the order that torch's foreach AdamW has."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight.float().numpy().reshape(-1).copy()
        self.m, self.v = np.zeros_like(self.weight), np.zeros_like(self.weight)

    def step(self, grad: torch.Tensor, t: int) -> None:
        g, one = grad.float().numpy().reshape(-1), np.float32
        self.weight = self.weight * one(1 - LR * DECAY)
        self.m = fma(one(1 - BETA1), g - self.m, self.m)
        self.v = fma(one(1 - BETA2) * g, g, self.v * one(BETA2))
        denom = np.sqrt(self.v) / one((1 - BETA2**t) ** 0.5) + one(EPS)
        self.weight = self.weight + (one(-(LR / (1 - BETA1**t))) * self.m) / denom
