"""The least time that a drive needs for a step of a model: bytes of a state format at measured rates."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from tierflow.scheduler.floor import drive_seconds
from tierflow.scheduler.rates import Bandwidths


@dataclass(frozen=True)
class Format:
    """Bytes per parameter and step. ``states``: (read, written) with optimizer states alone on NVMe; ``everything``
    with the weights there too, which the forward and the backward each read once."""

    name: str
    states: tuple[float, float]
    everything: tuple[float, float]

    @property
    def ratio(self) -> tuple[int, int]:
        """Reads to writes while a step runs with everything on NVMe, in whole numbers."""
        scale = max(Fraction(n).denominator for n in self.everything)
        return round(self.everything[0] * scale), round(self.everything[1] * scale)


#: docs/tune.md has the sums: lossless keeps 2 + 2 + 4 + 4 bytes, fp32 4 + 4 + 4. All but fp32 for bf16 models.
FORMATS = {
    f.name: f
    for f in (
        Format("lossless", (10, 10), (14, 12)),
        Format("fp32", (8, 8), (16, 12)),
        Format("bf16", (6, 6), (10, 8)),
        Format("int8", (4.125, 4.125), (8.125, 6.125)),
        Format("int8-24bit", (3.125, 3.125), (7.125, 5.125)),
    )
}


def step_seconds(parameters: int, traffic: tuple[float, float], rates: Bandwidths) -> float:
    """Seconds that the drive is busy in a step; ``traffic``: bytes (read, written) per parameter."""
    read, written = (round(parameters * nbytes) for nbytes in traffic)
    return drive_seconds(read, written, rates)


def step_rate(state: Format, rates: Bandwidths) -> float:
    """Bytes per second of a step with everything on NVMe."""
    scale = 10**9  # whole bytes in, so that the rounding of a single parameter does not count
    return sum(state.everything) * scale / step_seconds(scale, state.everything, rates)


_COUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMBT]?)\s*", re.IGNORECASE)


def parse_parameters(text: str) -> int:
    """13B, 1.2B, 135M or a whole number. Raises ValueError for anything else."""
    match = _COUNT.fullmatch(text)
    factor = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    count = round(float(match[1]) * factor[match[2].upper()]) if match else 0
    if count < 1:
        raise ValueError(f'--parameters is "{text}": expected a number of parameters such as 13B, 1.2B, 135M or 7000000')
    return count
