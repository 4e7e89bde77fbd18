"""Model shapes: published ones, written down from their configs, and any Hugging Face config."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _llama(
    hidden: int, intermediate: int, layers: int, heads: tuple[int, int], vocab: int, positions: int, **more: Any
) -> dict[str, Any]:  # fmt: skip
    """A Llama's ``config.json``; ``heads``: of queries, and of keys and values."""
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": hidden // heads[0],
        "vocab_size": vocab, "max_position_embeddings": positions, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "initializer_range": 0.02, "tie_word_embeddings": False,
    } | more  # fmt: skip


_LLAMA_3: dict[str, Any] = {"rope_theta": 500000.0}
_LLAMA_32: dict[str, Any] = _LLAMA_3 | {
    "tie_word_embeddings": True,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip

#: Name on the command line -> (the model whose shape it is, its config).
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-1b": ("Llama-3.2-1B", _llama(2048, 8192, 16, (32, 8), 128256, 131072, **_LLAMA_32)),
    "llama-3b": ("Llama-3.2-3B", _llama(3072, 8192, 28, (24, 8), 128256, 131072, **_LLAMA_32)),
    "llama-7b": ("Llama-2-7B", _llama(4096, 11008, 32, (32, 32), 32000, 4096)),
    "llama-8b": ("Llama-3-8B", _llama(4096, 14336, 32, (32, 8), 128256, 8192, **_LLAMA_3)),
    "llama-13b": ("Llama-2-13B", _llama(5120, 13824, 40, (40, 40), 32000, 4096)),
    "llama-70b": ("Llama-3-70B", _llama(8192, 28672, 80, (64, 8), 128256, 8192, **_LLAMA_3)),
}


@dataclass(frozen=True)
class Shape:
    """A model's config (transformers), where it is from, and how many layers were cut off it."""

    name: str
    origin: str
    config: Any
    layers: int
    whole_layers: int

    @property
    def cut(self) -> bool:
        """Whether this is less than the model it is named after."""
        return self.layers < self.whole_layers


def load_shape(name: str, layers: int | None = None) -> Shape:
    """One of SHAPES, or a Hugging Face ``config.json`` or a folder with one; ``layers`` cuts its depth.

    Nothing is downloaded. Raises ValueError naming the option and what it takes.
    """
    if name in SHAPES:
        from transformers import AutoConfig

        origin, data = SHAPES[name]
        return _cut(name, origin, AutoConfig.for_model(**data), layers)
    return _cut(name, name, _read(name), layers)


def _read(name: str) -> Any:
    from transformers import AutoConfig

    path = Path(name).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(name, SHAPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"--shape {name}: neither a shape ({', '.join(SHAPES)}) nor a Hugging Face config file or folder{hint}"
        )
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"--shape {name}: no config.json in this folder; give the folder of a Hugging Face model")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a config is free text: transformers raises many kinds of error over it
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"--shape {name}: transformers cannot read this config: {first}") from error


def _cut(name: str, origin: str, config: Any, layers: int | None) -> Shape:
    text = config.get_text_config()
    whole = getattr(text, "num_hidden_layers", None)
    if not isinstance(whole, int):
        raise ValueError(f"--shape {name}: its config has no num_hidden_layers; give a causal language model's")
    if layers is None:
        return Shape(name, origin, config, whole, whole)
    if not 1 <= layers <= whole:
        raise ValueError(f"--layers {layers}: {origin} has {whole}; give 1 to {whole}, or leave it out for all")
    text.num_hidden_layers = layers
    kinds = getattr(text, "layer_types", None)  # of models whose layers are not all alike
    if kinds is not None:
        text.layer_types = list(kinds)[:layers]
    return Shape(name, origin, config, layers, whole)
