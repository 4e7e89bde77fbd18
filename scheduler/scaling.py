"""Which loss scale the gradients of a backward carry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class UnscaledBackward(RuntimeError):
    """A backward that was not scaled met gradients that are to be."""

    def __init__(self, name: str):
        super().__init__(
            f"the gradient of {name!r} comes from loss.backward() while fp16.enabled is true: call "
            "optimizer.backward(loss), which applies the loss scale. torch.amp.GradScaler cannot be used beside the fp16 "
            "block: leave out one of the two"
        )


@dataclass
class Scaling:
    """Shared by all gradients of an engine.

    ``resting``: what a backward outside ``carrying`` multiplies gradients by; None where none may run (fp16).
    """

    resting: float | None = 1.0
    _factor: float = 1.0
    _running: int = 0

    @contextmanager
    def carrying(self, factor: float) -> Iterator[None]:
        """Backwards inside carry ``factor``. Those of micro-batches that take turns overlap, with the same factor."""
        self._factor, self._running = factor, self._running + 1
        try:
            yield
        finally:
            self._running -= 1

    def of_backward(self, name: str) -> float:
        """The factor in the gradient of parameter ``name`` that a backward delivers. Raises UnscaledBackward."""
        factor = self._factor if self._running else self.resting
        if factor is None:
            raise UnscaledBackward(name)
        return factor
