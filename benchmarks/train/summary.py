"""From the rounds' samples to one row a contender: medians, spread, ratios to plain torch, and whether losses agree."""

from __future__ import annotations

import math
import statistics
from typing import Any

from train.contenders import Contender

Runs = dict[str, list[dict[str, Any]]]

#: Losses of all contenders agree to this, relatively: their sums differ in order alone.
LOSS_TOLERANCE = 1e-3
PHASES = ("forward", "backward", "step")


def rows(contenders: list[Contender], results: Runs, missing: dict[str, str]) -> list[dict[str, Any]]:
    """``missing``: for an engine that cannot run, why."""
    torch_runs = results.get("torch", [])
    baseline = [] if _error(torch_runs) else torch_runs
    return [_row(c, results[c.name], baseline, missing) for c in contenders]


def _row(contender: Contender, runs: list[dict[str, Any]], torch: list[dict[str, Any]], missing: dict[str, str]) -> Any:
    head: dict[str, Any] = {"contender": contender.name, "title": contender.title}
    failed = _error(runs)
    if failed is not None:
        return head | {"status": "failed"} | failed
    if not runs:
        return head | {"status": "not run", "error": missing[contender.engine]}
    seconds = [s["seconds"] for r in runs for s in r["steps"]]
    return head | {
        "status": "ok",
        "seconds": spread(seconds),
        "phases": {p: statistics.median(s.get(p, 0.0) for r in runs for s in r["steps"]) for p in PHASES},
        "ratio_to_torch": _ratios(runs, torch),
        "peak_bytes": max(r["peak_bytes"] for r in runs),
        "peak_sampled_bytes": max(r["peak_sampled_bytes"] for r in runs),
        "imported_bytes": statistics.median(r["imported_bytes"] for r in runs),
        "kernel_read": statistics.median(r["kernel_read"] for r in runs),
        "kernel_written": statistics.median(r["kernel_written"] for r in runs),
        "engine": _medians([r["engine"] for r in runs]),
        "floor": floor_of(runs),
        "losses": runs[0]["losses"],
        "loss_difference": _loss_difference(runs, torch),
        "facts": runs[0]["facts"],
        "rounds": [{"steps": r["steps"], "engine": r["engine"], "kernel_read": r["kernel_read"],
                    "kernel_written": r["kernel_written"], "peak_bytes": r["peak_bytes"],
                    "peak_sampled_bytes": r["peak_sampled_bytes"]} for r in runs],
    }  # fmt: skip


def floor_of(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The floor that the engine computed, and the step's time over it, both as medians over rounds."""
    if any(r["floor"] is None for r in runs):
        return None
    ratios = [_median_seconds(r) / r["floor"]["seconds"] for r in runs]
    return {
        "seconds": statistics.median(r["floor"]["seconds"] for r in runs),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "resources": runs[-1]["floor"]["resources"],
        "last_round": runs[-1]["floor"]["lanes"],
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, extremes and the middle half."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "q1": low, "q3": high}


def _error(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next(({k: r[k] for k in ("error", "where", "output") if k in r} for r in runs if "error" in r), None)


def _ratios(runs: list[dict[str, Any]], torch: list[dict[str, Any]]) -> dict[str, float] | None:
    """Of each round's medians, so that a machine whose speed drifts does so for both; over rounds."""
    pairs = zip(map(_median_seconds, runs), map(_median_seconds, torch), strict=False)
    found = [mine / base for mine, base in pairs]
    return {"median": statistics.median(found), "min": min(found), "max": max(found)} if found else None


def _median_seconds(run: dict[str, Any]) -> float:
    return statistics.median(s["seconds"] for s in run["steps"])


def _medians(counts: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(c[name] for c in counts) for name in counts[0]}


def _loss_difference(runs: list[dict[str, Any]], torch: list[dict[str, Any]]) -> float | None:
    """The largest relative difference from plain torch's loss at the same step; infinite for a NaN."""
    if not torch:
        return None
    pairs = [(a, b) for r in runs for a, b in zip(r["losses"], torch[0]["losses"], strict=True)]
    return max(abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs)
