"""Held-out loss against a plain computation, and greedy text against generate()."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tierflow.finetune.data import DataError, Tokens
from tierflow.finetune.evaluate import HeldOut, held_out, sample, together


def document(count, name="made", learn=None):
    ids = np.random.default_rng(count).integers(4, 300, count).astype(np.int32)
    return Tokens(name, ids, np.ones(count, bool) if learn is None else learn)


def reference(model, one, window, limit):
    """Token by token from the log-probabilities of each window, in a loop of its own."""
    ids = [int(i) for i in one.ids[:limit]]
    losses = []
    for begin in range(0, len(ids) - 1, window):
        piece = ids[begin : begin + window + 1]
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([piece[:-1]])).logits[0].double(), -1)
        losses += [-float(scores[i, piece[i + 1]]) for i in range(len(piece) - 1) if one.learn[begin + i + 1]]
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize(("count", "window", "limit"), [(50, 8, 4096), (49, 16, 33), (5, 16, 99), (34, 16, 33)])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_token_after_the_first_is_predicted_once(model, count, window, limit, batch):
    one = document(count)
    (result,) = held_out(model, [one], window=window, limit=limit, batch=batch)
    loss, tokens = reference(model, one, window, limit)
    assert (result.name, result.tokens) == ("made", tokens) == ("made", min(count, limit) - 1)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_only_learned_tokens_count_and_windows_without_any_are_skipped(model):
    learn = np.zeros(40, bool)
    learn[[5, 6, 30]] = True
    one = document(40, learn=learn)
    calls = []
    (result,) = held_out(model, [one], window=8, progress=lambda done, total: calls.append((done, total)))
    assert (result.loss, result.tokens) == pytest.approx(reference(model, one, 8, 40), rel=1e-5)
    assert calls == [(1, 2), (2, 2)]


def test_the_model_comes_back_in_the_mode_it_was_in(model):
    for training in (True, False):
        model.train(training)
        held_out(model, [document(20)], window=8)
        assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_document_with_nothing_to_predict_is_an_error(model):
    with pytest.raises(DataError, match="made: no token to predict in the first 1"):
        held_out(model, [document(1)], window=8)


def test_together_weighs_by_tokens():
    both = together([HeldOut("a", 1, 1.0), HeldOut("b", 3, 2.0)])
    assert (both.tokens, both.loss) == (4, 1.75)
    assert HeldOut("c", 1, 1e4).perplexity == math.inf


def test_sample_equals_greedy_generation(model, tokenizer):
    model.eval()
    prompt = "to be, or"
    given = tokenizer(prompt, return_tensors="pt")
    expected = model.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=0)[
        0, given["input_ids"].shape[1] :
    ]
    assert sample(model, tokenizer, prompt, 12) == tokenizer.decode(expected, skip_special_tokens=True)
    with pytest.raises(ValueError, match="empty prompt"):
        sample(model, tokenizer, "")
