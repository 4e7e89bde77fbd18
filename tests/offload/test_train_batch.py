"""``train_batch`` and its calls one by one: what they take, refuse and count."""

from __future__ import annotations

import copy

import pytest
import tiny
from architectures import build
from turns import (
    COUNT,
    Ways,
    engine_for,
    equal,
    plain,
    text,
    way_loss,
    ways,
)


def test_call_by_call_like_deepspeed(tmp_path) -> None:
    model = build("llama")
    expected = plain(copy.deepcopy(model), text())
    with engine_for(model, tmp_path) as engine:
        losses = []
        for step in text():
            parts = []
            for i, batch in enumerate(step):
                assert engine.is_gradient_accumulation_boundary() == (i == COUNT - 1)
                parts.append(engine.backward(engine(**batch).loss).detach())
                engine.step()
            losses.append(sum(parts[1:], parts[0]).item())
        assert (engine.micro_steps, engine.global_steps) == (3 * COUNT, 3)
        equal((losses, tiny.weights(model)), expected)


def test_micro_batches_from_an_iterator_and_of_other_lengths(tmp_path) -> None:
    model = build("gpt2")
    steps = text(same_length=False)
    expected = plain(copy.deepcopy(model), steps)
    with engine_for(model, tmp_path) as engine:
        loader = (batch for step in steps for batch in step)
        losses = [engine.train_batch(loader).item() for _ in steps]
        equal((losses, tiny.weights(model)), expected)


def test_what_train_batch_refuses(tmp_path) -> None:
    with engine_for(build("llama"), tmp_path) as engine:
        step = text()[0]
        with pytest.raises(ValueError, match="was given 3 micro-batches and gradient_accumulation_steps is 4"):
            engine.train_batch(step[:3])
        with pytest.raises(ValueError, match="was given 2 micro-batches"):
            engine.train_batch(iter(step[:2]))
        with pytest.raises(ValueError, match=r"put this one in \[...\]"):
            engine.train_batch(step[0])
        with pytest.raises(TypeError, match="found no loss"):
            engine.train_batch([{"input_ids": b["input_ids"]} for b in step])
        engine.backward(engine(**step[0]).loss)
        engine.step()
        with pytest.raises(RuntimeError, match=r"call step\(\) first"):
            engine.train_batch(step)


def test_phases_follow_whoever_runs(tmp_path) -> None:
    said: list[str | None] = []
    with engine_for(Ways(depth=3), tmp_path, count=2) as engine:
        for step in ways([[[0, 1, 2]] * 2] * 2):
            said.clear()
            engine.train_batch(step, way_loss, said.append)
    names = [p for p in said if p is not None]
    changes = [p for i, p in enumerate(names) if i == 0 or names[i - 1] != p]
    assert changes == ["forward", "backward", "forward", "backward", "update"]
    assert said[-1] is None
