"""The schedule as text: the same for the same inputs, and its bytes are the plan's."""

from __future__ import annotations

import re
from pathlib import Path

import tiny
from outcome import Stack

import tierflow


def texts(path: Path) -> tuple[list[str], tierflow.scheduler.engine.Engine]:
    found = []
    for _ in range(2):
        model = Stack(layers=6, width=64)
        caps = tiny.tight(model)
        _, optimizer = tierflow.offload(model, tiny.config("everything", path, **caps))
        found.append(optimizer.engine.schedule())
        engine = optimizer.engine
        optimizer.close()
    return found, engine


def test_the_text_says_what_the_plan_counts(tmp_path: Path) -> None:
    (one, other), engine = texts(tmp_path)
    assert one == other
    lines = one.splitlines()[1:]
    names = [f"layers.{i}" for i in range(6)]
    assert [line.split()[1] for line in lines] == names + names[::-1][1:]
    written = sum(float(n) for n in re.findall(r"updated before, ([\d.]+) MB to NVMe", one))
    assert abs(written * 1e6 - engine.plan.nvme_written) < 6 * 1e4
    brought = sum(len(m.split(", ")) for m in re.findall(r"brings ([^;\n]+)", one))
    states = sum(8 * u.chunk.numel for u in engine.units)
    assert brought * engine.units[0].chunk.nbytes + states == engine.plan.nvme_read
    dropped = sum(len(m.split(", ")) for m in re.findall(r"drops ([^;\n]+)", one))
    assert dropped == brought  # a steady step ends as it began


def test_transfers_start_as_early_as_the_last_step_says(tmp_path: Path) -> None:
    model = Stack(layers=6, width=64)
    _, optimizer = tierflow.offload(model, tiny.config("everything", tmp_path, **tiny.tight(model)))
    for step in range(2):
        model(model.input(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    engine = optimizer.engine
    shown = re.findall(r"NVME +[\d.]+ +-(\d+)", engine.schedule())
    streamed = [engine.plan.homes.of(engine.units[i], tierflow.swap.Kind.PARAM).name == "NVME" for i in engine.recorder.trace.order]
    assert [int(n) for n in shown] == [n for n, on_nvme in zip(engine.look_ahead.leads, streamed, strict=True) if on_nvme]
    optimizer.close()
