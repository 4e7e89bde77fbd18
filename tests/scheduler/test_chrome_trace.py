"""The trace file: what its readers require of it, and that it tells of the very bytes that moved."""

from __future__ import annotations

import json
import random

import pytest
import tiny

import tierflow
from tierflow.chrome_trace import events
from tierflow.config import ConfigError
from tierflow.swap import Lane, Span, Traffic


def check(body: dict) -> list[dict]:
    """The format's rules: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU."""
    named = {e["tid"] for e in body["traceEvents"] if e["name"] == "thread_name"}
    done = [e for e in body["traceEvents"] if e["ph"] == "X"]
    assert {e["ph"] for e in body["traceEvents"]} <= {"X", "M", "C"}
    for e in body["traceEvents"]:
        assert isinstance(e["name"], str) and e["name"] and e["pid"] == 1 and isinstance(e["tid"], int)
    for e in done:
        assert e["ts"] >= 0 and e["dur"] >= 0 and e["tid"] in named
    for tid in named:
        open_ends: list[int] = []
        row = sorted((e for e in done if e["tid"] == tid), key=lambda e: (e["ts"], -e["dur"]))
        for begin, end in ((round(e["ts"] * 1e3), round((e["ts"] + e["dur"]) * 1e3)) for e in row):
            while open_ends and open_ends[-1] <= begin:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1], "events of a row lie inside one another or apart"
            open_ends.append(end)
    return done


def test_overlapping_transfers_get_rows_of_their_own_and_lose_nothing() -> None:
    rng = random.Random(3)
    spans = []
    for i in range(300):
        begin = 1e5 + rng.random()
        spans.append(Span(rng.choice([Lane.READ, Lane.WRITE]), f"unit {i}", begin, begin + rng.random() / 20, i))
    made = events(spans, [], [])
    done = check({"traceEvents": made})
    assert sorted(e["args"]["bytes"] for e in done if "args" in e) == list(range(1, 300))
    assert len(done) == 300
    for lane in (Lane.READ, Lane.WRITE):
        most = max(sum(a.begin <= b.begin < a.end for a in spans if a.lane is lane) for b in spans if b.lane is lane)
        assert len({e["tid"] for e in done if e["cat"] == lane.value}) == most  # no more rows than were needed


def test_units_lie_inside_their_forward_on_one_row_and_short_waits_are_left_out() -> None:
    spans = [
        Span(Lane.COMPUTE, "forward", 1.0, 5.0),
        Span(Lane.COMPUTE, "model.layers.0", 1.5, 2.5),
        Span(Lane.READ, "model.layers.1 param", 2.0, 3.0, wait=True),
        Span(Lane.READ, "model.layers.2 param", 3.0, 3.000001, wait=True),
    ]
    done = check({"traceEvents": events(spans, [("step 2", 0.5, 5.5)], [(1.0, {"DEVICE": 7})])})
    assert [(e["name"], e["ts"], e["dur"]) for e in done] == [
        ("step 2", 0.0, 5e6),
        ("forward", 5e5, 4e6),
        ("model.layers.0", 1e6, 1e6),
        ("wait for NVMe read: model.layers.1 param", 1.5e6, 1e6),
    ]
    assert done[1]["tid"] == done[2]["tid"]


def test_the_bytes_of_a_trace_are_those_that_moved(tmp_path) -> None:
    model, path = tiny.llama(layers=3, hidden=64), tmp_path / "trace.json"
    swap = tmp_path / "swap"
    swap.mkdir()
    _, optimizer = tierflow.offload(model, tiny.config("everything", swap, trace=str(path), update="immediate", **tiny.tight(model)))
    moved = Traffic()
    for step in range(1, 7):
        tiny.train(model, optimizer, 1)
        seen = optimizer.engine.take_report().traffic
        if 2 <= step <= 4:
            moved.nvme_read += seen.nvme_read
            moved.nvme_written += seen.nvme_written
            moved.to_device += seen.to_device
        if step == 3:
            assert path.read_text() == ""
        if step == 4:
            written = path.stat().st_mtime_ns
    optimizer.close()
    assert path.stat().st_mtime_ns == written
    body = json.loads(path.read_text())
    done = check(body)
    assert body["otherData"] == {"spans left out": 0}
    assert [e["name"] for e in done if e["cat"] == "steps"] == ["step 2", "step 3", "step 4"]
    sums = {c: sum(e.get("args", {}).get("bytes", 0) for e in done if e["cat"] == c) for c in {e["cat"] for e in done}}
    assert moved.nvme_read and moved.nvme_written
    assert (sums["NVMe read"], sums["NVMe write"]) == (moved.nvme_read, moved.nvme_written)
    assert sums.get("host to device", 0) == moved.to_device
    first, last = (next(e for e in done if e["name"] == f"step {n}") for n in (2, 4))
    end = last["ts"] + last["dur"]
    assert all(e["ts"] + e["dur"] <= end + 1e3 for e in done) and first["ts"] < 1e3
    held = [e["args"] for e in body["traceEvents"] if e["ph"] == "C"]
    assert held and all(set(h) == {"DEVICE", "HOST"} for h in held)
    names = {e["name"] for e in done}
    assert {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj update", "model.layers.0.mlp.up_proj exp_avg", "forward", "backward"} <= names


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path, caplog) -> None:
    for steps in (1, 3):
        model, path = tiny.llama(layers=1, hidden=32), tmp_path / f"{steps}.json"
        _, optimizer = tierflow.offload(model, tiny.config("nvme", tmp_path, trace=str(path)))
        tiny.train(model, optimizer, steps)
        optimizer.close()
    assert "1.json has no trace: the run ended before step 2 did" in caplog.text
    done = check(json.loads((tmp_path / "3.json").read_text()))
    assert [e["name"] for e in done if e["cat"] == "steps"] == ["step 2", "step 3"]


def test_a_path_that_cannot_be_written_shows_before_anything_is_taken(tmp_path) -> None:
    model = tiny.llama(layers=1, hidden=32)
    with pytest.raises(ConfigError, match=r"tierflow\.trace cannot be written"):
        tierflow.offload(model, tiny.config("nvme", tmp_path, trace=str(tmp_path / "missing" / "t.json")))
    _, optimizer = tierflow.offload(model, tiny.config("nvme", tmp_path))
    optimizer.close()
