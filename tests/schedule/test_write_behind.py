"""What a forward computed keeps out of the way of its reads, and what a backward foresees out of the way of its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from outcome import Stack, states_of
from slow import SlowStore, slow_down

import tierflow
from tierflow.scheduler.read_ahead import FORESEEN_AT_ONCE
from tierflow.swap import Kind, Tier

LAYERS, WIDTH = 40, 64
MOST = 26  #: pieces of staging: with one more there would be room for all states, and none would be staged
UNIT = 4 * 6144  #: of weights; a layer's update is one piece
PIECE = 3 * UNIT


def offloaded(path: Path, model: Stack, device: int, host: int, **block: Any) -> Any:
    """The optimizer of a model with everything on NVMe, under these caps in bytes; clipping bites."""
    caps = {"device_memory": str(device), "host_memory": str(host)}
    _, optimizer = tierflow.offload(model, tiny.config("everything", path, clip=1e-3, update="deferred", **caps, **block))
    return optimizer


@contextmanager
def trained(path: Path, pieces: int, **block: Any) -> Iterator[tuple[Stack, Any]]:
    """With room for three layers on the device, and for all gradients and ``pieces`` in host memory."""
    model = Stack(LAYERS, WIDTH)
    optimizer = offloaded(path, model, 3 * UNIT, LAYERS * UNIT + pieces * PIECE, **block)
    try:
        for number in range(3):
            step(model, optimizer, number)
        yield model, optimizer
    finally:
        optimizer.close()


def step(model: Stack, optimizer: Any, number: int) -> None:
    model(model.input(number, rows=2)).backward()
    optimizer.step()
    optimizer.zero_grad()


def written_by(engine: Any) -> Counter[bool]:
    """Bytes whose write was started since: True for weights, False for states."""
    found, write = Counter[bool](), engine.manager.nvme.write

    def noted(chunk: Any, data: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found[chunk.kind is Kind.PARAM] += data.nbytes
        return write(chunk, data, *args, **kwargs)

    engine.manager.nvme.write = noted
    return found


AT = 10  #: the layer at which a forward's writes are looked at


def test_states_wait_for_their_write_while_memory_is_left(tmp_path: Path) -> None:
    """Nothing is read ahead in the backward, which would take the memory."""
    seen, bits = dict[int, Counter[bool]](), []
    for pieces in (MOST, 2):
        with trained(tmp_path, pieces, prefetch=False) as (model, optimizer):
            engine = optimizer.engine
            assert engine.plan.homes.resident(engine.units).keys() >= {(Tier.NVME, Kind.PARAM), (Tier.NVME, Kind.EXP_AVG)}
            model(model.input(3, rows=2)).backward()
            written = written_by(engine)
            optimizer.step()
            optimizer.zero_grad()

            def note(*_: Any, written: Counter[bool] = written, pieces: int = pieces) -> None:
                seen[pieces] = written.copy()

            hook = model.layers[AT].register_forward_pre_hook(note)
            out = model(model.input(4, rows=2))
            hook.remove()
            out.backward()
            assert written == {True: LAYERS * UNIT, False: 2 * LAYERS * UNIT}, "all is on its way home behind the backward"
            optimizer.step()
            optimizer.zero_grad()
            bits.append(states_of(engine))
    assert seen[MOST][True] >= (AT - 3) * UNIT and seen[MOST][False] == 0
    assert seen[2][False] >= 2 * (AT - 3) * UNIT, "two pieces are all the memory that there is"
    assert tiny.same(*bits)


def test_a_backward_reads_little_ahead_at_once(tmp_path: Path) -> None:
    with trained(tmp_path, MOST) as (model, optimizer):
        engine = optimizer.engine
        engine.settle()
        engine.manager.store = SlowStore(engine.manager.store, 2e-3)
        seen = list[int]()
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda _: seen.append(engine.updates.ahead.arriving()))
        step(model, optimizer, 3)
        engine.settle()
        model(model.input(4, rows=2)).backward()
        assert max(seen) == FORESEEN_AT_ONCE < len(engine.updates.ahead)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("frozen", [0, 9])
@pytest.mark.parametrize("pieces", [2, 4])
@pytest.mark.parametrize(("less", "seconds"), [(0, 0.0), (16384, 0.01)])
def test_what_waits_gives_way_to_what_is_asked_for(
    tmp_path: Path, frozen: int, pieces: int, less: int, seconds: float
) -> None:
    """Between steps all staging memory may hold states that wait, or that a slow drive still reads; a weight that was never
    updated needs some of it.
    """
    model = Stack(10, WIDTH)
    model.layers[frozen].requires_grad_(False)
    optimizer = offloaded(tmp_path, model, 8 * UNIT, 9 * UNIT + pieces * PIECE - less)
    slow_down(optimizer.engine, seconds)
    weight = model.layers[frozen].weight
    for number in range(4):
        step(model, optimizer, number)
        before = model.layers[frozen].state_dict()["weight"].clone()
        with torch.no_grad(), tierflow.gathered([weight]):
            weight.mul_(0.5)
        assert torch.equal(model.layers[frozen].state_dict()["weight"], before * 0.5)
    optimizer.close()


@pytest.mark.parametrize("gradients", ["host", "nvme"])
@pytest.mark.parametrize("kind", [Kind.PARAM, Kind.EXP_AVG])
def test_a_write_that_cannot_begin_leaves_nothing_behind(tmp_path: Path, gradients: str, kind: Kind) -> None:
    model = Stack(10, WIDTH)
    host = (10 * UNIT if gradients == "host" else 2 * UNIT) + 6 * PIECE
    optimizer = offloaded(tmp_path, model, 8 * UNIT, host, gradients=gradients)
    step(model, optimizer, 0)
    engine = optimizer.engine
    engine.settle()
    write, begun = engine.manager.nvme.write, Counter[Kind]()

    def refuse(chunk: Any, *args: Any, **kwargs: Any) -> Any:
        begun[chunk.kind] += 1
        if begun[kind] == 2:
            raise OSError("cannot begin")
        return write(chunk, *args, **kwargs)

    engine.manager.nvme.write = refuse
    with pytest.raises(OSError, match="cannot begin"):
        for number in (1, 2):
            step(model, optimizer, number)
    idle = engine.updates.stager.idle._pool
    assert not engine.manager.ledger._scratch[Tier.HOST] and not (idle.leased if idle else 0)
    optimizer.close()
