"""Packing and order: every token accounted for, batches a pure function of seed, step and micro."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from tierflow.finetune.data import Batches, DataError, Sequences, Tokens, load_sequences, load_tokens, pack

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the quick brown"},
    {"role": "assistant", "content": "fox jumps"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "over the dog"},
]
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
)


def tokens(count, start=0, learn=True):
    ids = np.arange(start, start + count, dtype=np.int32)
    return Tokens("made", ids, np.full(count, learn))


def numbered(count, length=4):
    ids = np.arange(count * length, dtype=np.int32).reshape(count, length)
    return Sequences(ids, ids.copy(), 0)


def write_talk(tmp_path, messages):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    return path


def said(one, tokenizer):
    """The learned text, its runs parted by a bar."""
    out, before = "", False
    for token, learned in zip(one.ids, one.learn, strict=True):
        if learned:
            out += ("" if before or not out else "|") + tokenizer.decode([int(token)])
        before = bool(learned)
    return out


def test_text_is_closed_by_the_end_token_once(tmp_path, tokenizer):
    for name, text in (("a", "to be, or not"), ("b", "to be<|end|>")):
        (tmp_path / f"{name}.txt").write_text(text)
    first, second = load_tokens([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer)
    assert tokenizer.decode(first.ids) == "to be, or not<|end|>"
    assert tokenizer.decode(second.ids) == "to be<|end|>"
    assert first.learn.all()


@pytest.mark.parametrize("template", [None, MARKED], ids=["prefixes", "marked"])
def test_only_the_assistant_is_learned(tmp_path, tokenizer, template):
    if template:
        tokenizer.chat_template = template
    (one,) = load_tokens([write_talk(tmp_path, TALK)], tokenizer)
    assert said(one, tokenizer) == "fox jumps<|end|>|over the dog<|end|>"
    assert (one.labels == np.where(one.learn, one.ids, -100)).all()


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] if loop.last else '...' }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match=r"talk.jsonl:1: .*messages\[2\] differently.*% generation %"):
        load_tokens([write_talk(tmp_path, TALK)], tokenizer)


def test_template_troubles_name_the_line(tmp_path, tokenizer):
    path = write_talk(tmp_path, TALK)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"talk.jsonl:1: .*refuses.*roles must alternate"):
        load_tokens([path], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        load_tokens([path], tokenizer)


def test_packing_joins_documents_and_drops_the_tail():
    packed = pack([tokens(5), tokens(6, start=5)], 4)
    assert packed.ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (packed.dropped, packed.length, len(packed)) == (3, 4, 2)


def test_rows_with_nothing_to_learn_are_left_out():
    # The second row's only label is its first token, which nothing predicts.
    mixed = Tokens("made", np.arange(8, dtype=np.int32), np.asarray([0, 1, 0, 0, 1, 0, 0, 0], bool))
    packed = pack([mixed], 4)
    assert packed.labels.tolist() == [[-100, 1, -100, -100]]
    assert packed.dropped == 4
    with pytest.raises(DataError, match="none of the 2 sequences"):
        pack([tokens(8, learn=False)], 4)


def test_too_little_text_says_how_much(tmp_path, tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("to be, or not to be")
    count = len(load_tokens([path], tokenizer)[0].ids)
    with pytest.raises(DataError, match=rf"has {count} tokens, too few for one sequence of 256"):
        load_sequences([path], tokenizer, 256)
    with pytest.raises(DataError, match="length of 1"):
        pack([tokens(8)], 1)


@pytest.mark.parametrize("count", [1, 3, 8, 13])
def test_every_epoch_deals_every_sequence_once(count):
    batches = Batches(numbered(count), micro_batch=3, accumulation=2, seed=5)
    steps = batches.steps_for(4)
    dealt = np.concatenate([batches.rows(step, micro) for step in range(steps) for micro in range(2)])
    assert len(dealt) >= 4 * count > len(dealt) - 6 or steps == 1
    for epoch in range(4):
        assert sorted(dealt[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    def orders(seed):
        batches = Batches(numbered(64), micro_batch=64, seed=seed)
        return [batches.rows(step, 0).tolist() for step in range(3)]

    one = orders(1)
    assert orders(1) == one
    assert orders(2) != one
    assert one[0] != one[1] != one[2]


def test_order_is_the_hash_it_says(seed=2**63 + 11, count=50):
    """Against the same hash in whole numbers: a resumed run must deal what the interrupted one would have."""

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    batches = Batches(numbered(count), micro_batch=count, seed=seed)
    for epoch in range(3):
        start = mix(mix(seed) ^ epoch)
        expected = sorted(range(count), key=lambda place, start=start: mix((start + place) % 2**64))
        assert batches.rows(epoch, 0).tolist() == expected
    assert Batches(numbered(6), micro_batch=6, seed=7).rows(0, 0).tolist() == [1, 3, 2, 4, 0, 5]


def test_resume_needs_only_the_step():
    straight = Batches(numbered(10), micro_batch=2, accumulation=3, seed=9)
    seen = [straight.rows(step, micro).tolist() for step in range(8) for micro in range(3)]
    fresh = Batches(numbered(10), micro_batch=2, accumulation=3, seed=9)
    assert [fresh.rows(step, micro).tolist() for step in (7, 6, 5) for micro in range(3)] == (
        seen[21:] + seen[18:21] + seen[15:18]
    )


def test_micro_batches_are_tensors_of_the_rows():
    import torch

    batches = Batches(numbered(5), micro_batch=2, accumulation=2)
    batch = batches.micro(1, 1)
    assert set(batch) == {"input_ids", "labels"}
    for value in batch.values():
        assert value.dtype == torch.int64
        assert value.tolist() == batches.sequences.ids[batches.rows(1, 1)].tolist()
    assert batches.learned_tokens(0) == 4 * 3
    assert (batches.tokens_per_step, batches.epoch_at(5)) == (16, 4.0)
    with pytest.raises(IndexError):
        batches.rows(0, 2)
    with pytest.raises(DataError, match="accumulation must be 1 or more"):
        Batches(numbered(5), micro_batch=1, accumulation=0)


def test_importing_needs_neither_torch_nor_transformers():
    modules = "data, evaluate, plot, schedule"
    code = (
        f"from tierflow.finetune import {modules}; import sys; "
        "print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
