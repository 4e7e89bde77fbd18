"""SIMD Adam kernels for CPU tensors, and the torch optimizer on top of them."""

from . import kernels, reference
from .kernels import GradStats
from .optimizer import CPUAdamW

__all__ = ["CPUAdamW", "GradStats", "kernels", "reference"]
