"""I/O that fails beneath a training run: a clear error, nothing left behind, and no weight lost."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from outcome import Stack, states_of

import tierflow
from tierflow import aio
from tierflow.swap import Kind, Tier

LAYER = 24576  # bytes of one layer's padded fp32 weights
SERVER = Path(__file__).parent / "late_faults.py"


def config(path: Path, **block: object) -> dict:
    caps = {"device_memory": 3 * LAYER, "host_memory": 15 * LAYER, "nvme_capacity": 64 << 20}
    return {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "zero_optimization": {
            "offload_param": {"device": "nvme", "nvme_path": str(path)},
            "offload_optimizer": {"device": "nvme", "nvme_path": str(path)},
        },
        "tierflow": caps | block,
    }


class Faulty:
    """A mounted directory in which I/O fails on request."""

    def __init__(self, directory: Path, rules: Path):
        self.directory, self._rules = directory, rules

    def inject(self, op: str, begin: int, end: int, code: int = errno.EIO, **more: object) -> None:
        """``op`` at file offsets [begin, end) fails from now on."""
        fresh = self._rules.with_suffix(".new")
        fresh.write_text(json.dumps([{"op": op, "from": begin, "to": end, "errno": code, **more}]))
        os.replace(fresh, self._rules)

    def heal(self) -> None:
        """Nothing fails any more."""
        self._rules.unlink(missing_ok=True)


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Faulty]:
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("mounting a FUSE file system needs root and /dev/fuse")
    directory, rules = tmp_path / "mounted", tmp_path / "rules.json"
    directory.mkdir()
    server = subprocess.Popen(
        [sys.executable, str(SERVER), str(directory), str(rules)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        if server.stdout.readline() != "mounted\n":
            pytest.skip(f"no FUSE here: {server.stderr.read().strip()}")
        yield Faulty(directory, rules)
    finally:
        server.stdin.close()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        for pipe in (server.stdout, server.stderr):
            pipe.close()
        ctypes.CDLL(None).umount2(os.fsencode(directory), 2)  # if it was killed


def extent(engine, unit: int, kind: Kind) -> tuple[int, int]:
    """The file's byte range of one chunk."""
    chunk = engine.units[unit].chunks[kind]
    begin = engine.manager.nvme._extents[chunk.id].offset
    return begin, begin + chunk.nbytes


def train(model: Stack, optimizer, seed: int) -> float:
    loss = model(model.input(seed))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def pair(faulty: Faulty, tmp_path: Path, layers: int = 10, **block: object):
    """The run that will meet faults, and its twin on a sound disk, both a step old."""
    sound = tmp_path / "sound"
    sound.mkdir()
    models = [Stack(layers=layers, width=64) for _ in range(2)]
    runs = [(m, tierflow.offload(m, config(p, **block))[1]) for m, p in zip(models, (faulty.directory, sound), strict=True)]
    assert train(*runs[0], 0) == train(*runs[1], 0)
    return *runs[0], *runs[1]


def pins(engine) -> int:
    chunks = [c for u in engine.units for c in u.chunks.values()]
    return sum(engine.manager.ledger.pins(c, t) for c in chunks for t in Tier)


def is_gone(path: Path) -> bool:
    """Nothing of a store is left in the folder, named or open."""
    links = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    return os.listdir(path) == [] and not any(str(path) in link for link in links)


def forward(model: Stack) -> None:
    model(model.input(1))


def evaluate(model: Stack) -> None:
    with torch.no_grad():
        model(model.input(1))


def gather(model: Stack) -> None:
    with tierflow.gathered(model.layers[6]):
        pass


@pytest.mark.parametrize("act", [forward, evaluate, gather, lambda m: m.state_dict()], ids=["forward", "eval", "gathered", "state_dict"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_a_fetch_that_fails_is_raised_and_training_goes_on(
    faulty: Faulty, tmp_path: Path, act: Callable[[Stack], object], prefetch: bool
) -> None:
    model, optimizer, twin, other = pair(faulty, tmp_path, prefetch=prefetch)
    engine = optimizer.engine
    engine.settle()  # so that what reads next is no update
    faulty.inject("read", *extent(engine, 6, Kind.PARAM))
    with pytest.raises(aio.AioError) as raised:
        act(model)
    error = raised.value
    assert (error.errno, error.filename, error.op) == (errno.EIO, str(faulty.directory), "read")
    assert "Input/output error" in str(error) and str(faulty.directory) in str(error)
    assert pins(engine) == 0 and engine.failed is None
    engine.manager.ledger.check()
    faulty.heal()
    for i in range(1, 3):
        assert train(model, optimizer, i) == train(twin, other, i)
    assert tiny.same(states_of(engine), states_of(other.engine))
    optimizer.close()
    other.close()
    assert is_gone(faulty.directory)


def test_a_fetch_that_fails_in_the_backward_is_raised_and_the_step_can_be_done_again(faulty: Faulty, tmp_path: Path) -> None:
    model, optimizer, twin, other = pair(faulty, tmp_path, prefetch=False)
    engine = optimizer.engine
    loss = model(model.input(1))
    faulty.inject("read", *extent(engine, 4, Kind.PARAM))
    with pytest.raises(aio.AioError, match="Input/output error"):
        loss.backward()
    assert engine.failed is None
    faulty.heal()
    optimizer.zero_grad()
    del loss
    for i in range(1, 3):
        assert train(model, optimizer, i) == train(twin, other, i)
    assert tiny.same(states_of(engine), states_of(other.engine))
    assert pins(engine) == 0  # settled: an update holds its weights until they are written
    optimizer.close()
    other.close()


def in_memory(engine, unit: int, kind: Kind) -> bool:
    """Whether the chunk is in a memory tier, or on its way there."""
    chunk, manager = engine.units[unit].chunks[kind], engine.manager
    return chunk in manager.fetches or any(manager.ledger.valid(chunk, t) for t in (Tier.DEVICE, Tier.HOST))


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("kind", [Kind.PARAM, Kind.EXP_AVG, Kind.EXP_AVG_SQ])
@pytest.mark.parametrize("unit", [0, 5, 9])
@pytest.mark.parametrize("runs_at", ["step", "settle", "forward"])
def test_an_update_that_fails_ends_the_run_clearly(faulty: Faulty, op: str, kind: Kind, unit: int, runs_at: str) -> None:
    model = Stack(layers=10, width=64)
    update = "immediate" if runs_at == "step" else "deferred"
    _, optimizer = tierflow.offload(model, config(faulty.directory, update=update))
    engine = optimizer.engine
    train(model, optimizer, 0)
    model(model.input(1)).backward()
    if op == "read" and in_memory(engine, unit, kind):
        kind = Kind.EXP_AVG  # this weight is in memory already: its update reads only the moments
    engine.updates.forget()  # states that the backward read ahead
    faulty.inject(op, *extent(engine, unit, kind), code=errno.EIO if op == "read" else errno.ENOSPC)
    with pytest.raises(aio.AioError) as raised:
        optimizer.step()
        if runs_at == "settle":
            engine.settle()
        if runs_at == "forward":
            forward(model)
            engine.settle()  # what was written behind the forward
    assert (raised.value.op, raised.value.filename) == (op, str(faulty.directory))
    if engine.failed is None:  # weights whose read failed while nothing was updated are read again
        assert (op, kind, runs_at) == ("read", Kind.PARAM, "forward")
        with pytest.raises(aio.AioError):
            engine.settle()
    assert engine.failed is not None and pins(engine) == 0
    faulty.heal()
    scratch = engine.manager.ledger._scratch
    assert not any(scratch.values())  # the staging memory came back
    for act in (lambda: forward(model), optimizer.step, lambda: gather(model), lambda: evaluate(model)):
        with pytest.raises(RuntimeError, match=r"inconsistent .*resume from a checkpoint"):
            act()
    with pytest.raises(RuntimeError, match="inconsistent"):
        tierflow.save_checkpoint(model, optimizer, faulty.directory.parent / "checkpoint")
    assert not (faulty.directory.parent / "checkpoint").exists()
    optimizer.close()
    assert is_gone(faulty.directory)


def test_weights_that_an_update_waits_for_are_read_again_after_an_error_met_elsewhere(
    faulty: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, twin, other = pair(faulty, tmp_path, prefetch=False)
    engine, queue = optimizer.engine, optimizer.engine.updates
    model(model.input(1)).backward()
    optimizer.step()
    optimizer.zero_grad()
    for unit in engine.units[:5]:
        queue.end(unit)
    faulty.inject("read", *extent(engine, 5, Kind.PARAM))
    job = queue.job(engine.units[5])
    with monkeypatch.context() as blind:  # the read may have failed before this looks at it
        blind.setattr(engine.manager.fetches, "_advance", lambda *_, **__: None)
        assert queue._begin(must=True) and job.held and job.unit.chunk in engine.manager.fetches
    with pytest.raises(aio.AioError):
        while job.unit.chunk in engine.manager.fetches:
            engine.manager.fetches.pump()
    assert engine.failed is None and not job.held
    faulty.heal()
    train(twin, other, 1)
    for i in range(2, 4):
        assert train(model, optimizer, i) == train(twin, other, i)
    assert tiny.same(states_of(engine), states_of(other.engine)) and pins(engine) == 0
    optimizer.close()
    other.close()


def test_a_failed_run_is_restored_from_a_checkpoint(faulty: Faulty, tmp_path: Path) -> None:
    model, optimizer, twin, other = pair(faulty, tmp_path)
    tierflow.save_checkpoint(model, optimizer, tmp_path / "checkpoint")
    model(model.input(1)).backward()
    optimizer.step()
    optimizer.zero_grad()
    faulty.inject("write", *extent(optimizer.engine, 7, Kind.EXP_AVG))
    with pytest.raises(aio.AioError):
        train(model, optimizer, 1)
    faulty.heal()
    optimizer.close()
    fresh = Stack(layers=10, width=64)
    _, again = tierflow.offload(fresh, config(faulty.directory))
    tierflow.load_checkpoint(fresh, again, tmp_path / "checkpoint")
    for i in range(1, 3):
        assert train(fresh, again, i) == train(twin, other, i)
    assert tiny.same(states_of(again.engine), states_of(other.engine))
    again.close()
    other.close()


@pytest.mark.parametrize("op", ["read", "write"])
def test_close_while_transfers_fail(faulty: Faulty, op: str) -> None:
    model = Stack(layers=10, width=64)
    _, optimizer = tierflow.offload(model, config(faulty.directory))
    train(model, optimizer, 0)
    faulty.inject(op, 0, 1 << 40)
    with pytest.raises(aio.AioError):
        train(model, optimizer, 1)
    optimizer.close()
    assert is_gone(faulty.directory)


# ---- set-up


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def untouched(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    """Every weight as before, and the model an ordinary one that trains."""
    model(model.input()).backward()
    found = all(p.grad is not None and type(p) is torch.nn.Parameter for p in model.parameters())
    return found and tiny.same(before, weights(model)) and getattr(model, "_tierflow_engine", None) is None


@pytest.mark.parametrize("op", ["write", "read"])
@pytest.mark.parametrize("at", [0, 3 * 3 * LAYER, 9 * 3 * LAYER])
def test_a_set_up_that_fails_half_way_gives_the_weights_back(faulty: Faulty, op: str, at: int) -> None:
    model = Stack(layers=10, width=64)
    before = weights(model)
    faulty.inject(op, at, at + 3 * LAYER, times=1)
    with pytest.raises(aio.AioError):
        tierflow.offload(model, config(faulty.directory))
    assert untouched(model, before)
    assert is_gone(faulty.directory)
    for p in model.parameters():
        p.grad = None
    _, optimizer = tierflow.offload(model, config(faulty.directory))  # and it can be tried again
    train(model, optimizer, 0)
    optimizer.close()


def test_weights_that_were_to_become_bf16_come_back_in_fp32(faulty: Faulty) -> None:
    model = Stack(layers=10, width=64)
    model.register_buffer("scale", torch.tensor([1 / 3]))
    before = weights(model)
    faulty.inject("write", 1 << 19, 1 << 40, times=1)
    with pytest.raises(aio.AioError):
        tierflow.offload(model, config(faulty.directory) | {"bf16": {"enabled": True}})
    assert all(p.dtype == torch.float32 for p in (*model.parameters(), model.scale))
    assert untouched(model, before)


@pytest.mark.parametrize("capacity", ["auto", "64MB"])
def test_a_disk_too_small_is_found_out_before_the_model_is_touched(small_tmpfs: Path, capacity: str) -> None:
    model = Stack(layers=30, width=64)
    before = weights(model)
    with pytest.raises(tierflow.DoesNotFit, match="nvme"):
        tierflow.offload(model, config(small_tmpfs, **(tiny.tight(model) | {"nvme_capacity": capacity})))
    assert untouched(model, before) and is_gone(small_tmpfs)


def test_a_disk_that_fills_up_meanwhile(small_tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack(layers=30, width=64)
    before = weights(model)
    monkeypatch.setattr("tierflow.machine.disk_free", lambda path: 1 << 40)
    with pytest.raises(aio.DiskFull) as raised:
        tierflow.offload(model, config(small_tmpfs, **tiny.tight(model)))
    assert str(small_tmpfs) in str(raised.value)
    assert untouched(model, before) and is_gone(small_tmpfs)


def test_the_store_is_cut_behind_its_back(tmp_path: Path) -> None:
    model = Stack(layers=10, width=64)
    _, optimizer = tierflow.offload(model, config(tmp_path))
    train(model, optimizer, 0)
    (link,) = (
        f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")
        if os.path.realpath(f"/proc/self/fd/{n}").startswith(f"{tmp_path}/")
    )  # fmt: skip
    os.truncate(link, extent(optimizer.engine, 5, Kind.PARAM)[0])
    engine = optimizer.engine
    with pytest.raises(aio.AioError, match="the file ends"):
        train(model, optimizer, 1)
    if engine.failed is None:  # the read was the forward's, and updates under way hold weights of their own
        assert not any(engine._pins.values())
        with pytest.raises(aio.AioError, match="the file ends"):
            engine.settle()
    assert engine.failed is not None and pins(engine) == 0
    optimizer.close()
    assert is_gone(tmp_path)
