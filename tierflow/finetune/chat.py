"""Conversations to tokens, with the assistant's tokens marked: only those are learned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tierflow.finetune.documents import DataError, Message

if TYPE_CHECKING:
    import numpy.typing as npt

    Encoded = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDY = "give the tokenizer a chat template that marks the assistant's part with {% generation %}"


def encode_messages(messages: Sequence[Message], tokenizer: Any, where: str) -> Encoded:
    """Token ids of a whole conversation, and which of them the assistant said."""
    template = tokenizer.chat_template
    if not template:
        raise DataError(f"{where}: has `messages`, but the model's tokenizer has no chat template")
    if isinstance(template, dict):
        template = template.get("default", "")
    try:
        marked = bool(_GENERATION.search(template))
        ids, learn = (_by_template if marked else _by_prefixes)(messages, tokenizer, where)
    except DataError:
        raise
    except Exception as error:  # a template is a program of the model's: anything may come out of it
        raise DataError(f"{where}: the chat template refuses this conversation: {error}") from error
    if not learn.any():
        raise DataError(f"{where}: the chat template leaves no token of the assistant's; {_REMEDY}")
    return ids, learn


def _by_template(messages: Sequence[Message], tokenizer: Any, where: str) -> Encoded:
    out = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return np.asarray(out["input_ids"], np.int32), np.asarray(out["assistant_masks"], np.bool_)


def _by_prefixes(messages: Sequence[Message], tokenizer: Any, where: str) -> Encoded:
    """Render the conversation up to each assistant message, without and with it: the difference is its part.

    That only holds if each rendering begins with the one before. A template that rewrites earlier turns
    (dropping their reasoning, say) breaks it, and guessing would teach the wrong tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{where}: a slow tokenizer cannot say where a token begins; {_REMEDY}")

    def render(count: int, prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(list(messages[:count]), tokenize=False, add_generation_prompt=prompt)
        return text

    full = render(len(messages))
    spans = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(place, prompt=True), render(place + 1)
            if not (after.startswith(before) and full.startswith(after)):
                raise DataError(
                    f"{where}: the chat template renders messages[{place}] differently in other company, so "
                    f"its tokens cannot be told from the rest; {_REMEDY}"
                )
            spans.append((len(before), len(after)))
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]])
    learn = np.zeros(len(starts), np.bool_)
    for begin, end in spans:
        learn |= (starts >= begin) & (starts < end)
    return np.asarray(encoded["input_ids"], np.int32), learn
