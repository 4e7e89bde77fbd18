"""Saving by streaming from the tiers: weights for anybody, and checkpoints that resume bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tierflow.cpu_adam.state import check_codes
from tierflow.offloading import engine_of
from tierflow.optimizer import OffloadOptimizer
from tierflow.scheduler.contents import SPAN_BYTES, read_bytes, slot_bytes, write_bytes
from tierflow.scheduler.engine import Engine
from tierflow.scheduler.units import STATES, Slot, Unit
from tierflow.swap import Kind
from tierflow.weights import WeightFiles, WeightsError, write_safetensors

#: Raised by one whenever a checkpoint of the older layout could be misread.
FORMAT = 1


def save_weights(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> None:
    """Writes ``model.safetensors`` (and config, generation config and tokenizer, if any) for ``from_pretrained``.

    Weights stream from their tiers a few megabytes at a time. Tied weights are written once, buffers that
    ``state_dict`` would hold are included. An older file is replaced only by a complete one.
    """
    engine = engine_of(model)
    engine.usable()
    engine.settle()  # what is due counts
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    buffers = _persistent_buffers(model)
    entries = [(s.names[0], u.dtype, tuple(s.shape)) for u, s in _slots(engine)]
    entries += [(n, b.dtype, tuple(b.shape)) for n, b in buffers.items()]

    def pieces() -> Iterator[torch.Tensor]:
        for unit, slot in _slots(engine):
            yield from _stream(engine, unit, slot, Kind.PARAM)
        for buffer in buffers.values():
            yield buffer.detach().cpu()

    write_safetensors(target / "model.safetensors", entries, pieces())
    for part in (getattr(model, "config", None), getattr(model, "generation_config", None), tokenizer):
        save = getattr(part, "save_pretrained", None)
        if save is not None:
            save(target)


def save_checkpoint(
    model: nn.Module, optimizer: OffloadOptimizer, folder: str | Path, client_state: dict[str, Any] | None = None
) -> None:
    """Writes all that a bit-for-bit resume needs to ``folder``: weights, states, counts, groups, RNG states.

    ``client_state``: anything JSON can hold, given back by ``load_checkpoint``. Written beside and renamed: a
    crash leaves the older checkpoint or none, never half of one. Tensors are stored per parameter by name, so
    the layout knows neither units nor tiers.
    """
    engine = engine_of(model)
    engine.usable()
    engine.settle()
    target = Path(folder)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_weights(model, partial)
        _save_states(engine, partial / "optimizer.safetensors")
        torch.save(_rng(), partial / "rng.pt")
        manifest = {
            "format": FORMAT,
            "state_format": engine.plan.placement.state_format,
            "rule": engine.plan.placement.rule.name,
            "optimizer": _plain(optimizer.state_dict()),
            "names": _group_names(model, optimizer),
            "client_state": client_state or {},
        }
        (partial / "tierflow.json").write_text(json.dumps(manifest, indent=1))
        for path in (*partial.iterdir(), partial):
            _sync(path)
        _replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(model: nn.Module, optimizer: OffloadOptimizer, folder: str | Path) -> dict[str, Any]:
    """Restores what ``save_checkpoint`` wrote, into any placement of the same state format; returns client_state.

    Raises WeightsError for a folder that is no checkpoint, is damaged, or does not match the model, the state format or
    the optimizer's rule; nothing is restored then.
    """
    engine = engine_of(model)
    source = Path(folder)
    if not source.exists() and _old(source).exists():  # a save was cut off between its two renames
        source = _old(source)
    manifest = _manifest(source)
    _check_kind(source, manifest, engine)
    if manifest["names"] != _group_names(model, optimizer):
        raise WeightsError(f"{source}: its parameter groups do not hold the same parameters as this optimizer's")
    with WeightFiles(source) as files:
        wanted = [(u, s, k) for u, s in _slots(engine) for k in (Kind.PARAM, *STATES) if k in u.chunks]
        missing = [_key(s, k) for _, s, k in wanted if _key(s, k) not in files]
        if missing:
            raise WeightsError(f"{source}: {len(missing)} tensor(s) missing, first {missing[0]!r}")
        for unit, slot, kind in wanted:
            _check_tensor(files, unit, slot, kind)
        for unit, slot in _slots(engine):
            _check_codes(source, files, engine, unit, slot)
        engine.settle()  # an update that is due would run over what is restored
        for unit, slot, kind in wanted:
            _restore(engine, unit, slot, kind, files.read(_key(slot, kind)))
        for name, buffer in _persistent_buffers(model).items():
            buffer.copy_(files.read(name))
    optimizer.load_state_dict(manifest["optimizer"])
    _set_rng(torch.load(source / "rng.pt", weights_only=False))
    return manifest["client_state"]


def _check_kind(source: Path, manifest: dict[str, Any], engine: Engine) -> None:
    placement = engine.plan.placement
    saved, here = manifest["state_format"], placement.state_format
    if saved != here:
        raise WeightsError(
            f"{source}: saved with optimizer_state {saved!r}, this run has {here!r}: set tierflow.optimizer_state (or "
            f"--optimizer-state) to {saved!r}"
        )
    rule = manifest.get("rule", "Adam")
    if rule != placement.rule.name:
        raise WeightsError(
            f"{source}: saved by {rule}, this run has {placement.rule.name}: set optimizer.type to {rule!r}"
        )


def _slots(engine: Engine) -> Iterator[tuple[Unit, Slot]]:
    for unit in engine.units:
        for slot in unit.slots:
            yield unit, slot


def _key(slot: Slot, kind: Kind) -> str:
    return slot.names[0] if kind is Kind.PARAM else f"{slot.names[0]}.{kind.value}"


def _shape(unit: Unit, slot: Slot, kind: Kind) -> tuple[int, ...]:
    """Of a kind's tensor in a checkpoint: the parameter's, or (groups, values for each)."""
    layout = unit.layouts[kind]
    return tuple(slot.shape) if layout.group == 1 else (-(-slot.numel // layout.group), layout.per_group)


def _stream(engine: Engine, unit: Unit, slot: Slot, kind: Kind) -> Iterator[torch.Tensor]:
    begin, end = slot_bytes(unit.chunks[kind], slot)
    for at in range(begin, end, SPAN_BYTES):
        yield read_bytes(engine.manager, unit, kind, at, min(at + SPAN_BYTES, end), engine.victims())


def _check_tensor(files: WeightFiles, unit: Unit, slot: Slot, kind: Kind) -> None:
    """Raises WeightsError for a dtype or shape that is not this run's."""
    key, (dtype, shape) = _key(slot, kind), files.layout(_key(slot, kind))
    expected = unit.layouts[kind].dtype, _shape(unit, slot, kind)
    if kind is Kind.PARAM and dtype != unit.dtype:
        raise WeightsError(
            f"tensor {key!r} was saved as {str(dtype)[6:]} and is {str(unit.dtype)[6:]} in this run: "
            "resume with the bf16.enabled and fp16.enabled that it was saved with"
        )
    if (dtype, shape) != expected:
        raise WeightsError(
            f"tensor {key!r} is {str(dtype)[6:]} of shape {shape}, {str(expected[0])[6:]} of shape {expected[1]} expected"
        )


def _check_codes(source: Path, files: WeightFiles, engine: Engine, unit: Unit, slot: Slot) -> None:
    """Raises WeightsError for 8-bit moments and scales that no step leaves together."""
    if Kind.SCALE not in unit.chunks:
        return
    rule = engine.plan.placement.rule
    kinds = [Kind.SCALE, *map(Kind, rule.moments)]
    try:
        check_codes({kind.value: files.read(_key(slot, kind)) for kind in kinds}, rule, repr(slot.names[0]))
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from None


def _restore(engine: Engine, unit: Unit, slot: Slot, kind: Kind, tensor: torch.Tensor) -> None:
    begin, _ = slot_bytes(unit.chunks[kind], slot)
    write_bytes(engine.manager, unit, kind, begin, tensor.contiguous().view(-1).view(torch.uint8), engine.victims())
    if kind is Kind.PARAM:
        engine.values.home_was_written(unit)


def _save_states(engine: Engine, path: Path) -> None:
    wanted = [(u, s, k) for u, s in _slots(engine) for k in STATES if k in u.chunks]
    entries = [(_key(s, k), u.layouts[k].dtype, _shape(u, s, k)) for u, s, k in wanted]
    write_safetensors(path, entries, (p for u, s, k in wanted for p in _stream(engine, u, s, k)))


def _persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                out[f"{prefix}.{name}" if prefix else name] = buffer
    return out


def _group_names(model: nn.Module, optimizer: OffloadOptimizer) -> list[list[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return [[names.get(id(p), "") for p in g["params"]] for g in optimizer.param_groups]


def _plain(value: Any) -> Any:
    """Numbers, strings, lists and dicts only: a tensor learning rate becomes a float."""
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "tierflow.json"
    if not path.exists():
        raise WeightsError(f"{folder}: no tierflow.json, so this is not a checkpoint of tierflow.save_checkpoint")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path}: damaged ({error})") from error
    if manifest.get("format") != FORMAT:
        raise WeightsError(f"{path}: checkpoint format {manifest.get('format')}, this tierflow reads {FORMAT}")
    return manifest


def _replace(partial: Path, target: Path) -> None:
    """Puts the new folder in place of the old; between the two renames the old one is at ``.old``."""
    old = _old(target)
    if target.exists():  # else an earlier save was cut off here, and the old one is all there is
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    try:
        os.replace(partial, target)
    except BaseException:
        if old.exists():
            os.replace(old, target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(target: Path) -> Path:
    return target.with_name(target.name + ".old")


def _sync(path: Path) -> None:
    """Makes a file, or a folder's list of names, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _rng() -> dict[str, Any]:
    import numpy as np

    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_rng(state: dict[str, Any]) -> None:
    import numpy as np

    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
