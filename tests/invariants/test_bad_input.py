"""Bad input: each one clear error, before anything is allocated or the model is touched."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from outcome import Stack
from torch import nn

import tierflow
from tierflow.scheduler.units import Slot
from tierflow.weights import WeightsError

LAYER = 24576  # bytes of one layer's padded fp32 weights


def config(path: Path | str | None, param: str = "nvme", optim: str = "nvme", **block: object) -> dict[str, Any]:
    place = {} if path is None else {"nvme_path": str(path)}
    return {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {
            "offload_param": {"device": param, **place}, "offload_optimizer": {"device": optim, **place},
        },
        "tierflow": {"device_memory": 3 * LAYER, "host_memory": 12 * LAYER, "nvme_capacity": "64MB"} | block,
    }  # fmt: skip


class Untouched:
    """A model, and whether a failed call left it exactly as it was."""

    def __init__(self) -> None:
        self.model = Stack(layers=6, width=64)
        self._data = {n: (p, p.data_ptr(), p.detach().clone()) for n, p in self.model.named_parameters()}
        self._files = len(os.listdir("/proc/self/fd"))

    def __enter__(self) -> Stack:
        return self.model

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            return
        for n, p in self.model.named_parameters():
            was, address, values = self._data[n]
            assert p is was and p.data_ptr() == address and torch.equal(p, values) and type(p) is nn.Parameter, n
            assert p.requires_grad
        assert len(os.listdir("/proc/self/fd")) == self._files
        assert not self.model._forward_pre_hooks and not hasattr(self.model, "_tierflow_engine")


def refused(kind: type[BaseException] | tuple[type[BaseException], ...], words: str, given: Any, **more: Any) -> str:
    with Untouched() as model:
        if "optimizer" in more:
            more["optimizer"] = more["optimizer"](model)
        with pytest.raises(kind, match=words) as raised:
            tierflow.offload(model, given, **more)
    return str(raised.value)


# ---- keys and types


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping.*gradient_clipping"),
        ({"tierflow": {"device_memroy": "1MB"}}, "device_memroy.*device_memory"),
        ({"zero_optimization": {"offload_params": {}}}, "offload_params.*offload_param"),
        ({"tierflow": {"device_memory": "lots"}}, "tierflow.device_memory.*lots"),
        ({"tierflow": {"device_memory": -1}}, "tierflow.device_memory"),
        ({"tierflow": {"prefetch": "sometimes"}}, "tierflow.prefetch.*sometimes"),
        ({"tierflow": {"piece_elements": 0}}, "tierflow.piece_elements"),
        ({"tierflow": []}, "tierflow"),
        ({"gradient_clipping": "tight"}, "gradient_clipping.*tight"),
        ({"gradient_clipping": -1.0}, "gradient_clipping"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps"),
        ({"optimizer": {"type": "SGD"}}, "SGD.*AdamW"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}}, "optimizer.params.lr.*fast"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, "optimizer.params.betas"),
        ({"tierflow": {"optimizer_state": "int3"}}, "tierflow.optimizer_state.*int3"),
        ({"tierflow": {"engine": "windows"}}, "tierflow.engine.*windows"),
    ],
)
def test_a_key_that_is_unknown_or_has_the_wrong_value(tmp_path: Path, extra: dict, words: str) -> None:
    given = config(tmp_path)
    for name, value in extra.items():
        given[name] = given[name] | value if isinstance(value, dict) and isinstance(given.get(name), dict) else value
    message = refused(tierflow.ConfigError, words, given)
    assert len(message) < 400
    path = tmp_path / "config.json"
    path.write_text(json.dumps(given))
    assert re.search(words, refused(tierflow.ConfigError, words, path))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": }', "\x00\x01", '"AdamW"'])
def test_a_config_file_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    refused(tierflow.ConfigError, r"broken\.json|mapping", path)
    refused(tierflow.ConfigError, r"no configuration file .*nowhere\.json", tmp_path / "nowhere.json")
    refused(tierflow.ConfigError, "mapping", 3)


@pytest.mark.parametrize(("param", "optim"), [("nvme", "cpu"), ("nvme", "none"), ("cpu", "none")])
def test_tiers_that_make_no_sense_together(tmp_path: Path, param: str, optim: str) -> None:
    message = refused(tierflow.ConfigError, f'"{param}".*"{optim}"', config(tmp_path, param, optim))
    assert f'set offload_optimizer.device to "{param}"' in message
    fitting = config(tmp_path, param, param, host_memory="4MB")
    _, optimizer = tierflow.offload(Stack(layers=6, width=64), fitting)
    optimizer.close()


def test_stage_and_two_paths(tmp_path: Path) -> None:
    given = config(tmp_path)
    given["zero_optimization"]["stage"] = 2
    refused(tierflow.ConfigError, "needs stage 3", given)
    given = config(tmp_path)
    given["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path / "other")
    refused(tierflow.ConfigError, "one swap store", given)


# ---- the machine


@pytest.mark.parametrize("device", ["cuda:9", "cuda"])
def test_a_device_that_is_not_there(tmp_path: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    refused(tierflow.ConfigError, f"{device}.*CUDA device", config(tmp_path, device=device))
    refused(tierflow.ConfigError, "tierflow.device", config(tmp_path, device="tpu"))


def test_nvme_path(tmp_path: Path) -> None:
    refused((tierflow.ConfigError, OSError), "nvme_path", config(None))
    refused((tierflow.ConfigError, OSError), "nowhere", config(tmp_path / "nowhere"))
    file = tmp_path / "file"
    file.write_text("")
    refused((tierflow.ConfigError, OSError), "file", config(file))


def test_nvme_path_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):  # root may write anywhere: what the kernel says of others is all that is played here
        real = os.access
        monkeypatch.setattr(os, "access", lambda p, mode, **k: str(p) != str(locked) and real(p, mode, **k))
    refused((tierflow.ConfigError, OSError), "locked|writable", config(locked))


# ---- caps


def suggested(message: str) -> dict[str, str]:
    """The settings that the message says would do."""
    return dict(re.findall(r'set "(\w+)": "(\w+)" or more', message))


@pytest.mark.parametrize("placement", list(tiny.PLACEMENTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "lossless"])
def test_impossible_caps_come_with_a_table_and_settings_that_work(
    tmp_path: Path, placement: str, dtype: torch.dtype
) -> None:
    param, optim = tiny.PLACEMENTS[placement]
    build = lambda: Stack(layers=60, width=128, dtype=dtype)  # noqa: E731
    caps = {"device_memory": 4096, "host_memory": 4096, "nvme_capacity": 4096}
    model = build()
    with pytest.raises(tierflow.DoesNotFit) as raised:
        tierflow.offload(model, config(tmp_path, param, optim, **caps))
    message = str(raised.value)
    for word in ("DEVICE", "HOST", "total", "cap 4,096", "param", "exp_avg_sq", "free on this machine"):
        assert word in message, message
    assert sum(p.data_ptr() != 0 for p in model.parameters()) == 120
    for _ in range(3):  # lowering one need may raise another: how units are cut follows device_memory
        fits = suggested(message)
        assert fits
        caps |= fits
        try:
            _, optimizer = tierflow.offload(model, config(tmp_path, param, optim, **caps))
            break
        except tierflow.DoesNotFit as error:
            message = str(error)
    else:
        raise AssertionError(message)
    for i in range(2):
        model(model.input(i)).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()


@pytest.mark.parametrize("placement", list(tiny.PLACEMENTS))
def test_the_first_settings_suggested_work_for_a_transformer(tmp_path: Path, placement: str) -> None:
    """What is needed at least really is enough, in forward, backward, update, evaluation and saving."""
    param, optim = tiny.PLACEMENTS[placement]
    model = tiny.llama(layers=4)
    (_, optimizer), _ = tiny.least(
        lambda caps: tierflow.offload(model, config(tmp_path, param, optim, nvme_capacity="64MB", **caps))
    )
    losses, _ = tiny.train(model, optimizer, 3)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    tierflow.save_checkpoint(model, optimizer, tmp_path / "saved")
    tierflow.load_checkpoint(model, optimizer, tmp_path / "saved")
    assert tiny.weights(model).keys() == model.state_dict().keys() - {"lm_head.weight"}
    optimizer.close()
    assert len(losses) == 3


@pytest.mark.parametrize("placement", list(tiny.PLACEMENTS))
def test_the_least_memory_serves_everything_that_reads_a_large_parameter(tmp_path: Path, placement: str) -> None:
    """Whole chunks are far larger here than the staging memory that the update needs."""
    param, optim = tiny.PLACEMENTS[placement]
    caps = {"device_memory": 4096, "host_memory": 4096, "nvme_capacity": "64MB"}
    for _ in range(4):
        try:
            model = Stack(layers=2, width=512)
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            _, optimizer = tierflow.offload(model, config(tmp_path, param, optim, **caps))
            break
        except tierflow.DoesNotFit as error:
            needs = re.findall(r"tierflow\.(\w+) is [\d,]+ bytes; at least ([\d,]+) are needed", str(error))
            caps |= {name: int(need.replace(",", "")) for name, need in needs}
    assert tiny.same(before, model.state_dict())
    model.load_state_dict({n: t + 1 for n, t in before.items()})
    tierflow.save_checkpoint(model, optimizer, tmp_path / "saved")
    tierflow.load_checkpoint(model, optimizer, tmp_path / "saved")
    with torch.no_grad(), tierflow.gathered(model.layers[1]):
        model.layers[1].weight.sub_(1)
    for i in range(2):
        model(model.input(i)).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.engine.manager.ledger.check()
    optimizer.close()


def test_a_machine_that_has_too_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierflow.machine.mem_available", lambda: 100_000)
    message = refused(tierflow.DoesNotFit, "the machine has 100,000 bytes", config(tmp_path))
    assert "tierflow.host_memory" in message
    monkeypatch.undo()
    monkeypatch.setattr("tierflow.machine.disk_free", lambda path: 4096)
    refused(tierflow.DoesNotFit, "the machine has 4,096 bytes of nvme free", config(tmp_path))


# ---- optimizers


def test_optimizers_that_cannot_be_taken_over(tmp_path: Path) -> None:
    given = config(tmp_path)
    refused(TypeError, "SGD.*AdamW", given, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    refused((TypeError, ValueError), "str", given, optimizer=lambda m: "AdamW")
    refused(ValueError, "amsgrad", given, optimizer=lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True))
    del given["optimizer"]
    message = refused(tierflow.ConfigError, "no optimizer", given)
    assert "torch.optim.AdamW" in message and "param_groups" in message


def test_an_optimizer_of_other_parameters_or_one_that_has_stepped(tmp_path: Path) -> None:
    strange = nn.Linear(2, 2)
    refused(ValueError, "not in the model|no optimizer state", config(tmp_path),
            optimizer=lambda m: torch.optim.AdamW(strange.parameters()))  # fmt: skip

    def stepped(model: Stack) -> torch.optim.Optimizer:
        made = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        model(model.input()).backward()
        made.step()
        made.zero_grad()
        return made

    refused(ValueError, "has stepped", config(tmp_path), optimizer=stepped)
    with Untouched() as model, pytest.raises(ValueError, match="not both"):
        groups = [{"params": list(model.parameters())}]
        tierflow.offload(model, config(tmp_path), optimizer=torch.optim.AdamW(model.parameters()), param_groups=groups)


@pytest.mark.parametrize(
    ("group", "words"),
    [({"lr": -1.0}, "learning rate"), ({"betas": (0.9, 1.0)}, "beta"), ({"eps": -1e-8}, "epsilon"),
     ({"weight_decay": -0.1}, "weight_decay")],
)  # fmt: skip
def test_hyperparameters_that_torch_refuses_too(tmp_path: Path, group: dict, words: str) -> None:
    with Untouched() as model, pytest.raises(ValueError, match=words):
        tierflow.offload(model, config(tmp_path), param_groups=[{"params": list(model.parameters()), **group}])


# ---- model files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny.llama(layers=2, hidden=32).save_pretrained(folder)
    return folder


def load(folder: Path, path: Path) -> None:
    from transformers import AutoModelForCausalLM

    before = len(os.listdir("/proc/self/fd"))
    try:
        _, optimizer = tierflow.load(AutoModelForCausalLM, folder, config(path))
        optimizer.close()
    finally:
        assert len(os.listdir("/proc/self/fd")) <= before


def test_a_sound_model_loads(saved: Path, tmp_path: Path) -> None:
    load(saved, tmp_path)


def test_a_model_folder_that_is_missing_or_incomplete(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere"):
        load(tmp_path / "nowhere", tmp_path)
    (saved / "config.json").rename(saved / "config.bak")
    with pytest.raises(WeightsError, match=r"config\.json"):
        load(saved, tmp_path)
    (saved / "config.bak").rename(saved / "config.json")
    (saved / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="safetensors"):
        load(saved, tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, 5000, -1, -4096])
def test_a_truncated_file(saved: Path, tmp_path: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, keep if keep >= 0 else size + keep)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        load(saved, tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"not safetensors at all, but text" * 9, bytes(64), b"\x10" + bytes(7) + b"[1, 2, 3]       ", b"\xff" * 64,
     b"\x20" + bytes(7) + b'{"a": {"dtype": "F32"}}         ', b"\x10" + bytes(7) + b'{"a": 3}        '],
)  # fmt: skip
def test_a_file_that_is_not_safetensors(saved: Path, tmp_path: Path, content: bytes) -> None:
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors|no tensor|in no file"):
        load(saved, tmp_path)


def test_a_shape_or_a_name_that_does_not_match(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = saved / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=rf"{name}.*shape"):
        load(saved, tmp_path)
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=name):
        load(saved, tmp_path)


def test_a_model_on_meta_without_a_source(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"meta.*tierflow\.load"):
        tierflow.offload(model, config(tmp_path))


def test_a_source_of_the_wrong_size(tmp_path: Path) -> None:
    def source(slot: Slot, _param: nn.Parameter) -> torch.Tensor:
        return torch.zeros(3)

    with pytest.raises(ValueError, match="3 values given"):
        tierflow.offload(Stack(layers=2, width=8), config(tmp_path), source=source)


# ---- checkpoints


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    model = Stack(layers=6, width=64)
    _, optimizer = tierflow.offload(model, config(tmp_path))
    model(model.input()).backward()
    optimizer.step()
    optimizer.zero_grad()
    good = tmp_path / "good"
    tierflow.save_checkpoint(model, optimizer, good)
    before = tiny.weights(model)

    def fails(words: str, folder: Path) -> None:
        with pytest.raises(WeightsError, match=words):
            tierflow.load_checkpoint(model, optimizer, folder)
        assert tiny.same(before, tiny.weights(model))
        assert optimizer.steps_taken == 1

    fails("no tierflow.json", tmp_path / "nowhere")
    fails("no tierflow.json", tmp_path)

    def copy(name: str) -> Path:
        import shutil

        return Path(shutil.copytree(good, tmp_path / name))

    manifest = json.loads((good / "tierflow.json").read_text())
    for name, change, words in (
        ("format", {"format": 99}, "format 99"),
        ("state", {"state_format": "lossless"}, "lossless.*optimizer_state"),
        ("groups", {"names": [["other"]]}, "groups"),
    ):
        (copy(name) / "tierflow.json").write_text(json.dumps(manifest | change))
        fails(words, tmp_path / name)
    (copy("damaged") / "tierflow.json").write_text("{")
    fails("damaged", tmp_path / "damaged")
    os.truncate(copy("short") / "optimizer.safetensors", 3000)
    fails(r"optimizer\.safetensors", tmp_path / "short")
    (copy("less") / "optimizer.safetensors").unlink()
    fails("missing", tmp_path / "less")
    (copy("no_rng") / "rng.pt").unlink()
    with pytest.raises((WeightsError, OSError), match="rng"):
        tierflow.load_checkpoint(model, optimizer, tmp_path / "no_rng")
    optimizer.close()

    wide = Stack(layers=6, width=72)
    _, other = tierflow.offload(wide, config(tmp_path))
    weights = tiny.weights(wide)
    with pytest.raises(WeightsError, match=r"layers\.0\.weight"):
        tierflow.load_checkpoint(wide, other, good)
    assert tiny.same(weights, tiny.weights(wide))
    other.close()
