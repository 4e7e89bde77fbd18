"""SIMD Adam kernels for CPU tensors, and the torch optimizer on top of them."""

from . import formats, kernels, reference
from .formats import StateFormat
from .kernels import GradStats
from .optimizer import CPUAdagrad, CPUAdamW, CPULion

__all__ = ["CPUAdagrad", "CPUAdamW", "CPULion", "GradStats", "StateFormat", "formats", "kernels", "reference"]
