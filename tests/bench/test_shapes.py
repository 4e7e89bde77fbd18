"""The shapes are the published models', to the parameter, and cost no memory to build."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tierflow.bench.shapes import SHAPES, load_shape
from tierflow.bench.work import count_work
from tierflow.loading import build_from_config

#: Of the published checkpoints, by hand.
PARAMETERS = {
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
    "llama-7b": 6_738_415_616,
    "llama-8b": 8_030_261_248,
    "llama-13b": 13_015_864_320,
    "llama-70b": 70_553_706_496,
}


def build(name: str, layers: int | None = None) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return build_from_config(AutoModelForCausalLM, load_shape(name, layers).config, torch.bfloat16)


def test_every_shape_is_checked() -> None:
    assert PARAMETERS.keys() == SHAPES.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert all(p.untyped_storage().nbytes() <= 4 for p in model.parameters())  # one element stands for all
    assert not any(b.is_meta for b in model.buffers())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_positions_are_turned_as_published() -> None:
    """Llama-3.2's scaled frequencies: the slowest is divided by 32, the fastest is left alone."""
    buffers = dict(build("llama-1b").named_buffers())
    plain = 1.0 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    found = buffers["model.rotary_emb.inv_freq"]
    assert found[0] == plain[0] == 1.0
    torch.testing.assert_close(found[-1], plain[-1] / 32)


def test_a_cut_shape_says_so() -> None:
    cut, whole = load_shape("llama-7b", 2), load_shape("llama-7b", 32)
    assert cut.cut and not whole.cut
    assert len(build("llama-7b", 2).model.layers) == 2


@pytest.mark.parametrize("folder", [True, False])
def test_a_config_file_or_folder_is_a_shape(tmp_path: Path, folder: bool) -> None:
    data = {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 16, "vocab_size": 50,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(data))
    shape = load_shape(str(tmp_path if folder else tmp_path / "config.json"), 3)
    assert (shape.layers, shape.whole_layers, shape.cut) == (3, 5, True)


@pytest.mark.parametrize(
    ("name", "layers", "wanted"),
    [
        ("llama-13", None, "did you mean llama-13b?"),
        ("llama-1b", 17, "--layers 17: Llama-3.2-1B has 16"),
        ("{tmp}", None, "no config.json"),
        ("{tmp}/broken.json", None, "cannot read this config"),
        ("{tmp}/nothing.json", None, "cannot read this config"),
    ],
)
def test_what_is_no_shape_is_refused(tmp_path: Path, name: str, layers: int | None, wanted: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "nothing.json").write_text("{}")
    with pytest.raises(ValueError) as caught:
        load_shape(name.format(tmp=tmp_path), layers)
    message = str(caught.value)
    assert wanted in message and "\n" not in message


def test_operations_of_a_step_counted_by_hand() -> None:
    # Llama-2-7B: 32 layers of 4096 x 4096 x 4 + 4096 x 11008 x 3 and two norms, a final norm, the head
    block = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    matrices = 32 * block + 4096 + 32000 * 4096
    model = build("llama-7b")
    plain, again = count_work(model, False), count_work(model, True)
    attention = 32 * 4096 * 128  # layers x hidden size x length: scores and their sums over values, 2 each
    assert plain.operations(1024, 128) == 1024 * (6 * matrices + 3 * 4 * attention)
    assert again.operations(1024, 128) == 1024 * (6 * matrices + 2 * 32 * block + 4 * 4 * attention)
    tied = build("llama-1b")
    assert count_work(tied, False).matrices == PARAMETERS["llama-1b"]  # the embedding is the head
