"""``tierflow bench train`` as a user types it, on a small shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from typer.testing import CliRunner

from tierflow.bench.run import Options, prepare, steps
from tierflow.bench.weights import random_weights
from tierflow.cli import app
from tierflow.scheduler.blocks import deliver_in_blocks
from tierflow.scheduler.units import Slot

EVERYTHING = {"param": "nvme", "optimizer": "nvme", "sequence_length": 16}


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> Path:
    """A config file, and nothing else: no weights anywhere."""
    folder = tmp_path_factory.mktemp("shape")
    tiny.llama(layers=4, hidden=32).config.save_pretrained(folder)
    return folder / "config.json"


def bench(shape: Path | str, where: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tierflow", "bench", "train", "--shape", str(shape), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=where, timeout=300)


def least(shape: Path, *where: Path, **more: object) -> dict[str, str]:
    """The caps that leave as much as can be on NVMe."""

    def offer(caps: dict[str, int]) -> None:
        prepare(Options(str(shape), **(EVERYTHING | more | {k: str(v) for k, v in caps.items()}), nvme=where)).optimizer.close()

    return {k: str(v) for k, v in tiny.least(offer)[1].items()}


def test_everything_on_nvme(shape: Path, tmp_path: Path) -> None:
    caps = least(shape, tmp_path, dtype="bfloat16", accumulation=2)
    caps["device_memory"] = str(int(caps["device_memory"]) + 12 * 4096)  # checkpointing keeps a whole layer's weights
    done = bench(
        shape, tmp_path, "--nvme", str(tmp_path), "--param", "nvme", "--optimizer", "nvme", "--device-memory", caps["device_memory"], "--host-memory", caps["host_memory"],
        "--dtype", "bfloat16", "--batch", "2", "--accumulation", "2", "--sequence-length", "16",
        "--steps", "3", "--checkpointing", "--clip", "1.0", "--json", "out.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for piece in ("tokens/s", "model TFLOP/s", "exp_avg_sq", "step    3/3", "recomputed under checkpointing"):
        assert piece in done.stdout, piece
    assert "CUT" not in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["placement"] == {"param": "NVME", "optimizer": "NVME"}
    assert (found["batch"], found["accumulation"], found["sequence_length"]) == (2, 2, 16)
    assert (found["dtype"], found["state_format"], found["shape"]["cut"]) == ("bfloat16", "lossless", False)
    assert len(found["steps"]) == 3 and found["summary"]["steps_timed"] == 2
    assert found["machine"]["nvme"]["engine"] in ("io_uring", "threads")
    timed = found["summary"]
    assert timed["tokens_per_second"] == pytest.approx(64 / timed["seconds_per_step"]["median"])
    assert timed["model_tflops"] == pytest.approx(
        timed["operations_per_step"] / timed["seconds_per_step"]["median"] / 1e12
    )
    planned, written = found["planned_nvme_per_step"]["written"], [s["nvme_written"] for s in found["steps"]]
    assert 0 < sum(written) <= 3 * planned and written[0] < planned  # what a step leaves to be written, the next one writes
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]  # the store is gone


def test_two_folders_make_one_store(shape: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    caps = least(shape, *folders)
    words = [word for folder in folders for word in ("--nvme", folder.name)]
    done = bench(
        shape, tmp_path, *words, "--param", "nvme", "--optimizer", "nvme", "--device-memory", caps["device_memory"],
        "--host-memory", caps["host_memory"], "--sequence-length", "16", "--steps", "2", "--json", "out.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NVMe: a, b through" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["options"]["nvme"] == ["a", "b"]


def test_a_cut_model_says_it_is_none(shape: Path, tmp_path: Path) -> None:
    done = bench(shape, tmp_path, "--layers", "2", "--steps", "1", "--sequence-length", "8", "--json", "out.json", "--optimizer-state", "int8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["state_format"] == "int8"
    assert done.stdout.count("CUT MODEL") == 2 and "CUT to 2 of 4 layers" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["shape"]["cut"] is True


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--device-memory", "24XB"), "--device-memory 24XB"),
        (("--param", "gpu"), "--param gpu: expected one of device, cpu, nvme, auto"),
        (("--optimizer", "nvme"), "give --nvme PATH"),
        (("--nvme", "nowhere"), "--nvme nowhere: no such folder"),
        (("--nvme", ".", "--nvme", "nowhere"), "--nvme nowhere: no such folder"),
        (("--nvme", ".", "--nvme", "."), "a list of different paths"),
        (("--dtype", "fp8"), "--dtype fp8"),
        (("--sequence-length", "65"), "has 64 positions"),
        (("--param", "cpu", "--optimizer", "device"), "offload_optimizer is --optimizer"),
        (("--device-memory", "1kB", "--param", "cpu"), "device_memory is --device-memory"),
        (("--host-memory", "1kB", "--device-memory", "1kB"), "give --nvme PATH for that"),
        (("--config", "missing.json"), "missing.json"),
        (("--json", "no/where.json"), "--json no/where.json"),
        (("--layers", "5"), "--layers 5"),
        (("--optimizer-state", "int8-24bit"), "optimizer_state is --optimizer-state"),
        (("--private-memory", "lots"), "--private-memory lots"),
    ],
)
def test_bad_input_is_one_clear_error(
    shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], wanted: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = refused("--shape", str(shape), "--steps", "1", "--sequence-length", "16", *arguments)
    assert "error:" in done and wanted in done.replace("\n", " ")


def test_a_model_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vit.json").write_text(json.dumps({"model_type": "vit"}))
    assert "no causal language model" in refused("--shape", str(tmp_path / "vit.json"))


def refused(*arguments: str) -> str:
    """What the command prints as it ends with exit code 1; anything but a clean end raises."""
    result = CliRunner().invoke(app, ["bench", "train", *arguments])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1, result
    return result.output


def losses(shape: Path, **more: object) -> list[tuple[float, float]]:
    run = prepare(Options(str(shape), **({"sequence_length": 16, "steps": 3} | more)))
    try:
        records = list(steps(run))
        assert any(r.nvme_read and r.nvme_written for r in records) == ("nvme" in more)
        return [(r.loss, r.grad_norm) for r in records]
    finally:
        run.optimizer.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_losses_wherever_the_state_lives(shape: Path, tmp_path: Path, dtype: str) -> None:
    near = losses(shape, param="device", optimizer="device", dtype=dtype)
    far = losses(shape, nvme=(tmp_path,), dtype=dtype, **EVERYTHING, **least(shape, tmp_path, dtype=dtype))
    assert near == far
    assert near != losses(shape, dtype=dtype, seed=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_chunked_head_agrees_between_placements_and_nearly_with_the_whole(
    shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(deliver_in_blocks, "__defaults__", (1 << 12, 1 << 11))
    near = losses(shape, param="device", optimizer="device", dtype=dtype, head_chunk=4)
    far = losses(shape, nvme=(tmp_path,), dtype=dtype, head_chunk=4, **EVERYTHING, **least(shape, tmp_path, dtype=dtype))
    assert near == far
    whole = losses(shape, dtype=dtype)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    torch.testing.assert_close(torch.tensor(near), torch.tensor(whole), rtol=tolerance, atol=0)


def test_logits_that_are_more_than_a_product_are_refused(tmp_path: Path) -> None:
    data = {"model_type": "gemma2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
    (tmp_path / "gemma.json").write_text(json.dumps(data))
    done = refused("--shape", str(tmp_path / "gemma.json"), "--head-chunk", "8")
    assert "--head-chunk" in done and "more with its logits" in done


def test_the_kernel_holds_the_process_to_its_private_memory(shape: Path, tmp_path: Path) -> None:
    done = bench(shape, tmp_path, "--steps", "1", "--sequence-length", "16", "--private-memory", "60MB")
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert "memory ran out" in done.stdout and "--private-memory" in done.stdout


def test_weights_are_drawn_as_the_model_is_initialised() -> None:
    source, std = random_weights(3, 0.02), 0.02

    def drawn(name: str, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        param = torch.nn.Parameter(torch.empty(0, dtype=dtype))
        numel = torch.Size(size).numel()
        return source(Slot((name,), torch.Size(size), numel, 0, 0), param)

    matrix = drawn("layers.0.proj.weight", 400, 500)
    assert abs(matrix.mean()) < 4 * std / 200_000**0.5 and abs(matrix.std() / std - 1) < 0.01
    assert torch.equal(matrix, drawn("layers.0.proj.weight", 400, 500))  # by name and seed alone
    assert not torch.equal(matrix, drawn("layers.1.proj.weight", 400, 500))
    assert torch.equal(drawn("norm.weight", 7), torch.ones(7))
    assert torch.equal(drawn("proj.bias", 7, dtype=torch.bfloat16), torch.zeros(7, dtype=torch.bfloat16))
