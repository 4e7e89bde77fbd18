"""However updates overlap with forward and backward, every bit is that of the plain schedule."""

from __future__ import annotations

import os
from pathlib import Path

import overlap
import pytest
import tiny
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from overlap import STEPS, Case

EXAMPLES = int(os.environ.get("TIERFLOW_EXAMPLES", "40"))
PLACEMENTS = ["everything", "everything", "nvme", "param_host_states_nvme", "param_host", "host"]


@st.composite
def cases(draw: st.DrawFn, speculative: bool = False) -> Case:
    """``speculative``: such as update in the backward."""
    loop = draw(st.sampled_from(["owned", "batch"] if speculative else ["owned", "owned", "batch", "plain"]))
    fp16 = draw(st.sampled_from([False, False, False, True]))
    accumulation = draw(st.sampled_from([1, 1, 2, 3]))
    schedule = draw(st.booleans())
    events = [e for e in overlap.EVENTS if not (e == "group" and schedule)]
    places = ["before_step", "between", *(["after_step"] if loop != "batch" else [])]  # train_batch zeroes gradients itself
    happen = st.tuples(st.integers(0, STEPS - 1), st.sampled_from(places), st.sampled_from(events))
    placement = draw(st.sampled_from(["everything", "nvme"] if speculative else PLACEMENTS))
    spills = not speculative and "nvme" in tiny.PLACEMENTS[placement]
    return Case(
        model=draw(st.sampled_from(["stack", "stack", "tower", "llama", "frozen_llama", "untied"])),
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16"])) if not fp16 else "float32",
        placement=placement, gradients=draw(st.sampled_from(["host", "host", "auto", "nvme"])) if spills else "host",
        update=draw(st.sampled_from(["speculative"] if speculative else ["speculative", "deferred", "immediate", "auto"])),
        loop=loop, accumulation=accumulation,
        order=draw(st.sampled_from(["micro_batch", "layer_major"])) if loop == "batch" else "micro_batch",
        clip=draw(st.sampled_from([0.0, 0.0, 1e6, 1.0, 1e-3])),
        groups=draw(st.sampled_from([1, 2])), schedule=schedule, fp16=fp16,
        through_host=draw(st.booleans()), slack=draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.6, 3.0])),
        seed=draw(st.integers(0, 1 << 16)),
        delay=draw(st.sampled_from([0.0, 0.0, 2e-4, 2e-3])), worker=draw(st.booleans()),
        loud_step=draw(st.sampled_from([-1, -1, 3, 6])),
        bad_step=draw(st.sampled_from([-1, -1, 3, 4])), abandoned=draw(st.sampled_from([-1, -1, 2, 5])),
        events=tuple(draw(st.lists(happen, max_size=3))),
    )  # fmt: skip


@pytest.mark.parametrize("speculative", [False, True])
def test_any_schedule_equals_the_plain_one(tmp_path: Path, speculative: bool) -> None:
    committed, undone = [], []

    @settings(max_examples=EXAMPLES // 2, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=cases(speculative))
    def run(case: Case) -> None:
        note(repr(case))
        seen = overlap.check(case, tmp_path)
        committed.append(seen.committed)
        undone.append(seen.undone)

    run()
    if speculative:
        assert sum(n > 0 for n in committed) >= EXAMPLES // 20, "hardly any update in the backward counted"
        assert sum(n > 0 for n in undone) >= EXAMPLES // 20, "hardly any update in the backward was undone"
