"""The profile: what is in it, how a config takes it, and what is said of one that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from profiles import profile
from pydantic import ValidationError

from tierflow.config import ConfigError, load_config
from tierflow.tune.floor import FORMATS, parse_parameters, step_rate, step_seconds
from tierflow.tune.plot import plot
from tierflow.tune.profile import Tried, read_profile


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    profile().write_to(path)
    return path


def test_a_profile_is_read_as_it_was_written_and_nothing_else_is_left(file: Path) -> None:
    assert read_profile(file) == profile()
    assert [p.name for p in file.parent.iterdir()] == ["profile.json"]


@pytest.mark.parametrize("form", ["text", "block"])
def test_a_config_takes_settings_engine_and_rates(file: Path, form: str) -> None:
    config = load_config({"aio": str(file) if form == "text" else {"profile": str(file)}})
    assert config.aio_options() == {"engine": "io_uring", "block_size": 1 << 20, "queue_depth": 24}
    assert config.drive is not None
    assert (config.drive.read, config.drive.write) == (4e9, 3e9)
    assert (config.drive.mixed_read, config.drive.mixed_write) == (1.5e9, 1.25e9)
    again = load_config(config.resolved())
    assert again.aio_options() == config.aio_options() and again.drive == config.drive


def test_a_thread_profile_gives_its_depth_as_threads(tmp_path: Path) -> None:
    profile(engine="threads").write_to(tmp_path / "p.json")
    config = load_config({"aio": str(tmp_path / "p.json")})
    assert config.aio_options() == {"engine": "threads", "block_size": 1 << 20, "threads": 24}
    named = load_config({"aio": {"profile": str(tmp_path / "p.json"), "thread_count": 3}})
    assert named.aio_options()["threads"] == 3


def test_what_the_config_says_itself_comes_first(file: Path) -> None:
    config = load_config({"aio": {"profile": str(file), "queue_depth": 5}})
    assert config.aio_options() == {"engine": "io_uring", "block_size": 1 << 20, "queue_depth": 5}
    other = load_config({"aio": str(file), "tierflow": {"engine": "threads"}})
    # depth and rates were found with another engine
    assert other.aio_options() == {"engine": "threads", "block_size": 1 << 20} and other.drive is None


def test_a_read_only_profile_leaves_the_rates_to_the_probe(tmp_path: Path) -> None:
    profile(write=None, mixed=None).write_to(tmp_path / "p.json")
    config = load_config({"aio": str(tmp_path / "p.json")})
    assert config.drive is None and config.aio_options()["queue_depth"] == 24


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot be read", "No such file"]),
        ("{", ["not JSON"]),
        ("[]", ["no profile"]),
        ('{"block_size": 4096}', ["no profile", "tierflow-tune-1"]),
        ({"queue_depth": 0}, ["queue_depth", "greater than or equal to 1"]),
        ({"engine": "libaio"}, ["engine", "io_uring"]),
        ({"surprise": 1}, ["surprise"]),
        ({"read": {"read": "fast"}}, ["read.read"]),
    ],
)  # fmt: skip
def test_a_profile_that_cannot_be_used_is_named_with_field_and_remedy(tmp_path: Path, content: Any, words: list[str]) -> None:
    path = tmp_path / "p.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(profile().model_dump_json()) | content)
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as raised:
        load_config({"aio": str(path)})
    (problem,) = raised.value.problems
    assert all(word in problem for word in ["aio.profile", str(path), "tierflow tune", *words]), problem


#: As ``get_aio_config`` of DeepSpeed 0.19.8 reads them, with the types of its defaults.
DEEPSPEED = {"block_size": int, "queue_depth": int, "intra_op_parallelism": int, "single_submit": bool,
             "overlap_events": bool, "use_gds": bool}  # fmt: skip


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_the_deepspeed_block_has_its_keys_with_real_booleans(engine: str) -> None:
    block = profile(engine=engine).deepspeed_block()
    assert {name: type(value) for name, value in block.items()} == DEEPSPEED
    written = json.dumps(block)
    assert '"single_submit": false' in written and '"overlap_events": true' in written
    config = load_config({"aio": block})  # which names what it does not use, and refuses nothing
    assert config.aio.block_size == 1 << 20


def test_scheduler_takes_the_rates_instead_of_probing_the_drive(tmp_path: Path) -> None:
    import torch

    from tierflow.scheduler.bandwidth import Paths, probe

    rates = profile().bandwidths()
    # a folder that is not there: the drive is not touched
    found = probe(Paths(torch.device("cpu"), str(tmp_path / "none"), {}, drive=rates))
    assert (found.read, found.write, found.mixed_read, found.mixed_write) == (4e9, 3e9, 1.5e9, 1.25e9)
    assert 0 < found.update < float("inf")


def test_the_floor_in_closed_form() -> None:
    rates = profile().bandwidths()
    assert rates is not None
    # 14e9 read and 12e9 written: 12 / 1.25 = 9.6 s together move 14.4 of reads, so 14 / 1.5 s and the rest of the writes
    both = 14 / 1.5
    together = both + (12 - both * 1.25) / 3
    apart = 14 / 4 + 12 / 3
    assert step_seconds(10**9, FORMATS["lossless"].everything, rates) == pytest.approx(min(together, apart))
    assert step_rate(FORMATS["lossless"], rates) == pytest.approx(26e9 / min(together, apart))
    assert FORMATS["fp32"].states == (8, 8) and FORMATS["fp32"].everything == (16, 12)


@pytest.mark.parametrize(("text", "count"), [("13B", 13 * 10**9), ("1.2b", 1_200_000_000), ("135M", 135_000_000), ("7000", 7000), ("0.5T", 5 * 10**11)])
def test_parameters_as_people_write_them(text: str, count: int) -> None:
    assert parse_parameters(text) == count


@pytest.mark.parametrize("text", ["", "B", "13 GB", "-1B", "0", "1e9", "nan"])
def test_what_is_no_count_of_parameters_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--parameters"):
        parse_parameters(text)


def test_the_heat_map_is_a_picture_whole_or_not_at_all(tmp_path: Path) -> None:
    tried = [
        Tried(engine=e, block_size=b, queue_depth=q, rings=1, huge_pages=h, score=1e9, rates={"read": 1e9, "write": 2e9, "mixed": 1.5e9})
        for e, b, q, h in (("io_uring", 1 << 20, 24, True), ("threads", 4 << 20, 2, False))
    ]
    target = plot(profile(tried=tried), tmp_path / "p.png")
    assert target.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(OSError):
        plot(profile(tried=tried), tmp_path / "none" / "p.png")
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_a_profile_is_frozen() -> None:
    with pytest.raises(ValidationError):
        profile().block_size = 1  # type: ignore[misc]


def test_a_run_with_a_profile_opens_its_store_so_and_reports_by_its_rates(file: Path, tmp_path: Path) -> None:
    import tiny

    import tierflow

    profile(paths=[str(tmp_path)]).write_to(file)
    model = tiny.llama(layers=2, hidden=32)
    config = tiny.config("nvme", tmp_path, **tiny.tight(model, "nvme")) | {"aio": str(file)}
    _, optimizer = tierflow.offload(model, config)
    engine = optimizer.engine
    try:
        tiny.train(model, optimizer, 1)
        assert engine.io_options["block_size"] == 1 << 20 and engine.io_options["queue_depth"] == 24
        assert engine.manager.store.engine in ("io_uring", "threads")
        engine.report()
        assert engine.bandwidths is not None and engine.bandwidths.read == 4e9 and engine.bandwidths.mixed_write == 1.25e9
    finally:
        optimizer.close()


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_of_a_format_are_those_that_the_kernels_describe(name: str) -> None:
    """`tune` imports no torch, so it has them written down."""
    import torch

    from tierflow.cpu_adam.formats import resolve

    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    state, weight = resolve(name, dtype).state_bytes(), dtype.itemsize
    assert FORMATS[name].states == (state, state)
    assert FORMATS[name].everything == (state + 2 * weight, state + weight)
