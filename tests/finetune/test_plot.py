from __future__ import annotations

import math

import pytest

from tierflow.finetune.plot import Occupancy, plot_run

OCCUPANCY = [Occupancy(t / 10, {"DEVICE": 2 * 10**8, "HOST": 10**7 * t, "NVME": 10**9}) for t in range(30)]
TRAIN = [(step, 4 - math.log(step)) for step in range(1, 41)]


@pytest.mark.parametrize(
    "parts",
    [
        {"train": TRAIN, "held_out": [(0, 4.1), (40, 1.0)], "occupancy": OCCUPANCY, "caps": {"HOST": 9 * 10**8}},
        {"train": TRAIN[:1]},
        {"train": []},
        {"train": [(1, math.nan), (2, 3.0)], "occupancy": OCCUPANCY[:1], "caps": {"NVME": 10**13}},
        {"train": TRAIN, "held_out": TRAIN, "occupancy": [Occupancy(0.0, {})]},
    ],
    ids=["whole", "one step", "nothing", "a nan", "many held-out points"],
)
def test_a_png_comes_out_whatever_there_is_to_draw(tmp_path, parts):
    path = plot_run(tmp_path / "deeper" / "run.png", title="a run", **parts)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [found.name for found in path.parent.iterdir()] == ["run.png"]
