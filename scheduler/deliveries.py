"""The order in which micro-batches deliver a parameter's gradient.

[Note: order of deliveries] Sums of floats depend on their order. In the plain order all of a micro-batch's parts of a
gradient are added before the next one's, and so it must be here. How many parts there are is learned: one, unless
a block shared by reentrant checkpoints delivers one for each. The wait is in a hook of the parameter that autograd
calls before it adds, where it holds no lock; in the hook after it, it does.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tierflow.scheduler.binding import raw

log = logging.getLogger("tierflow")


@dataclass
class Delivered:
    """How often one micro-batch has delivered each parameter's gradient, by id of the parameter."""

    index: int
    counts: dict[int, int] = field(default_factory=dict)
    finished: bool = False


class Deliveries:
    """Calls ``arriving(key)`` before each gradient is added, and knows whose turn it is."""

    def __init__(self, params: Iterable[torch.Tensor], arriving: Callable[[int], None]):
        self._expected: dict[int, int] = {}
        self._warned = False
        hook = _weakly(arriving)
        with raw():
            self._handles = [p.register_hook(hook(id(p))) for p in params if p.requires_grad]

    def may(self, mine: Delivered, others: Sequence[Delivered], key: int) -> bool:
        """Whether every earlier micro-batch has delivered all its parts for the parameter."""
        wanted = self._expected.get(key)
        return all(
            o.finished or (wanted is not None and o.counts.get(key, 0) >= wanted)
            for o in others
            if o.index < mine.index
        )

    def note(self, mine: Delivered, others: Sequence[Delivered], key: int) -> None:
        """One part of ``mine`` is about to be added."""
        mine.counts[key] = mine.counts.get(key, 0) + 1
        if any(o.index > mine.index and key in o.counts for o in others) and not self._warned:
            self._warned = True
            log.warning(
                "in a layer-major step a gradient was added in another order than micro-batch by micro-batch, since a "
                "parameter was used in more places than in any step before: the sum may differ in its last bits"
            )

    def finish(self, mine: Delivered) -> None:
        """The micro-batch delivers no more."""
        mine.finished = True
        for key, count in mine.counts.items():
            self._expected[key] = max(count, self._expected.get(key, 0))

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _weakly(arriving: Callable[[int], None]) -> Callable[[int], Callable[[Any], None]]:
    """Hooks without a reference to the engine: Python's collector cannot see into autograd's."""
    found = weakref.WeakMethod(arriving)

    def of(key: int) -> Callable[[Any], None]:
        def hook(_grad: Any) -> None:
            alive = found()
            if alive is not None:
                alive(key)

        return hook

    return of
