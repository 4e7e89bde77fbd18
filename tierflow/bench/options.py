"""What ``tierflow bench train`` is asked to do, and the config that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierflow.config import Config, load_config
from tierflow.sizes import parse_size

_TIERS = {"device": "none", "cpu": "cpu", "nvme": "nvme", "auto": "auto"}
#: Random tokens teach nothing: a rate at which the weights stay what they were drawn as.
_LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Options:
    """Everything the command line can say. Lengths in tokens; None means "from --config, or auto"."""

    shape: str
    device_memory: str | None = None
    host_memory: str | None = None
    nvme: tuple[Path, ...] = ()
    param: str | None = None
    optimizer: str | None = None
    dtype: str = "auto"
    batch: int | None = None
    accumulation: int | None = None
    sequence_length: int = 512
    steps: int = 4
    layers: int | None = None
    checkpointing: bool = False
    clip: float | None = None
    head_chunk: int | None = None
    private_memory: str | None = None
    config: Path | None = None
    json: Path | None = None
    seed: int = 0
    optimizer_state: str | None = None


def effective_config(options: Options) -> Config:
    """The file's config, or all "auto", with what the command line says on top. Raises ConfigError and ValueError."""
    over: dict[str, Any] = {"zero_optimization": _placement(options), "tierflow": _caps(options)}
    if options.optimizer_state is not None:
        over["tierflow"]["optimizer_state"] = options.optimizer_state
    below = load_config(options.config)
    if below.optimizer is None or below.optimizer.params.lr is None:
        over["optimizer"] = {"params": {"lr": _LEARNING_RATE}}
    for name, value in (
        ("gradient_clipping", options.clip),
        ("gradient_accumulation_steps", options.accumulation),
        ("train_micro_batch_size_per_gpu", options.batch),
    ):
        if value is not None:
            over[name] = value
    config = load_config(options.config, overrides=over)
    _check_path(options, config)
    return config


#: What an error may name -> the option that sets it.
_OPTIONS = {
    "device_memory": "--device-memory", "host_memory": "--host-memory", "nvme_path": "--nvme",
    "offload_param": "--param", "offload_optimizer": "--optimizer", "gradient_clipping": "--clip",
    "optimizer_state": "--optimizer-state", "gradient_accumulation_steps": "--accumulation", "train_micro_batch_size_per_gpu": "--batch",
}  # fmt: skip


def in_options(text: str) -> str:
    """A config's or plan's message with the options that set what it names."""
    named = [f"{key} is {option}" for key, option in _OPTIONS.items() if key in text]
    return f"{text}\non this command line {', '.join(named)}" if named else text


def _placement(options: Options) -> dict[str, Any]:
    blocks: dict[str, Any] = {"offload_param": {}, "offload_optimizer": {}}
    for option, block, value in (
        ("--param", "offload_param", options.param),
        ("--optimizer", "offload_optimizer", options.optimizer),
    ):
        if value is None:
            continue
        if value not in _TIERS:
            raise ValueError(f"{option} {value}: expected one of {', '.join(_TIERS)}")
        blocks[block]["device"] = _TIERS[value]
    for folder in options.nvme:
        if not folder.is_dir():
            raise ValueError(f"--nvme {folder}: no such folder; make it on the drive that is to be used")
    if options.nvme:
        for block in blocks.values():
            block["nvme_path"] = [str(folder) for folder in options.nvme]
    return blocks


def _caps(options: Options) -> dict[str, Any]:
    given = {"device_memory": options.device_memory, "host_memory": options.host_memory}
    return {key: read_size(_OPTIONS[key], text) for key, text in given.items() if text not in (None, "auto")}


def read_size(option: str, text: str | None) -> int:
    """Bytes. Raises ValueError naming the option."""
    try:
        return parse_size(text or "")
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}") from None


def _check_path(options: Options, config: Config) -> None:
    zero = config.zero_optimization
    asked = [b.device for b in (zero.offload_param, zero.offload_optimizer) if b.nvme_path is None]
    if len(asked) == 2 and "nvme" in asked:
        option = "--param" if zero.offload_param.device == "nvme" else "--optimizer"
        raise ValueError(f"{option} nvme: no folder to put it; give --nvme PATH, on the drive that is to be used")
