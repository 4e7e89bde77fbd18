"""The optimizer step in every state format, against its limits and against others.

    python benchmarks/bench_adam.py [--deepspeed-python PATH] [--peers-python PATH] [--numel N...] [--json PATH]

Each contender is made, warmed by one step, timed a few times and dropped again; all take turns, round after round, in an
order drawn anew, so that a machine that changes its speed does so for all. Contenders of other packages run in the
environments named (benchmarks/README.md). "roof" is a plain loop over the same arrays as the step, in the same order:
what memory gives. "L2" is the same kernel, one thread, on operands that stay in its cache: what arithmetic gives. A step
can be no faster than either, so "of limit" is the speed over the lower of the roof and L2 times threads; above 1 where
prefetching beats the plain loop. The rest of the machine should be idle; this process starts a session of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
#: What a contender may hold, in bytes.
MEMORY = 6 * 10**9
L2_NUMEL = 1 << 15

FORMATS = [("fp32", "float32"), ("lossless", "bfloat16"), ("bf16", "bfloat16"), ("int8", "bfloat16")]
FORMATS += [("int8-24bit", "bfloat16"), ("int8", "float32")]
#: Bytes a parameter in memory: gradient and state. What is not here is taken for 16.
HELD = {("lossless", "bfloat16"): 14, ("bf16", "bfloat16"): 10, ("int8", "bfloat16"): 8.2, ("int8-24bit", "bfloat16"): 7.2}
HELD |= {("int8", "float32"): 10.2}
PEERS = [
    ("here", "torch fused", "torch_adamw", "float32", "fused"),
    ("here", "torch fused, all bf16", "torch_adamw", "bfloat16", "fused"),
    ("here", "torch foreach", "torch_adamw", "float32", "foreach"),
    ("deepspeed", "DeepSpeed", "deepspeed", "float32", True),
    ("deepspeed", "DeepSpeed, bf16, fp32 moments", "deepspeed", "bfloat16", True),
    ("deepspeed", "DeepSpeed, bf16, bf16 moments", "deepspeed", "bfloat16", False),
    ("deepspeed-avx2", "DeepSpeed for AVX2", "deepspeed", "float32", True),
    ("deepspeed-avx2", "DeepSpeed for AVX2, bf16, fp32 moments", "deepspeed", "bfloat16", True),
    ("deepspeed-avx2", "DeepSpeed for AVX2, bf16, bf16 moments", "deepspeed", "bfloat16", False),
    ("peers", "bitsandbytes 8-bit", "bitsandbytes", "float32", "AdamW8bit"),
    ("peers", "torchao 8-bit", "torchao", "float32", "AdamW8bit"),
]
#: These take seconds for what others do in milliseconds.
SLOW, SLOW_NUMEL = ("bitsandbytes", "torchao"), 1 << 22


@dataclass
class Case:
    """One contender at one size: where it runs, what the worker is told, and what came of it."""

    name: str
    where: str
    order: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def speed(self) -> float:
        """Million parameters a second."""
        return self.answer["numel"] / statistics.median(self.seconds) / 1e6 if self.seconds else 0.0


class Worker:
    """A process that times what it is told to. ``name`` is a key of the dictionary of Pythons in ``main``."""

    def __init__(self, name: str, python: str, threads: int) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
        env.pop("OMP_WAIT_POLICY", None)
        if name == "passive":
            env["OMP_WAIT_POLICY"] = "passive"
        env["PATH"] = f"{Path(python).parent}{os.pathsep}{env['PATH']}"
        # What peers/install_deepspeed.sh built; for AVX2 it is built by the first that needs it.
        env["TORCH_EXTENSIONS_DIR"] = str(Path(python).parents[1] / "operators")
        if name == "deepspeed-avx2":
            env["TORCH_EXTENSIONS_DIR"] += "-avx2"
            env["BENCH_DEEPSPEED_AVX2"] = "1"
        if python != sys.executable:  # what is on this one's path belongs to this environment
            env.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [python, str(HERE / "adam" / "worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=env,
        )  # fmt: skip

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            return {"error": f"the worker ended with status {self.process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def flat_cases(numel: int, threads: int, isas: list[str], pythons: dict[str, str]) -> list[Case]:
    """One flat buffer: every format with its roof and L2, every peer."""
    found = []
    base = {"numel": numel, "threads": threads, "tensors": 1, "rule": "adam"}
    for isa in isas:
        for fmt, dtype in FORMATS:
            if HELD.get((fmt, dtype), 16) * numel > MEMORY:
                continue
            order = {**base, "format": fmt, "dtype": dtype, "isa": isa}
            for kind in ("step", "roof", "L2"):
                size = L2_NUMEL if kind == "L2" else numel
                found.append(Case(f"{fmt}, {dtype}, {isa}", "here", {**order, "kind": kind, "numel": size}))
    if 16 * numel <= MEMORY:
        for rule in ("lion", "adagrad"):
            order = {**base, "format": "int8", "dtype": "bfloat16", "isa": isas[0], "kind": "step", "rule": rule}
            found.append(Case(f"{rule}, int8", "here", order))
        found += peer_cases(base, pythons)
    return found


def peer_cases(base: dict[str, Any], pythons: dict[str, str]) -> list[Case]:
    found = []
    for where, name, kind, dtype, option in PEERS:
        if where in pythons and (kind not in SLOW or base["numel"] <= SLOW_NUMEL):
            found.append(Case(name, where, {**base, "kind": kind, "dtype": dtype, "option": option}))
    return found


def many_cases(numel: int, tensors: int, threads: int, pythons: dict[str, str]) -> list[Case]:
    """The same parameters in many tensors, through the optimizers."""
    base = {"numel": numel, "threads": threads, "tensors": tensors}
    found = [
        Case(f"CPUAdamW, {fmt}, {dtype}", "here", {**base, "kind": "optimizer", "format": fmt, "dtype": dtype})
        for fmt, dtype in FORMATS
    ]
    return found + [c for c in peer_cases(base, pythons) if c.order["kind"] not in SLOW]


def after_cases(numel: int, threads: int) -> list[Case]:
    """A step alone and right after torch's threads had work, which spin then, or sleep where they are told to."""
    base = {"numel": numel, "threads": threads, "tensors": 1, "kind": "optimizer", "dtype": "float32"}
    found = []
    for where, policy in (("here", "torch's threads as they are"), ("passive", "OMP_WAIT_POLICY=passive")):
        for after in (False, True):
            order = {**base, "after": after}
            name = f"{'after torch' if after else 'alone'}, {policy}"
            found += [Case(f"{fmt} {name}", where, {**order, "format": fmt}) for fmt in ("fp32", "int8")]
            found.append(Case(f"torch fused {name}", where, {**order, "kind": "torch_adamw", "option": "fused"}))
    return found


def measure(cases: list[Case], workers: dict[str, Worker], rounds: int, repeats: int) -> None:
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        order = list(cases)
        shuffle(order)
        for case in order:
            answer = workers[case.where].ask({**case.order, "repeats": repeats})
            case.answer = answer
            case.seconds += answer.get("seconds", [])


def report(cases: list[Case], threads: int) -> list[dict[str, Any]]:
    """Prints a table and returns its rows: limits stand in the row of their step."""
    by_kind = {(c.name, c.order["kind"]): c for c in cases}
    rows = []
    print(f"{'contender':<46}{'M/s':>8}{'min':>8}{'max':>8}{'GB/s':>7}{'roof':>8}{'L2':>8}{'of limit':>9}")
    for case in cases:
        if case.order["kind"] in ("roof", "L2"):
            continue
        row: dict[str, Any] = {"contender": case.name, **case.order, "error": case.answer.get("error")}
        if case.seconds:
            speeds = [case.answer["numel"] / s / 1e6 for s in case.seconds]
            size = case.answer["bytes_per_element"]
            row |= {"million_per_s": case.speed, "slowest": min(speeds), "fastest": max(speeds), "seconds": case.seconds}
            text = f"{case.name:<46}{case.speed:8.0f}{min(speeds):8.0f}{max(speeds):8.0f}"
            roof, inside = by_kind.get((case.name, "roof")), by_kind.get((case.name, "L2"))
            if roof and inside and roof.seconds and inside.seconds:
                limit = min(roof.speed, inside.speed * threads)
                row |= {"gb_per_s": case.speed * size / 1e3, "bytes_per_element": size, "roof": roof.speed}
                row |= {"L2_one_thread": inside.speed, "of_limit": case.speed / limit}
                text += f"{row['gb_per_s']:7.1f}{roof.speed:8.0f}{inside.speed * threads:8.0f}{row['of_limit']:9.3f}"
            print(text, flush=True)
        else:
            print(f"{case.name:<46}{row['error']}", flush=True)
        rows.append(row)
    return rows


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    cpu = names[0].split(":", 1)[1].strip() if names else platform.processor()
    return {"cpu": cpu, "cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}


def versions(python: str) -> dict[str, str]:
    code = """if True:
        import importlib.metadata as m, json
        found = {d.metadata["Name"]: d.version for d in m.distributions()}
        print(json.dumps({k: found[k] for k in ("torch", "deepspeed", "bitsandbytes", "torchao") if k in found}))
    """
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True).stdout)
    return found


def own_session() -> None:
    """Shares of the processor go by session: one of its own, before others where that is allowed."""
    try:
        os.setsid()
        Path("/proc/self/autogroup").write_text("-20")
    except OSError:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--numel", type=int, nargs="+", default=[1 << 20, 1 << 24, 100_000_000 // 64 * 64, 500_000_000])
    parser.add_argument("--many", type=int, nargs=2, default=[20_480_000, 1000], metavar=("NUMEL", "TENSORS"))
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--isa", nargs="+", help="the first is also used where only one is measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="in each round")
    parser.add_argument("--deepspeed-python")
    parser.add_argument("--peers-python", help="with bitsandbytes and torchao")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from tierflow.cpu_adam import kernels

    own_session()
    isas = args.isa or [i for i in kernels.isas() if i != "scalar"] or ["scalar"]
    pythons = {"here": sys.executable}
    if args.deepspeed_python:
        pythons |= {"deepspeed": args.deepspeed_python}
        if "avx512" in isas:  # there it is built with AVX-512
            pythons |= {"deepspeed-avx2": args.deepspeed_python}
    pythons |= {"peers": args.peers_python} if args.peers_python else {}
    head = {"benchmark": "adam", **machine(), "versions": {k: versions(p) for k, p in pythons.items()}}
    head |= {"rounds": args.rounds, "repeats": args.repeats, "command": " ".join(sys.argv)}
    tables = []
    for threads in args.threads:
        workers = {name: Worker(name, python, threads) for name, python in [*pythons.items(), ("passive", sys.executable)]}
        sets = [(f"{n} elements", flat_cases(n, threads, isas, pythons)) for n in args.numel]
        sets.append((f"{args.many[0]} elements in {args.many[1]} tensors", many_cases(*args.many, threads, pythons)))
        if threads > 1:
            sets += [(f"{n} elements after torch", after_cases(n, threads)) for n in args.numel[:2]]
        for title, cases in sets:
            print(f"\n{title}, {threads} threads", flush=True)
            measure(cases, workers, args.rounds, args.repeats)
            tables.append({"title": title, "threads": threads, "rows": report(cases, threads)})
            if args.json:
                args.json.write_text(json.dumps({**head, "tables": tables}, indent=1) + "\n")
        for worker in workers.values():
            worker.close()


if __name__ == "__main__":
    main()
