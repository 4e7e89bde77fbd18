"""Opening what is measured: the one place that knows how paths and rings become stores."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from tierflow import aio
from tierflow.tune.knobs import Setting

#: Whether ``tierflow.aio.open`` makes one store of several paths and rings; without it each path is a store.
TOGETHER = "rings" in inspect.signature(aio.open).parameters
#: Values of the knob ``rings`` that it can be asked for.
RINGS: tuple[int, ...] = (1, 2, 4) if TOGETHER else (1,)


@dataclass(frozen=True)
class Spot:
    """One transfer's place."""

    store: aio.Store
    offset: int


def open_stores(paths: list[str], nbytes: int, setting: Setting, weights: list[float]) -> list[aio.Store]:
    """Stores over all paths in proportion to ``weights``, ``nbytes`` on the path that has most.

    Raises what ``tierflow.aio.open`` raises.
    """
    most = max(weights)
    if TOGETHER:
        more: dict[str, Any] = {"rings": setting.rings, "weights": weights}
        every: Any = paths
        return [aio.open(every, int(nbytes * sum(weights) / most), **setting.aio_options(), **more)]
    found: list[aio.Store] = []
    try:
        for path, weight in zip(paths, weights, strict=True):
            found.append(aio.open(path, int(nbytes * weight / most), **setting.aio_options()))
    except BaseException:
        for store in found:
            store.close()
        raise
    return found


def lay_out(stores: list[aio.Store], transfer: int) -> list[Spot]:
    """Places of ``transfer`` bytes that fill every store, dealt so that each start of the list has the stores' proportion."""
    room = [store.capacity // transfer for store in stores]
    dealt = sorted(((k + 0.5) / n, i) for i, n in enumerate(room) for k in range(n))
    return [Spot(stores[i], stores[i].allocate(transfer).offset) for _, i in dealt]
