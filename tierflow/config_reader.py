"""From a file or mapping to the plain values of the honoured keys; everything else is judged by the table."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tierflow import config_keys
from tierflow.config_keys import ALIASES, KEYS, Key, Role

_BLOCKS = config_keys.blocks()
#: Blocks with something honoured in them; of the others nothing is kept but notes.
_MODELLED = {
    block for block in _BLOCKS if any(k.role is Role.HONOURED for p, k in KEYS.items() if p.startswith(f"{block}."))
}


class ConfigError(ValueError):
    """A configuration that cannot be used: one sentence for each problem, in ``problems``."""

    def __init__(self, *problems: str):
        self.problems = problems
        super().__init__("\n".join(problems))


@dataclass(frozen=True)
class Note:
    """A key that was accepted and has no effect of its own."""

    path: str
    role: Role
    value: Any
    reason: str


def list_notes(notes: Iterable[Note]) -> list[str]:
    """A line for each reason, with the keys that it is given for."""
    lines: dict[tuple[Role, str], list[str]] = {}
    for note in notes:
        lines.setdefault((note.role, note.reason), []).append(f"{note.path} = {show(note.value)}")
    verbs = {Role.COMPUTED: "computed here", Role.UNUSED: "not used"}
    return [f"{', '.join(keys)}: {verbs[role]}; {reason}" for (role, reason), keys in lines.items()]


@dataclass
class Reading:
    """``values``: the honoured keys, nested as they were. ``notes`` and ``problems``: about all the others."""

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def show(value: Any) -> str:
    """A value as it stands in JSON, cut short if it is long."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def read_file(path: str | Path) -> Mapping[str, Any]:
    """The JSON object in a file. Raises ConfigError that says what is wrong with the path, or where in the text."""
    where = Path(path)
    try:
        text = where.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        if str(path).lstrip().startswith("{"):
            text = f"{show(str(path))}; to give JSON text, pass json.loads(text)"
        else:
            text = f'"{path}"'  # whole, however long
        raise ConfigError(f"there is no configuration file {text}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not JSON: byte {error.start} is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"the configuration file {show(str(path))} cannot be read: {reason}") from None
    return _parse(text, where)


def _parse(text: str, where: Path) -> Mapping[str, Any]:
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(sorted({name for name in names if names.count(name) > 1}))
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where} is not JSON: line {error.lineno}, column {error.colno}: {error.msg} (JSON has no comments and no "
            "comma after the last entry)"
        ) from None
    except RecursionError:
        raise ConfigError(f"{where} is not a configuration: its blocks are nested too deep") from None
    if repeated:
        raise ConfigError(*[f'{where} has the key "{name}" twice in one block: keep one' for name in repeated])
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} holds {show(value)}: expected a JSON object {{...}} of configuration keys")
    return value


def read(source: Mapping[str, Any]) -> Reading:
    """Sorts every key into honoured values, notes and problems. Never raises."""
    reading = Reading()
    renamed: dict[Any, Any] = {}
    for name, value in source.items():
        new = ALIASES.get(name, name) if isinstance(name, str) else name
        if new in renamed or (new != name and new in source):
            reading.problems.append(f"{name} is the old name of {new}, and both are given: keep {new}")
        else:
            renamed[new] = value
    reading.values = _read_block("", renamed, reading)
    return reading


def _read_block(path: str, source: Mapping[Any, Any], reading: Reading) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in source.items():
        inner = f"{path}.{name}" if path else str(name)
        if isinstance(name, str) and "." not in name and inner in KEYS:
            if value is not None:  # null is "not given", as it is for DeepSpeed
                _read_key(KEYS[inner], value, values, reading)
        elif isinstance(name, str) and "." not in name and inner in _BLOCKS:
            _read_inner(inner, name, value, values, reading)
        else:
            reading.problems.append(_unknown(path, name))
    return values


def _read_inner(path: str, name: str, value: Any, values: dict[str, Any], reading: Reading) -> None:
    if value is None or value == "auto":
        return
    if path == "aio" and isinstance(value, str):
        value = {"profile": value}
    if isinstance(value, Mapping):
        inner = _read_block(path, value, reading)
        if path in _MODELLED:
            values[name] = inner
    else:
        reading.problems.append(f"{path} is {show(value)}: expected a block {{...}}; {_names(path)}")


def _read_key(key: Key, value: Any, values: dict[str, Any], reading: Reading) -> None:
    if key.role is Role.HONOURED:
        values[key.name] = value
        return
    if value == "auto":
        return
    if not _has_type(key.expect, value):
        reading.problems.append(f"{key.path} is {show(value)}: expected {key.expect}")
    elif key.role is not Role.REFUSED:
        if key.role is Role.UNUSED and (not key.note or value is False or value == {"enabled": False}):
            return  # what is not there is off as asked: nothing to say
        reading.notes.append(Note(key.path, key.role, value, key.note))
    elif not _is_off(key, value):
        reading.problems.append(f"{key.path} is {show(value)}, which tierflow refuses: {key.note}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_TYPES: dict[str, Callable[[Any], bool]] = {
    config_keys.BOOL: lambda value: isinstance(value, bool),
    config_keys.WHOLE: lambda value: _is_number(value) and value >= 0 and value == int(value),
    config_keys.NUMBER: _is_number,
    config_keys.TEXT: lambda value: isinstance(value, str),
    config_keys.BLOCK: lambda value: isinstance(value, Mapping),
    config_keys.ANY: lambda value: True,
}


def _has_type(expect: str, value: Any) -> bool:
    return _TYPES[expect](value)


def _is_off(key: Key, value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value in key.off
    if not value:
        return True
    # a block's other settings do not matter once its switch is off
    return any(all(name in value and value[name] == state for name, state in off.items()) for off in key.off)


def _unknown(path: str, name: Any) -> str:
    inner = f"{path}.{name}" if path else str(name)
    if inner in KEYS:
        return f"{inner} is written as one key with a dot in it: write it as a block inside a block"
    near = nearest(path, str(name))
    if near:
        return f"unknown key {inner}: did you mean {' or '.join(near)}?"
    if path:
        return f"unknown key {inner}: {_names(path)}"
    return f"unknown key {inner}: docs/config.md lists every key"


def _names(block: str) -> str:
    """The keys of a block that do something, for a message."""
    paths = [f"{block}.{name}" for name in _BLOCKS[block]]
    known = [p for p in paths if p in _BLOCKS or KEYS[p].role is Role.HONOURED]
    return f"{block} takes {', '.join(p.rpartition('.')[2] for p in known)}"


def nearest(path: str, name: str) -> list[str]:
    """Up to three known paths for a name that is not in this block: in its right place, or spelled alike."""
    known = [*KEYS, *[block for block in _BLOCKS if block]]
    here = {other: f"{path}.{other}" if path else other for other in _BLOCKS[path]}
    last = name.rpartition(".")[2].lower()
    misplaced = [full for full in known if full.rpartition(".")[2].lower() == last]
    if misplaced:
        # the closest relatives of the block first: offload_param's keys before aio's
        return sorted(misplaced, key=lambda full: -difflib.SequenceMatcher(None, full, path).ratio())[:3]
    close = difflib.get_close_matches(name.lower(), here, n=1, cutoff=0.6)
    if close:
        return [here[close[0]]]
    names = {full.rpartition(".")[2]: full for full in reversed(known)}
    return [names[match] for match in difflib.get_close_matches(last, names, n=1, cutoff=0.75)]
