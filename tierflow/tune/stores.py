"""Opening what is measured: the one place that knows how paths and rings become stores."""

from __future__ import annotations

from dataclasses import dataclass

from tierflow import aio
from tierflow.tune.knobs import Setting

#: Values of the knob ``rings`` that ``tierflow.aio.open`` can be asked for.
RINGS: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Spot:
    """One transfer's place. ``path``: the number of the path, where one store is one path."""

    store: aio.Store
    offset: int
    path: int


def open_stores(paths: list[str], nbytes: int, setting: Setting) -> list[aio.Store]:
    """Stores with ``nbytes`` on each path, in the paths' order. Raises what ``tierflow.aio.open`` raises."""
    found: list[aio.Store] = []
    try:
        for path in paths:
            found.append(aio.open(path, nbytes, **setting.aio_options()))
    except BaseException:
        for store in found:
            store.close()
        raise
    return found


def lay_out(stores: list[aio.Store], nbytes: int, transfer: int, weights: list[float]) -> list[Spot]:
    """Places of ``transfer`` bytes on every store, dealt so that each start of the list has the weights' proportion.

    ``weights``: a share of each store; the largest fills its store's ``nbytes``.
    """
    most = max(weights)
    room = [max(2, int(nbytes * w / most) // transfer) for w in weights]
    dealt = sorted((((k + 0.5) / n, i) for i, n in enumerate(room) for k in range(n)))
    return [Spot(stores[i], stores[i].allocate(transfer).offset, i) for _, i in dealt]
