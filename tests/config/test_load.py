"""What is read, what it becomes, and what is said about the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierflow.config import Config, ConfigError, load_config
from tierflow.config_keys import KEYS, Role
from tierflow.config_models import Block


def problems(source: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    return caught.value.problems


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


#: As the Hugging Face documentation gives it for ZeRO-Infinity: nearly every key of offloading.
INFINITY: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme", "pin_memory": True, "buffer_count": 4},
        "offload_param": {"device": "nvme", "nvme_path": "/nvme", "buffer_size": 1e8, "max_in_cpu": 1e9},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1, "single_submit": False},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_nothing_given_is_auto_throughout() -> None:
    cfg = load_config(None)
    assert cfg == load_config({}) == Config()
    assert cfg.tierflow.device_memory is None and cfg.tierflow.device == "auto" and cfg.tierflow.prefetch
    assert cfg.zero_optimization.offload_param.device == "auto" and cfg.zero_optimization.stage == 3
    assert cfg.gradient_clipping == 0.0 and cfg.gradient_accumulation_steps is None and cfg.optimizer is None
    assert cfg.aio_options() == {"engine": "auto"} and cfg.ignored_notes() == []


def test_a_deepspeed_file_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(INFINITY))
    cfg = load_config(file)
    assert load_config(str(file)) == cfg and load_config(cfg) is cfg
    assert cfg.zero_optimization.offload_param.nvme_path == "/nvme"
    assert cfg.gradient_clipping is None and cfg.bf16.enabled is None
    assert cfg.aio_options() == {"engine": "auto", "block_size": 262144, "queue_depth": 32, "threads": 1}
    assert cfg.optimizer is not None
    assert {k: v for k, v in cfg.optimizer.group().items() if v is not None} == {
        "maximize": False,
        "decoupled_weight_decay": True,
    }


def test_what_has_no_effect_is_listed_once_by_reason() -> None:
    cfg = load_config(INFINITY)
    assert set(cfg.computed) == {
        "zero_optimization.offload_optimizer.pin_memory",
        "zero_optimization.offload_optimizer.buffer_count",
        "zero_optimization.offload_param.buffer_size",
        "zero_optimization.offload_param.max_in_cpu",
        "zero_optimization.sub_group_size",
        "zero_optimization.stage3_max_live_parameters",
    }
    text = "\n".join(cfg.ignored_notes())
    for path in cfg.computed:
        assert text.count(path) == 1
    assert "steps_per_print = 2000: not used; " in text
    for quiet in ("fp16", "wall_clock_breakdown", "single_submit", "reduce_bucket_size"):  # off, or auto
        assert quiet not in text
    assert "scheduler.type" in text and "scheduler.type" not in "\n".join(cfg.ignored_notes(scheduler_used=True))


def test_the_resolved_block_is_json_and_is_taken_again() -> None:
    for source in ({}, INFINITY, {"tierflow": {"device_memory": "24GB"}, "train_batch_size": 8}):
        resolved = load_config(source).resolved()
        assert load_config(json.loads(json.dumps(resolved))).resolved() == resolved
    assert resolved["tierflow"]["device_memory"] == 24 * 10**9
    assert resolved["zero_optimization"]["offload_param"] == {"device": "auto", "nvme_path": "auto"}


def test_the_configuration_is_frozen() -> None:
    cfg = load_config({})
    with pytest.raises(ValueError):
        cfg.gradient_clipping = 1.0


def test_overrides_are_laid_over_block_by_block() -> None:
    source = {"tierflow": {"device_memory": "1GB", "report": False}, "optimizer": {"params": {"lr": 1e-3}}}
    cfg = load_config(source, overrides={"optimizer": {"params": {"lr": 1e-5}}, "tierflow": {"report": True}})
    assert cfg.optimizer is not None and cfg.optimizer.params.lr == 1e-5
    assert cfg.tierflow.report and cfg.tierflow.device_memory == 10**9
    assert source["optimizer"] == {"params": {"lr": 1e-3}}
    with pytest.raises(ConfigError, match="cannot be laid over a Config"):
        load_config(cfg, overrides={"gradient_clipping": 1.0})


@pytest.mark.parametrize(
    ("params", "decay", "decoupled"),
    [
        ({}, 0.0, True),  # [Note: weight decay] in tierflow/config_models.py
        ({"weight_decay": 0.1}, 0.1, True),
        ({"weight_decay": None}, 0.0, True),
        ({"weight_decay": "auto"}, None, True),
        ({"torch_adam": True}, 0.01, True),
        ({"torch_adam": True, "adam_w_mode": False}, 0.0, False),
        ({"adam_w_mode": False, "bias_correction": True, "amsgrad": False}, 0.0, False),
    ],
)
def test_deepspeed_adam(params: dict[str, Any], decay: float | None, decoupled: bool) -> None:
    cfg = load_config({"optimizer": {"type": "adam", "params": params}})
    assert cfg.optimizer is not None and cfg.optimizer.type == "Adam"
    group = cfg.optimizer.group()
    assert (group["weight_decay"], group["decoupled_weight_decay"]) == (decay, decoupled)
    assert group["betas"] == (0.9, 0.999) and group["lr"] == 1e-3 and group["eps"] == 1e-8


@pytest.mark.parametrize(
    ("type_", "params", "group"),
    [
        ("Lion", {}, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0, "decoupled_weight_decay": True}),
        ("lion", {"lr": "auto", "betas": [0.9, 0.99], "set_grad_none": True},
         {"lr": None, "betas": (0.9, 0.99), "weight_decay": 0.0, "decoupled_weight_decay": True}),
        ("Adagrad", {}, {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.0, "decoupled_weight_decay": False}),
        ("adagrad", {"lr": 0.1, "weight_decay": 0.2, "amsgrad": False, "fp32_optimizer_states": True},
         {"lr": 0.1, "eps": 1e-10, "weight_decay": 0.2, "decoupled_weight_decay": False}),
    ],
)  # fmt: skip
def test_deepspeed_lion_and_adagrad(type_: str, params: dict[str, Any], group: dict[str, Any]) -> None:
    cfg = load_config({"optimizer": {"type": type_, "params": params}})
    assert cfg.optimizer is not None and cfg.optimizer.type == type_.capitalize()
    assert cfg.optimizer.group() == group
    assert set(cfg.resolved()["optimizer"]["params"]) == set(group) - {"decoupled_weight_decay"}
    assert load_config(cfg.resolved()).resolved() == cfg.resolved()


@pytest.mark.parametrize(
    ("given_", "found"),
    [
        ((None, None, None), (None, None, None)),
        ((32, 4, None), (32, 4, 8)),
        ((32, None, 8), (32, 4, 8)),
        ((None, 4, 8), (32, 4, 8)),
        ((32, 4, 8), (32, 4, 8)),
        ((32, None, None), (32, 32, 1)),
        ((None, 4, None), (4, 4, 1)),
        ((None, None, 8), (None, None, 8)),
        (("auto", 4, "auto"), (None, 4, None)),
        ((32, "auto", "auto"), (32, None, None)),
        ((32, "auto", None), (32, None, None)),
        ((32.0, "auto", 4.0), (32, 8, 4)),
    ],
)
def test_batch_sizes(given_: tuple[Any, ...], found: tuple[Any, ...]) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    cfg = load_config({n: v for n, v in zip(names, given_, strict=True) if v is not None})
    assert tuple(getattr(cfg, n) for n in names) == found


def test_batch_sizes_that_disagree() -> None:
    triple = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}
    assert "4 x 4 = 16" in problems(triple)[0]
    assert "no multiple" in problems({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 5})[0]


def test_loading_imports_no_torch() -> None:
    code = (
        "import sys, tierflow.config as c, tierflow.machine as m, tierflow.env; c.load_config({'bf16': {'enabled': True}});"
        "m.mem_available(); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def honoured_fields(model: type[Block], path: str = "") -> set[str]:
    found = set()
    for name, info in model.model_fields.items():
        inner = next((t for t in (info.annotation, *getattr(info.annotation, "__args__", ())) if is_block(t)), None)
        found |= honoured_fields(inner, f"{path}{name}.") if inner is not None else {f"{path}{name}"}
    return found


def is_block(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Block)


def test_the_models_hold_exactly_what_the_table_calls_honoured() -> None:
    table = {path for path, key in KEYS.items() if key.role is Role.HONOURED}
    assert honoured_fields(Config) - {"notes", "drive", "tuned"} == table


@pytest.mark.parametrize("path", [p for p, k in KEYS.items() if k.role is Role.HONOURED and p != "scheduler.type"])
def test_auto_and_null_serve_everywhere(path: str) -> None:
    base = {"scheduler": {"type": "WarmupLR"}} if path.startswith("scheduler") else {}
    for value in ("auto", None):
        cfg = load_config(base, overrides=nested(path, value))
        assert load_config(cfg.resolved()).resolved() == cfg.resolved()


def default_of(path: str) -> Any:
    here: Any = load_config({"optimizer": {}, "scheduler": {"type": "WarmupLR"}})
    for name in path.split("."):
        here = getattr(here, name)
    return here


def test_the_table_tells_the_models_defaults() -> None:
    for path, key in KEYS.items():
        value = default_of(path) if key.role is Role.HONOURED and path != "scheduler.type" else None
        if value is None:  # derived, or left to a part of its own
            continue
        shown = str(list(value)) if isinstance(value, tuple) else str(value)
        assert key.default.removesuffix(" (off)") == (shown.lower() if isinstance(value, bool) else shown), path


def test_the_table_tells_the_io_engines_defaults() -> None:
    from tierflow import aio

    told = {p.removeprefix("aio."): KEYS[p].default for p in ("aio.block_size", "aio.queue_depth", "aio.thread_count")}
    found = (aio.DEFAULT_BLOCK_SIZE, aio.DEFAULT_QUEUE_DEPTH, aio.DEFAULT_THREADS)
    assert tuple(map(int, told.values())) == found


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("auto"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.tuples(st.sampled_from([*KEYS, "tierflow", "aio", "optimizer", "nothing"]), ANYTHING), max_size=4))
def test_any_values_give_a_config_or_a_config_error(entries: list[tuple[str, Any]]) -> None:
    source: dict[str, Any] = {}
    for path, value in entries:
        here = source
        *blocks, last = path.split(".")
        for name in blocks:
            here = here[name] if isinstance(here.get(name), dict) else here.setdefault(name, {})
            if not isinstance(here, dict):
                return
        here[last] = value
    try:
        cfg = load_config(source)
    except ConfigError as error:
        assert error.problems and all(error.problems)
    else:
        assert load_config(json.loads(json.dumps(cfg.resolved()))).resolved() == cfg.resolved()
        cfg.ignored_notes()


def test_fp16_that_is_off_asks_nothing_of_its_other_keys() -> None:
    for enabled in (False, "auto"):
        block = {"enabled": enabled, "initial_scale_power": 2, "min_loss_scale": 5, "auto_cast": True}
        cfg = load_config({"fp16": block, "bf16": {"enabled": True}})
        assert not cfg.fp16.enabled and cfg.bf16.enabled and cfg.ignored_notes() == []
