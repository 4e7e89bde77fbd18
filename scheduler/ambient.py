"""What torch keeps for each thread, carried into the threads of micro-batches; and a random stream for each.

[Note: random streams] Checkpointing sets the global generators back for a recomputation. If another micro-batch ran
inside of that, it would draw from the wrong place, and the recomputation would draw other masks than the forward
had. So each micro-batch that rotates has generators' states of its own, seeded from the caller's. Where nothing is
drawn the caller's states are what they were.
"""

from __future__ import annotations

import contextvars
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Ambient:
    """The calling thread's modes, to enter in another thread. Made in the caller's thread."""

    device: torch.device
    grad: bool = field(default_factory=torch.is_grad_enabled)
    threads: int = field(default_factory=torch.get_num_threads)
    cache: bool = field(default_factory=torch.is_autocast_cache_enabled)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def __post_init__(self) -> None:
        kinds = dict.fromkeys(["cpu", self.device.type])
        self._autocast = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds]
        self._stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def enter(self) -> ExitStack:
        """Sets this thread up like the caller's; closing what is returned undoes it."""
        stack = ExitStack()
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        stack.enter_context(torch.set_grad_enabled(self.grad))
        for kind, dtype, enabled in self._autocast:
            if enabled:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self.cache))
        if self._stream is not None:
            # the device's part of a backward would otherwise run in a thread that all micro-batches share
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(torch.cuda.stream(self._stream))
        return stack


def not_carried() -> str | None:
    """What is active in this thread and would be missing in another; None if nothing is."""
    for probe, what in (
        ("_len_torch_function_stack", "a torch function mode (torch.set_default_device is one)"),
        ("_len_torch_dispatch_stack", "a torch dispatch mode"),
    ):
        count = getattr(torch._C, probe, None)
        if count is not None and count() > 0:
            return what
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None and top(True) is not None:
        return "a saved-tensor hook"
    return "inference mode" if torch.is_inference_mode_enabled() else None


class RandomStreams:
    """States of the default generators, one set for each of ``count`` micro-batches. See [Note: random streams]."""

    def __init__(self, count: int, device: torch.device):
        self._generators = default_generators(device)
        self._before = [g.get_state() for g in self._generators]
        source = torch.Generator()
        source.set_state(self._before[0])
        seeds = torch.randint(1 << 62, (count + 1,), generator=source).tolist()
        self._begun = [self._seeded(seed) for seed in seeds]
        self._now = list(self._begun)

    def _seeded(self, seed: int) -> list[torch.Tensor]:
        return [torch.Generator(g.device).manual_seed(seed).get_state() for g in self._generators]

    def resume(self, index: int) -> None:
        """From here on micro-batch ``index`` draws."""
        self._set(self._now[index])

    def suspend(self, index: int) -> None:
        """Notes how far micro-batch ``index`` has drawn."""
        self._now[index] = [g.get_state() for g in self._generators]

    def end(self) -> bool:
        """Gives the caller's generators back, moved on if any micro-batch drew; whether one did."""
        drew = any(not _same(a, b) for a, b in zip(self._now, self._begun, strict=True))
        self._set(self._begun[-1] if drew else self._before)
        return drew

    def _set(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)


class DrawProbe:
    """Whether anything was drawn from the default generators since this was made."""

    def __init__(self, device: torch.device):
        self._generators = default_generators(device)
        self._before = [g.get_state() for g in self._generators]

    def drew(self) -> bool:
        """Compares the states with those at the start."""
        return not _same(self._before, [g.get_state() for g in self._generators])


def default_generators(device: torch.device) -> list[Any]:
    """The generators that operations on the CPU and on ``device`` draw from."""
    generators: list[Any] = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        generators.append(torch.cuda.default_generators[device.index or 0])
    return generators


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
