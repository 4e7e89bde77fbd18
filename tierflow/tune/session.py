"""A run of tune: calibration, search, and the figures of what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tierflow import aio
from tierflow.tune import load
from tierflow.tune.knobs import MOST_IN_FLIGHT, Setting, Space
from tierflow.tune.load import Kind, Limits, Sample
from tierflow.tune.rig import LEAST_PIECES, TRANSFER, Candidate, Rig
from tierflow.tune.search import MOST_MOVES, Outcome, search
from tierflow.tune.stores import lay_out, open_store

#: Settings to begin with, and the least of them where time is short.
STARTS, FEWEST = 12, 6
#: Of a run's seconds: one load of a candidate's shortest look; one load of a look at the result.
LOOK_SHARE, FINAL_SHARE = 0.0025, 0.008
#: Of a run's bytes: what the search may write, and the result's own figures after it.
SEARCH_BYTES, FINAL_BYTES = 0.7, 0.25
FINAL_LOOKS = 5
#: Neighbours that the search will look at, about.
NEAR = 12
#: Candidates' files of a whole run at most: one for the first look, and eight neighbours wherever the search moves.
MOST_FILES = 1 + STARTS + 8 * (MOST_MOVES + 1)
#: Seconds kept back for the result's figures, of the whole.
KEPT_BACK = 0.2
#: Of a run's seconds, what a slow drive may take at most: to fill a path's file first, to fill a candidate's files, and
#: to empty a full queue.
FIRST_SHARE, FILL_SHARE, QUEUE_SHARE = 0.04, 0.01, 0.005
#: Less in flight is no queue, in seconds and in bytes (a power of two).
SHORTEST_QUEUE, LEAST_QUEUE = 0.03, 1 << 20


@dataclass
class Watcher:
    """What is told of a run under way; each may be replaced."""

    say: Callable[[str], None] = lambda text: None
    look: Callable[[Candidate], None] = lambda candidate: None


@dataclass(frozen=True)
class Figures:
    """What one load gave with the setting that was found; ``samples`` one by one, latencies in seconds."""

    kind: Kind
    samples: tuple[Sample, ...]
    latency: tuple[float, float]

    def rate(self, pick: str = "rate") -> float:
        """Median bytes per second: "rate" of both directions, "read" or "write"."""
        return load.median([getattr(s, pick) for s in self.samples])

    def spread(self) -> tuple[float, float]:
        """The lowest and the highest rate."""
        rates = [s.rate for s in self.samples]
        return min(rates), max(rates)

    def cpu_per_gib(self) -> float:
        """CPU seconds per GiB over all samples: one is too short for the kernel's clock."""
        return sum(s.cpu for s in self.samples) / sum(s.nbytes for s in self.samples) * (1 << 30)


@dataclass
class Finding:
    """The result. ``size``: bytes of each path's file that ``figures`` were taken on; ``tried``: every setting with its
    score and rates by load, best first."""

    best: Setting
    outcome: Outcome
    size: int = 0
    figures: dict[Kind, Figures] = field(default_factory=dict)
    tried: list[tuple[Setting, float, dict[Kind, float]]] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether nothing was cut short."""
        return self.outcome.complete and all(len(f.samples) == FINAL_LOOKS for f in self.figures.values())


class CandidateMeter:
    """Opens, measures and closes candidates for the search; remembers what was measured of each."""

    def __init__(self, rig: Rig, nbytes: int, kept_back: float, starts: int, watcher: Watcher):
        self.rig, self.nbytes, self.kept_back, self.watcher = rig, nbytes, kept_back, watcher
        self.seconds = LOOK_SHARE * rig.budget.seconds
        self.limit = int(rig.budget.limit * SEARCH_BYTES)
        #: What a look may write: the search's bytes, less those that fill files, over the looks that it will take.
        fills = nbytes * len(rig.paths) * (starts + NEAR)
        self.each = max(self.limit - rig.budget.written - fills, self.limit // 10) // (20 * starts)
        self.open: dict[Setting, Candidate] = {}
        self.known: dict[Setting, Candidate] = {}
        self.refused: dict[str, int] = {}

    def add(self, setting: Setting) -> bool:
        """Opens and fills its files, unless they are open; False if it is refused or the means do not suffice."""
        if setting in self.open:
            return True
        # one there must be, however late it is: its figures are then the result
        if self.known and not self._affords(self.nbytes * len(self.rig.paths)):
            return False
        try:
            made = self.rig.candidate(setting, self.nbytes, FILL_SHARE * self.rig.budget.seconds)
        except OSError as error:
            self.refused[str(error)] = self.refused.get(str(error), 0) + 1
            return False
        if setting in self.known:
            made.samples = self.known[setting].samples
        self.open[setting] = self.known[setting] = made
        return True

    def drop(self, setting: Setting) -> None:
        """Closes it."""
        if setting in self.open:
            self.open.pop(setting).close()

    def visit(self, settings: list[Setting], effort: int) -> bool:
        """A look at each in turn; False as soon as seconds or bytes run out."""
        for setting in settings:
            written = self.each * min(effort, 3)
            if not self._affords(written):
                return False
            self.open[setting].visit(self.seconds * min(effort, 3), written)
            self.watcher.look(self.open[setting])
        return True

    def score(self, setting: Setting) -> float:
        """Of the medians of all samples; 0 where there are none."""
        candidate = self.known[setting]
        return candidate.score() if all(candidate.samples.values()) else 0.0

    def close(self) -> None:
        """Closes whatever is open."""
        for setting in list(self.open):
            self.drop(setting)

    def _affords(self, written: int) -> bool:
        budget = self.rig.budget
        return budget.seconds_left > self.kept_back and budget.written + written <= self.limit


def calibrate(rig: Rig, nbytes: int, setting: Setting) -> float:
    """Looks at each path alone, sets the rig's weights by it, and returns the slowest one's bytes per second."""
    slowest = float("inf")
    for number, path in enumerate(rig.paths):
        store = open_store([path], nbytes, setting, [1.0])
        try:
            write, read = _first_look(rig, store, rig.pieces(setting, max(TRANSFER, setting.block_size)))
        finally:
            rig.put_away(store)
        rig.weights[number] = read
        slowest = min(slowest, write, read)
    return slowest


def _first_look(rig: Rig, store: aio.Store, pieces: list[memoryview]) -> tuple[float, float]:
    """Bytes per second (written, read) of a path of which nothing is known."""
    seconds, transfer = rig.budget.seconds, len(pieces[0])
    places, share = lay_out(store, transfer), FIRST_SHARE * seconds / len(rig.paths)
    alone = _fill(rig, store, places[:1], pieces, share)[1]
    pieces = pieces[: max(1, int(alone * share) // transfer)]  # a slow drive gets no long queue even now
    reached, write = _fill(rig, store, places, pieces, share)
    read = load.run("read", store, reached, pieces, Limits(2 * LOOK_SHARE * seconds)).rate
    return write, read


def _fill(rig: Rig, store: aio.Store, places: list[int], pieces: list[memoryview], seconds: float) -> tuple[list[int], float]:
    """(the places written to, bytes per second)"""
    began = rig.budget.elapsed
    reached = load.fill(store, places, pieces, seconds)
    nbytes = len(reached) * len(pieces[0])
    rig.budget.written += nbytes
    return reached, nbytes / max(rig.budget.elapsed - began, 1e-9)


def _queue_bytes(rate: float, seconds: float) -> int:
    """What a drive of ``rate`` bytes per second may have in flight in a run of ``seconds``."""
    most = int(rate * max(QUEUE_SHARE * seconds, SHORTEST_QUEUE))
    return min(MOST_IN_FLIGHT, max(LEAST_QUEUE, 1 << max(most.bit_length() - 1, 0)))


def _final_look(rig: Rig) -> float:
    """Seconds of one load."""
    return max(0.05, FINAL_SHARE * rig.budget.seconds)


def _figures_seconds(rig: Rig) -> float:
    """What the result's figures take where the drive is no hindrance, filling its file apart."""
    return (FINAL_LOOKS + 1) * _final_look(rig) * len(rig.kinds)


def _least_seconds(rig: Rig, rate: float, in_flight: int) -> float:
    """What the result's figures take at least where all paths together move ``rate`` bytes per second: to fill the
    shortest file that will do, and to look once at rates and once at latencies."""
    queue = (LEAST_PIECES + in_flight // TRANSFER) * len(rig.paths)
    return (queue + 2 * load.least_transfers(queue) * len(rig.kinds)) * TRANSFER / rate


def find(rig: Rig, space: Space, first: Setting, candidate_bytes: int, size: int, watcher: Watcher) -> Finding:
    """Searches from ``first`` and a spread of others, then takes the figures of the best on files of ``size``."""
    watcher.say("a first look at each path")
    seconds = rig.budget.seconds
    slowest = calibrate(rig, candidate_bytes, first) / len(rig.paths)  # they may share a drive
    space = replace(space, most_in_flight=_queue_bytes(slowest, seconds))
    first = space.within(first)
    # the slowest path sets what it takes to make a candidate ready
    ready = min(candidate_bytes / slowest, FILL_SHARE * seconds) + 2 * LOOK_SHARE * seconds * len(rig.kinds)
    count = max(FEWEST, min(STARTS, int(0.25 * seconds / ready)))
    starts = [first, *(s for s in space.starts(count) if s != first)][:count]
    least = _least_seconds(rig, slowest, space.most_in_flight)
    kept_back = max(KEPT_BACK * seconds, 1.2 * _figures_seconds(rig), least)
    meter = CandidateMeter(rig, candidate_bytes, kept_back, len(starts), watcher)
    try:
        outcome = search(space, meter, starts, watcher.say)
    finally:
        meter.close()
    finding = Finding(outcome.best, outcome, refused=meter.refused)
    measured = {s: c for s, c in meter.known.items() if all(c.samples.values())}
    finding.tried = sorted(
        ((s, c.score(), {k: c.rate(k) for k in rig.kinds}) for s, c in measured.items()), key=lambda row: -row[1]
    )
    finding.size, finding.figures = take_figures(rig, outcome.best, size, least, watcher)
    return finding


def take_figures(rig: Rig, setting: Setting, size: int, least: float, watcher: Watcher) -> tuple[int, dict[Kind, Figures]]:
    """(the bytes of each file that were used, the figures that are reported: each load several times in turn).

    ``least``: seconds without which a slow drive gives none.
    """
    watcher.say(f"measuring {setting}")
    budget = rig.budget
    seconds = _final_look(rig)
    rest = max(_figures_seconds(rig), least)
    with rig.candidate(setting, size, max(budget.seconds_left - rest, FILL_SHARE * budget.seconds)) as candidate:
        each = int(min(budget.limit * FINAL_BYTES, budget.bytes_left * 0.9)) // (FINAL_LOOKS + 1)
        for _ in range(FINAL_LOOKS):
            began = budget.elapsed
            candidate.visit(seconds, each)
            watcher.look(candidate)
            if budget.seconds_left < 2 * (budget.elapsed - began):  # latencies take as long as a look
                break
        found = {}
        for kind in rig.kinds:
            latencies = candidate.latencies(kind, seconds, each // 2)
            both = load.percentile(latencies, 0.5), load.percentile(latencies, 0.99)
            found[kind] = Figures(kind, tuple(candidate.samples[kind]), both)
    return candidate.nbytes, found


def effects(finding: Finding) -> dict[str, list[tuple[str | int, float]]]:
    """For each knob its values and the score of the best with that value alone, relative to the best itself."""
    scores = {setting: score for setting, score, _ in finding.tried}
    top = scores.get(finding.best)
    found: dict[str, list[tuple[str | int, float]]] = {}
    for knob in (f.name for f in dataclasses.fields(Setting)):
        own = getattr(finding.best, knob)
        values = {
            getattr(s, knob): score / top
            for s, score in scores.items()
            if top and replace(s, **{knob: own}) == finding.best
        }
        found[knob] = sorted(values.items(), key=lambda item: item[0] if isinstance(item[0], str) else f"{item[0]:020d}")
    return found
