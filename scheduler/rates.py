"""How fast the paths of a run are. Numbers alone, so that reading them needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

NEVER = math.inf


@dataclass(frozen=True)
class Bandwidths:
    """Rates in bytes per second, ``update`` in elements per second; infinite for a path that is not in use.

    ``mixed_read`` and ``mixed_write`` hold while the drive does both. ``intake`` counts bytes of incoming gradients.
    """

    read: float = NEVER
    write: float = NEVER
    mixed_read: float = NEVER
    mixed_write: float = NEVER
    to_device: float = NEVER
    to_host: float = NEVER
    update: float = NEVER
    intake: float = NEVER
