"""Documents to fixed-length sequences, and the order in which training sees them.

Texts are joined end to end, each closed by the tokenizer's end-of-text token, and cut to one length, so every
batch has one shape and no token is padding. Attention crosses the joins, as is usual for packed pretraining.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tierflow.finetune.chat import encode_messages
from tierflow.finetune.documents import DataError, Document, read_documents

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

__all__ = ["Batches", "DataError", "Sequences", "Tokens", "load_sequences", "load_tokens", "pack"]

IGNORED = -100  # the label torch's cross_entropy leaves out


@dataclass(frozen=True)
class Tokens:
    """One document's tokens, and which of them are learned."""

    where: str
    ids: npt.NDArray[np.int32]
    learn: npt.NDArray[np.bool_]

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        return np.where(self.learn, self.ids, np.int32(IGNORED))


@dataclass(frozen=True)
class Sequences:
    """Rows of one length; `dropped` tokens filled no whole row or stood in rows with nothing to learn."""

    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    dropped: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])


def load_tokens(paths: Iterable[str | Path], tokenizer: Any) -> list[Tokens]:
    """Read and tokenize every document of the files."""
    return [_tokenize(document, tokenizer) for document in read_documents(paths)]


def load_sequences(paths: Iterable[str | Path], tokenizer: Any, length: int) -> Sequences:
    """Read, tokenize and pack files into sequences of `length` tokens."""
    return pack(load_tokens(paths, tokenizer), length)


def _tokenize(document: Document, tokenizer: Any) -> Tokens:
    if document.messages is not None:
        ids, learn = encode_messages(document.messages, tokenizer, document.where)
        return Tokens(document.where, ids, learn)
    raw = tokenizer(document.text, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    if end is not None and (not raw or raw[-1] != end):
        raw = [*raw, end]
    ids = np.asarray(raw, np.int32)
    return Tokens(document.where, ids, np.ones(len(ids), np.bool_))


def pack(documents: list[Tokens], length: int) -> Sequences:
    """Join the documents and cut them to rows of `length`; rows in which nothing is learned are left out."""
    if length < 2:
        raise DataError(f"a sequence length of {length} leaves nothing to predict; use 2 or more")
    total = sum(len(document.ids) for document in documents)
    rows = total // length
    if not rows:
        raise DataError(
            f"the data has {total} tokens, too few for one sequence of {length}; give more text or a "
            f"sequence length of {total} or less"
        )
    joined = [np.concatenate(side) for side in zip(*((one.ids, one.labels) for one in documents), strict=True)]
    ids, labels = (side[: rows * length].reshape(rows, length) for side in joined)
    # A row's first token is never predicted. A row with no label has no mean: its loss would be NaN.
    useful = (labels[:, 1:] != IGNORED).any(axis=1)
    if not useful.any():
        raise DataError(f"none of the {rows} sequences of {length} tokens holds a token to learn")
    return Sequences(ids[useful], labels[useful], total - int(useful.sum()) * length)


class Batches:
    """Micro-batches as a pure function of (seed, step, micro), so that resuming needs only the step's number.

    Sequences are dealt from an endless row of epochs, each shuffled on its own; a step may end one epoch and
    begin the next.
    """

    def __init__(self, sequences: Sequences, micro_batch: int, accumulation: int = 1, seed: int = 0) -> None:
        for name, value in (("micro_batch", micro_batch), ("accumulation", accumulation)):
            if value < 1:
                raise DataError(f"{name} must be 1 or more, not {value}")
        self.sequences = sequences
        self.micro_batch = micro_batch
        self.accumulation = accumulation
        self.seed = seed
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    @property
    def sequences_per_step(self) -> int:
        return self.micro_batch * self.accumulation

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.sequences.length

    def steps_for(self, epochs: float) -> int:
        """The steps after which every sequence was seen `epochs` times or more."""
        return max(1, -int(-epochs * len(self.sequences) // self.sequences_per_step))

    def epoch_at(self, step: int) -> float:
        """Epochs gone by when `step` begins."""
        return step * self.sequences_per_step / len(self.sequences)

    def rows(self, step: int, micro: int) -> npt.NDArray[np.int64]:
        """Which sequences make micro-batch `micro` of `step`."""
        if not 0 <= micro < self.accumulation:
            raise IndexError(f"micro {micro} of {self.accumulation}")
        first = (step * self.accumulation + micro) * self.micro_batch
        dealt = range(first, first + self.micro_batch)
        count = len(self.sequences)
        return np.asarray([self._order(place // count)[place % count] for place in dealt], np.int64)

    def micro(self, step: int, micro: int) -> dict[str, torch.Tensor]:
        """``{"input_ids", "labels"}`` as int64 tensors on the CPU."""
        import torch

        rows = self.rows(step, micro)
        return {
            "input_ids": torch.from_numpy(self.sequences.ids[rows].astype(np.int64)),
            "labels": torch.from_numpy(self.sequences.labels[rows].astype(np.int64)),
        }

    def learned_tokens(self, step: int) -> int:
        """The tokens that the step's loss is a mean over; micro-batches are weighted by their share of it."""
        rows = np.concatenate([self.rows(step, micro) for micro in range(self.accumulation)])
        return int((self.sequences.labels[rows, 1:] != IGNORED).sum())

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            for old in [known for known in self._orders if known < epoch - 1]:
                del self._orders[old]
            self._orders[epoch] = _shuffled(len(self.sequences), self.seed, epoch)
        return self._orders[epoch]


def _shuffled(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation by hashing (SplitMix64): numpy promises no stream across its versions."""
    start = _mix(_mix(np.asarray([seed % 2**64], np.uint64)) ^ np.uint64(epoch))
    keys = _mix(np.arange(count, dtype=np.uint64) + start[0])
    return np.argsort(keys, kind="stable").astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
