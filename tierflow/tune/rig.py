"""Candidates: a setting with its open store, measured as often as the search asks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tierflow import aio
from tierflow.scheduler.rates import Bandwidths
from tierflow.tune import load
from tierflow.tune.budget import Budget, check_memory
from tierflow.tune.floor import Format, step_rate
from tierflow.tune.knobs import MOST_IN_FLIGHT, Setting
from tierflow.tune.load import Kind, Limits, Sample
from tierflow.tune.pages import Pages
from tierflow.tune.stores import lay_out, open_store

#: Transfers are as large as the pieces that the offload block moves, or one block where that is more.
TRANSFER = 4 << 20
#: Transfers under way on each path where one fills the queue: two wait behind it.
LEAST_PIECES = 3


class Rig:
    """What all candidates share: the paths and their ``weights``, memory, and what may be spent. A context manager.

    [Note: files kept] Files of candidates that are out stay until the end: a file system mounted with ``discard`` would
    tell the drive of their blocks some seconds later, in the middle of others' measurement (on one virtual disk, writes
    at 1 instead of 6 GB/s for two seconds).
    """

    def __init__(self, paths: list[str], kinds: tuple[Kind, ...], state: Format, budget: Budget):
        self.paths, self.kinds, self.state, self.budget = paths, kinds, state, budget
        self.weights = [1.0] * len(paths)
        self._pages: dict[bool, Pages] = {}
        self._kept: list[int] = []

    def pages(self, huge: bool) -> Pages:
        """The memory on pages of one kind, made when it is first asked for. Raises NotEnough."""
        if huge not in self._pages:
            nbytes = 2 * MOST_IN_FLIGHT * len(self.paths)
            check_memory(nbytes)
            self._pages[huge] = Pages(nbytes, huge)
        return self._pages[huge]

    def pieces(self, setting: Setting, transfer: int) -> list[memoryview]:
        """Enough for a full queue on every path and two transfers that wait behind it."""
        full = -(-setting.in_flight // transfer)
        return self.pages(setting.huge_pages).pieces(transfer)[: (full + LEAST_PIECES - 1) * len(self.paths)]

    def put_away(self, store: aio.Store) -> None:
        """Closes a store and keeps its files; see [Note: files kept]."""
        self._kept += [os.dup(path.file.fd) for path in store.paths]
        store.close()

    def close(self) -> None:
        """Gives the files back."""
        while self._kept:
            os.close(self._kept.pop())

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def candidate(self, setting: Setting, nbytes: int, seconds: float = float("inf")) -> Candidate:
        """With files of ``nbytes`` on each path, filled as far as ``seconds`` allow. Raises OSError where a store refuses."""
        return Candidate(self, setting, nbytes, seconds)


@dataclass
class Candidate:
    """A setting with its store and every sample that was taken of it. A context manager.

    ``nbytes``: of each path's file; afterwards, the part of it that was filled and is used.
    """

    rig: Rig
    setting: Setting
    nbytes: int
    fill_seconds: float
    samples: dict[Kind, list[Sample]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.samples = {kind: [] for kind in self.rig.kinds}
        self.store = open_store(self.rig.paths, self.nbytes, self.setting, self.rig.weights)
        try:
            self._transfer = max(TRANSFER, self.setting.block_size)
            self._pieces = self.rig.pieces(self.setting, self._transfer)
            places = lay_out(self.store, self._transfer)
            self._offsets = load.fill(self.store, places, self._pieces, self.fill_seconds)
            self.rig.budget.written += len(self._offsets) * self._transfer
            if len(self._offsets) < len(places):
                self.nbytes = self.nbytes * len(self._offsets) // len(places) // 4096 * 4096
        except BaseException:
            self.close()
            raise

    def visit(self, seconds: float, written: int) -> None:
        """One sample of each load: ``seconds`` each, and about ``written`` bytes written in all."""
        writers = sum(kind != "read" for kind in self.rig.kinds) or 1
        for kind in self.rig.kinds:
            limits = Limits(seconds, written // writers)
            sample = load.run(kind, self.store, self._offsets, self._pieces, limits, self.rig.state.ratio)
            self.rig.budget.written += sample.written
            self.samples[kind].append(sample)

    def latencies(self, kind: Kind, seconds: float, written: int) -> list[float]:
        """Seconds of requests of one block each, with just as many under way as the queue holds."""
        depth = self.setting.queue_depth * len(self.rig.paths)
        block = self.setting.block_size
        pieces = [piece[:block] for piece in self._small_pieces(depth)]
        # every block of a transfer in turn: its first ones alone could all lie on one path
        blocks = [start + at for start in self._offsets for at in range(0, self._transfer - block + 1, block)]
        sample = load.run(kind, self.store, blocks, pieces, Limits(seconds, written), self.rig.state.ratio)
        self.rig.budget.written += sample.written
        return list(sample.latencies)

    def _small_pieces(self, count: int) -> list[memoryview]:
        return self.rig.pages(self.setting.huge_pages).pieces(self.setting.block_size)[:count]

    def rate(self, kind: Kind) -> float:
        """Median of the samples' bytes per second, both directions."""
        return load.median([s.rate for s in self.samples[kind]])

    def rates(self) -> Bandwidths:
        """Medians by direction."""

        def middle(kind: Kind, pick: Callable[[Sample], float]) -> float:
            return load.median([pick(s) for s in self.samples[kind]]) if self.samples.get(kind) else 0.0

        return Bandwidths(
            middle("read", lambda s: s.read), middle("write", lambda s: s.write),
            middle("mixed", lambda s: s.read), middle("mixed", lambda s: s.write),
        )  # fmt: skip

    def score(self) -> float:
        """Bytes per second of a step that has everything on this drive; of reads where nothing else was measured."""
        return step_rate(self.rig.state, self.rates()) if "write" in self.samples else self.rate("read")

    def close(self) -> None:
        """Gives threads back, and the files to the rig."""
        self.rig.put_away(self.store)

    def __enter__(self) -> Candidate:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()
