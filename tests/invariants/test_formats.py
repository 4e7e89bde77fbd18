"""Every state format and rule through tiers, pipeline and checkpoints: the bits of the plain optimizer, nothing moved."""

from __future__ import annotations

import json
import random
import shutil
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from outcome import states_of
from torch import nn

import tierflow
from tierflow.config import ConfigError, load_config
from tierflow.cpu_adam import CPUAdagrad, CPUAdamW, CPULion
from tierflow.offloading import make_run
from tierflow.scheduler import placement
from tierflow.swap import DebugMemory, Kind, Tier
from tierflow.weights import WeightsError

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CLASSES = {"AdamW": CPUAdamW, "Lion": CPULion, "Adagrad": CPUAdagrad}
#: (optimizer, state format, dtype); AdamW's exact formats are test_parity's.
CASES = [
    ("AdamW", "bf16", F32), ("AdamW", "bf16", BF16), ("AdamW", "int8", F32), ("AdamW", "int8", BF16),
    ("AdamW", "int8", F16), ("AdamW", "int8-24bit", BF16), ("Lion", "fp32", F32), ("Lion", "lossless", BF16), ("Lion", "int8-24bit", BF16),
    ("Adagrad", "fp32", F32), ("Adagrad", "bf16", BF16), ("Adagrad", "int8", F32),
]  # fmt: skip
IDS = ["-".join((kind, state, str(dtype)[6:])) for kind, state, dtype in CASES]
#: Its square is more than the smallest piece of an 8-bit format and no whole number of groups.
WIDTH = 261


class Net(nn.Module):
    """Matrices beside norms and biases, which stay exact; a layer is frozen."""

    def __init__(self, dtype: torch.dtype, layers: int = 4):
        super().__init__()
        torch.manual_seed(4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(layers))
        self.blocks[1].requires_grad_(False)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x.float().square().mean()

    def input(self, seed: int) -> torch.Tensor:
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))
        return x.to(self.blocks[0][1].weight.dtype)


def config(path: Path, place: str, case: tuple, accumulation: int = 1, clip: float = 0.0, **block: Any) -> dict[str, Any]:
    kind, state, dtype = case
    made = tiny.config({"split": "nvme"}.get(place, place), path, clip, accumulation, optimizer_state=state, **block)
    made["optimizer"] = {"type": kind, "params": {"lr": 1e-3, "weight_decay": 0.1}}
    # plain torch adds micro-batches in the parameters' own dtype
    return made | {"data_types": {"grad_accum_dtype": {F32: "fp32", BF16: "bf16", F16: "fp16"}[dtype]}}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all of the states could be staged at once, and there would be room for none of them or for all."""
    monkeypatch.setattr(placement, "PIECE_ELEMENTS", 1 << 12)


def caps_for(place: str, case: tuple, path: Path, update: str = "auto") -> dict[str, Any]:
    """So little memory that what is on NVMe comes and goes; for "split" so much that it cuts a unit's states in two."""
    if place in ("device", "host"):
        return {}
    model = net(case)
    top = {name: value for name, value in config(path, place, case).items() if name in ("optimizer", "data_types")}
    block = {"optimizer_state": case[1], "update": update}
    found = tiny.tight(model, {"split": "nvme"}.get(place, place), direct=False, top=top, **block)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    for more in range(0, 4 << 20, 20 << 10) if place == "split" else ():
        split = found | {"host_memory": str(int(found["host_memory"]) + more)}
        plan = make_run(model, load_config(config(path, place, case, **split)), tiny.DEVICE, trained, None, direct=False)[1]
        if any(Tier.HOST in ahead for ahead in plan.homes.ahead.values()):
            return split
    return found  # of a format with large grains HOST takes a unit's states whole, and DEVICE alone has a part


def net(case: tuple) -> Net:
    """With more states than the staging of two of the smallest pieces takes: else all of them live in memory."""
    return Net(case[2], layers=16 if case[1:] == ("int8", F32) else 4)


class Run:
    """A run under tierflow, memory slots at random and freed memory poisoned."""

    def __init__(self, path: Path, place: str, case: tuple, accumulation: int = 1, clip: float = 0.0, **block: Any):
        self.model, self.accumulation = net(case), accumulation
        made = config(path, place, case, accumulation, clip, **(caps_for(place, case, path, block.get("update", "auto")) | block))
        debug = DebugMemory(random.Random(1), through_host=True)
        self.engine = tierflow.initialize(self.model, made, debug_memory=debug)
        self.optimizer = self.engine.optimizer

    def steps(self, begin: int, end: int) -> list[float]:
        losses = []
        for i in range(begin * self.accumulation, end * self.accumulation):
            losses.append(self.engine.backward(self.engine(self.model.input(i))).item())
            self.engine.step()
        return losses

    def states(self) -> dict[str, torch.Tensor]:
        self.optimizer.engine.manager.ledger.check()
        return states_of(self.optimizer.engine)

    def close(self) -> None:
        self.engine.close()


@cache
def plain(case: tuple, accumulation: int, steps: int = 4) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and every byte of weights and states, of the resident optimizer in a plain loop."""
    kind, state, _ = case
    model = net(case)
    optimizer = CLASSES[kind](model.parameters(), lr=1e-3, weight_decay=0.1, state_format=state)
    losses = []
    for i in range(steps * accumulation):
        loss = model(model.input(i))
        loss = loss / accumulation if accumulation > 1 else loss
        loss.backward()
        losses.append(loss.item())
        if (i + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    found = {}
    for name, p in model.named_parameters():
        kept = {"param": p.detach()} | {k: v for k, v in optimizer.state.get(p, {}).items() if k != "step"}
        for key, value in kept.items():
            key = "master" if key in ("remainder", "correction") else key
            found[f"{name}.{key}"] = value.contiguous().view(-1).view(torch.uint8)
    return losses, found


@pytest.mark.parametrize(
    ("place", "accumulation", "update", "block"),
    [
        ("device", 1, "immediate", {}),
        ("host", 2, "deferred", {}),
        ("nvme", 1, "deferred", {"prefetch": False}),
        ("split", 2, "deferred", {"piece_elements": 1}),
        ("param_host_states_nvme", 1, "speculative", {}),
        ("everything", 1, "speculative", {}),
        ("everything", 2, "deferred", {}),
        ("everything", 1, "immediate", {"piece_elements": 1}),
    ],
)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_placement_has_the_bits_of_the_resident_optimizer(
    tmp_path: Path, case: tuple, place: str, accumulation: int, update: str, block: dict[str, Any]
) -> None:
    run = Run(tmp_path, place, case, accumulation, update=update, **block)
    engine = run.optimizer.engine
    losses, states = run.steps(0, 4), run.states()
    expected = plain(case, accumulation)
    assert losses == expected[0]
    assert tiny.same(states, expected[1])
    moved = engine.manager.traffic
    assert (moved.nvme_read > 0) == (moved.nvme_written > 0) == (place not in ("device", "host"))
    assert (update == "speculative") == (engine.speculation is not None and engine.speculation.committed > 0)
    if place == "split":
        assert any(engine.plan.homes.ahead.values())
    if "piece_elements" in block:
        assert engine.plan.piece_elements == max(u.grain for u in engine.units if u.trainable)
    run.close()


@pytest.mark.parametrize("case", [c for c in CASES if c[0] == "AdamW"], ids=[i for i in IDS if i.startswith("AdamW")])
def test_an_update_is_undone_to_the_byte(tmp_path: Path, case: tuple) -> None:
    """Clipping is seen after the backward in which the update was tried; weights in memory are restored from NVMe."""
    found = []
    for place, update in (("device", "immediate"), ("everything", "speculative"), ("param_host_states_nvme", "speculative")):
        run = Run(tmp_path, place, case, clip=1e-2, update=update)
        found.append((run.steps(0, 4), run.states()))
        speculation = run.optimizer.engine.speculation
        assert (speculation is not None) == (update == "speculative")
        assert speculation is None or (speculation.undone > 0 and not speculation.committed)
        run.close()
    for other in found[1:]:
        assert other[0] == found[0][0] and tiny.same(other[1], found[0][1])


def test_kinds_and_bytes_are_the_formats(tmp_path: Path) -> None:
    """Three trained layers: matrices of 68,121 elements pad to three pieces of 32,768, biases and norms to 2,048."""
    run = Run(tmp_path, "nvme", ("AdamW", "int8-24bit", BF16))
    plan, engine = run.optimizer.engine.plan, run.optimizer.engine
    matrices, small = 3 * 98304, 3 * 2048
    assert {kind: plan.resident[Tier.NVME, kind] for kind in (Kind.MASTER, Kind.EXP_AVG, Kind.EXP_AVG_SQ, Kind.SCALE)} == {
        Kind.MASTER: matrices + 2 * small, Kind.EXP_AVG: matrices + 4 * small, Kind.EXP_AVG_SQ: matrices + 4 * small,
        Kind.SCALE: matrices // 8,
    }  # fmt: skip
    total = matrices * 25 // 8 + 10 * small
    assert plan.nvme_read == plan.nvme_written == total
    assert plan.format_text.startswith("int8-24bit states of Adam, lossy") and f"{total:,} bytes" in plan.format_text
    exact = {name for u in engine.units if u.exact for s in u.slots for name in s.names}
    assert exact == {n for n, p in run.model.named_parameters() if p.dim() < 2 and p.requires_grad}
    run.close()


# ---- checkpoints


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_resuming_is_going_on(tmp_path: Path, case: tuple) -> None:
    first = Run(tmp_path, "everything", case)
    first.steps(0, 2)
    tierflow.save_checkpoint(first.model, first.optimizer, tmp_path / "checkpoint")
    first.close()
    for place in ("device", "split", "everything"):
        again = Run(tmp_path, place, case)
        if place != "device":
            again.steps(7, 8)  # into a run under way
        tierflow.load_checkpoint(again.model, again.optimizer, tmp_path / "checkpoint")
        assert again.steps(2, 4) == plain(case, 1)[0][2:]
        assert tiny.same(again.states(), plain(case, 1)[1]), place
        again.close()


def spoil(folder: Path, name: str, at: int, value: bytes) -> None:
    """Overwrites bytes of a tensor in optimizer.safetensors."""
    data = bytearray((folder / "optimizer.safetensors").read_bytes())
    header = struct.unpack("<Q", data[:8])[0]
    begin = 8 + header + json.loads(data[8 : 8 + header])[name]["data_offsets"][0] + at
    data[begin : begin + len(value)] = value
    (folder / "optimizer.safetensors").write_bytes(data)


def test_states_of_another_kind_or_corrupted_are_refused(tmp_path: Path) -> None:
    case = ("AdamW", "int8", BF16)
    run = Run(tmp_path, "nvme", case)
    run.steps(0, 2)
    good = tmp_path / "good"
    tierflow.save_checkpoint(run.model, run.optimizer, good)
    held = run.states()

    def refused(folder: Path, *words: str) -> None:
        with pytest.raises(WeightsError) as caught:
            tierflow.load_checkpoint(run.model, run.optimizer, folder)
        assert all(word in str(caught.value) for word in words), caught.value
        assert tiny.same(held, run.states())

    weight = "blocks.2.1.weight"
    for number, (name, at, value, words) in enumerate([
        ("scale", 4, struct.pack("<f", -1.0), ["negative or infinite"]),
        ("scale", 8, struct.pack("<f", float("inf")), ["negative or infinite"]),
        ("scale", 0, bytes(4), ["exp_avg", "codes where its scale is 0"]),
        ("exp_avg_sq", 64, bytes(64), ["exp_avg_sq", "none where it is not"]),
    ]):  # fmt: skip
        folder = Path(shutil.copytree(good, tmp_path / str(number)))
        spoil(folder, f"{weight}.{name}", at, value)
        refused(folder, str(folder), weight, "corrupted", *words)
    manifest = json.loads((good / "tierflow.json").read_text())
    (good / "tierflow.json").write_text(json.dumps(manifest | {"state_format": "bf16"}))
    refused(good, "'bf16'", "'int8'", "--optimizer-state")
    (good / "tierflow.json").write_text(json.dumps(manifest | {"rule": "Lion"}))
    refused(good, "saved by Lion", "this run has Adam", "optimizer.type")
    for state in ("bf16", "int8-24bit", "lossless"):  # the manifest lies: the tensors still say what they are
        other = Run(tmp_path, "nvme", ("AdamW", state, BF16))
        before = other.states()
        (good / "tierflow.json").write_text(json.dumps(manifest | {"state_format": state}))
        with pytest.raises(WeightsError, match=r"expected|missing"):
            tierflow.load_checkpoint(other.model, other.optimizer, good)
        assert tiny.same(before, other.states())
        other.close()
    run.close()


# ---- weights from outside


@pytest.mark.parametrize("place", ["host", "everything"])
def test_fp32_weights_keep_what_the_format_has_room_for(tmp_path: Path, place: str) -> None:
    """An fp32 model cast to bf16 as it is placed: 24 bits are the nearest, and written weights become the master."""
    case = ("AdamW", "int8-24bit", BF16)
    model = Net(F32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    # float: 8 exponent bits, so 24 bits of the pattern round the 16 lower mantissa bits to 8
    made = config(tmp_path, place, case, **caps_for(place, case, tmp_path)) | {"bf16": {"enabled": True}}
    _, optimizer = tierflow.offload(model, made)
    held = states_of(optimizer.engine)
    for name, p in before.items():
        if p.dim() == 2 and f"{name}.master" in held:
            half = held[f"{name}.param"].view(torch.int16).long() << 16
            joined = (half + (held[f"{name}.master"].view(torch.int8).long() << 8)).to(torch.int32)
            error = (joined.view(F32) - p.view(-1)).abs()
            unit = 2.0 ** (torch.frexp(p.view(-1)).exponent - 16)  # of the 24-bit pattern's last place
            assert bool((error <= unit).all()) and (error <= unit / 2).float().mean() > 0.99
    model.load_state_dict({n: torch.full_like(p, 0.5) for n, p in before.items()})
    optimizer.engine.settle()
    held = states_of(optimizer.engine)
    assert all(not v.any() for n, v in held.items() if n.endswith(".master"))
    optimizer.close()


# ---- what a format does not serve


@pytest.mark.parametrize(
    ("state", "dtype", "words"),
    [
        ("int8-24bit", F32, ["float32", '"int8"', "bf16.enabled"]),
        ("int8-24bit", F16, ["float16", '"int8"']),
        ("lossless", F16, ["float16", '"auto"']),
    ],
)
def test_a_format_that_does_not_serve_the_model_is_refused(tmp_path: Path, state: str, dtype: torch.dtype, words: list[str]) -> None:
    model = nn.Linear(80, 80, dtype=dtype)
    weight = model.weight.detach().clone()
    with pytest.raises(ConfigError) as caught:
        tierflow.offload(model, tiny.config("host", tmp_path, optimizer_state=state))
    text = str(caught.value)
    assert text.startswith(f'tierflow.optimizer_state is "{state}"') and all(word in text for word in words)
    assert torch.equal(model.weight, weight)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_auto_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Linear(80, 80, dtype=dtype)
    _, optimizer = tierflow.offload(model, tiny.config("host", tmp_path))
    engine = optimizer.engine
    assert not engine.plan.lossy and engine.plan.placement.state_format == ("lossless" if dtype == BF16 else "fp32")
    assert all(u.layouts[k].dtype == F32 for u in engine.units for k in (Kind.EXP_AVG, Kind.EXP_AVG_SQ))
    assert Kind.SCALE not in engine.units[0].chunks and len(engine.units) == 1
    optimizer.close()
