"""The heat map: block size against requests in flight, as far as the search looked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tierflow.tune.knobs import size
from tierflow.tune.profile import Profile, Tried

MISSING = 'the heat map needs matplotlib: pip install "matplotlib>=3.8" (or "tierflow[finetune]"); everything else was done'
_TITLES = {"read": "reads", "write": "writes", "mixed": "mixed as in a step, both directions"}


def plot(profile: Profile, target: str | Path) -> Path:
    """Draws a PNG, whole or not at all. Raises ImportError without matplotlib, OSError where it cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(MISSING) from None
    kinds = [kind for kind in _TITLES if any(kind in tried.rates for tried in profile.tried)]
    pages = [huge for huge in (True, False) if any(t.huge_pages is huge for t in profile.tried)]
    blocks = sorted({t.block_size for t in profile.tried})
    depths = sorted({t.queue_depth for t in profile.tried})
    width = 2.2 + len(kinds) * (1.2 + 0.55 * len(depths))
    figure = Figure(figsize=(width, 1.5 + len(pages) * (1.0 + 0.42 * len(blocks))), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(pages), len(kinds), squeeze=False)
    for column, kind in enumerate(kinds):
        top = max(t.rates[kind] for t in profile.tried)
        image: Any = None
        for row, huge in enumerate(pages):
            here = [t for t in profile.tried if t.huge_pages is huge]
            axes = grid[row][column]
            image = _panel(axes, here, kind, blocks, depths, top, profile if huge == profile.huge_pages else None)
            axes.set_title(f"{_TITLES[kind]}, {'huge' if huge else '4 KiB'} pages", fontsize=9)
            axes.set_ylabel("block size" if column == 0 else "", fontsize=9)
            axes.set_xlabel("blocks in flight" if row == len(pages) - 1 else "", fontsize=9)
        bar = figure.colorbar(image, ax=[grid[row][column] for row in range(len(pages))], shrink=0.8, pad=0.02)
        bar.ax.tick_params(labelsize=8)
        bar.set_label("GB/s", fontsize=8)
    figure.suptitle(_headline(profile), fontsize=10)
    return _save(figure, Path(target))


def _panel(
    axes: Any, tried: list[Tried], kind: str, blocks: list[int], depths: list[int], top: float, chosen: Profile | None
) -> Any:
    cells = [[float("nan")] * len(depths) for _ in blocks]
    engines = [[""] * len(depths) for _ in blocks]
    for one in tried:
        row, column = blocks.index(one.block_size), depths.index(one.queue_depth)
        rate = one.rates[kind] / 1e9
        if not rate <= cells[row][column]:  # the better of several in one cell; NaN compares as false
            cells[row][column], engines[row][column] = rate, "t" if one.engine == "threads" else ""
    axes.set_facecolor("#f1f1f1")
    image = axes.imshow(cells, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=top / 1e9)
    for row, line in enumerate(cells):
        for column, value in enumerate(line):
            if value == value:
                dark = value < 0.6 * top / 1e9
                axes.text(column, row, f"{value:.2f}{engines[row][column]}", ha="center", va="center", fontsize=7,
                          color="white" if dark else "black")  # fmt: skip
    if chosen is not None:
        place = depths.index(chosen.queue_depth), blocks.index(chosen.block_size)
        axes.add_patch(_frame(place))
    axes.set_xticks(range(len(depths)), [str(d) for d in depths], fontsize=8)
    axes.set_yticks(range(len(blocks)), [size(b) for b in blocks], fontsize=8)
    axes.set_xticks([x - 0.5 for x in range(1, len(depths))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(blocks))], minor=True)
    axes.grid(which="minor", color="white", lw=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return image


def _frame(place: tuple[int, int]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((place[0] - 0.5, place[1] - 0.5), 1, 1, fill=False, ec="#d62728", lw=2.2, zorder=3, clip_on=False)


def _headline(profile: Profile) -> str:
    model = profile.machine.get("device", "")
    where = ", ".join(profile.paths) + (f" ({model})" if model else "")
    return f"{where}\nframed: the profile's setting; t: thread pool, others io_uring; grey: not looked at"


def _save(figure: Any, target: Path) -> Path:
    partial = target.with_name(target.name + ".partial")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target
