"""Write a Llama-shaped GGUF file as a Hugging Face folder: fp32 safetensors, config, tokenizer, chat template.

    python gguf_to_hf.py MODEL.gguf FOLDER

transformers reads GGUF too, but marks the model as quantized, and such a model is not for training.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type


def convert(source: Path, folder: Path) -> None:
    """Convert `source` into `folder`, which must exist."""
    import gguf

    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.model"] != "gpt2":
        raise SystemExit(f"{source}: only Llama-shaped models with a byte-level BPE tokenizer are converted here")
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    config = make_config(fields, tied)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    write_weights(reader, fields, folder)
    write_tokenizer(fields, folder)


def make_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": fields["llama.context_length"],
        # GGUF holds it in 32 bits; five digits give back what was meant.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.5g}"),
        "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": tied,
    }


def write_weights(reader: Any, fields: dict[str, Any], folder: Path) -> None:
    import gguf
    import numpy as np
    from safetensors.numpy import save_file

    heads = fields["llama.attention.head_count"]
    split = {"attn_q": heads, "attn_k": fields.get("llama.attention.head_count_kv", heads)}
    weights = {}
    for tensor in reader.tensors:
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        if found is None or found[2] not in NAMES:
            raise SystemExit(f"{tensor.name}: no such tensor in a plain Llama model")
        block, part = found.groups()
        value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if part in split:
            # llama.cpp pairs a head's rows (0, 1), (2, 3), ...; Hugging Face pairs row i with row i + half.
            rows, columns = value.shape
            value = value.reshape(split[part], -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        where = f"model.layers.{block}." if block is not None else ""
        weights[f"{where}{NAMES[part]}.weight"] = np.ascontiguousarray(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, merges))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if fields.get("tokenizer.ggml.pre") == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, kind in kinds if kind == CONTROL_TOKEN])
    named = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        place = fields.get(f"tokenizer.ggml.{key}_token_id")
        if place is not None:
            named[f"{name}_token"] = tokens[place]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=fields["llama.context_length"], **named
    )
    wrapped.chat_template = fields.get("tokenizer.chat_template")
    wrapped.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
