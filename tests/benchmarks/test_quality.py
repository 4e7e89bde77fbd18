"""The quality benchmark, small: every case trains, on the small model and on a pretrained one, and verdicts follow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from outcome import ROOT, child_environment

BENCHMARK = ROOT / "benchmarks" / "bench_quality.py"


def bench(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *map(str, arguments)],
        env=child_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_formats_beside_exact_runs_on_bytes(tmp_path: Path) -> None:
    cases = ["torch, fp32, seed 0", "fp32", "int8, fp32 weights"]
    result, picture = tmp_path / "quality.json", tmp_path / "quality.png"
    said = bench("--text", ROOT / "README.md", "--steps", 3, "--cases", *cases, "--json", result, "--plot", picture)
    found = json.loads(result.read_text())
    assert [row["case"] for row in found["rows"]] == cases and found["unit"] == "byte"
    for row in found["rows"]:
        assert len(row["train"]) == 3 and row["held_out"][-1] == [3, row["final"]]
        assert row["within"] == (row["above_mean"] <= row["spread"]) and f"{row['final']:.4f}" in said
    exact, ours, lossy = (row["final"] for row in found["rows"])
    assert exact == pytest.approx(ours, rel=1e-5) and lossy == pytest.approx(ours, rel=1e-2)
    assert picture.read_bytes().startswith(b"\x89PNG")


def save_tokenizer(folder: Path) -> None:
    """One token for each byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_a_pretrained_model_in_its_own_tokens(tmp_path: Path) -> None:
    folder, result = tmp_path / "model", tmp_path / "quality.json"
    tiny.llama(layers=2, hidden=32, vocab=256).save_pretrained(folder)
    save_tokenizer(folder)
    bench("--text", ROOT / "README.md", "--model", folder, "--steps", 2, "--cases", "fp32", "lossless", "--json", result)
    found = json.loads(result.read_text())
    assert found["unit"] == "token" and len(found["rows"]) == 2
    assert all(0 < row["final"] < 20 for row in found["rows"])
