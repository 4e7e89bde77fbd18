"""A two-layer cut of the real SmolLM2, where the demo has put it: its weights, its shapes, its tokenizer's range."""

from __future__ import annotations

import gc
import json
import os
import random
from pathlib import Path

import pytest
import tiny
import torch

import tierflow
from tierflow.cpu_adam import CPUAdamW
from tierflow.swap import DebugMemory, Tier

FOLDER = Path(os.environ.get("TIERFLOW_DEMO_MODEL") or Path(__file__).parents[2] / "demo" / "model")
LAYERS, STEPS, LR = 2, 3, 1e-4


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers, the embedding and the last norm, as a model folder of their own."""
    if not (FOLDER / "config.json").exists() or not list(FOLDER.glob("*.safetensors")):
        pytest.skip(f"no model in {FOLDER}: `./run demo` makes one, or set TIERFLOW_DEMO_MODEL")
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("cut")
    config = json.loads((FOLDER / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    kept = {}
    for file in FOLDER.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < LAYERS:
                    kept[name] = tensors.get_tensor(name).float()
    assert len(kept) >= 2 + 9 * LAYERS
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 49152, (1, 48), generator=generator) for _ in range(STEPS)]


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for ids in batches():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_three_steps_with_everything_on_nvme_equal_plain_torch(cut: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    plain = AutoModelForCausalLM.from_pretrained(cut, dtype=torch.float32)
    for p in plain.parameters():  # out of the mapped file: where a weight lies in memory changes products
        p.data = p.data.clone()
    state = 12 * sum(p.numel() for p in plain.parameters())
    expected = train(plain, CPUAdamW(plain.parameters(), lr=LR, weight_decay=0.1))
    weights = tiny.weights(plain)
    del plain
    gc.collect()

    config = tiny.config("everything", tmp_path, device_memory="130MB", host_memory="260MB", nvme_capacity="2GB")
    config["optimizer"]["params"]["lr"] = LR
    model, optimizer = tierflow.load(AutoModelForCausalLM, cut, config)
    plan, store = optimizer.engine.plan, optimizer.engine.manager.store
    assert plan.total(Tier.DEVICE) + plan.total(Tier.HOST) < state < plan.total(Tier.NVME) * 1.01
    assert plan.parameters * 12 == state
    optimizer.engine.take_report()
    assert train(model, optimizer) == expected
    optimizer.engine.settle()
    written = optimizer.engine.take_report().traffic.nvme_written
    assert written == STEPS * plan.nvme_written and store.bytes_written >= written
    assert plan.nvme_written > 0.9 * state  # what the caps hold of the states is not written
    optimizer.engine.manager.ledger.check()
    tierflow.save_weights(model, tmp_path / "trained")
    optimizer.close()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32)
    assert tiny.same(weights, tiny.weights(again))


def test_the_same_with_slots_at_random_and_poison(cut: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(cut, dtype=torch.float32)
    config = tiny.config("everything", tmp_path, device_memory="160MB", host_memory="400MB", nvme_capacity="2GB")
    _, optimizer = tierflow.offload(model, config, debug_memory=DebugMemory(random.Random(4)))
    losses = train(model, optimizer)
    optimizer.close()
    model = AutoModelForCausalLM.from_pretrained(cut, dtype=torch.float32)
    _, optimizer = tierflow.offload(model, tiny.config("device", tmp_path, device_memory="3GB", host_memory="3GB"))
    assert train(model, optimizer) == losses
    optimizer.close()
