"""One clear sentence for each mistake: the field, the value, what is expected, what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tierflow.config import ConfigError, load_config
from tierflow.config_keys import KEYS, Role
from tierflow.sizes import format_size, parse_size


def problems(source: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    return caught.value.problems


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("gradient_cliping", "gradient_clipping"),
        ("tierflow.device_memroy", "tierflow.device_memory"),
        ("tierflow.gpu_memory", None),
        ("zero_optimization.offload_params", "zero_optimization.offload_param"),
        ("zero_optimization.offload_param.nvme_pth", "zero_optimization.offload_param.nvme_path"),
        ("zero_optimization.stage3_prefetch_bucketsize", "zero_optimization.stage3_prefetch_bucket_size"),
        ("zero_optimization.aio", "aio"),
        ("offload_optimizer", "zero_optimization.offload_optimizer"),
        ("device_memory", "tierflow.device_memory"),
        ("aio.engine", "tierflow.engine"),
        ("optimizer.lr", "optimizer.params.lr"),
        ("optimizer.params.beta", "optimizer.params.betas"),
        ("Tierflow", "tierflow"),
        ("zzz", None),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(path: str, nearest: str | None) -> None:
    (problem,) = problems(nested(path, 1))
    assert problem.startswith(f"unknown key {path}: ")
    if nearest is not None:
        assert f"did you mean {nearest}?" in problem


def test_a_dotted_key_is_not_taken_for_a_path() -> None:
    (problem,) = problems({"zero_optimization.stage": 3})
    assert problem.startswith("zero_optimization.stage is written as one key with a dot in it")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("gradient_clipping", -1.0),
        ("gradient_clipping", True),
        ("gradient_clipping", "1.0"),
        ("gradient_clipping", float("nan")),
        ("gradient_clipping", float("inf")),
        ("gradient_accumulation_steps", 0),
        ("gradient_accumulation_steps", 1.5),
        ("gradient_accumulation_steps", "4"),
        ("train_batch_size", True),
        ("bf16.enabled", 1),
        ("bf16.enabled", "true"),
        ("fp16.loss_scale", -1),
        ("fp16.loss_scale", True),
        ("fp16.initial_scale_power", 128),
        ("fp16.initial_scale_power", -1),
        ("fp16.loss_scale_window", 0),
        ("fp16.hysteresis", 0),
        ("fp16.min_loss_scale", 0),
        ("fp16.min_loss_scale", float("inf")),
        ("fp16.auto_cast", "yes"),
        ("data_types.grad_accum_dtype", "int8"),
        ("optimizer.type", 5),
        ("optimizer.params.lr", "1e-5"),
        ("optimizer.params.lr", -1e-5),
        ("optimizer.params.betas", [0.9]),
        ("optimizer.params.betas", [0.9, 1.0]),
        ("optimizer.params.betas", 0.9),
        ("optimizer.params.eps", 0),
        ("optimizer.params.adam_w_mode", 0),
        ("zero_optimization.stage", 4),
        ("zero_optimization.stage", True),
        ("zero_optimization.offload_param.device", "gpu"),
        ("zero_optimization.offload_optimizer.device", "disk"),
        ("zero_optimization.offload_optimizer.nvme_path", ""),
        ("zero_optimization.offload_optimizer.nvme_path", []),
        ("zero_optimization.offload_optimizer.nvme_path", ["/a", 3]),
        ("zero_optimization.offload_optimizer.nvme_path", ["/a", "/b/../a"]),
        ("aio.block_size", "8 elephants"),
        ("aio.block_size", 0),
        ("aio.block_size", "2GiB"),
        ("aio.queue_depth", 5000),
        ("aio.thread_count", 2000),
        ("tierflow.device_memory", "12 gigs"),
        ("tierflow.host_memory", ""),
        ("tierflow.host_memory", -1),
        ("tierflow.nvme_capacity", "0GB"),
        ("tierflow.device", "gpu"),
        ("tierflow.device", "cuda:x"),
        ("tierflow.engine", "libaio"),
        ("tierflow.prefetch", "yes"),
        ("tierflow.piece_elements", 0),
        ("tierflow.optimizer_state", "int4"),
        # keys that are not honoured are checked too
        ("zero_optimization.sub_group_size", "big"),
        ("zero_optimization.overlap_comm", "yes"),
        ("wandb", True),
    ],
)
def test_a_value_that_does_not_fit_its_key(path: str, value: Any) -> None:
    (problem,) = problems(nested(path, value))
    assert problem.startswith(f"{path} is ") and "expected " in problem
    assert KEYS[path].expect in problem or "a size" in problem
    assert "\n" not in problem


def test_every_problem_is_told_at_once() -> None:
    found = problems({"gradient_clipping": -1, "amp": {"enabled": True}, "tierflow": {"foo": 1, "device": "x"}})
    starts = ["amp is ", "unknown key tierflow.foo", "tierflow.device is ", "gradient_clipping is "]
    assert len(found) == len(starts) and all(p.startswith(start) for p, start in zip(found, starts, strict=True))


@pytest.mark.parametrize("path", [p for p, k in KEYS.items() if k.role is Role.REFUSED])
def test_a_refusal_gives_its_reason_and_every_off_value_is_taken(path: str) -> None:
    key = KEYS[path]
    base = {"scheduler": {"type": "WarmupLR"}} if path.startswith("scheduler") else {}
    for off in (*key.off, "auto", None):
        assert load_config(base, overrides=nested(path, off)).ignored_notes(scheduler_used=True) == []
    on: Any = {
        "true or false": not key.off[0] if key.off else None,
        "a block {...}": {"enabled": True},
        "a string": "sum",
    }.get(key.expect, 0.5 if key.expect == "a number" else 2)
    problem = problems(nested(path, on))[0]
    assert problem.startswith(f"{path} is ") and problem.endswith(f"which tierflow refuses: {key.note}")


@pytest.mark.parametrize("name", ["Lamb", "OneBitAdam", "Muon", "OneBitLion", "SGD"])
def test_another_optimizer_is_refused_and_its_params_are_not_picked_at(name: str) -> None:
    (problem,) = problems({"optimizer": {"type": name, "params": {"momentum": 0.9, "max_grad_norm": 1.0}}})
    assert problem.startswith(f'optimizer.type is "{name}", which is not available')


@pytest.mark.parametrize(
    ("type_", "name", "takes"),
    [
        ("lion", "eps", "lr, betas, weight_decay"),
        ("Lion", "adam_w_mode", "lr, betas, weight_decay"),
        ("adagrad", "betas", "lr, eps, weight_decay"),
        ("Adagrad", "torch_adam", "lr, eps, weight_decay"),
        ("Adagrad", "maximize", "lr, eps, weight_decay"),
    ],
)
def test_a_setting_of_another_optimizer_is_refused(type_: str, name: str, takes: str) -> None:
    value = {"eps": 1e-8, "betas": [0.9, 0.99]}.get(name, True)
    (problem,) = problems({"optimizer": {"type": type_, "params": {name: value}}})
    assert problem == f"optimizer.params.{name} is no setting of {type_.capitalize()}, which takes {takes}: leave it out"


def test_other_schedules() -> None:
    assert "not available" in problems({"scheduler": {"type": "OneCycle"}})[0]
    assert problems({"scheduler": {"params": {}}})[0].startswith("scheduler.type is missing: expected ")


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (zero(stage=2, offload_param={"device": "cpu"}), ["offload_param.device", "stage is 2", "set stage to 3"]),
        (zero(stage=0, offload_optimizer={"device": "nvme"}), ["offload_optimizer.device", "stage is 0"]),
        (
            zero(offload_param={"device": "nvme"}, offload_optimizer={"device": "none"}),
            ["offload_param.device", "offload_optimizer.device", 'set offload_optimizer.device to "nvme"'],
        ),
        (
            zero(offload_param={"nvme_path": "/a"}, offload_optimizer={"nvme_path": "/b"}),
            ["offload_param.nvme_path", "offload_optimizer.nvme_path", "one swap store"],
        ),
        ({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}}, ["adam_w_mode", '"Adam"']),
        ({"aio": {"thread_count": 2, "intra_op_parallelism": 4}}, ["thread_count", "intra_op_parallelism"]),
        ({"bf16": {}, "bfloat16": {}}, ["bfloat16", "keep bf16"]),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ["fp16.enabled", "bf16.enabled", "both true"]),
        (
            {"fp16": {"enabled": True, "initial_scale_power": 2, "min_loss_scale": 5}},
            ["fp16.initial_scale_power is 2", "at 4", "fp16.min_loss_scale, 5"],
        ),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, ["fp16_master_weights_and_grads", "refuses", "lose bits"]),
    ],
)
def test_keys_that_contradict_each_other(source: dict[str, Any], words: list[str]) -> None:
    (problem,) = problems(source)
    for word in words:
        assert word in problem


def test_tiers_that_make_sense_are_taken() -> None:
    order = ["none", "cpu", "nvme", "auto"]
    for param in order:
        for optim in order:
            source = zero(offload_param={"device": param}, offload_optimizer={"device": optim})
            if "auto" in (param, optim) or order.index(optim) >= order.index(param):
                load_config(source)
    load_config(zero(stage=2, offload_optimizer={"device": "cpu"}, offload_param={"device": "none"}))
    load_config(zero(offload_param={"nvme_path": "/a/"}, offload_optimizer={"nvme_path": "/a/b/.."}))
    both = load_config(zero(offload_param={"nvme_path": ["/a/", "/c"]}, offload_optimizer={"nvme_path": ["/a", "/c"]}))
    assert load_config(both.resolved()) == both
    with pytest.raises(ConfigError, match="one swap store"):
        load_config(zero(offload_param={"nvme_path": ["/a", "/c"]}, offload_optimizer={"nvme_path": "/a"}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1,}', "line 1, column"),
        (b'{\n  "a": // comment\n}', "line 2, column 8"),
        (b"", "line 1, column 1"),
        (b"\xff\xfe{}", "byte 0 is not UTF-8"),
        (b"[1, 2]", "expected a JSON object"),
        (b'{"aio": {"queue_depth": 1, "queue_depth": 2}}', '"queue_depth" twice'),
        (b"[" * 100000, "nested too deep"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "c.json"
    file.write_bytes(content)
    (problem,) = problems(file)
    assert words in problem and str(file) in problem


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    assert "there is no configuration file" in problems(tmp_path / "absent.json")[0]
    assert "json.loads" in problems('{"gradient_clipping": 1.0}')[0]
    assert "directory" in problems(tmp_path)[0].lower()
    assert "not int" in problems(7)[0]
    assert "cannot be read" in problems("a\0b")[0]


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_bytes(b'\xef\xbb\xbf{"gradient_clipping": 1}')
    assert load_config(file).gradient_clipping == 1.0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("512 MB", 512 * 10**6), ("1.5gib", 3 * 2**29), ("7", 7), ("7B", 7),
        (" 2kB ", 2000), ("2KiB", 2048), (5, 5), (1e9, 10**9), ("9007199254740993", 9007199254740993), ("1PB", 10**15),
    ],
)  # fmt: skip
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24G", "GB", "", "1e9", "-5GB", "0", 0, -1, 1.5, True, None, float("inf"), "1..5GB"])
def test_no_sizes(text: Any) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)


def test_a_size_without_its_b_is_told_the_unit() -> None:
    assert '"24GB"' in problems({"tierflow": {"device_memory": "24G"}})[0]


def test_sizes_for_people() -> None:
    assert [format_size(n) for n in (0, 999, 1000, 2_150_000_000, 24 * 10**9, 999_999_999, 5 * 10**15)] == [
        "0 B", "999 B", "1 kB", "2.15 GB", "24 GB", "1 GB", "5000 TB",
    ]  # fmt: skip
