"""Small models of real architectures, with random weights that are the same each time."""

from __future__ import annotations

import torch
from torch import nn

VOCAB = 128


def build(name: str) -> nn.Module:
    """In training mode; "untied" is a llama with a head of its own."""
    import transformers as t

    small = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=VOCAB)
    makers = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=True)),
        "untied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=False)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**small, num_key_value_heads=2, tie_word_embeddings=False)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=VOCAB, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        ),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(**{k: v for k, v in small.items() if k != "intermediate_size"}, ffn_dim=64, word_embed_proj_dim=32, dropout=0, max_position_embeddings=32)
        ),
        "mixtral": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(**small, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
        ),
        "bert": lambda: t.BertForMaskedLM(
            t.BertConfig(**small, hidden_dropout_prob=0, attention_probs_dropout_prob=0, max_position_embeddings=32)
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=VOCAB, dropout_rate=0, decoder_start_token_id=0)
        ),
    }  # fmt: skip
    torch.manual_seed(5)
    return makers[name]().train()
