"""``tierflow bench train``: shows the plan, runs the steps, prints and writes what was measured."""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tierflow import machine
from tierflow.bench.options import Options
from tierflow.bench.run import Run, held, prepare, steps
from tierflow.finetune.meter import StepRecord, peak_rss
from tierflow.scheduler.plan import rows
from tierflow.scheduler.report import Report
from tierflow.sizes import format_size as size
from tierflow.swap import Tier
from tierflow.tables import plan_notes, plan_table


def train(options: Options, console: Console) -> None:
    """The whole command. Raises ValueError (ConfigError and DoesNotFit among them) and OSError."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    torch.manual_seed(options.seed)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json {options.json}: no folder {options.json.absolute().parent}; make it, or name another")
    with _memory_may_run_out():
        _run(options, console)


def _run(options: Options, console: Console) -> None:
    with console.status("placing random weights"):
        run = prepare(options)
    try:
        _show(run, console)
        records = []
        for record in steps(run):
            console.print(record.line(options.steps), highlight=False, soft_wrap=True)
            records.append(record)
        _finish(run, records, console)
    finally:
        run.optimizer.close()


@contextmanager
def _memory_may_run_out() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch has no type of its own for this on the CPU
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"memory ran out beside the tiers ({reason}): lower --batch or --sequence-length, use "
            "--checkpointing or --head-chunk, lower --device-memory and --host-memory, or raise --private-memory"
        ) from error


def _show(run: Run, console: Console) -> None:
    shape, engine = run.shape, run.optimizer.engine
    if shape.cut:
        console.print(
            f"[bold red]CUT MODEL[/]: {shape.layers} of {shape.origin}'s {shape.whole_layers} layers. "
            "No figure below is that model's.",
            soft_wrap=True,
        )
    _line(console, f"{_title(run)}; random weights and tokens, on {_hardware(run)}")
    for note in run.config.ignored_notes():
        _line(console, f"note: {note}")
    console.print(plan_table(engine.plan))
    for note in plan_notes(engine.plan):
        _line(console, note)
    store = engine.manager.store
    if store is not None:
        how = "O_DIRECT" if store.direct else "buffered"
        _line(console, f"NVMe: {', '.join(path.path for path in store.paths)} through {store.engine}, {how}")
    _line(console, f"weights placed in {run.build_seconds:.1f} s")


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _title(run: Run) -> str:
    layers = f", CUT to {run.shape.layers} of {run.shape.whole_layers} layers" if run.shape.cut else ""
    again = ", activation checkpointing" if run.options.checkpointing else ""
    return (
        f"{run.shape.origin}{layers}: {run.optimizer.engine.plan.parameters:,} parameters in {str(run.dtype)[6:]}, batch "
        f"{run.batch} x {run.options.sequence_length} tokens x {run.accumulation} micro-batches a step{again}"
    )


def _hardware(run: Run) -> str:
    processor = machine.cpu()
    text = f"{processor.name}, {processor.cores} cores, {size(machine.mem_total())}"
    return f"{torch.cuda.get_device_name(run.device)}; {text}" if run.device.type == "cuda" else text


def summary(run: Run, records: list[StepRecord]) -> dict[str, Any]:
    """The figures of the steps after the first, which learns the order of use (of the first if it is alone).

    Seconds are the median's; tokens and operations a second follow from it.
    """
    timed = records[1:] or records
    seconds = statistics.median(r.seconds for r in timed)
    operations = run.work.operations(run.tokens_per_step, run.options.sequence_length)
    return {
        "steps_timed": len(timed),
        "seconds_per_step": {"median": seconds, "min": min(r.seconds for r in timed), "max": max(r.seconds for r in timed)},
        "tokens_per_second": run.tokens_per_step / seconds,
        "model_tflops": operations / seconds / 1e12,
        "operations_per_step": operations,
        "formula": run.work.formula(),
    }


def _finish(run: Run, records: list[StepRecord], console: Console) -> None:
    found = summary(run, records)
    report = _report(run, records, console)
    table = Table(title=_title(run), title_justify="left", show_header=False)
    for name, value in _figures(run, found):
        table.add_row(name, value)
    console.print(table)
    _line(console, f"model operations a step = {found['formula']}")
    if run.shape.cut:
        console.print("[bold red]CUT MODEL[/]: these are not the whole model's figures")
    if run.options.json is not None:
        run.options.json.write_text(json.dumps(_results(run, records, found, report), indent=1) + "\n")
        _line(console, f"results are in {run.options.json}")


def _figures(run: Run, found: dict[str, Any]) -> list[tuple[str, str]]:
    seconds, engine = found["seconds_per_step"], run.optimizer.engine
    first = "" if run.options.steps == 1 else ", after the first"
    lines = [
        ("tokens/s", f"{found['tokens_per_second']:,.1f}"),
        ("model TFLOP/s", f"{found['model_tflops']:,.3f}"),
        (
            "seconds a step",
            f"{seconds['median']:.2f} (median of {found['steps_timed']}{first}; {seconds['min']:.2f} to {seconds['max']:.2f})",
        ),
    ]
    for tier, most in held(run).items():
        lines.append((f"{tier.name} bytes", f"{size(most)} at most in use of {size(engine.plan.total(tier))} taken"))
    peak = peak_rss()
    lines.append((
        "resident memory",
        f"at most {size(peak)}; {size(run.rss_before)} before the model, at most {size(run.rss_built)} until it was placed",
    ))  # fmt: skip
    if run.device.type == "cuda":
        lines.append(("CUDA memory", f"at most {size(torch.cuda.max_memory_reserved(run.device))} reserved by the process"))
    return lines


def _report(run: Run, records: list[StepRecord], console: Console) -> Report:
    """Where a mean step's time went, and what it moved beside what was planned."""
    assert run.meter is not None
    report, plan = run.meter.report(), run.optimizer.engine.plan
    _line(console, report.text())
    timed = records[1:] or records
    if plan.total(Tier.NVME):
        for name, planned in (("nvme_read", plan.nvme_read), ("nvme_written", plan.nvme_written)):
            moved = statistics.fmean(getattr(r, name) for r in timed)
            _line(console, f"{name.replace('nvme_', 'NVMe bytes ')}: {size(round(moved))}, planned {size(planned)}")
    return report


def _results(run: Run, records: list[StepRecord], found: dict[str, Any], report: Report) -> dict[str, Any]:
    options, engine = run.options, run.optimizer.engine
    plan, store = engine.plan, engine.manager.store
    given = {k: str(v) if hasattr(v, "__fspath__") else v for k, v in asdict(options).items()}
    given["nvme"] = [str(folder) for folder in options.nvme]
    return {
        "command": ["tierflow", *sys.argv[1:]],
        "options": given,
        "shape": {
            "origin": run.shape.origin, "layers": run.shape.layers, "whole_layers": run.shape.whole_layers,
            "cut": run.shape.cut, "parameters": plan.parameters,
        },
        "dtype": str(run.dtype)[6:], "state_format": plan.placement.state_format, "batch": run.batch,
        "accumulation": run.accumulation, "sequence_length": options.sequence_length,
        "machine": {
            "hardware": _hardware(run), "torch": torch.__version__, "python": platform.python_version(),
            "kernel": platform.release(), "threads": torch.get_num_threads(),
            "nvme": None if store is None else {
                "file_system": "+".join(sorted({machine.file_system(p.path) for p in store.paths})), "direct": store.direct, "engine": store.engine,
            },
        },
        "placement": {"param": plan.placement.param.name, "optimizer": plan.placement.optimizer.name},
        "bytes": [{"tier": tier, "what": what, "bytes": n} for tier, what, n in rows(plan)],
        "caps": {t.name: plan.caps.of(t) for t in Tier},
        "held_at_most": {t.name: n for t, n in held(run).items()},
        "planned_nvme_per_step": {"read": plan.nvme_read, "written": plan.nvme_written},
        "resident": {"before": run.rss_before, "built": run.rss_built, "peak": peak_rss()},
        "summary": found,
        "report": {
            "seconds": report.seconds, "floor": report.floor.resources, "bound": report.floor.bound,
            "ratio_to_floor": report.ratio, "advice": report.advice,
            "busy": {lane.value: s for lane, s in report.lanes.busy.items()},
            "waiting": {lane.value: s for lane, s in report.lanes.waiting.items()},
        },
        "steps": [r.as_dict() for r in records],
    }  # fmt: skip
