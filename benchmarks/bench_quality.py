"""Does training hold up in each state format? A model on plain text, the same seeds for each.

    python benchmarks/bench_quality.py --text FILE... [--model DIR] [--steps N] [--json PATH] [--plot PATH]

The model is a small Llama-shaped one that reads bytes, or with --model a pretrained one in its own tokens. Matrix products
are fp32 whatever the weights are: bf16 weights are widened for the forward, and their gradients rounded to bf16, as a bf16
model's would be. The exact runs are torch's AdamW with two seeds and this package's exact format, whose last bits differ:
that alone moves a run by what a seed does. For bf16 weights torch's masters are fp32, rounded to bf16 for each forward.
"within" says whether a format's held-out loss is no further above the exact runs' mean than these are apart. Runs are
processes, one after another.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quality.cases import CASES, Case, Weights, verdicts
from quality.plot import plot
from quality.subjects import Subject, subject
from torch import Tensor, nn

from tierflow.cpu_adam import CPUAdamW

CLIP, HYPER = 1.0, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def batches(data: Tensor, of: Subject, seed: int) -> Callable[[], Tensor]:
    """Draws rows from anywhere in the data."""
    gen = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        at = torch.randint(len(data) - of.context - 1, (of.batch,), generator=gen)
        return torch.stack([data[i : i + of.context + 1] for i in at]).long()

    return draw


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Tensor, of: Subject, count: int) -> float:
    """The mean over the same ``count`` batches each time."""
    draw = batches(data, of, 1234)
    return statistics.fmean(model.loss(draw()).item() for _ in range(count))  # type: ignore[operator]


def optimizer_for(case: Case, weights: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Torch's, or ours with the case's format."""
    options: dict[str, Any] = {"lr": lr, **HYPER}
    if case.state_format is None:
        return torch.optim.AdamW(weights, foreach=True, **options)
    return CPUAdamW(weights, state_format=case.state_format, **options)


def train(case: Case, text: bytes, steps: int, folder: Path | None) -> dict[str, Any]:
    """One run: the loss of every step and the held-out loss along the way."""
    of = subject(folder)
    if of.threads:
        torch.set_num_threads(of.threads)
    data = of.encode(text)
    cut = int(len(data) * 0.9)
    torch.manual_seed(case.seed)
    model: Any = of.make()
    weights = Weights(model, case)
    optimizer = optimizer_for(case, weights.trained, of.lr)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / of.warmup, 0.55 + 0.45 * math.cos(math.pi * t / steps))
    )
    draw, losses, held_out = batches(data[:cut], of, 100 + case.seed), [], []
    for t in range(steps):
        loss = model.loss(draw())
        loss.backward()
        losses.append(loss.item())
        weights.gradients()
        torch.nn.utils.clip_grad_norm_(weights.trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        weights.show()
        last = t + 1 == steps
        if (t + 1) % 50 == 0 or last:
            held_out.append((t + 1, held_out_loss(model, data[cut:], of, of.looks[last])))
    return {"case": case.name, "train": losses, "held_out": held_out, "final": held_out[-1][1]}


def head(args: argparse.Namespace, text_bytes: int) -> dict[str, Any]:
    """What the runs had in common."""
    of = subject(args.model)
    return {
        "benchmark": "quality", "parameters": sum(p.numel() for p in of.make().parameters()), "steps": args.steps,
        "model": args.model.name if args.model else "bytes", "batch": of.batch, "context": of.context, "unit": of.unit,
        "text": sorted(p.name for p in args.text), "text_bytes": text_bytes, "lr": of.lr, "torch": torch.__version__,
        "python": platform.python_version(), **{k: str(v) for k, v in HYPER.items()},
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a pretrained model, as transformers saves it")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    text = b"\n".join(p.read_bytes() for p in sorted(args.text))
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for case in CASES:
            if case.name in args.cases:
                rows.append(pool.apply(train, (case, text, args.steps, args.model)))
                print(f"{case.name:<30} held out {rows[-1]['final']:.4f}", flush=True)
    verdicts(rows)
    for row in rows:
        if "within" in row:
            print(f"{row['case']:<30}{row['final']:.4f} {row['above_mean']:+.4f} spread {row['spread']:.4f} {row['within']}")
    if args.json:
        for row in rows:
            row["train"] = [round(x, 5) for x in row["train"]]
        args.json.write_text(json.dumps({**head(args, len(text)), "rows": rows}) + "\n")
    if args.plot:
        plot(rows, subject(args.model).unit, args.plot)


if __name__ == "__main__":
    main()
