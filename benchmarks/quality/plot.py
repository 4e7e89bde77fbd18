"""The curves of all runs, one picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from quality.cases import CASES

WINDOW = 20


def plot(rows: list[dict[str, Any]], unit: str, path: Path) -> None:
    """Writes a PNG: fp32 weights on the left, bf16 weights on the right; ``unit`` is what a loss is of."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True)
    cases = {c.name: c for c in CASES}
    for row in rows:
        case = cases[row["case"]]
        style = "k" if case.state_format is None else "-"
        smooth = [statistics.fmean(row["train"][max(0, i - WINDOW) : i + 1]) for i in range(len(row["train"]))]
        axes[int(case.bf16)].plot(smooth, style, label=f"{case.name}: {row['final']:.4f}", linewidth=1)
    for axis, title in zip(axes, ("fp32 weights", "bf16 weights"), strict=True):
        axis.set(xlabel="step", title=f"{title}: loss, mean of 20 steps (legend: held out, at the end)")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"nats per {unit}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
