"""Which loss scale the gradients of a backward carry."""

from __future__ import annotations

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

    ``factor``: what the backward that may run now multiplies gradients by; None where none may run (fp16, outside
    ``OffloadOptimizer.backward``).
    """

    factor: float | None = 1.0

    def of_backward(self, name: str) -> float:
        """The factor in the gradient of parameter ``name`` that a backward delivers. Raises UnscaledBackward."""
        if self.factor is None:
            raise UnscaledBackward(name)
        return self.factor
