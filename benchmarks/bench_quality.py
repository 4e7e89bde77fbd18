"""Does training hold up in each state format? A small Llama-shaped model on plain text, the same seeds for each.

    python benchmarks/bench_quality.py --text FILE... [--steps N] [--json PATH] [--plot PATH]

The model reads bytes. Matrix products are fp32 whatever the weights are: bf16 weights are widened for the forward, and
their gradients rounded to bf16, as a bf16 model's would be. The exact runs are torch's AdamW with two seeds and this
package's exact format, whose last bits differ: that alone moves a run by what a seed does. For bf16 weights torch's
masters are fp32, rounded to bf16 for each forward. "within" says whether a format's held-out loss is no further above the
exact runs' mean than these are apart. Runs are processes, one after another.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tierflow.cpu_adam import CPUAdamW

WIDTH, LAYERS, HEADS, HIDDEN, CONTEXT, BATCH, BYTES = 256, 4, 4, 768, 128, 8, 256
LR, WARMUP, CLIP, HYPER = 2e-3, 40, 1.0, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (WIDTH,), self.weight, 1e-5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = Norm(), Norm()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, turn), rotate(k, turn)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        y = self.between(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = Norm(), nn.Linear(WIDTH, BYTES, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def loss(self, tokens: Tensor) -> Tensor:
        half = WIDTH // HEADS // 2
        angle = torch.outer(torch.arange(CONTEXT), 10000.0 ** (-torch.arange(half) / half))
        turn = (angle.cos(), angle.sin())
        x = self.embed(tokens[:, :-1])
        for block in self.blocks:
            x = block(x, turn)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


@dataclass(frozen=True)
class Case:
    """``state_format`` None is torch's own AdamW; ``bf16`` says what the weights of the forward are."""

    name: str
    bf16: bool
    state_format: str | None
    seed: int = 0


CASES = [
    Case("torch, fp32, seed 0", False, None, 0),
    Case("torch, fp32, seed 1", False, None, 1),
    Case("fp32", False, "fp32"),
    Case("bf16 moments, fp32 weights", False, "bf16"),
    Case("int8, fp32 weights", False, "int8"),
    Case("torch, bf16-rounded, seed 0", True, None, 0),
    Case("torch, bf16-rounded, seed 1", True, None, 1),
    Case("lossless", True, "lossless"),
    Case("bf16", True, "bf16"),
    Case("int8", True, "int8"),
    Case("int8-24bit", True, "int8-24bit"),
]


class Weights:
    """The optimizer's weights beside the model's fp32 ones: the same, or in bf16 (torch: fp32, rounded)."""

    def __init__(self, model: Model, case: Case) -> None:
        self.of_model, self.rounded, self.own = list(model.parameters()), case.bf16, case.state_format is not None
        self.trained = self.of_model
        if self.rounded:
            dtype = torch.bfloat16 if self.own else torch.float32
            # Both begin at the same bf16 values.
            self.trained = [nn.Parameter(p.detach().bfloat16().to(dtype)) for p in self.of_model]
        self.show()

    @torch.no_grad()
    def show(self) -> None:
        if self.rounded:
            for p, t in zip(self.of_model, self.trained, strict=True):
                p.copy_(t.bfloat16())

    @torch.no_grad()
    def gradients(self) -> None:
        if self.rounded:
            for p, t in zip(self.of_model, self.trained, strict=True):
                assert p.grad is not None
                t.grad = p.grad.bfloat16().to(t.dtype)
                p.grad = None


def batches(data: Tensor, seed: int) -> Callable[[], Tensor]:
    gen = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        at = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=gen)
        return torch.stack([data[i : i + CONTEXT + 1] for i in at]).long()

    return draw


@torch.no_grad()
def held_out_loss(model: Model, data: Tensor, count: int) -> float:
    draw = batches(data, 1234)
    return statistics.fmean(model.loss(draw()).item() for _ in range(count))


def train(case: Case, text: bytes, steps: int) -> dict[str, Any]:
    """One run: the loss of every step and the held-out loss along the way."""
    torch.set_num_threads(1)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = int(len(data) * 0.9)
    torch.manual_seed(case.seed)
    model = Model()
    weights = Weights(model, case)
    options: dict[str, Any] = {"lr": LR, **HYPER}
    optimizer: torch.optim.Optimizer
    if case.state_format is None:
        optimizer = torch.optim.AdamW(weights.trained, foreach=True, **options)
    else:
        optimizer = CPUAdamW(weights.trained, state_format=case.state_format, **options)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / WARMUP, 0.55 + 0.45 * math.cos(math.pi * t / steps)),
    )
    draw, losses, held_out = batches(data[:cut], 100 + case.seed), [], []
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
        if (t + 1) % 50 == 0 or t + 1 == steps:
            held_out.append((t + 1, held_out_loss(model, data[cut:], 40 if t + 1 == steps else 10)))
    return {"case": case.name, "train": losses, "held_out": held_out, "final": held_out[-1][1]}


def verdicts(rows: list[dict[str, Any]]) -> None:
    """Adds to each row how far it is above the mean of the exact runs on like weights, and whether within their spread."""
    by_name = {row["case"]: row for row in rows}
    for case in CASES:
        exact = [
            by_name[c.name]["final"]
            for c in CASES
            if c.name in by_name and c.bf16 == case.bf16 and c.state_format in (None, "fp32", "lossless")
        ]
        if case.name in by_name and len(exact) > 1:
            row = by_name[case.name]
            row["above_mean"], row["spread"] = row["final"] - statistics.fmean(exact), max(exact) - min(exact)
            row["within"] = row["above_mean"] <= row["spread"]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True)
    cases = {c.name: c for c in CASES}
    for row in rows:
        case = cases[row["case"]]
        style = "k" if case.state_format is None else "-"
        window = 20
        smooth = [statistics.fmean(row["train"][max(0, i - window) : i + 1]) for i in range(len(row["train"]))]
        axes[int(case.bf16)].plot(smooth, style, label=f"{case.name}: {row['final']:.4f}", linewidth=1)
    for axis, title in zip(axes, ("fp32 weights", "bf16 weights"), strict=True):
        axis.set(xlabel="step", title=f"{title}: loss, mean of 20 steps (legend: held out, at the end)")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats per byte")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    text = b"\n".join(p.read_bytes() for p in sorted(args.text))
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for case in CASES:
            if case.name in args.cases:
                rows.append(pool.apply(train, (case, text, args.steps)))
                print(f"{case.name:<30} held out {rows[-1]['final']:.4f}", flush=True)
    verdicts(rows)
    for row in rows:
        if "within" in row:
            print(f"{row['case']:<30}{row['final']:.4f} {row['above_mean']:+.4f} spread {row['spread']:.4f} {row['within']}")
    if args.json:
        numel = sum(p.numel() for p in Model().parameters())
        head = {"benchmark": "quality", "parameters": numel, "steps": args.steps, "batch": BATCH, "context": CONTEXT}
        head |= {"text": sorted(p.name for p in args.text), "text_bytes": len(text), "lr": LR, "torch": torch.__version__}
        head |= {"python": platform.python_version(), **{k: str(v) for k, v in HYPER.items()}}
        for row in rows:
            row["train"] = [round(x, 5) for x in row["train"]]
        args.json.write_text(json.dumps({**head, "rows": rows}) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
