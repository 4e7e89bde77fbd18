"""``load``: a pretrained model straight to its tiers. It is built on the meta device and never whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tierflow.offloading import ConfigLike, offload
from tierflow.optimizer import OffloadOptimizer
from tierflow.scheduler.units import Slot
from tierflow.settings import Folders
from tierflow.weights import WeightFiles, WeightsError


def load(
    model_class: Any,
    folder: str | Path,
    config: ConfigLike = None,
    *,
    dtype: torch.dtype | None = None,
    param_groups: Callable[[nn.Module], Any] | None = None,
    nvme_path: Folders | None = None,
    owned_loop: bool = False,
) -> tuple[nn.Module, OffloadOptimizer]:
    """Builds ``model_class`` from a Hugging Face folder and streams its safetensors to the tiers.

    ``model_class`` has ``from_config`` (transformers' Auto classes) or is called with the config (a model class).
    ``dtype``: of the parameters; default what the files hold. ``param_groups``: called with the built model.
    ``owned_loop``: as for ``offload``. Returns (model, optimizer) like it. Raises WeightsError naming the file or the tensors that do not match.
    """
    with WeightFiles(folder) as files:
        model = build_empty(model_class, folder, dtype or _file_dtype(files))
        _check_names(model, files)
        groups = param_groups(model) if param_groups is not None else None
        return offload(
            model, config, param_groups=groups, nvme_path=nvme_path, source=_reader(files), owned_loop=owned_loop
        )


def build_empty(model_class: Any, folder: str | Path, dtype: torch.dtype) -> nn.Module:
    """The model of a Hugging Face folder, built as ``build_from_config`` does."""
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").exists():
        raise WeightsError(f"{folder}: no config.json; give the folder of a Hugging Face model")
    return build_from_config(model_class, AutoConfig.from_pretrained(folder), dtype)


def build_from_config(model_class: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model with parameters that take no memory and with its buffers computed.

    ``offload`` needs a ``source`` for such parameters.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _parameters_on_meta():
            model = model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
    finally:
        torch.set_default_dtype(before)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    _leave_meta(model)
    return model


def _leave_meta(model: nn.Module) -> None:
    """Replaces meta parameters by ones without memory of their own: a meta parameter cannot take real data later."""
    fresh: dict[int, nn.Parameter] = {}
    old: list[nn.Parameter] = []  # kept until the end, so that no id is used twice
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or not p.is_meta:
                continue
            if id(p) not in fresh:
                empty = torch.zeros(1, dtype=p.dtype).as_strided(p.shape, (0,) * p.dim())
                fresh[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
                old.append(p)
            module._parameters[name] = fresh[id(p)]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters registered inside have no memory; buffers are real, since no file holds the computed ones."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _file_dtype(files: WeightFiles) -> torch.dtype:
    first = next((n for n in files.names()), None)
    if first is None:
        raise WeightsError(f"{files.folder}: the safetensors files hold no tensor")
    dtype = files.read(first).dtype
    return dtype if dtype.is_floating_point else torch.float32


def _check_names(model: nn.Module, files: WeightFiles) -> None:
    """Every parameter must be found under one of its names, with its shape."""
    groups: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(name)
    missing = [names[0] for names in groups.values() if not any(n in files for n in names)]
    if missing:
        raise WeightsError(
            f"{files.folder}: {len(missing)} parameter(s) of {type(model).__name__} are in no file, first {missing[0]!r}. "
            "If this model's checkpoint is renamed while it loads, use from_pretrained and tierflow.offload instead"
        )


def _reader(files: WeightFiles) -> Callable[[Slot, nn.Parameter], torch.Tensor]:
    def read(slot: Slot, _param: nn.Parameter) -> torch.Tensor:
        name = next(n for n in slot.names if n in files)
        tensor = files.read(name)
        if tensor.shape != slot.shape:
            raise WeightsError(
                f"{files.folder}: tensor {name!r} has shape {tuple(tensor.shape)}, the model wants {tuple(slot.shape)}"
            )
        return tensor

    return read
