"""The rows of one cell of the grid as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from train.summary import LOSS_TOLERANCE, PHASES

_COLUMNS = (
    "s/step", "min..max", "x torch", "fwd", "bwd", "step", "waiting s", "floor s (x)", "peak RSS GiB (steps)", "NVMe GB/step", "engine's GB", "loss off by",
)  # fmt: skip


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Medians over all timed steps; the ratio is the median over rounds of that round's ratio.

    The peak is the process's, set-up included, and in brackets that of the timed steps alone.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("contender", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    notes = []
    for row in rows:
        if row["status"] == "ok":
            table.add_row(row["title"], *_cells(row))
            if row["loss_difference"] is not None and row["loss_difference"] > LOSS_TOLERANCE:
                notes.append(f"{row['title']}: its losses are not plain torch's, so its times say nothing")
        else:
            table.add_row(row["title"], row["status"])
            notes.append(f"{row['title']}: {row['status']}: {row['error']}")
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def _cells(row: dict[str, Any]) -> list[str]:
    seconds, ratio, engine = row["seconds"], row["ratio_to_torch"], row["engine"]
    waits = [engine[name] for name in engine if name.startswith("wait_")]
    counted = [f"{engine[name] / 1e9:.2f}" for name in ("nvme_read", "nvme_written") if name in engine]
    return [
        f"{seconds['median']:.3f}",
        f"{seconds['min']:.2f}..{seconds['max']:.2f}",
        f"{ratio['median']:.2f}" if ratio else "",
        *(f"{row['phases'][p]:.2f}" for p in PHASES),
        f"{sum(waits):.2f}" if waits else "",
        f"{row['floor']['seconds']:.2f} ({row['floor']['ratio']['median']:.2f})" if row["floor"] else "",
        f"{row['peak_bytes'] / 2**30:.2f} ({row['peak_sampled_bytes'] / 2**30:.2f})",
        f"{row['kernel_read'] / 1e9:.2f}+{row['kernel_written'] / 1e9:.2f}",
        "+".join(counted),
        "" if row["loss_difference"] is None else f"{row['loss_difference']:.0e}",
    ]
