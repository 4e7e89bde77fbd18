"""What a step does, in order, compared whole with what the rules say.

Transfers are over as soon as somebody asks, so that the order is the schedule's alone. Kernels and NVMe transfers are
noted when they start; "backward", "step" and "next forward" are where the loop is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from outcome import Stack
from slow import prompt
from torch import nn

import tierflow
from tierflow.swap import Lane, Timeline

UNIT = 24576  #: bytes of a Stack's layer of width 64: 64 * 64 + 64 floats, each parameter aligned, padded


def events(engine: Any) -> list[str]:
    """A list that fills with what the engine starts from now on."""
    log: list[str] = []
    manager, stager = engine.manager, engine.updates.stager

    def note(owner: Any, name: str, entry: Callable[..., str]) -> None:
        before = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            log.append(entry(*args, **kwargs))
            return before(*args, **kwargs)

        setattr(owner, name, noted)

    def transfer(op: str) -> Callable[..., str]:
        def entry(chunk: Any, data: Any, begin: int = 0, spare: bool = False, **_: Any) -> str:
            return f"{op} {engine.units[chunk.unit].label} {chunk.kind.value}{' (second slot)' if spare else ''}"

        return entry

    note(manager.nvme, "read", transfer("read"))
    note(manager.nvme, "write", transfer("write"))
    note(stager, "compute", lambda piece: f"kernel {piece.job.unit.label}")
    return log


def always_alike(engine: Any) -> None:
    """Steps seem to take what they would with a link that brings up one layer while one computes."""
    lanes = replace(
        Timeline().take(), busy=dict.fromkeys(Lane, 1.0), nbytes=dict.fromkeys(Lane, UNIT),
        computed={unit.label: 2.0 for unit in engine.units},
    )  # fmt: skip
    learn = engine.look_ahead.learn
    engine.look_ahead.learn = lambda trace, _: learn(trace, lanes)


def steady_step(model: nn.Module, loss_of: Callable[[int], torch.Tensor], path: Path, update: str, **config: Any) -> list[str]:
    """The events from a fourth step's forward to the end of the next step's forward."""
    placement = config.pop("placement")
    _, optimizer = tierflow.offload(
        model, tiny.config(placement, path, update=update, **config), owned_loop=update == "speculative"
    )
    prompt(optimizer.engine)
    always_alike(optimizer.engine)
    log: list[str] = []
    for step in range(4):
        if step == 3:
            log = events(optimizer.engine)
        optimizer.expect_step()
        loss = loss_of(step)
        log.append("backward")
        loss.backward()
        log.append("step")
        optimizer.step()
        optimizer.zero_grad()
    log.append("next forward")
    loss_of(4)
    optimizer.close()
    return log


def update_of(unit: str, pieces: int, weights: bool = True, slot: str = "", kept: bool = False) -> list[str]:
    """States in, kernel, weights out, and the states behind them: piece by piece. ``kept``: what the weights were is
    written instead, last.
    """
    states = ["exp_avg", "exp_avg_sq"]
    written = [*states, "param"] if kept else ["param", *states] if weights else states
    return [
        *(f"read {unit} {kind}" for kind in states),
        f"kernel {unit}",
        *(f"write {unit} {kind}{slot}" for kind in written),
    ] * pieces


def states_ahead(unit: str, pieces: int) -> list[str]:
    """States that are read before their weights come: in the backward, for the update of the step to come, too."""
    return [f"read {unit} exp_avg", f"read {unit} exp_avg_sq"] * pieces


def rest_of_update(unit: str, pieces: int, weights: bool = True) -> list[str]:
    """The update of what was read ahead."""
    return [event for event in update_of(unit, pieces, weights) if not event.startswith("read")]


AHEAD = " (second slot)"

#: Three of four layers fit. The forward that comes to layer 3 gives up layer 0, whose next use is the farthest: the backward
#: ends at layer 1, as the input asks for no gradient. There layer 0 is fetched for the next forward, in place of layer 3.
#: The staging memory holds the states of two layers: the backward reads those of the first two ahead. What the update
#: finds in memory it updates there; layer 3, whose states are read while its weights have no room, is brought up when the
#: next forward is done with layer 0.
STACK = {
    "deferred": [
        "read layers.3 param",
        *rest_of_update("layers.3", 2),
        "backward",
        *states_ahead("layers.0", 2),
        *states_ahead("layers.1", 2),
        "read layers.0 param",
        "step",
        *rest_of_update("layers.0", 2),
        *rest_of_update("layers.1", 2),
        *update_of("layers.2", 2),
        *states_ahead("layers.3", 2),
        "next forward",
        "read layers.3 param",
        *rest_of_update("layers.3", 2),
    ],
    # each as soon as its gradient is there and its weights have served
    "speculative": [
        "read layers.3 param",
        "backward",
        *update_of("layers.3", 2, slot=AHEAD),
        "read layers.0 param",
        *update_of("layers.2", 2, slot=AHEAD),
        *update_of("layers.1", 2, slot=AHEAD),
        *update_of("layers.0", 2, slot=AHEAD),
        "step",
        "next forward",
        "read layers.3 param",
    ],
}

#: Weights stay on DEVICE; in the second slot they are kept as they were. The staging memory holds all states but those of
#: the last piece and the norm (if it could hold these too, nothing would be staged: all would live there). The tied
#: embedding's gradient is final when the embedding's own has come, last of all.
LLAMA = {
    "deferred": [
        "backward",
        *states_ahead("model.embed_tokens", 1),
        *states_ahead("model.layers.0", 2),
        *states_ahead("model.layers.1", 1),
        "step",
        *rest_of_update("model.embed_tokens", 1, weights=False),
        *rest_of_update("model.layers.0", 2, weights=False),
        *rest_of_update("model.layers.1", 1, weights=False),
        *update_of("model.layers.1", 1, weights=False),
        *update_of("model.norm", 1, weights=False),
        "next forward",
    ],
    "speculative": [
        "backward",
        *update_of("model.norm", 1, slot=AHEAD, kept=True),
        *update_of("model.layers.1", 2, slot=AHEAD, kept=True),
        *update_of("model.layers.0", 2, slot=AHEAD, kept=True),
        *update_of("model.embed_tokens", 1, slot=AHEAD, kept=True),
        "step",
        "next forward",
    ],
}


@pytest.mark.parametrize("update", ["deferred", "speculative"])
def test_everything_on_nvme(tmp_path: Path, update: str) -> None:
    model = Stack(layers=4, width=64)
    staging = 2 * 4096 * 12  # two pieces of a block of elements each: 4 bytes of weight and 8 of moments
    found = steady_step(
        model, lambda step: model(model.input(step)), tmp_path, update, placement="everything",
        device_memory=str(3 * UNIT), host_memory=str(4 * UNIT + staging),
    )  # fmt: skip
    assert found == STACK[update]


@pytest.mark.parametrize("update", ["deferred", "speculative"])
def test_states_on_nvme_and_tied_weights(tmp_path: Path, update: str) -> None:
    model = tiny.llama(layers=2, hidden=32, vocab=96)

    def loss_of(step: int) -> torch.Tensor:
        ids = torch.randint(0, 96, (1, 8), generator=torch.Generator().manual_seed(step))
        return model(input_ids=ids, labels=ids).loss

    device = tiny.tight(model, "nvme")["device_memory"]  # no room for states
    host = {"deferred": "300000", "speculative": "315000"}[update]
    found = steady_step(model, loss_of, tmp_path, update, placement="nvme", device_memory=device, host_memory=host)
    assert found == LLAMA[update]
