"""Which path has which stripe of a store. Pure arithmetic; ``csrc/array.hpp`` follows the same pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence

_MOST_STRIPES = 128  # in a pattern: weights are met to within one in so many


def pattern(weights: Sequence[float]) -> list[int]:
    """The path of each stripe in turn, repeated over the store.

    Every path has its share of any run of stripes, as nearly as whole stripes can: a tensor that is a few stripes
    long is spread like the whole store. A path has at least one stripe in ``_MOST_STRIPES``.
    """
    shares = _shares(weights)
    turns = [((turn + 0.5) / share, path) for path, share in enumerate(shares) for turn in range(share)]
    return [path for _, path in sorted(turns)]


def _shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers of stripes in proportion to the weights, in lowest terms (largest remainders)."""
    total = math.fsum(weights)
    exact = [weight / total * _MOST_STRIPES for weight in weights]
    shares = [max(int(share), 1) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda path: exact[path] - int(exact[path]), reverse=True)
    for path in by_remainder[: max(_MOST_STRIPES - sum(shares), 0)]:
        shares[path] += 1
    divisor = math.gcd(*shares)
    return [share // divisor for share in shares]


def file_sizes(capacity: int, stripe: int, turns: Sequence[int], paths: int) -> list[int]:
    """Bytes that each path has to hold for a store of ``capacity`` bytes; whole stripes where there are several."""
    if paths == 1:
        return [capacity]
    rounds, rest = divmod(-(-capacity // stripe), len(turns))
    return [(rounds * turns.count(path) + turns[:rest].count(path)) * stripe for path in range(paths)]


def check_weights(weights: Sequence[float], paths: int) -> list[float]:
    """Raises ValueError unless there is one positive number for each path."""
    found = [float(weight) for weight in weights]
    if len(found) != paths:
        raise ValueError(f"weights has {len(found)} entries and there are {paths} paths: one for each is needed")
    for index, weight in enumerate(found):
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weights[{index}] is {weight}: a positive number is needed; leave out a path of no use")
    return found
