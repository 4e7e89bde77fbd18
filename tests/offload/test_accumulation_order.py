"""Which order of micro-batches "auto" takes, how many take turns at once, and what is said of it."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from architectures import VOCAB, build
from torch import nn
from turns import (
    COUNT,
    SMALL,
    Drops,
    engine_for,
    equal,
    plain,
    text,
    train,
    way_loss,
    ways,
    wide,
)

from tierflow import machine


@pytest.fixture
def any_wait_is_worth_turns(monkeypatch) -> None:
    monkeypatch.setattr("tierflow.accumulation.WORTH_TURNS", -1.0)


def test_auto_takes_no_turns_on_a_processor_that_hardly_waits(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tierflow.accumulation.WORTH_TURNS", 2.0)
    with engine_for(wide(), tmp_path, order="auto", **SMALL) as engine:
        engine.train_batch(ways([[list(range(12))] * COUNT])[0], way_loss)
        assert engine.accumulation.order == "micro_batch" and "waits for fetches" in engine.accumulation.why


@pytest.mark.usefixtures("any_wait_is_worth_turns")
def test_auto_takes_turns_where_that_saves_fetches_and_fits(tmp_path, monkeypatch) -> None:
    def choice(model, steps, loss=None, free=1 << 40, **options):
        monkeypatch.setattr(machine, "mem_available", lambda *_: free)
        with engine_for(model, tmp_path, order="auto", **options) as engine:
            for step in steps:
                engine.train_batch(step, loss)
            return engine.accumulation

    steps = ways([[list(range(12))] * COUNT] * 2)
    found = choice(wide(), steps, way_loss, **SMALL)
    assert (found.order, found.at_once) == ("layer_major", COUNT)
    found = choice(wide(), steps, way_loss, device_memory="64MB")
    assert found.order == "micro_batch" and "weights stay on the device" in found.why
    found = choice(wide(), steps, way_loss, placement="host", device_memory="64MB", host_memory="64MB")
    assert found.order == "micro_batch" and "weights stay on the device" in found.why
    found = choice(Drops(), [[torch.randn(4, 32) for _ in range(COUNT)]] * 2, device_memory="20KB")
    assert found.order == "micro_batch" and "random numbers" in found.why


@pytest.mark.usefixtures("any_wait_is_worth_turns")
def test_auto_turns_back_when_dropout_comes_later(tmp_path) -> None:
    model = Drops().eval()
    with engine_for(model, tmp_path, order="auto", device_memory="20KB") as engine:
        step = [torch.randn(4, 32) for _ in range(COUNT)]
        engine.train_batch(step)
        assert engine.accumulation.order == "layer_major"
        model.train()
        engine.train_batch(step)
        assert engine.accumulation.order == "micro_batch"


@pytest.mark.usefixtures("any_wait_is_worth_turns")
@pytest.mark.parametrize(("free", "at_once"), [(8.0, 4), (3.0, 2), (1.0, 1)])
def test_groups_as_large_as_fit(free: float, at_once: int, tmp_path, monkeypatch, caplog) -> None:
    """``free`` in what one micro-batch leaves: each that waits is to have twice that in four fifths of what is free."""
    orders = [list(range(12))] * COUNT
    model = wide()
    other = copy.deepcopy(model)
    steps = ways([orders] * 3)
    # a block saves its input, what LayerNorm takes and two statistics, what tanh gives, that factor; and x is squared
    tensors = 12 * 4 + 1
    one = tensors * 4 * 128 * 4
    with engine_for(model, tmp_path, order="auto", **SMALL) as engine:
        monkeypatch.setattr(machine, "mem_available", lambda *_: int(free * one))
        result = train(engine, steps, way_loss)
        assert engine.accumulation.at_once == at_once, str(engine.accumulation)
    equal(result, plain(other, steps, way_loss))


@pytest.mark.usefixtures("any_wait_is_worth_turns")
def test_larger_inputs_are_learned_before_they_take_turns(tmp_path) -> None:
    model = wide()
    with engine_for(model, tmp_path, order="auto", **SMALL) as engine:
        def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return model(x, list(range(12)))

        figures = []
        for rows in (4, 4, 8, 4):
            engine.train_batch([torch.randn(rows, 128) for _ in range(COUNT)], loss)
            figures.append(engine.accumulation.why)
        assert figures[0] == figures[1] != figures[2] == figures[3]


def test_modes_that_threads_would_miss_keep_the_plain_order(tmp_path, caplog) -> None:
    caplog.set_level("INFO", logger="tierflow")
    model = wide()
    steps = ways([[[0, 1, 2]] * COUNT] * 2)
    with engine_for(model, tmp_path) as engine:
        engine.train_batch(steps[0], way_loss)
        names = []

        def loss(model: nn.Module, batch) -> torch.Tensor:
            names.append(threading.current_thread().name)
            return way_loss(model, batch)

        with torch.device("cpu"):
            engine.train_batch(steps[1], loss)
        assert set(names) == {"MainThread"} and "torch function mode" in caplog.text
        engine.train_batch(steps[1], loss)
        assert len(set(names)) == 1 + COUNT


def test_the_gradient_of_a_tied_head_waits_too(tmp_path) -> None:
    from tierflow.accumulation import tied_gradients

    for name, expected in (("llama", 4 * VOCAB * 32), ("untied", 0)):
        with engine_for(build(name), tmp_path) as engine:
            assert tied_gradients(engine.optimizer.engine.units) == expected


def test_the_report_names_the_order_of_micro_batches(tmp_path) -> None:
    with engine_for(build("llama"), tmp_path, order="layer_major") as engine:
        train(engine, text(steps=2))
        assert engine.report().text().splitlines()[-1] == str(engine.accumulation)
        assert str(engine.accumulation).startswith(f"accumulation: layer_major, {COUNT} micro-batches in turns")
