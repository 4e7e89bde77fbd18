"""The files a run leaves beside its model: the plot and the metrics."""

from __future__ import annotations

import json
from pathlib import Path

from tierflow.finetune.evaluate import together
from tierflow.finetune.meter import Meter
from tierflow.finetune.plot import Occupancy, plot_run
from tierflow.finetune.train import History
from tierflow.scheduler.plan import MemoryPlan
from tierflow.swap import Tier


def plot(history: History, meter: Meter, plan: MemoryPlan, folder: Path) -> Path:
    """``run.png``: the losses, and what the tiers held over time."""
    held = [
        Occupancy(second, {t.name: meter.held[t][i] for t in Tier}) for i, second in enumerate(meter.seconds)
    ]
    return plot_run(
        folder / "run.png",
        train=[(s.step + 1, s.loss) for s in history.steps],
        held_out=[(step, together(results).loss) for step, results in history.evaluations],
        occupancy=held,
        caps={t.name: plan.caps.of(t) for t in (Tier.DEVICE, Tier.HOST)},
        title=f"{plan.parameters:,} parameters, {plan.placement.state_format} states, "
        f"weights on {plan.placement.param.name}, optimizer states on {plan.placement.optimizer.name}",
    )


def write_metrics(history: History, plan: MemoryPlan, peak: int, samples: dict[str, str], folder: Path) -> None:
    """``metrics.json``: every step, every evaluation, the plan's totals (bytes) and the samples."""
    data = history.as_dict() | {
        "plan": {t.name: {"total": plan.total(t), "cap": plan.caps.of(t)} for t in Tier},
        "nvme_per_step": {"read": plan.nvme_read, "written": plan.nvme_written},
        "peak_rss": peak,
        "samples": samples,
    }
    (folder / "metrics.json").write_text(json.dumps(data, indent=1))
