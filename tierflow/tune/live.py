"""What a run shows while it is under way: one live block on a terminal, a line for each stage elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tierflow.sizes import format_size
from tierflow.tune.budget import Budget
from tierflow.tune.rig import Candidate
from tierflow.tune.session import Watcher


class Progress(Watcher):
    """A watcher that shows the stage, the time, the bytes written, and the best setting so far. A context manager."""

    def __init__(self, console: Console, budget: Budget):
        super().__init__(self._stage, self._look)
        self._console, self._budget = console, budget
        self._text, self._now, self._looks = "", "", 0
        self._best: tuple[float, str, str] = (0.0, "", "")
        self._live = Live(self._render(), console=console, transient=True, refresh_per_second=8) if console.is_terminal else None
        self._shown = 0.0

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def tell(self, text: str) -> None:
        """A word on where a stage is, for those that do not measure candidates."""
        self._now = text
        self._refresh()

    def _stage(self, text: str) -> None:
        self._text, self._now = text, ""
        if self._live:
            self._refresh(force=True)
        else:
            line = f"{self._budget.elapsed:5.1f} s  {text}"
            best = f"; best so far {self._best[1]}: {self._best[2]}" if self._best[1] else ""
            self._console.print(line + best, highlight=False, soft_wrap=True)

    def _look(self, candidate: Candidate) -> None:
        self._looks += 1
        self._now = str(candidate.setting)
        score = candidate.score()
        if score > self._best[0] or self._best[1] == self._now:
            rates = ", ".join(f"{kind} {candidate.rate(kind) / 1e9:.2f}" for kind in candidate.rig.kinds)
            self._best = (score, self._now, f"{rates} GB/s")
        self._refresh()

    def _refresh(self, force: bool = False) -> None:
        # drawing costs the processor that is being measured: a few times a second is enough
        if self._live and (force or time.monotonic() - self._shown > 0.15):
            self._shown = time.monotonic()
            self._live.update(self._render())

    def _render(self) -> Table:
        spent = min(self._budget.elapsed, self._budget.seconds)
        table = Table.grid(padding=(0, 2))
        table.add_row("stage", Text(self._text))
        table.add_row("now", Text(self._now, style="dim"))
        table.add_row("best so far", Text(self._best[1] or "-", style="bold green"))
        table.add_row("", Text(self._best[2]))
        table.add_row("spent", f"{spent:.0f} of {self._budget.seconds:.0f} s, {format_size(self._budget.written)} written, {self._looks} looks")
        table.add_row("", ProgressBar(total=self._budget.seconds, completed=spent, width=60))
        return table
