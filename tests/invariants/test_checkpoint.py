"""Checkpoints: saved in one placement, resumed in another, the same training bit for bit; whole or not there."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from outcome import Stack, states_of
from torch import nn

import tierflow
from tierflow.swap import DebugMemory

PLACES = ["device", "host", "nvme", "param_host_states_nvme", "everything"]


class Model(Stack):
    """Dropout, a frozen layer, a layer that gets no gradient, a tied weight, and buffers that count."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__(layers=6, width=48, dropout=0.3, dtype=dtype)
        self.layers[2].requires_grad_(False)
        self.idle = nn.Linear(48, 3, dtype=dtype)
        self.layers[5].weight = self.layers[0].weight
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("passing", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return super().forward(x) * (1 + 0.01 * self.seen)


def groups(model: Model) -> list[dict[str, Any]]:
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [{"params": decay, "lr": 2e-2, "weight_decay": 0.2}, {"params": rest, "lr": 5e-3, "betas": (0.8, 0.95)}]


class Run:
    """A training loop with accumulation, clipping, a schedule and three sources of randomness."""

    def __init__(self, path: Path, placement: str, dtype: torch.dtype = torch.float32, seed: int = 3):
        path.mkdir(exist_ok=True)
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        self.model = Model(dtype)
        caps = {} if placement == "device" else tiny.tight(self.model, placement, accumulation=2, direct=False)
        config = tiny.config(placement, path, clip=0.5, accumulation=2, **caps)
        debug = DebugMemory(random.Random(1), through_host=True)
        _, self.optimizer = tierflow.offload(self.model, config, param_groups=groups(self.model), debug_memory=debug)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: 1 / (s + 1))

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            for _ in range(2):
                noise = torch.randn(4, 48) + random.random() + float(np.random.rand())
                loss = self.model(noise.to(self.model.layers[0].weight.dtype)) / 2
                loss.backward()
                losses.append(loss.item())
            self.optimizer.step()
            losses.append(self.optimizer.last_grad_norm)
            self.schedule.step()
            self.optimizer.zero_grad()
        return losses

    def save(self, folder: Path) -> None:
        tierflow.save_checkpoint(self.model, self.optimizer, folder, {"schedule": self.schedule.state_dict(), "epoch": 3})

    def load(self, folder: Path) -> None:
        client = tierflow.load_checkpoint(self.model, self.optimizer, folder)
        assert client["epoch"] == 3
        self.schedule.load_state_dict(client["schedule"])

    def all(self) -> dict[str, torch.Tensor]:
        lrs = torch.tensor([g["lr"] for g in self.optimizer.param_groups], dtype=torch.float64)
        return states_of(self.optimizer.engine) | {"seen": self.model.seen.clone(), "lrs": lrs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "lossless"])
@pytest.mark.parametrize("saved_in", PLACES)
def test_resuming_is_going_on(tmp_path: Path, saved_in: str, dtype: torch.dtype) -> None:
    first = Run(tmp_path / "a", saved_in, dtype)
    if saved_in == "everything":  # updates stay due: the checkpoint is to hold them
        first.optimizer.engine.updates.advance = lambda **_: None
    first.steps(3)
    if saved_in == "everything":
        assert first.optimizer.engine.updates
    first.save(tmp_path / "checkpoint")
    expected = first.steps(3)
    held = first.all()
    assert held["seen"].item() == 12 and len(set(expected)) == len(expected)
    first.optimizer.close()
    for loaded_in in PLACES:
        again = Run(tmp_path / "b", loaded_in, dtype, seed=99)
        if loaded_in in ("nvme", "everything"):
            again.steps(1)  # into a run under way: its caches, gradients and updates to come must not show through
        again.load(tmp_path / "checkpoint")
        assert again.optimizer.steps_taken == 3
        assert again.steps(3) == expected, loaded_in
        assert tiny.same(held, again.all()), loaded_in
        again.optimizer.engine.manager.ledger.check()
        again.optimizer.close()


def test_saving_changes_nothing(tmp_path: Path) -> None:
    runs = [Run(tmp_path / "a", "everything"), None]
    losses = [runs[0].steps(4)]
    runs[1] = Run(tmp_path / "b", "everything")
    found = []
    for i in range(4):
        found += runs[1].steps(1)
        runs[1].save(tmp_path / "checkpoint")
        tierflow.save_weights(runs[1].model, tmp_path / f"weights{i}")
    assert [found] == losses
    assert tiny.same(runs[0].all(), runs[1].all())
    for run in runs:
        run.optimizer.close()


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("fails_at", ["model.safetensors", "optimizer.safetensors", "rng", "tierflow.json", "rename"])
def test_an_error_while_saving_leaves_the_old_checkpoint(
    tmp_path: Path, fails_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "a", "everything")
    run.steps(1)
    folder = tmp_path / "checkpoints" / "last"
    run.save(folder)
    before = content(folder)
    run.steps(1)
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise full

    if fails_at.endswith("safetensors"):
        import tierflow.weights as weights

        real = weights.os.fsync
        calls = []

        def fsync(fd: int) -> None:
            calls.append(os.readlink(f"/proc/self/fd/{fd}"))
            if fails_at in calls[-1]:
                raise full
            real(fd)

        monkeypatch.setattr(weights.os, "fsync", fsync)
    elif fails_at == "rng":
        monkeypatch.setattr(torch, "save", refuse)
    elif fails_at == "tierflow.json":
        monkeypatch.setattr(Path, "write_text", refuse)
    else:
        real_replace = os.replace

        def replace(a: Any, b: Any) -> None:
            if Path(b) == folder and Path(a).name.endswith(".partial"):
                raise full
            real_replace(a, b)

        monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        run.save(folder)
    monkeypatch.undo()
    assert content(folder) == before
    assert os.listdir(folder.parent) == ["last"]
    expected = run.steps(1)  # the run goes on
    assert len(expected) == 3
    run.save(folder)  # and saves again
    assert content(folder) != before
    again = Run(tmp_path / "b", "device", seed=5)
    again.load(folder)
    assert tiny.same(run.all(), again.all())
    for r in (run, again):
        r.optimizer.close()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saved_weights_load_with_from_pretrained(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny.llama(layers=3, hidden=32, tied=tied, dtype=dtype)
    caps = tiny.tight(model)
    _, optimizer = tierflow.offload(model, tiny.config("everything", tmp_path, **caps))
    tiny.train(model, optimizer, 3)
    tierflow.save_weights(model, tmp_path / "weights")
    mine = tiny.weights(model)
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "weights", dtype="auto", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = tiny.weights(plain)
    assert tiny.same(mine, theirs)
    assert all(p.dtype == dtype for p in theirs.values())
    for p in plain.parameters():  # out of the mapped file, where a weight may lie at any offset: that changes products
        p.data = p.data.clone()
    ids = torch.arange(10)[None]
    if dtype == torch.float32:  # .to(bfloat16) has rounded the model's rotary buffer, which no file holds
        with torch.no_grad():
            assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    optimizer.close()
    # and back into the tiers, from the file
    config = tiny.config("everything", tmp_path, **caps)
    loaded, optimizer = tierflow.load(AutoModelForCausalLM, tmp_path / "weights", config)
    assert tiny.same(mine, tiny.weights(loaded))
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, loaded(input_ids=ids).logits)
    optimizer.close()


def test_a_save_cut_off_between_its_renames_loses_nothing(tmp_path: Path) -> None:
    model = tiny.llama(layers=1, hidden=32)
    _, optimizer = tierflow.offload(model, tiny.config("nvme", tmp_path))
    tiny.train(model, optimizer, 1)
    folder = tmp_path / "checkpoint"
    tierflow.save_checkpoint(model, optimizer, folder, {"step": 1})
    folder.rename(tmp_path / "checkpoint.old")
    assert tierflow.load_checkpoint(model, optimizer, folder) == {"step": 1}
    tierflow.save_checkpoint(model, optimizer, folder, {"step": 2})
    assert tierflow.load_checkpoint(model, optimizer, folder) == {"step": 2}
    assert not (tmp_path / "checkpoint.old").exists()
    optimizer.close()
