"""Opening what is measured: the one place that knows how paths and rings become stores."""

from __future__ import annotations

from tierflow import aio
from tierflow.tune.knobs import Setting

#: Values of the knob ``rings``.
RINGS = (1, 2, 4)


def open_store(paths: list[str], nbytes: int, setting: Setting, weights: list[float]) -> aio.Store:
    """A store over all paths in proportion to ``weights``, ``nbytes`` on the path that has most.

    Raises what ``tierflow.aio.open`` raises.
    """
    capacity = int(nbytes * sum(weights) / max(weights))
    return aio.open(paths, capacity, rings=setting.rings, weights=weights, **setting.aio_options())


def lay_out(store: aio.Store, transfer: int) -> list[int]:
    """Offsets of transfers of ``transfer`` bytes that fill the store."""
    return [store.allocate(transfer).offset for _ in range(store.capacity // transfer)]
