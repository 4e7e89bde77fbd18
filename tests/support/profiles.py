"""A made-up profile of ``tierflow tune``."""

from __future__ import annotations

from typing import Any

from tierflow.tune.profile import Profile

FIGURES = {"read": 4e9, "write": 0.0, "low": 3e9, "high": 5e9, "latency_p50": 1e-3, "latency_p99": 2e-3,
           "cpu_per_gib": 0.01, "samples": 5}  # fmt: skip


def profile(**changes: Any) -> Profile:
    values = {
        "made": "2026-01-01T00:00:00+00:00", "command": "tierflow tune /mnt/a", "paths": ["/mnt/a"], "weights": [1.0],
        "engine": "io_uring", "block_size": 1 << 20, "queue_depth": 24, "rings": 1, "huge_pages": True, "size": 1 << 30,
        "mixed_ratio": (14, 12), "read": FIGURES, "write": FIGURES | {"read": 0.0, "write": 3e9},
        "mixed": FIGURES | {"read": 1.5e9, "write": 1.25e9}, "complete": True, "seconds": 50.0, "bytes_written": 10**9,
    } | changes  # fmt: skip
    return Profile.model_validate(values)
