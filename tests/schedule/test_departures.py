"""What the trace did not foresee is served, said at most once, learned when it lasts, and leaves nothing behind."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from loops import ids
from slow import prompt
from torch import nn

import tierflow
from tierflow.swap import Tier

WIDTH, UNIT = 64, 24576


class Routed(nn.Module):
    """Blocks in any order, any of them left out: what ``route`` says."""

    def __init__(self, blocks: int = 8):
        super().__init__()
        torch.manual_seed(6)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(blocks))
        self.route = list(range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in self.route:
            x = x + torch.tanh(self.blocks[i](x))
        return x.square().mean()


def experts(step: int) -> list[int]:
    """Two experts of six, others each step, between a first and a last block."""
    drawn = torch.randperm(6, generator=torch.Generator().manual_seed(step))[:2] + 1
    return [0, *drawn.tolist(), 7]


ROUTES: dict[str, Callable[[int], list[int]]] = {
    "experts": experts,
    "early exit": lambda step: list(range(8 if step % 3 else 4)),
    "branch": lambda step: [0, 1, 2, 3] if step % 4 < 2 else [0, 4, 5, 6, 7],
    "backwards": lambda step: list(range(8)) if step < 3 else list(range(8))[::-1],
    "twice": lambda step: [0, 1, 2, 3, 4, 5, 6, 7] if step % 2 else [0, 0, 1, 2, 1, 7],
}


def step(model: Any, optimizer: Any, route: list[int], number: int) -> float:
    model.route = route
    if hasattr(optimizer, "expect_step"):
        optimizer.expect_step()
    loss = model(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(number)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def offload(model: nn.Module, path: Path, update: str, units: int = 3) -> Any:
    caps = {"device_memory": str(units * UNIT), "host_memory": str(len(model.blocks) * UNIT + 2 * 8192 * 12)}
    config = tiny.config("everything", path, update=update, **caps)
    _, optimizer = tierflow.offload(model, config, owned_loop=update == "speculative")
    return optimizer


def leased(optimizer: Any) -> dict[Tier, int]:
    """Bytes that stay leased when every copy that may go has gone and nothing is under way."""
    engine = optimizer.engine
    engine.settle()
    engine.manager.fetches.settle()
    for tier in (Tier.DEVICE, Tier.HOST):
        for unit in engine.units:
            if engine.manager.evictable(unit.chunk, tier):
                engine.manager.evict(unit.chunk, tier)
    return {t: engine.manager.pools[t].working.leased for t in (Tier.DEVICE, Tier.HOST)}


@pytest.mark.parametrize("name", list(ROUTES))
@pytest.mark.parametrize("update", ["immediate", "deferred", "speculative"])
def test_any_way_gives_the_right_weights_and_one_warning(tmp_path: Path, caplog, name: str, update: str) -> None:
    model = Routed()
    plain = copy.deepcopy(model)
    other = tiny.plain_adamw(plain)
    optimizer = offload(model, tmp_path, update)
    with caplog.at_level(logging.WARNING, "tierflow"):
        for number in range(9):
            route = ROUTES[name](number)
            assert step(model, optimizer, route, number) == step(plain, other, route, number), number
            optimizer.engine.manager.ledger.check()
    assert sum("order in which modules run has changed" in r.message for r in caplog.records) <= 1
    assert leased(optimizer) == {Tier.DEVICE: 0, Tier.HOST: 0}
    assert tiny.same(tiny.weights(model), tiny.weights(plain))
    optimizer.close()


def demands(optimizer: Any, model: Routed, route: list[int], number: int) -> int:
    """Units that a step came to before anybody had asked for them."""
    manager = optimizer.engine.manager
    found, before = [], manager.fetches.start

    def start(chunk: Any, victims: Any, hint: bool = False, **kw: Any) -> bool:
        if not hint and not manager.ledger.valid(chunk, Tier.DEVICE) and chunk not in manager.fetches:
            found.append(chunk)
        return before(chunk, victims, hint=hint, **kw)

    manager.fetches.start = start
    step(model, optimizer, route, number)
    manager.fetches.start = before
    return len(found)


def test_a_departure_that_lasts_is_learned(tmp_path: Path) -> None:
    model = Routed()
    optimizer = offload(model, tmp_path, "immediate", units=4)
    prompt(optimizer.engine)
    there, back = list(range(8)), [7, 2, 5, 0, 3, 6, 1, 4]
    for number in range(3):
        step(model, optimizer, there, number)
    settled = demands(optimizer, model, there, 3)
    departed = demands(optimizer, model, back, 4)
    step(model, optimizer, back, 5)
    learned = demands(optimizer, model, back, 6)
    assert settled < departed and learned < departed
    assert optimizer.engine.recorder.trace.order[:8] == back
    optimizer.close()


@pytest.mark.parametrize("update", ["immediate", "deferred", "speculative"])
def test_prefetches_that_nobody_wants_give_their_memory_back(tmp_path: Path, update: str) -> None:
    model = Routed()
    optimizer = offload(model, tmp_path, update)
    engine = optimizer.engine
    for number in range(4):
        step(model, optimizer, list(range(8)), number)
    engine.settle()
    before = {t: engine.manager.pools[t].working.leased for t in (Tier.DEVICE, Tier.HOST)}
    model.route = [0, 1]
    with pytest.raises(KeyError):
        model(torch.randn(2, WIDTH)) / {}["an error in the loop while the next units are on their way"]
    model.zero_grad()
    step(model, optimizer, [0, 1], 9)
    engine.settle()
    engine.manager.fetches.settle()
    after = {t: engine.manager.pools[t].working.leased for t in (Tier.DEVICE, Tier.HOST)}
    assert after[Tier.DEVICE] <= 3 * UNIT and after[Tier.HOST] == before[Tier.HOST] == 0
    assert len(engine.manager.fetches) == 0
    assert leased(optimizer) == {Tier.DEVICE: 0, Tier.HOST: 0}
    optimizer.close()


@pytest.mark.parametrize("update", ["immediate", "deferred", "speculative"])
@pytest.mark.parametrize("where", ["between forward and backward", "between backward and step", "between steps"])
def test_generating_in_the_middle(tmp_path: Path, caplog, update: str, where: str) -> None:
    model = tiny.llama(layers=3, hidden=32)
    plain = copy.deepcopy(model)
    other = tiny.plain_adamw(plain)
    caps = tiny.tight(model, "everything", slack=0.0)
    _, optimizer = tierflow.offload(
        model, tiny.config("everything", tmp_path, update=update, **caps), owned_loop=update == "speculative"
    )

    def talk(m: nn.Module, here: str) -> Any:
        if here != where:
            return None
        return m.generate(ids()[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()

    def train(m: nn.Module, o: Any, number: int) -> list[Any]:
        getattr(o, "expect_step", lambda: None)()
        loss = m(input_ids=ids(number), labels=ids(number)).loss
        said = [loss.item(), talk(m, "between forward and backward")]
        loss.backward()
        said.append(talk(m, "between backward and step"))
        o.step()
        o.zero_grad()
        return [*said, talk(m, "between steps")]

    with caplog.at_level(logging.WARNING, "tierflow"):
        for number in range(4):
            assert train(model, optimizer, number) == train(plain, other, number)
    assert sum("order in which modules run has changed" in r.message for r in caplog.records) <= 1
    assert leased(optimizer) == {Tier.DEVICE: 0, Tier.HOST: 0}
    assert tiny.same(tiny.weights(model), tiny.weights(plain))
    optimizer.close()


@pytest.mark.parametrize("zero", ["first", "between", "last"])
def test_a_step_that_a_gradscaler_leaves_out_ends_all_the_same(tmp_path: Path, zero: str) -> None:
    """It calls no ``step()``: two forwards and backwards would look like one step of twice the length."""
    model = tiny.llama(layers=3, hidden=32, vocab=96)
    _, optimizer = tierflow.offload(model, tiny.config("everything", tmp_path, **tiny.tight(model)))
    recorder, scaler = optimizer.engine.recorder, torch.amp.GradScaler("cpu", init_scale=2.0**8)
    orders = []
    for step in range(6):
        ids = torch.randint(0, 96, (1, 8), generator=torch.Generator().manual_seed(step))
        if zero == "first":
            optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        if zero == "between":
            optimizer.zero_grad()
        scaler.scale(loss * (math.inf if step == 3 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if zero == "last":
            optimizer.zero_grad()
        orders.append(list(recorder.trace.order))
    assert optimizer.steps_taken == 5 and scaler.get_scale() == 2.0**7
    assert orders == orders[:1] * 6 and recorder.departures == 0
    optimizer.close()
    optimizer.zero_grad()
