"""``tierflow tune``: looks, searches, and says and writes what it found."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from tierflow import aio, machine
from tierflow.sizes import format_size
from tierflow.stopping import exit_code
from tierflow.tune import report
from tierflow.tune.budget import Budget, check_space
from tierflow.tune.facts import Facts, cautions, look
from tierflow.tune.floor import FORMATS
from tierflow.tune.knobs import Setting, Space
from tierflow.tune.live import Progress
from tierflow.tune.load import KINDS, Kind
from tierflow.tune.options import Job, Options, understand
from tierflow.tune.plot import plot
from tierflow.tune.profile import LoadFigures, Profile, Tried
from tierflow.tune.rig import Rig
from tierflow.tune.session import MOST_FILES, Figures, Finding, effects, find
from tierflow.tune.stores import RINGS
from tierflow.tune.sustained import Sustained, wear, write_on

#: A candidate's file, next to that of the result; and the largest that is of use for a short look.
CANDIDATE_SHARE, CANDIDATE_BYTES = 8, 96 << 20
#: Seconds kept back for the heat map.
DRAWING = 2.0


def tune(options: Options, console: Console) -> Profile:
    """Runs it. With ``options.json`` the profile alone goes to stdout and all else to ``console``.

    Raises ValueError and OSError for what a user can put right, ImportError where the heat map cannot be drawn.
    """
    job = understand(options)
    budget = Budget(options.time - min(DRAWING, options.time / 10))
    facts = look(job.paths)
    console.print(report.device_table(facts))
    doubts = cautions(facts)
    for line in doubts:
        console.print(f"[yellow]note:[/] {line}", highlight=False, soft_wrap=True)
    if job.sustained is not None:
        console.print(f"[yellow]wear:[/] {wear(job.sustained)}", highlight=False, soft_wrap=True)
    with _stopped_cleanly(console, budget):
        profile = _measure(options, job, facts, doubts, budget, console)
        _tell(profile, options, job, console)
    return profile


def _measure(options: Options, job: Job, facts: Facts, doubts: list[str], budget: Budget, console: Console) -> Profile:
    small = max(64 << 20, min(CANDIDATE_BYTES, job.size // CANDIDATE_SHARE))
    check_space(job.paths, small * MOST_FILES + job.size, "free some space, or give a smaller --size")
    kinds: tuple[Kind, ...] = ("read",) if options.read_only else KINDS
    pages = (False, True) if facts.huge_pages in ("always", "madvise") else (False,)
    space = Space(engine=facts.engines, rings=RINGS, huge_pages=pages)
    first = Setting(facts.engines[0], aio.DEFAULT_BLOCK_SIZE, aio.DEFAULT_QUEUE_DEPTH, 1, pages[-1])
    with Rig(job.paths, kinds, FORMATS[options.optimizer_state], budget) as rig, Progress(console, budget) as progress:
        finding = find(rig, space, first, small, job.size, progress)
        lasting = _sustain(job, rig, finding, progress) if job.sustained else None
        found = _profile(options, job, facts, doubts, rig, finding)
    return found.model_copy(
        update={"seconds": round(budget.elapsed, 2), "bytes_written": budget.written, "sustained": lasting}
    )


def _sustain(job: Job, rig: Rig, finding: Finding, progress: Progress) -> dict[str, object]:
    assert job.sustained is not None
    progress.say(f"writing {format_size(job.sustained)} on")
    rig.budget.limit += job.sustained
    file_bytes = _room(job) // 4096 * 4096
    found = write_on(rig, finding.best, job.sustained, file_bytes, lambda done, rate: progress.tell(f"{format_size(done)}: {rate / 1e9:.2f} GB/s"))
    return dataclasses.asdict(found)


def _room(job: Job) -> int:
    """Bytes of each path's file for --sustained: all of it where that leaves half of what is free, else that half."""
    assert job.sustained is not None
    share = -(-job.sustained // len(job.paths))
    return max(job.size, min(share, *(machine.disk_free(path) // 2 // len(job.paths) for path in job.paths)))


def _profile(options: Options, job: Job, facts: Facts, doubts: list[str], rig: Rig, finding: Finding) -> Profile:
    best = finding.best
    device = next((leaf.model or leaf.name for p in facts.paths if p.device for leaf in p.device.leaves()), "")
    cpu = machine.cpu()
    return Profile(
        made=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=shlex.join(["tierflow", *sys.argv[1:]]),
        paths=job.paths, weights=[w / sum(rig.weights) for w in rig.weights], engine=best.engine,
        block_size=best.block_size, queue_depth=best.queue_depth, rings=best.rings, huge_pages=best.huge_pages,
        size=finding.size, mixed_ratio=FORMATS[options.optimizer_state].ratio,
        read=_load(finding.figures["read"]),
        write=_load(finding.figures["write"]) if "write" in finding.figures else None,
        mixed=_load(finding.figures["mixed"]) if "mixed" in finding.figures else None,
        effects={knob: {str(value): round(ratio, 4) for value, ratio in values} for knob, values in effects(finding).items()},
        tried=[Tried(**dataclasses.asdict(s), score=score, rates={str(k): v for k, v in rates.items()}) for s, score, rates in finding.tried],
        complete=finding.complete, seconds=0.0, bytes_written=0, cautions=doubts,
        machine={
            "device": device, "cpu": cpu.name, "cores": cpu.cores, "kernel": platform.release(),
            "refused_settings": finding.refused, **dataclasses.asdict(facts),
        },
    )  # fmt: skip


def _load(figures: Figures) -> LoadFigures:
    low, high = figures.spread()
    return LoadFigures(
        read=figures.rate("read"), write=figures.rate("write"), low=low, high=high, latency_p50=figures.latency[0],
        latency_p99=figures.latency[1], cpu_per_gib=figures.cpu_per_gib(), samples=len(figures.samples),
    )  # fmt: skip


def _tell(profile: Profile, options: Options, job: Job, console: Console) -> None:
    console.print(report.figures_table(profile))
    if any(len(values) > 1 for values in profile.effects.values()):
        console.print(report.effects_table(profile))
    lines = []
    if not profile.complete:
        lines.append("seconds or bytes ran out before all was looked at as often as meant: a longer --time may find better")
    if profile.size < job.size:
        lines.append(f"the drive took {format_size(profile.size)} of --size {format_size(job.size)} in the time: the figures are of so much")
    if profile.sustained:
        lines += report.sustained_lines(Sustained(**profile.sustained))
    if job.parameters:
        lines += report.floor_lines(profile, job.parameters, FORMATS[options.optimizer_state])
    profile.write_to(options.output)
    lines.append(f'profile: {options.output}; in a config: "aio": "{options.output}"')
    lines += report.deepspeed_lines(profile)
    lines.append(_draw(profile, options.output.with_suffix(".png")))
    lines.append(f"written: {format_size(profile.bytes_written)} in {profile.seconds:.0f} s; no file is left")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if options.json:
        print(profile.model_dump_json(indent=1))


def _draw(profile: Profile, picture: Path) -> str:
    if not profile.tried:
        return "no heat map: the time was over before a second setting was looked at"
    try:
        return f"heat map: {plot(profile, picture)}"
    except ImportError as error:
        return str(error)


@contextmanager
def _stopped_cleanly(console: Console, budget: Budget) -> Iterator[None]:
    """Ctrl-C and SIGTERM end what is under way, give the files back, and say what was written."""
    try:
        yield
    except KeyboardInterrupt as stop:
        console.print(f"stopped; {format_size(budget.written)} were written, and no file is left", highlight=False)
        raise SystemExit(exit_code(stop)) from None


