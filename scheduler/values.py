"""A live model's parameters by value: copied, replaced, gathered; and whether a weight that somebody kept is out of date."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from tierflow.scheduler.contents import UserWrites, read_parameter, store_parameter, write_back
from tierflow.scheduler.units import Unit
from tierflow.swap import Tier

if TYPE_CHECKING:
    from tierflow.scheduler.engine import Engine

#: Host memory that ``state_dict`` leaves free.
STATE_DICT_MARGIN = 256 << 20


class Values:
    """What reads and writes whole parameters of an engine's model, outside its forward and backward."""

    def __init__(self, engine: Engine):
        self._engine, self._manager = engine, engine.manager
        self._generation = dict.fromkeys(range(len(engine.units)), 0)
        self.user_writes = UserWrites(engine.manager, engine.units)

    def generation(self, unit: Unit, offset: int) -> tuple[int, int]:
        """How often the weight at element ``offset`` was updated, or written by the user: a saved weight of an older
        generation is out of date."""
        if self._manager.home(unit.chunk) is not Tier.DEVICE:
            return self._generation[unit.index], 0
        at = bisect.bisect(unit.slots, offset, key=lambda slot: slot.offset) - 1
        return self._generation[unit.index], unit.params[at]._version  # there it can be written without our knowing

    def changed(self, unit: Unit) -> None:
        """Weights that were saved before are out of date."""
        self._generation[unit.index] += 1

    def home_was_written(self, unit: Unit) -> None:
        """The home copy was replaced from outside: caches are dropped, saved weights are out of date."""
        self._manager.wrote(unit.chunk, self._manager.home(unit.chunk))
        self.changed(unit)
        self.user_writes.master_came_too(unit)

    def read(self, param: Any) -> torch.Tensor:
        """A copy for ``state_dict``. Raises MemoryError where the host has no room for it."""
        unit, slot = self._engine.where(param)
        self._engine.settle([unit])
        if psutil.virtual_memory().available < unit.chunk.nbytes + STATE_DICT_MARGIN:
            raise MemoryError(
                f"state_dict() has no room on the host for {param._tierflow_name!r}: use "
                "tierflow.save_weights(model, folder), which streams"
            )
        return read_parameter(self._manager, unit, slot, self._engine.victims())

    def write(self, param: Any, values: torch.Tensor) -> Any:
        """Replaces the parameter, as ``load_state_dict`` does; returns it."""
        unit, slot = self._engine.where(param)
        self._engine.settle([unit])
        store_parameter(self._manager, unit, slot, values.cpu(), self._engine.victims())
        self.home_was_written(unit)
        return param

    @contextmanager
    def gathered(self, params: list[nn.Parameter]) -> Iterator[None]:
        """Parameters pinned on DEVICE; what the body changed is written back to the home at the end.

        Those that are not managed are where they are.
        """
        wanted = {id(p) for p in params}
        units = [u for u in self._engine.units if any(id(p) in wanted for p in u.params)]
        held: list[Unit] = []
        try:
            self._engine.settle(units)
            for unit in units:
                self._engine.acquire(unit, foreseen=False)
                held.append(unit)
            yield
            for unit in held:
                self._write_back(unit)
        finally:
            for unit in held:
                self._engine.release(unit)

    def _write_back(self, unit: Unit) -> None:
        """Carries a changed DEVICE copy home, and forgets the remainder of every weight that changed."""
        if write_back(self._manager, unit, self._engine.victims()) and self._manager.home(unit.chunk) is not Tier.DEVICE:
            self.changed(unit)
