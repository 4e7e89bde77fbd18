"""Which instruction set the kernels use, and how many threads."""

from __future__ import annotations

import os
import warnings
from functools import cache

from . import _cpu_adam

__all__ = ["check_threads", "isa", "isa_index", "isas", "set_threads", "threads", "threads_for_step"]

_ISAS = tuple(_cpu_adam.isas())
# The processors that this process may use, which may be fewer than there are.
_default_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def isas() -> list[str]:
    """The instruction sets that this CPU can run, best first; "scalar" is always the last."""
    return list(_ISAS)


@cache
def isa_index(name: str | None) -> int:
    """The native half's number of an instruction set; None: of the one in use."""
    if name is None:
        name = os.environ.get("TIERFLOW_ISA") or _ISAS[0]
    if name not in _ISAS:
        raise ValueError(f"instruction set {name!r} is not available here; choose from {', '.join(_ISAS)}")
    return _ISAS.index(name)


def isa() -> str:
    """The instruction set in use: the environment variable TIERFLOW_ISA's (read once), else the best."""
    return _ISAS[isa_index(None)]


def threads() -> int:
    """How many threads a large call uses, the caller's included."""
    return _default_threads


def set_threads(n: int) -> None:
    """Set how many threads a large call uses. Results do not depend on it."""
    global _default_threads
    _default_threads = check_threads(n)


def check_threads(n: int | None) -> int:
    """How many threads a call uses that was given ``n``; None: the default. Raises ValueError for what is no such number."""
    if n is None:
        return _default_threads
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 4096:
        raise ValueError(f"threads must be an integer from 1 to 4096, got {n!r}")
    return n


#: Below this many elements a step is too short for threads to matter.
_WORTH_A_WARNING = 1 << 20
_PRESENT = os.cpu_count() or 1
_warned = False


def threads_for_step(n: int | None, elements: int) -> int:
    """Of a step; says once if a long one uses less than the machine has, unless the caller chose the number."""
    global _warned
    if n is None and not _warned and elements >= _WORTH_A_WARNING and _default_threads < _PRESENT:
        _warned = True
        warnings.warn(
            f"the optimizer step runs on {_default_threads} of this machine's {_PRESENT} processors: this process is "
            "limited to them (taskset, a container), or set_threads() was called",
            RuntimeWarning,
            stacklevel=5,
        )
    return check_threads(n)
