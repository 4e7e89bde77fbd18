"""The steps of an optimizer's parameters as one native call.

What was checked of a parameter and its state is kept from step to step, and holds while these are the same tensors over
the same memory: for small parameters the checks would cost more than the arithmetic.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _cpu_adam, choice, state
from .formats import StateFormat
from .operands import FLOATS, Operands, check_apart, check_overlap, operands
from .rules import Rule

__all__ = ["Batch", "Prepared"]


class Seen(NamedTuple):
    """A tensor as it was."""

    ref: weakref.ref[Tensor]
    pointer: int
    numel: int
    dtype: torch.dtype


def _seen(t: Tensor) -> Seen:
    return Seen(weakref.ref(t), t.data_ptr(), t.numel(), t.dtype)


class Prepared(NamedTuple):
    """A parameter's operands, and what they were made of: ``names`` are those of its state, the count of steps last."""

    fmt: StateFormat
    names: tuple[str, ...]
    seen: tuple[Seen, ...]
    operands: Operands
    counter: int  # the address of the count of steps, 0 where it is not one fp32

    def holds(self, p: Tensor, kept: dict[str, Any], fmt: StateFormat) -> bool:
        """Whether all is as it was."""
        if fmt is not self.fmt:
            return False
        t: Tensor | None = p
        for (ref, pointer, numel, dtype), name in zip(self.seen, self.names, strict=True):
            if name:
                t = kept.get(name)
            if t is None or ref() is not t or t.data_ptr() != pointer or t.numel() != numel or t.dtype != dtype:
                return False
            if not t.is_contiguous():
                return False
        return True


class Batch:
    """One step of some parameters. ``prepared``, by id of parameter, is kept from step to step by the caller."""

    def __init__(self, rule: Rule, prepared: dict[int, Prepared]):
        self._rule, self._prepared = rule, prepared
        self._native = _cpu_adam.Batch(choice.isa_index(None))
        self._operands: list[Operands] = []
        self._fresh = False  # something of it is new
        self._gradients: list[Tensor] = []  # copies, alive until they are read
        self._params: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._counts: list[Tensor] = []  # of steps, as far as the native half cannot count them

    def add(
        self, p: Tensor, kept: dict[str, Any], fmt: StateFormat, constants: Callable[[int], tuple[list[float], bool]],
        sign: float, seed: int,
    ) -> None:
        """``kept`` is the parameter's state, completed here; ``constants`` gives the rule's for a step's count.

        Raises ValueError or TypeError for what the kernels cannot take; nothing has been stepped then.
        """
        grad = p.grad
        assert grad is not None
        before = self._prepared.get(id(p))
        if before is not None and before.holds(p, kept, fmt):
            found, count = before.operands, before.counter
            self._params.append(p)
        else:
            found, count = self._prepare(p, kept, fmt)
        code = FLOATS.get(grad.dtype)
        if code is None or grad.layout is not torch.strided:
            raise TypeError(f"a gradient must be a dense tensor of float32, bfloat16 or float16, got {grad.dtype}, {grad.layout}")
        if not grad.is_contiguous():
            grad = grad.contiguous()
            self._gradients.append(grad)
        pointer = grad.data_ptr()
        check_apart(pointer, grad.nbytes, found)
        step = int(kept["step"].item()) + 1
        self._native.add(
            *found[:-1], pointer, code, *constants(step), 1.0, sign, seed & 0xFFFFFFFFFFFFFFFF, step, 0, count
        )
        self._operands.append(found)
        if not count:
            self._counts.append(kept["step"])

    def _prepare(self, p: Tensor, kept: dict[str, Any], fmt: StateFormat) -> tuple[Operands, int]:
        self._fresh = True
        state.complete(kept, p, fmt, self._rule)
        master = None if fmt.master is None else state.MASTER_KEYS[fmt.master]
        names = tuple(name for name in (*self._rule.moments, master, "scale") if name in kept)
        flat = {name: kept[name].view(-1) for name in names}
        # A parameter that is not contiguous passes through a copy; its state is contiguous from the start.
        weight = p.detach().contiguous()
        found = operands(self._rule, weight.view(-1), flat, flat.get(master or ""), flat.get("scale"))
        steps = kept["step"]
        count = steps.data_ptr() if steps.dtype == torch.float32 and steps.is_cpu and steps.numel() == 1 else 0
        if p.is_contiguous():
            self._params.append(p)
            seen = tuple(_seen(t) for t in (p, *(kept[name] for name in names), steps))
            self._prepared[id(p)] = Prepared(fmt, ("", *names, "step"), seen, found, count)
        else:
            self._copies.append((p, weight))
        return found, count

    def run(self) -> None:
        """Steps all of them, and counts it. Raises ValueError, with nothing stepped, where two share memory."""
        if self._fresh:
            check_overlap(_named(self._operands))
        self._native.run(choice.threads_for_step(None, sum(found.n for found in self._operands)))
        increment_version(self._params)  # the kernel wrote behind autograd's back
        for p, weight in self._copies:
            p.copy_(weight)
        if self._counts:
            torch._foreach_add_(self._counts, 1.0)


def _named(found: Iterable[Operands]) -> Iterable[tuple[int, int, str]]:
    for i, entry in enumerate(found):
        yield from ((begin, size, f"{name} of parameter {i}") for begin, size, name in entry.spans)
