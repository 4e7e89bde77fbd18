"""Weights as safetensors files: found, checked and read a piece at a time; written by streaming from the tiers."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WeightsError(ValueError):
    """A weights file is missing, truncated or does not match the model; names the file and the tensor."""


class WeightFiles:
    """Every tensor of a folder's ``*.safetensors``, read one by one. A context manager."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._where: dict[str, Path] = {}
        for path in _weight_files(self.folder):
            for name in _check_header(path):
                self._where[name] = path
        self._open: dict[Path, BinaryIO] = {}
        self._headers = {path: _header(path) for path in set(self._where.values())}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._where)

    def layout(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """A tensor's dtype and shape."""
        entry = self._headers[self._where[name]][0][name]
        return DTYPES[entry["dtype"]], tuple(entry["shape"])

    def read(self, name: str) -> torch.Tensor:
        """The tensor as a new CPU tensor. Raises WeightsError for a file that changed under us."""
        path = self._where[name]
        entries, start = self._headers[path]
        begin, end = entries[name]["data_offsets"]
        if path not in self._open:
            self._open[path] = open(path, "rb", buffering=0)  # noqa: SIM115
        file = self._open[path]
        data = torch.empty(end - begin, dtype=torch.uint8)
        view, got = _bytes(data), 0
        file.seek(start + begin)
        while got < len(view):
            count = file.readinto(view[got:])  # type: ignore[attr-defined]
            if not count:
                raise WeightsError(f"{path}: tensor {name!r} ends at byte {got} of {len(view)}; copy the file again")
            got += count
        return data.view(DTYPES[entries[name]["dtype"]]).view(entries[name]["shape"])

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()


def _bytes(data: torch.Tensor) -> memoryview:
    """The memory of a uint8 CPU tensor."""
    array: Any = data.numpy()
    return memoryview(array)


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder; give the folder that holds config.json and *.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            listed = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise WeightsError(f"{index}: not a safetensors index ({error})") from error
        missing = [n for n in listed if not (folder / n).exists()]
        if missing:
            raise WeightsError(f"{folder / missing[0]}: missing, though {index.name} names it; download it again")
        return [folder / n for n in listed]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder}: no *.safetensors file; save the model with safe_serialization first")
    return files


def _header(path: Path) -> tuple[dict[str, dict], int]:
    with open(path, "rb") as file:
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= size <= 100 << 20:
            raise WeightsError(f"{path}: not a safetensors file (its first 8 bytes give no header length)")
        raw = file.read(size)
    try:
        entries = json.loads(raw)
    except ValueError as error:
        raise WeightsError(f"{path}: the safetensors header is damaged or cut off ({error})") from error
    if not isinstance(entries, dict):
        raise WeightsError(f"{path}: not a safetensors file (its header is no table of tensors)")
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if not _describes(entry):
            raise WeightsError(f"{path}: damaged: its header does not say where tensor {name!r} lies, or with what shape")
    return entries, 8 + size


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(i, int) and i >= 0 for i in value)


def _describes(entry: Any) -> bool:
    """Whether a header's entry gives dtype, shape and a span of as many bytes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        return False
    dtype = DTYPES.get(entry["dtype"])
    return dtype is None or offsets[1] - offsets[0] == torch.Size(shape).numel() * dtype.itemsize


def _check_header(path: Path) -> Iterable[str]:
    """Names of the file's tensors, after checking that the bytes for all of them are there."""
    entries, start = _header(path)
    have = path.stat().st_size
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise WeightsError(f"{path}: tensor {name!r} has dtype {entry['dtype']}, which tierflow does not load")
        if start + entry["data_offsets"][1] > have:
            raise WeightsError(
                f"{path}: truncated: tensor {name!r} ends at byte {start + entry['data_offsets'][1]:,}, the file has "
                f"{have:,}; copy or download it again"
            )
    return entries


def write_safetensors(
    path: Path,
    entries: list[tuple[str, torch.dtype, tuple[int, ...]]],
    pieces: Iterator[torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a safetensors file from a stream: ``pieces`` are the tensors' bytes in the order of ``entries``.

    Goes to a temporary file that is synced and renamed, so that ``path`` is whole or not there.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    offset = 0
    for name, dtype, shape in entries:
        nbytes = int(torch.Size(shape).numel()) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            for piece in pieces:
                file.write(_bytes(piece.contiguous().view(-1).view(torch.uint8)))
            written = file.tell() - 8 - len(raw)
            if written != offset:
                raise AssertionError(f"{written} bytes streamed, {offset} announced")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
