"""What surrounds the kernels: the choice of instruction set, threads, fork, the stub, the benchmark."""

import ast
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tierflow.cpu_adam import _cpu_adam, kernels

ROOT = Path(__file__).resolve().parents[2]
N = 300_000


def python(*arguments, **env):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def tensors(n=N):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=gen), torch.randn(n, generator=gen), torch.zeros(n), torch.zeros(n)]


def one_step(given=None):
    p, g, m, v = given or tensors()
    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}
    kernels.adam_step(p, g, m, v, step=1, threads=4, **hyper)
    return p


def test_isas():
    assert kernels.isas()[-1] == "scalar"
    assert kernels.isas() == [i for i in ("avx512", "avx2", "neon", "scalar") if i in kernels.isas()]
    assert kernels.isa() in kernels.isas()


@pytest.mark.parametrize("isa", kernels.isas())
def test_forced_by_the_environment(isa):
    code = (
        "import torch; from tierflow.cpu_adam import kernels as k; "
        "x = torch.arange(100_000.0); y = torch.zeros(100_000); "
        "print(k.isa(), k.intake(y, x, accumulate=True).sum_squares.hex())"
    )
    done = python("-c", code, TIERFLOW_ISA=isa)
    expected = kernels.grad_stats(torch.arange(100_000.0)).sum_squares.hex()
    assert done.stdout.split() == [isa, expected], done.stderr


def test_forcing_what_is_not_there_is_one_clear_error():
    done = python("-c", "from tierflow.cpu_adam import kernels as k; k.isa()", TIERFLOW_ISA="mmx")
    assert done.returncode == 1
    assert "'mmx' is not available here; choose from" in done.stderr


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a second capability to try"
)
def test_parity_with_torch_s_avx2_build():
    done = python(
        "-m",
        "pytest",
        "-q",
        "--import-mode=importlib",
        "tests/cpu_adam/test_parity.py",
        ATEN_CPU_CAPABILITY="avx2",
    )
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own():
    expected = one_step()  # the parent's pool is there now
    given, wanted = tensors(), bytes(expected.numpy())
    child = os.fork()
    if child == 0:
        # No operator of torch here: its own threads did not survive the fork, and it would wait for them.
        signal.alarm(60)
        os._exit(0 if bytes(one_step(given).numpy()) == wanted else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(one_step(), expected)


def test_calls_from_several_threads_at_once():
    expected = one_step()
    results, barrier = [], threading.Barrier(6)

    def work():
        barrier.wait()
        results.extend(torch.equal(one_step(), expected) for _ in range(10))

    workers = [threading.Thread(target=work) for _ in range(6)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert results == [True] * 60


def test_the_gil_is_released():
    """With forced switches put off, another thread can run only while the kernel is without the GIL."""
    before = sys.getswitchinterval()
    turns, done = [], threading.Event()
    dst, src = torch.zeros(1 << 20), torch.ones(1 << 20)

    def watch():
        while not done.is_set():
            turns.append(1)
            time.sleep(0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        sys.setswitchinterval(1000)
        seen = len(turns)
        for _ in range(200):
            kernels.intake(dst, src, accumulate=True, isa="scalar", threads=1)
            if len(turns) > seen:
                break
        assert len(turns) > seen
    finally:
        sys.setswitchinterval(before)
        done.set()
        watcher.join()


def test_the_stub_matches_the_module():
    tree = ast.parse((Path(kernels.__file__).parent / "_cpu_adam.pyi").read_text())
    functions = {f.name: [a.arg for a in f.args.args] for f in tree.body if isinstance(f, ast.FunctionDef)}
    classes = [c for c in tree.body if isinstance(c, ast.ClassDef)]
    constants = {a.target.id for a in tree.body if isinstance(a, ast.AnnAssign)}
    public = {name: value for name, value in vars(_cpu_adam).items() if not name.startswith("_")}
    assert set(public) == set(functions) | constants | {c.name for c in classes}
    assert all(isinstance(public[name], int) for name in constants)
    found = [(public[name], arguments) for name, arguments in functions.items()]
    for c in classes:
        methods = {f.name: [a.arg for a in f.args.args] for f in c.body}
        assert {name for name in vars(public[c.name]) if not name.startswith("_")} == set(methods) - {"__init__"}
        found += [(getattr(public[c.name], name), arguments) for name, arguments in methods.items()]
    for function, arguments in found:
        signature = inspect.getdoc(function).splitlines()[0]
        assert re.findall(r"(\w+): ", signature) == arguments, function


def test_the_kernels_import_nothing_else_of_the_package():
    for file in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1 and not (node.module or "").startswith("tierflow"), file
            elif isinstance(node, ast.Import):
                assert not any(a.name.startswith("tierflow") for a in node.names), file


def test_the_benchmark_runs(tmp_path):
    out = tmp_path / "bench.json"
    size = ["--numel", "70016", "--many", "6400", "100", "--threads", "2", "--rounds", "1", "--repeats", "2"]
    done = python("benchmarks/bench_adam.py", *size, "--json", str(out))
    assert done.returncode == 0, done.stderr
    flat, many, after = json.loads(out.read_text())["tables"]
    assert not [r["error"] for r in flat["rows"] + many["rows"] + after["rows"] if r["error"]]
    assert {r["after"] for r in after["rows"]} == {False, True} and len(after["rows"]) == 12
    isa = kernels.isas()[0]
    assert {r["contender"] for r in flat["rows"]} >= {f"int8-24bit, bfloat16, {isa}", "lion, int8", "torch fused"}
    assert all(r["of_limit"] > 0 for r in flat["rows"] if r.get("format") and r["rule"] == "adam")


def test_numa_nodes_are_read_as_linux_writes_them(tmp_path):
    mine = sorted(os.sched_getaffinity(0))
    for name, cpus in (("node0", "0-1,4\n"), ("node12", f"{mine[-1]}\n"), ("power", "0\n"), ("node3", "\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(cpus)
    lists = _cpu_adam.numa_nodes(str(tmp_path))
    assert sorted(c for node in lists for c in node) == mine and all(lists)
    assert lists[-1] == [mine[-1]] or len(mine) == 1
    assert _cpu_adam.numa_nodes(str(tmp_path / "none")) == [mine]


def test_several_nodes_change_no_bit(tmp_path):
    """Workers bound to nodes and runs taken node by node, on nodes of one processor each."""
    for k, cpu in enumerate(sorted(os.sched_getaffinity(0))):
        (tmp_path / f"node{k}").mkdir()
        (tmp_path / f"node{k}" / "cpulist").write_text(f"{cpu}\n")
    code = (
        "import torch; from tierflow.cpu_adam import kernels as k, _cpu_adam as c; "
        "x = torch.arange(3_000_001.0); y = torch.zeros(3_000_001); "
        "print(len(c.numa_nodes('')), [k.intake(y, x, accumulate=True, threads=n).sum_squares.hex() for n in (1, 2, 5)])"
    )
    several = python("-c", code, TIERFLOW_NODE_DIR=str(tmp_path))
    one = python("-c", code, TIERFLOW_NODE_DIR=str(tmp_path / "none"))
    assert several.returncode == one.returncode == 0, several.stderr + one.stderr
    assert several.stdout.split()[0] == str(len(os.sched_getaffinity(0))) and one.stdout.split()[0] == "1"
    assert several.stdout.split()[1:] == one.stdout.split()[1:]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_one_warning_for_a_step_on_fewer_threads_than_there_are_processors():
    code = """if True:
        import os, warnings
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
        import torch
        from tierflow.cpu_adam import CPUAdamW, kernels
        warnings.simplefilter("always")
        params = [torch.nn.Parameter(torch.ones(1 << 20)) for _ in range(2)]
        optimizer = CPUAdamW(params)
        for p in params:
            p.grad = torch.ones_like(p)
        with warnings.catch_warnings(record=True) as seen:
            optimizer.step()
            optimizer.step()
        print([str(w.message) for w in seen])
        with warnings.catch_warnings(record=True) as seen:
            kernels.intake(params[0].detach(), params[1].detach(), accumulate=True)
        print(len(seen))
    """
    done = python("-c", code)
    first, second = done.stdout.splitlines()
    assert first.count("runs on 1 of this machine's") == 1 and second == "0", done.stderr
    assert "warn" not in python("-c", code.replace("[:1]", "")).stdout.replace("[]", "")
