"""Memory, disk, files and threads are given back at the end, however it comes; forks harm nobody."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from outcome import Stack, child_environment, states_of, step
from tmpfs import mounted
from torch import nn

import tierflow
from tierflow.swap import CopyState, Tier

RSS_PROGRAM = """
import ctypes, os, sys, gc
import torch
from outcome import Stack
import tierflow
def rss():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20
def blocks(path):
    found = os.statvfs(path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize >> 20
def descriptors():
    return len(os.listdir("/proc/self/fd"))
def threads():
    return len(os.listdir("/proc/self/task"))
def train(width, layers, path):
    model = Stack(layers=layers, width=width)
    place = {"device": "nvme", "nvme_path": path}
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
              "zero_optimization": {"offload_param": place, "offload_optimizer": place},
              "tierflow": {"device_memory": "30MB", "host_memory": "200MB", "nvme_capacity": "400MB"}}
    _, optimizer = tierflow.offload(model, config)
    for i in range(2):
        model(model.input(i)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer
path = sys.argv[1]
_, optimizer = train(1024, 2, path)  # libraries, thread pools
optimizer.close()
base, disk, files, tasks = rss(), blocks(path), descriptors(), threads()
model, optimizer = train(1024, 20, path)
high, used = rss(), blocks(path)
assert high - base > 150, (base, high)
assert used - disk > 200, (disk, used)
if sys.argv[2] == "close":
    optimizer.close()
else:
    del model, optimizer
print(rss() - base, blocks(path) - disk, descriptors() - files, threads() - tasks)
"""


@pytest.fixture
def own_disk(tmp_path: Path):
    """A file system whose usage no other process changes."""
    with mounted(tmp_path / "own", "512m") as directory:
        yield directory


@pytest.mark.parametrize("how", ["close", "forget"])
def test_memory_disk_files_and_threads_are_given_back(own_disk: Path, python, how: str) -> None:
    memory, disk, files, threads = map(int, python(RSS_PROGRAM, own_disk, how).split())
    assert memory < 40
    assert disk < 2
    assert files <= 0
    assert threads <= 0


@pytest.mark.parametrize("stop_after", ["offload", "forward", "backward", "step", "zero_grad"])
def test_a_model_that_is_dropped_at_any_point_is_collected(tmp_path: Path, stop_after: str) -> None:
    def begin() -> list[weakref.ref]:
        model = Stack(layers=6, width=64)
        _, optimizer = tierflow.offload(model, tiny.config("everything", tmp_path, **tiny.tight(model)))
        alive = [weakref.ref(x) for x in (model, optimizer.engine, optimizer.engine.manager.store)]
        if stop_after == "offload":
            return alive
        loss = model(model.input())
        if stop_after == "forward":
            return alive
        loss.backward()
        if stop_after == "backward":
            return alive
        optimizer.step()
        assert optimizer.engine.updates  # an update that is due keeps nothing alive
        if stop_after == "zero_grad":
            optimizer.zero_grad()
        return alive

    alive = begin()
    gc.collect()
    assert [ref() for ref in alive] == [None, None, None]
    links = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert not any(str(tmp_path) in link for link in links)


TRAIN_PROGRAM = """
import sys, time
from outcome import Stack, states_of, Outcome
import tierflow
model = Stack(layers=12, width=128)
place = {"device": "nvme", "nvme_path": sys.argv[1]}
config = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
          "zero_optimization": {"offload_param": place, "offload_optimizer": place},
          "tierflow": {"device_memory": "300kB", "host_memory": "2MB", "nvme_capacity": "16MB"}}
_, optimizer = tierflow.offload(model, config)
print("ready", flush=True)
if sys.argv[3] == "wait":
    sys.stdin.readline()
losses = []
for i in range(int(sys.argv[2])):
    loss = model(model.input(i))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if i == 1:
        print("training", flush=True)
print(Outcome(losses, [], states_of(optimizer.engine)).digest(), flush=True)
"""


def child(path: Path, steps: int, wait: bool = False) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN_PROGRAM, str(path), str(steps), "wait" if wait else "go"],
        env=child_environment(OMP_NUM_THREADS="1"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def await_line(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 100)
    assert ready and process.stdout.readline().strip() == word


def used(path: Path) -> int:
    found = os.statvfs(path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_killed_in_mid_training_leaves_nothing_on_disk(own_disk: Path, sign: int) -> None:
    before = used(own_disk)
    process = child(own_disk, 1_000_000)
    try:
        await_line(process, "ready")
        await_line(process, "training")
        assert used(own_disk) - before >= 12 * 16384 * 12  # 12 layers of 128 x 128, 12 bytes each
        assert os.listdir(own_disk) == []
        process.send_signal(sign)
        process.wait(timeout=60)
        assert process.returncode != 0
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            pipe.close()
    deadline = time.monotonic() + 30
    while used(own_disk) != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert used(own_disk) == before
    assert os.listdir(own_disk) == []


def test_two_runs_on_one_path_do_not_touch_each_other(tmp_path: Path) -> None:
    alone = child(tmp_path, 20)
    expected = alone.communicate(timeout=100)[0].split()[-1]
    pair = [child(tmp_path, 20, wait=True) for _ in range(2)]
    try:
        for process in pair:
            await_line(process, "ready")
        for process in pair:
            process.stdin.write("go\n")
            process.stdin.flush()
        digests = [process.communicate(timeout=100)[0].split()[-1] for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.wait()
    assert digests == [expected, expected]
    assert len(expected) == 64


# ---- fork


class Rows(torch.utils.data.Dataset):
    """Also says in which process a row was made, and tries what a worker's exit would do."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        x = torch.randn(64, generator=torch.Generator().manual_seed(i))
        return x, os.getpid()


def test_data_loader_workers_neither_copy_the_arena_nor_free_it(tmp_path: Path) -> None:
    outcomes = []
    for workers in (0, 2):
        model = Stack(layers=6, width=64)
        _, optimizer = tierflow.offload(model, tiny.config("everything", tmp_path, device_memory=24576 * 3, host_memory=24576 * 11))
        pids = set()
        for _ in range(2):
            loader = torch.utils.data.DataLoader(
                Rows(), batch_size=4, num_workers=workers, multiprocessing_context="fork" if workers else None
            )
            for x, made_by in loader:
                loss = model(x)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                pids.update(made_by.tolist())
        assert (os.getpid() in pids) == (workers == 0)
        outcomes.append(states_of(optimizer.engine))
        optimizer.close()
    assert tiny.same(*outcomes)


def test_a_fork_that_closes_everything_harms_nobody(tmp_path: Path) -> None:
    model, twin = Stack(layers=6, width=64), Stack(layers=6, width=64)
    caps = {"device_memory": 24576 * 3, "host_memory": 24576 * 11}
    _, optimizer = tierflow.offload(model, tiny.config("everything", tmp_path, **caps))
    _, other = tierflow.offload(twin, tiny.config("everything", tmp_path, **caps))
    step(model, optimizer)
    step(twin, other)
    arena = optimizer.engine.manager.pools[Tier.HOST].resident.arena
    low, high = arena.address, arena.address + arena.nbytes
    report, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
            copied = any(int(a, 16) < high and int(b, 16) > low for a, b in spans)
            os.write(out, b"copied" if copied else b"absent")
        with contextlib.suppress(BaseException):
            arena.close()
        with contextlib.suppress(BaseException):
            optimizer.engine.manager.store.close()
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(out)
    assert os.read(report, 16) == b"absent"
    os.close(report)
    for i in range(1, 3):
        assert step(model, optimizer, i) == step(twin, other, i)
    assert tiny.same(states_of(optimizer.engine), states_of(other.engine))
    optimizer.close()
    other.close()


def test_a_closed_engine_says_so_and_holds_nothing(tmp_path: Path) -> None:
    model = Stack(layers=6, width=64)
    _, optimizer = tierflow.offload(model, tiny.config("everything", tmp_path, **tiny.tight(model)))
    step(model, optimizer)
    engine = optimizer.engine
    assert engine.updates  # closed with an update that is due
    open_files = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if _link(n)]
    assert any(str(tmp_path) in f for f in open_files)
    optimizer.close()
    open_files = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if _link(n)]
    assert not any(str(tmp_path) in f for f in open_files)
    for unit in engine.units:
        assert all(engine.manager.ledger.state(unit.chunk, t) is CopyState.ABSENT for t in Tier)
    for act in (lambda: model(model.input()), optimizer.step, lambda: next(model.parameters()).sum()):
        with pytest.raises(RuntimeError, match="closed"):
            act()
    fresh = nn.Linear(2, 2)  # the machinery around parameters is as it was
    fresh(torch.zeros(1, 2)).sum().backward()


def _link(name: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{name}")


# ---- the C heap

_FILL = """
import os, sys, torch, tierflow
from tierflow.swap import Tier
from torch import nn

def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))

values = lambda slot, param: torch.zeros(slot.shape, dtype=param.dtype).fill_(0.5)
model = nn.Sequential(*[nn.Linear(2048, 1024, bias=False, device="meta") for _ in range(24)]).to(torch.bfloat16)
for layer in model:
    layer.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16).as_strided((1024, 2048), (0, 0)))
config = {"optimizer": {}, "zero_optimization": {
    name: {"device": "nvme", "nvme_path": sys.argv[1]} for name in ("offload_param", "offload_optimizer")},
    "tierflow": {"device_memory": "8MB", "host_memory": "150MB"}}
before = anonymous()
_, optimizer = tierflow.offload(model, config, source=values)
plan = optimizer.engine.plan
print(anonymous() - before - sum(plan.total(t) for t in (Tier.DEVICE, Tier.HOST)))
optimizer.close()
"""


def test_placing_weights_leaves_no_holes_in_the_heap(tmp_path: Path) -> None:
    """24 weights of 4 MB, each with a remainder, passed through the heap one by one."""
    command = [sys.executable, "-c", _FILL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40_000_000
