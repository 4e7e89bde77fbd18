"""How much more an update may stage: memory that nobody has, and memory that idles."""

from __future__ import annotations

from tierflow.scheduler.stager import Stager
from tierflow.scheduler.units import Unit
from tierflow.swap import Tier


class StagingRoom:
    """For pieces of at most ``piece_elements``. ``landing``: bytes of HOST that are left to weights on their way up."""

    def __init__(self, stager: Stager, piece_elements: int, landing: int):
        self._stager, self._piece_elements, self._landing = stager, piece_elements, landing

    def most(self, unit: Unit) -> int:
        """Bytes of staging memory that a piece of the unit needs at most."""
        return self._stager.most(unit, min(self._piece_elements, unit.chunk.numel))

    def free(self) -> int:
        """Bytes of HOST that nobody has, and weights on their way up do not need."""
        return self._stager.manager.pools[Tier.HOST].working.free - self._landing

    def offers(self, unit: Unit, beyond_depth: bool) -> bool:
        """Whether there is memory for one more piece of the unit: that idles, or (``beyond_depth``) that nobody has."""
        need = self.most(unit)
        free = beyond_depth and not self._landing and self.free() >= need  # that serves copies of weights
        return free or self._stager.idle.offers(need)

    def pieces(self, unit: Unit) -> int:
        """How many more pieces of the unit, which stages something, there is memory for."""
        need, idle = self.most(unit), self._stager.idle
        free = self.free() if self._stager.manager.pools[Tier.HOST].working.largest >= need else 0
        return max(free, 0) // need + (idle.free() if idle.offers(need) else 0) // need
