"""Sizes in bytes as people write them: 24GB (10^9), 24GiB (2^30), or a plain number."""

from __future__ import annotations

import math
import re

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")

EXPECTED = 'a size of at least 1 byte, such as "24GB" (10^9), "24GiB" (2^30), "512MB" or a whole number of bytes'


def parse_size(value: int | float | str) -> int:
    """Bytes. Raises ValueError for what is no size, or none of at least one byte."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected {EXPECTED}")
    if isinstance(value, str):
        return _at_least_one(_parse_text(value))
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"expected {EXPECTED}")
    return _at_least_one(int(value))


def _parse_text(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"expected {EXPECTED}")
    number, unit = match.groups()
    factor = _UNITS.get(unit.upper())
    if factor is None:
        near = f'"{number}{unit.upper()}B"' if f"{unit.upper()}B" in _UNITS else '"GB" or "GiB"'
        raise ValueError(f'"{unit}" is no unit of size here; write {near}; expected {EXPECTED}')
    # whole numbers stay exact: a float would round above 2^53
    return int(number) * factor if number.isdigit() else int(float(number) * factor)


def _at_least_one(size: int) -> int:
    if size < 1:
        raise ValueError(f"expected {EXPECTED}")
    return size


def format_size(size: int) -> str:
    """For people, in decimal units: 2.15 GB."""
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if abs(size) >= 0.9995 * factor:  # three digits round up to one of the next unit from there
            digits = f"{size / factor:.3g}"
            return f"{size / factor:.0f} {unit}" if "e" in digits else f"{digits} {unit}"
    return f"{size} B"
