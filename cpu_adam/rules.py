"""The update rules: which moments each keeps, and the constants that its C++ half (csrc/rule_*.hpp) reads.

A rule's function gets the hyperparameters of a step and returns its constants, in double and in the order in which the
C++ reads them, and whether the step needs the rule's rarer branches. docs/kernels.md says how to add a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import _cpu_adam

__all__ = ["ADAGRAD", "ADAM", "LION", "Hyper", "Rule"]

EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters of one step, which counts from 1. A rule that has no use for one ignores it."""

    step: int
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True


@dataclass(frozen=True)
class Rule:
    """An update rule. ``moments`` names what it keeps for each element, EXP_AVG first."""

    name: str
    code: int
    moments: tuple[str, ...]
    constants: Callable[[Hyper], tuple[list[float], bool]]


def _adam(h: Hyper) -> tuple[list[float], bool]:
    # In double, and in torch's order.
    bias1 = 1 - h.beta1**h.step
    bias2_sqrt = (1 - h.beta2**h.step) ** 0.5
    decay = 1 - h.lr * h.weight_decay if h.decoupled and h.weight_decay != 0 else 1.0
    l2 = 0.0 if h.decoupled else h.weight_decay
    share = 1 - h.beta1
    step_size = (h.lr / bias1) * -1
    constants = [decay, l2, share, h.beta2, 1 - h.beta2, bias2_sqrt, h.eps, step_size]
    # 0.5 in fp32, rounded as the kernel will round it.
    return constants, l2 != 0 or share >= 0.5 - 2**-26


def _lion(h: Hyper) -> tuple[list[float], bool]:
    return [1 - h.lr * h.weight_decay, 1 - h.beta1, 1 - h.beta2, h.lr], False


def _adagrad(h: Hyper) -> tuple[list[float], bool]:
    return [h.weight_decay, h.eps, -h.lr], False


#: Adam and AdamW.
ADAM = Rule("Adam", _cpu_adam.ADAM, (EXP_AVG, EXP_AVG_SQ), _adam)
#: Lion; its weight decay is decoupled.
LION = Rule("Lion", _cpu_adam.LION, (EXP_AVG,), _lion)
#: Adagrad; its weight decay is added to the gradient.
ADAGRAD = Rule("Adagrad", _cpu_adam.ADAGRAD, (EXP_AVG_SQ,), _adagrad)
