"""The step kernels against torch's AdamW and against what this machine's memory can stream.

    python benchmarks/bench_cpu_adam.py [--numel N] [--repeats N] [--threads N] [--isa NAME] [--json PATH]

Everything is interleaved, repeat by repeat in an order drawn each time, so that a machine that changes its
speed does so for all. The streaming limit is a plain loop over the fp32 step's traffic: four streams read,
three of them written back. A step in another format moves other bytes, so "of limit" compares GB/s. One
thread alone may exceed the limit: the kernel prefetches, the plain loop is faster without.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tierflow.cpu_adam import _cpu_adam, kernels

HYPER: Any = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def torch_step(n: int, kind: str) -> Callable[[], None]:
    p = torch.nn.Parameter(torch.randn(n))
    p.grad = torch.randn(n)
    options: dict[str, Any] = {kind: True}
    optimizer = torch.optim.AdamW([p], lr=1e-3, weight_decay=1e-2, **options)

    def run() -> None:
        optimizer.step()

    return run


def our_step(n: int, fmt: str, grad_dtype: torch.dtype, isa: str, threads: int) -> Callable[[], None]:
    weight, m, v = torch.randn(n), torch.zeros(n), torch.zeros(n)
    grad = torch.randn(n).to(grad_dtype)
    param, master = weight, None
    if fmt == "lossless":
        param, master = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int16)
        kernels.split(weight, param, master)
    steps = iter(range(1, 1 << 30))

    def run() -> None:
        kernels.adam_step(
            param, grad, m, v, master=master, step=next(steps), isa=isa, threads=threads, **HYPER
        )  # fmt: skip

    return run


def stream(n: int, isa: str, threads: int) -> Callable[[], None]:
    tensors = [torch.zeros(n) for _ in range(4)]
    index = kernels.isas().index(isa)
    read, a, b, c = (t.data_ptr() for t in tensors)

    def run() -> None:
        assert tensors  # whose memory this is
        _cpu_adam.stream_pattern(n, read, a, b, c, index, threads)

    return run


def measure(cases: dict[str, tuple[int, Callable[[], None]]], repeats: int) -> dict[str, list[float]]:
    for _, run in cases.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    shuffle = random.Random(0).shuffle
    for _ in range(repeats):
        order = list(cases.items())
        shuffle(order)  # a case pays for what its predecessor leaves in caches and memory
        for name, (_, run) in order:
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def report(
    cases: dict[str, tuple[int, Callable[[], None]]], seconds: dict[str, list[float]], n: int
) -> list[Any]:
    rows = []
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    limit = cases["streaming limit"][0] / medians["streaming limit"]
    print(f"{'case':<28}{'ms':>9}{'min':>9}{'max':>9}{'GB/s':>8}{'of limit':>10}{'x fused':>9}")
    for name, (size, _) in cases.items():
        median, rate = medians[name], size * n / medians[name]
        fused = medians["torch fused"] / median
        row: dict[str, Any] = {
            "case": name,
            "bytes_per_element": size,
            "seconds_median": median,
            "seconds_min": min(seconds[name]),
            "seconds_max": max(seconds[name]),
            "seconds": seconds[name],
            "gb_per_s": rate / 1e9,
            "of_limit": rate / (limit * n),
            "speed_vs_torch_fused": fused,
        }
        rows.append(row)
        print(
            f"{name:<28}{median * 1e3:9.2f}{row['seconds_min'] * 1e3:9.2f}{row['seconds_max'] * 1e3:9.2f}"
            f"{rate / 1e9:8.1f}{row['of_limit']:10.3f}{fused:9.2f}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 25)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=kernels.threads())
    parser.add_argument("--isa", default=kernels.isa(), choices=kernels.isas())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    n, isa, threads = args.numel, args.isa, args.threads
    torch.set_num_threads(threads)
    # Bytes an element: what the algorithm must read and write, not what an implementation does.
    cases = {
        "streaming limit": (28, stream(n, isa, threads)),
        "fp32": (28, our_step(n, "fp32", torch.float32, isa, threads)),
        "fp32, bf16 gradients": (26, our_step(n, "fp32", torch.bfloat16, isa, threads)),
        "lossless, bf16 gradients": (26, our_step(n, "lossless", torch.bfloat16, isa, threads)),
        "torch fused": (28, torch_step(n, "fused")),
        "torch foreach": (28, torch_step(n, "foreach")),
    }
    print(f"{cpu_name()}, {threads} threads, {isa}, torch {torch.__version__}")
    print(f"{n} elements, {args.repeats} repeats, interleaved")
    rows = report(cases, measure(cases, args.repeats), n)
    if args.json:
        head = {
            "benchmark": "cpu_adam",
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "kernel": platform.release(),
            "threads": threads,
            "isa": isa,
            "torch": torch.__version__,
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "numel": n,
            "repeats": args.repeats,
        }
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
