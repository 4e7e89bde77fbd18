"""One picture of a run: the loss over the steps, and what each tier held over the seconds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TIERS = ("DEVICE", "HOST", "NVME")
# Told apart by the colour-blind too, and in grey by their lightness.
_COLOURS = {"DEVICE": "#d55e00", "HOST": "#0072b2", "NVME": "#009e73"}
_LABEL: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 9, "color": "#c0392b"}
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


@dataclass(frozen=True)
class Occupancy:
    """Bytes held in each tier, by tier name, at a time since the run began."""

    seconds: float
    held: Mapping[str, int]


def plot_run(
    path: str | Path,
    *,
    train: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, float]] = (),
    occupancy: Sequence[Occupancy] = (),
    caps: Mapping[str, int] | None = None,
    title: str = "",
) -> Path:
    """Draw (step, loss) points and the tiers' bytes with their caps to a PNG, whole or not at all."""
    # Neither pyplot nor a backend: a user's own matplotlib session in this process is left as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = 2 if occupancy else 1
    figure = Figure(figsize=(9, 3.6 * rows + 0.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    if title:
        figure.suptitle(title, fontsize=11)
    _draw_loss(axes[0], train, held_out)
    if occupancy:
        _draw_occupancy(axes[1], occupancy, caps or {})
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    figure.savefig(partial, format="png")
    os.replace(partial, target)
    return target


def _draw_loss(axes: Axes, train: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    if train:
        steps, losses = zip(*train, strict=True)
        many = len(train) > 30
        colour, marker = ("#9fb6cc", "") if many else ("#33557a", ".")
        axes.plot(steps, losses, lw=1, color=colour, marker=marker, label="training")
        if many:
            axes.plot(steps, _smoothed(losses), color="#33557a", lw=2, label="training, running mean")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color="#c0392b", lw=1, ls=":", marker="o", ms=6, label="held-out")
        # A handful of points can carry their numbers; many would cover the curve.
        for step, loss in held_out if len(held_out) <= 4 else (held_out[0], held_out[-1]):
            # The number goes above its point.
            axes.annotate(f"{loss:.3f}", (step, loss), (0, 9), **_LABEL)
    axes.set(title="Loss", xlabel="optimizer steps done", ylabel="nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.04, y=0.15)
    _finish(axes)


def _draw_occupancy(axes: Axes, occupancy: Sequence[Occupancy], caps: Mapping[str, int]) -> None:
    names = [tier for tier in TIERS if tier in caps or any(point.held.get(tier) for point in occupancy)]
    peak = max([1, *(held for point in occupancy for held in point.held.values())])
    # A cap far above all that was held would press the curves flat: the legend alone tells it.
    lines = {tier: cap for tier, cap in caps.items() if cap <= 2 * peak}
    top = max([peak, *lines.values()])
    scale, unit = next(pair for pair in _UNITS if top >= pair[0])
    seconds = [point.seconds for point in occupancy]
    for tier in names:
        held = [point.held.get(tier, 0) / scale for point in occupancy]
        # A tier's bytes stay until something moves, so the line is a staircase.
        label = f"{tier}, peak {max(held):.3g} {unit}"
        if tier in caps:
            label += f" of {caps[tier] / scale:.3g} {unit}"
        if tier in lines:
            axes.axhline(caps[tier] / scale, color=_COLOURS[tier], lw=1.2, ls="--", alpha=0.8)
        axes.plot(seconds, held, drawstyle="steps-post", color=_COLOURS[tier], lw=1.4, label=label)
    axes.set(title="What each tier holds (dashed: its cap)", xlabel="seconds", ylabel=unit)
    axes.set_ylim(0, top / scale * 1.12)
    axes.set_xlim(0, max(seconds[-1], 1e-3) * 1.01)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        # Beside the curves: inside, it would sooner or later cover one.
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential running mean over some ten steps, freed of its start at zero."""
    keep, mean, out = 0.9, 0.0, []
    for count, value in enumerate(values, start=1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**count))
    return out
