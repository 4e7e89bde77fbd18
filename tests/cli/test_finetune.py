"""``tierflow finetune`` as a user types it, on a small model made here."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

TEXT = "the quick brown fox jumps over the lazy dog and runs home again before the rain comes down . " * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, a tokenizer with a chat template, and data."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("job")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<unk>", "<eos>", "<|user|>", "<|assistant|>"]
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=150, special_tokens=special))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    model = tiny.llama(layers=3, hidden=32)
    model.save_pretrained(root / "model")
    fast.save_pretrained(root / "model")
    (root / "train.txt").write_text(TEXT)
    (root / "held.txt").write_text(TEXT[500:1500])
    turns = [{"role": "user", "content": "where is the dog ?"}, {"role": "assistant", "content": "the dog runs home ."}]
    (root / "chat.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for _ in range(40)))
    return root


def command(folder: Path, out: Path, *arguments: str, data: str = "train.txt") -> list[str]:
    return [
        sys.executable, "-m", "tierflow", "finetune", "--model", str(folder / "model"), "--data", str(folder / data),
        "--output", str(out), "--sequence-length", "16", *arguments,
    ]  # fmt: skip


def run(folder: Path, out: Path, *arguments: str, data: str = "train.txt") -> subprocess.CompletedProcess:
    words = command(folder, out, *arguments, data=data)
    return subprocess.run(words, capture_output=True, text=True, cwd=out.parent, timeout=300)


def tight(folder: Path) -> dict[str, str]:
    """Caps that leave nearly everything on NVMe."""
    from transformers import AutoModelForCausalLM

    return tiny.tight(AutoModelForCausalLM.from_pretrained(folder / "model"))


def config(path: Path, **top) -> str:
    raw = {
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"offload_param": {"device": "nvme"}, "offload_optimizer": {"device": "nvme"}},
        "tierflow": {"device_memory": "2MB", "host_memory": "8MB"},
    } | top
    path.write_text(json.dumps(raw))
    return str(path)


def test_everything_on_nvme_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    done = run(
        folder, out, "--config", config(tmp_path / "c.json", tierflow=tight(folder) | {"update": "deferred"}), "--steps", "12", "--micro-batch", "2",
        "--eval-data", str(folder / "held.txt"), str(folder / "train.txt"), "--eval-tokens", "64",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for piece in ("resolved config", "exp_avg_sq", "600 TBW", "step   12/12", "tok/s", "sample after", "perplexity"):
        assert piece in done.stdout, piece
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["steps"]) == 12
    before, after = (e[1][0][2] for e in metrics["evaluations"])
    assert [len(e[1]) for e in metrics["evaluations"]] == [2, 2]
    assert after < before
    planned = metrics["nvme_per_step"]["written"]  # what a step leaves to be written is written in the next one, or after
    written = [s["nvme_written"] for s in metrics["steps"]]
    assert planned and written[0] < planned and all(0 <= n * planned - sum(written[:n]) <= planned for n in range(1, 13))
    assert (out / "run.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(TEXT[:100], return_tensors="pt").input_ids
    assert math.isfinite(model(input_ids=ids, labels=ids).loss.item())
    assert not (out / "swap").exists()


def test_two_folders_for_nvme_and_the_same_losses(folder: Path, tmp_path: Path) -> None:
    named = [str(tmp_path / name) for name in "ab"]
    listed = json.loads(Path(config(tmp_path / "c.json", tierflow=tight(folder))).read_text())
    for block in listed["zero_optimization"].values():
        block["nvme_path"] = named
    (tmp_path / "listed.json").write_text(json.dumps(listed))
    ways = {
        "one": ("--config", str(tmp_path / "c.json")),
        "two": ("--config", str(tmp_path / "c.json"), "--nvme-path", named[0], "--nvme-path", named[1]),
        "listed": ("--config", str(tmp_path / "listed.json")),  # --nvme-path made the folders, a config does not
    }
    losses = {}
    for way, arguments in ways.items():
        done = run(folder, tmp_path / way, *arguments, "--steps", "3")
        assert done.returncode == 0, done.stdout + done.stderr
        assert (f"NVMe: {', '.join(named)} through" in done.stdout) == (way != "one")
        losses[way] = [s["loss"] for s in json.loads((tmp_path / way / "metrics.json").read_text())["steps"]]
    assert losses["one"] == losses["two"] == losses["listed"]
    assert all(list(Path(name).iterdir()) == [] for name in named)
    twice = run(folder, tmp_path / "twice", *ways["one"], "--nvme-path", named[0], "--nvme-path", named[0], "--steps", "1")
    assert twice.returncode == 1 and "expected different folders" in twice.stdout, twice.stdout + twice.stderr


def test_report_and_trace_of_a_run(folder: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace.json"
    done = run(
        folder, out, "--config", config(tmp_path / "c.json", tierflow=tight(folder) | {"update": "immediate"}), "--steps", "6", "--report", "--trace", str(trace),
        "--eval-every", "3", "--eval-data", str(folder / "held.txt"), "--eval-tokens", "64",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table = re.search(r"^step (\S+) s \(mean of 4 steps\), floor (\S+) s by the \w+", done.stdout, re.M)
    assert table and "what would help most: " in done.stdout and re.search(r"^NVMe read ", done.stdout, re.M)
    steps = json.loads((out / "metrics.json").read_text())["steps"]
    assert float(table[1]) > 0.5 * sum(s["seconds"] for s in steps[2:]) / 4
    body = json.loads(trace.read_text())
    moved = {c: sum(e["args"]["bytes"] for e in body["traceEvents"] if e.get("cat") == c) for c in ("NVMe read", "NVMe write")}
    traced = steps[1:4]
    assert moved["NVMe write"] == sum(s["nvme_written"] for s in traced)
    # the evaluation after step 3 reads weights too
    assert moved["NVMe read"] >= sum(s["nvme_read"] for s in traced) > 0


def test_resume_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    c = config(tmp_path / "c.json", gradient_accumulation_steps=2)
    common = ("--config", c, "--schedule", "linear", "--warmup", "2", "--optimizer-state", "int8")
    assert run(folder, whole, *common, "--steps", "6").returncode == 0
    first = run(folder, parts, *common, "--steps", "6", "--save-every", "4")
    assert first.returncode == 0
    (parts / "model.safetensors").unlink()
    again = run(folder, parts, *common, "--steps", "6", "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "int8 states of Adam, lossy" in again.stdout
    assert "resumed from" in again.stdout and "at step 5" in again.stdout
    a, b = (load_file(p / "model.safetensors") for p in (whole, parts))
    assert tiny.same(a, b)
    records = [json.loads((p / "metrics.json").read_text())["steps"] for p in (whole, parts)]
    assert [s["loss"] for s in records[0]] == [s["loss"] for s in records[1]]


def test_chat_data_without_any_config(folder: Path, tmp_path: Path) -> None:
    done = run(folder, tmp_path / "out", "--steps", "3", "--lr", "1e-3", data="chat.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"device": "none"' in done.stdout  # all of it fits the memory of any machine


def test_nan_loss_is_reported_and_the_weights_are_kept(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    done = run(folder, tmp_path / "out", "--config", config(tmp_path / "c.json"), "--steps", "30", "--lr", "1e30")
    assert done.returncode == 1
    assert "changed no weight" in done.stdout and "step" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "data", "wanted"),
    [
        (("--config", "missing.json"), "train.txt", "missing.json"),
        (("--schedule", "cosin"), "train.txt", "cosine"),
        (("--optimizer-state", "int4"), "train.txt", "tierflow.optimizer_state"),
        ((), "absent.txt", "absent.txt"),
        ((), "model/model.safetensors", "model.safetensors"),
        (("--resume",), "train.txt", "tierflow.json"),
    ],
)
def test_bad_input_is_one_clear_error(folder: Path, tmp_path: Path, arguments, data: str, wanted: str) -> None:
    done = run(folder, tmp_path / "out", "--steps", "3", *arguments, data=data)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error:" in done.stdout and wanted in done.stdout and "Traceback" not in done.stderr + done.stdout


def test_a_plan_that_does_not_fit_leaves_no_folder(folder: Path, tmp_path: Path) -> None:
    small = config(tmp_path / "c.json", tierflow={"device_memory": "8KB", "host_memory": "8KB"})
    done = run(folder, tmp_path / "out", "--steps", "3", "--config", small)
    assert done.returncode == 1 and "does not fit" in done.stdout and "device_memory" in done.stdout
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert run(folder, tmp_path / "out", "--steps", "3", "--config", small).returncode == 1
    assert (tmp_path / "out").exists(), "it was the user's"


@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_in_mid_run_leaves_no_folder(folder: Path, tmp_path: Path, number: int, code: int, said: str) -> None:
    words = command(folder, tmp_path / "new" / "out", "--steps", "100000", "--config", config(tmp_path / "c.json"))
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    try:
        assert process.stdout is not None
        assert any(line.startswith("step") for line in process.stdout)
        assert (tmp_path / "new" / "out" / "swap").is_dir()
        process.send_signal(number)
        rest = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == code and rest.splitlines()[-1] == said and "Traceback" not in rest
    assert not (tmp_path / "new").exists()


def test_env_says_what_there_is() -> None:
    done = subprocess.run([sys.executable, "-m", "tierflow", "env"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for part in ("torch", "io_uring", "update kernels", "host memory"):
        assert part in done.stdout
    assert torch.__version__.split("+")[0] in done.stdout


def test_fp16_says_its_scale_and_what_it_skipped(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fp16 = {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}
    c = config(tmp_path / "c.json", fp16=fp16, gradient_accumulation_steps=2)
    done = run(folder, whole, "--config", c, "--steps", "12", "--schedule", "linear")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((whole / "metrics.json").read_text())["steps"]
    skipped = [s["skipped"] for s in steps]
    assert skipped[0] and not all(skipped)
    assert done.stdout.count("SKIPPED") == sum(skipped) and "scale 1.04858e+06  SKIPPED" in done.stdout
    scale, taken = 2.0**20, 0
    for step in steps:  # the schedule follows the steps that were taken
        assert step["loss_scale"] == scale and step["lr"] == pytest.approx(5e-3 * (1 - taken / 12))
        scale, taken = (scale / 2, taken) if step["skipped"] else (scale, taken + 1)
    assert run(folder, parts, "--config", c, "--steps", "12", "--schedule", "linear", "--save-every", "5").returncode == 0
    again = run(folder, parts, "--config", c, "--steps", "12", "--schedule", "linear", "--resume")
    assert again.returncode == 0 and "at step 11" in again.stdout, again.stdout + again.stderr
    a, b = (load_file(p / "model.safetensors") for p in (whole, parts))
    assert tiny.same(a, b) and all(t.dtype == torch.float16 for t in a.values())
