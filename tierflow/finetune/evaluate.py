"""Held-out loss and a sample of text: what a run did for the model, in two numbers and a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierflow.finetune.data import IGNORED, DataError, Tokens

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HeldOut:
    """Loss in nats per token over `tokens` predicted tokens of one document, or of several together."""

    name: str
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def held_out(
    model: torch.nn.Module,
    documents: Sequence[Tokens],
    *,
    window: int,
    limit: int = 4096,
    batch: int = 1,
    progress: Progress | None = None,
) -> list[HeldOut]:
    """Loss on the first `limit` tokens of each document, in windows that forget what stood before.

    Every token after the first is predicted once: a window begins with the last token of the one before it.
    """
    jobs = [_batches(document, window, limit, batch) for document in documents]
    done, total = 0, sum(len(job) for job in jobs)
    results = []
    with _evaluating(model):
        for document, job in zip(documents, jobs, strict=True):
            loss, tokens = 0.0, 0
            for inputs, targets in job:
                part, count = _summed_loss(model, inputs, targets)
                loss, tokens, done = loss + part, tokens + count, done + 1
                if progress is not None:
                    progress(done, total)
            results.append(HeldOut(document.where, tokens, loss / tokens))
    return results


def together(results: Sequence[HeldOut]) -> HeldOut:
    """The mean over all tokens of all documents."""
    tokens = sum(result.tokens for result in results)
    return HeldOut("all", tokens, sum(result.loss * result.tokens for result in results) / tokens)


def sample(model: torch.nn.Module, tokenizer: Any, prompt: str, tokens: int = 24) -> str:
    """Continue `prompt` greedily; the text that was added, up to `tokens` tokens or the end of the text.

    A plain loop of forwards: generate() would touch parameters that may not be there outside one.
    """
    import torch

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(_device(model))
    if not ids.shape[1]:
        raise ValueError("an empty prompt cannot be continued")
    cache, said = None, []
    with _evaluating(model):
        for _ in range(tokens):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            choice = int(torch.argmax(out.logits[0, -1]))
            if choice == tokenizer.eos_token_id:
                break
            said.append(choice)
            ids = ids.new_tensor([[choice]])
    return str(tokenizer.decode(said, skip_special_tokens=True))


Batch = tuple["torch.Tensor", "torch.Tensor"]


def _batches(document: Tokens, window: int, limit: int, batch: int) -> list[Batch]:
    """(inputs, targets) pairs; only the last window of a document may be shorter, and goes alone."""
    import torch

    ids = torch.from_numpy(document.ids[:limit].astype("int64"))
    labels = torch.from_numpy(document.labels[:limit].astype("int64"))
    if not bool((labels[1:] != IGNORED).any()):
        raise DataError(f"{document.where}: no token to predict in the first {len(ids)}")
    inputs, targets = ids[:-1], labels[1:]
    whole = len(inputs) // window
    rows = [side[: whole * window].reshape(whole, window).split(batch) for side in (inputs, targets)]
    pairs = list(zip(*rows, strict=True)) if whole else []
    if len(inputs) % window:
        pairs.append((inputs[None, whole * window :], targets[None, whole * window :]))
    return [(given, wanted) for given, wanted in pairs if bool((wanted != IGNORED).any())]


def _summed_loss(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=inputs.to(_device(model)), use_cache=False).logits
    loss = 0.0
    # Row by row: the softmax of a whole batch would hold a second copy of the logits, its largest tensor.
    for row, wanted in zip(logits, targets.to(logits.device), strict=True):
        loss += float(cross_entropy(row.float(), wanted, ignore_index=IGNORED, reduction="sum"))
    return loss, int((targets != IGNORED).sum())


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    import torch

    training = model.training
    model.eval()
    try:
        # no_grad rather than inference_mode: tensors made in the latter may not take part in training again.
        with torch.no_grad():
            yield
    finally:
        model.train(training)
