"""Files to documents: .txt and .jsonl read strictly: what cannot be used is named rather than skipped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, Any]


class DataError(ValueError):
    """Training or evaluation data that cannot be used; the message names file, place and remedy."""


@dataclass(frozen=True)
class Document:
    """One text or one conversation, and where it came from (``file`` or ``file:line``)."""

    where: str
    text: str | None = None
    messages: Sequence[Message] | None = None


def read_documents(paths: Iterable[str | Path]) -> Iterator[Document]:
    """The documents of all files in the order given; each file must yield at least one."""
    for path in paths:
        yield from _read_file(Path(path))


def _read_file(path: Path) -> Iterator[Document]:
    kinds = {".txt": _read_text, ".jsonl": _read_jsonl}
    reader = kinds.get(path.suffix.lower())
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name its .txt or .jsonl files")
    if reader is None:
        raise DataError(f"{path}: what to read it as is told by its ending, which must be .txt or .jsonl")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not raw.strip():
        raise DataError(f"{path}: is empty")
    yield from reader(path, raw)


def _read_text(path: Path, raw: bytes) -> Iterator[Document]:
    yield Document(str(path), text=_decode(raw, str(path)).replace("\r\n", "\n"))


def _read_jsonl(path: Path, raw: bytes) -> Iterator[Document]:
    offset = found = 0
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            document = _parse_line(_decode(line, str(path), offset), f"{path}:{number}")
            if document is not None:
                found += 1
                yield document
        offset += len(line) + 1
    if not found:
        raise DataError(f"{path}: every line's text is empty")


def _decode(raw: bytes, where: str, offset: int = 0) -> str:
    if offset == 0 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{where}: is UTF-16; save it as UTF-8")
    zero = raw.find(b"\0")
    if zero >= 0:
        raise DataError(f"{where}: not text: zero byte at offset {offset + zero}")
    try:
        # A byte-order mark can only stand at the file's start; elsewhere it is a character of the text.
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        # error.start counts from behind a byte-order mark, as error.object does.
        start = error.start + len(raw) - len(error.object)
        byte = raw[start]
        raise DataError(f"{where}: not UTF-8 text: byte 0x{byte:02x} at offset {offset + start}") from error


def _parse_line(line: str, where: str) -> Document | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with `text` or `messages`, found {_kind(row)}")
    given = [key for key in ("text", "messages") if key in row]
    if len(given) != 1:
        has = "both `text` and `messages`" if given else f"neither `text` nor `messages` (keys: {_keys(row)})"
        raise DataError(f"{where}: has {has}; one of them is needed")
    if given == ["messages"]:
        return Document(where, messages=_check_messages(row["messages"], where))
    text = row["text"]
    if not isinstance(text, str):
        raise DataError(f"{where}: `text` must be a string, found {_kind(text)}")
    return Document(where, text=text) if text.strip() else None


def _check_messages(messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: `messages` must be a list of at least one message")
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"{where}: messages[{place}] must be an object, found {_kind(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = _kind(message[key]) if key in message else f"keys {_keys(message)}"
                raise DataError(f"{where}: messages[{place}] needs a string `{key}`, found {found}")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message has the role `assistant`, so there is nothing to learn from")
    return messages


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(sorted(row)) or "none"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
