"""From samples to medians, spreads and the ratios that the targets name."""

from __future__ import annotations

import statistics
from typing import Any

GIB = 1 << 30


def row(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one contender: GB/s (median, lowest, highest), CPU and kernel seconds per GiB, every sample; or "error"."""
    errors = [s["error"] for s in samples if "error" in s]
    if errors:
        return {"error": errors[0]}
    rates = [s["bytes"] / s["seconds"] for s in samples]
    moved = sum(s["bytes"] for s in samples)
    return {
        "rate": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "cpu_per_gib": sum(s["cpu"] for s in samples) / moved * GIB,
        "kernel_per_gib": sum(s["kernel"] for s in samples) / moved * GIB,
        "samples": rates,
    }


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """tierflow to the best of all others with the same pages, to DeepSpeed as it comes and with the same pages, and what
    pages alone give."""
    rate = {key: r["rate"] for key, r in rows.items() if "rate" in r}
    found: dict[str, float] = {}
    for pages in ("huge", "4k"):
        own = rate.get(f"tierflow, {pages}")
        others = [r for key, r in rate.items() if key.endswith(f", {pages}") and not key.startswith("tierflow")]
        if own and others:
            found[f"to_best_{pages}"] = own / max(others)
    own, shipped = rate.get("tierflow, huge"), rate.get("deepspeed, shipped")
    if own and shipped:
        found["to_deepspeed"] = own / shipped
    for pages in ("huge", "4k"):
        if f"tierflow, {pages}" in rate and f"deepspeed, {pages}" in rate:
            found[f"to_deepspeed_{pages}"] = rate[f"tierflow, {pages}"] / rate[f"deepspeed, {pages}"]
    if own and "tierflow, 4k" in rate:
        found["pages"] = own / rate["tierflow, 4k"]
    return found
