"""Real architectures with random weights, everything on NVMe, against plain torch with the same update kernel."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

VOCAB = 128


def build(name: str):
    import transformers as t

    small = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=VOCAB)
    makers = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=True)),
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


def steps(count: int = 3):
    generator = torch.Generator().manual_seed(11)
    batches = [torch.randint(1, VOCAB, (2, 10), generator=generator) for _ in range(count)]
    return [lambda m, ids=ids: m(input_ids=ids, labels=ids).loss for ids in batches]


ARCHITECTURES = ["llama", "qwen2", "gpt2", "opt", "mixtral", "bert", "t5"]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("placement", ["everything", "param_host"])
def test_offloaded_training_equals_plain_torch(name: str, placement: str, tmp_path) -> None:
    model = build(name)
    losses, expected = tiny.reference(copy.deepcopy(model), steps())
    got, weights, moved = tiny.offloaded(model, steps(), tmp_path, placement)
    assert got == losses
    assert tiny.same(weights, expected)
    assert moved.to_device + moved.nvme_read > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral", "opt"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(name: str, reentrant: bool, tmp_path) -> None:
    model = build(name)
    plain = copy.deepcopy(model)
    for m in (plain, model):
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            m.enable_input_require_grads()
    losses, expected = tiny.reference(plain, steps())
    caps = tiny.tight(model, slack=8.0, direct=False)  # what is recomputed keeps its weights
    got, weights, moved = tiny.offloaded(model, steps(), tmp_path, **caps)
    assert got == losses and moved.nvme_read and moved.nvme_written
    assert tiny.same(weights, expected)
