"""From what the user wrote and what the machine has to the settings of one run: every "auto" settled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierflow import machine
from tierflow.config import Config, ConfigError

if TYPE_CHECKING:
    import torch

    from tierflow.scheduler.placement import Caps
    from tierflow.scheduler.rates import Bandwidths

#: One folder, or several that make one store.
Folders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

#: Of what is free now, the share that "auto" takes; the rest is for activations, autograd and everything else.
AUTO_SHARE = 0.6
#: A disk is not filled to the brim.
DISK_SHARE = 0.9


@dataclass(frozen=True)
class Settings:
    """What building an engine needs beside the plan: the device, where NVMe is, and how to read and write there."""

    device: torch.device
    nvme_paths: tuple[str, ...]
    aio: dict[str, Any]
    prefetch: bool
    update: str
    #: The drive's rates where a profile has them; else they are measured when they are needed.
    drive: Bandwidths | None = None
    #: What is to be said once the drive is really used.
    note: str = ""


def pick_device(config: Config) -> torch.device:
    """The compute device. Raises ConfigError for one that is not there."""
    import torch

    name = config.tierflow.device
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(
            f'tierflow.device is "{name}", but torch sees {found} CUDA device(s) here; use "auto" or "cpu"'
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def available(device: torch.device, nvme_paths: Sequence[str], weights: Sequence[float] = ()) -> dict[Any, int]:
    """Bytes free now in each tier; on NVMe those of a store over the paths, equal shares without ``weights``."""
    import torch

    from tierflow.swap import Tier

    have = {Tier.HOST: machine.mem_available()}
    if device.type == "cuda":
        have[Tier.DEVICE] = torch.cuda.mem_get_info(device)[0]
    else:
        have[Tier.DEVICE] = have[Tier.HOST]
    if nvme_paths:
        have[Tier.NVME] = _store_free(nvme_paths, weights)
    return have


def _store_free(paths: Sequence[str], weights: Sequence[float]) -> int:
    """Bytes that a store over the paths can have: where the first file system is full, none can grow."""
    from tierflow.aio.striping import pattern

    turns = pattern(weights or [1.0] * len(paths))
    stripes: dict[int, list[int]] = {}
    for number, path in enumerate(paths):
        stripes.setdefault(os.stat(machine.existing(path)).st_dev, []).append(number)
    return min(
        machine.disk_free(paths[group[0]]) * len(turns) // sum(turns.count(number) for number in group)
        for group in stripes.values()
    )


def make_caps(config: Config, device: torch.device, nvme_paths: Sequence[str], weights: Sequence[float] = ()) -> Caps:
    """The caps: what the config says, else a share of what is free."""
    from tierflow.scheduler.placement import Caps
    from tierflow.swap import Tier

    have, block = available(device, nvme_paths, weights), config.tierflow
    shared = device.type == "cpu"  # DEVICE and HOST are then the same memory
    share = AUTO_SHARE / 2 if shared else AUTO_SHARE
    dev = block.device_memory if block.device_memory is not None else int(have[Tier.DEVICE] * share)
    host = block.host_memory if block.host_memory is not None else int(have[Tier.HOST] * share)
    disk = have.get(Tier.NVME, 0)
    nvme = block.nvme_capacity if block.nvme_capacity is not None else int(disk * DISK_SHARE)
    return Caps(dev, host, nvme, have)


def nvme_directories(config: Config, default: Folders | None) -> tuple[str, ...]:
    """The folders for the swap store: the config's, else ``default``, which is made; empty without either.

    Raises ConfigError where ``default`` has one twice, OSError where it cannot be made.
    """
    zero = config.zero_optimization
    given = zero.offload_param.nvme_path or zero.offload_optimizer.nvme_path
    named: Folders = given or default or ()
    several = (named,) if isinstance(named, (str, os.PathLike)) else named
    paths = tuple(os.fspath(one) for one in several)
    if len({os.path.abspath(path) for path in paths}) < len(paths):
        raise ConfigError(f"nvme_path is {', '.join(paths)}: expected different folders, one for each drive")
    for path in paths if given is None else ():
        os.makedirs(path, exist_ok=True)
    return paths


def drive_settings(config: Config, paths: Sequence[str]) -> tuple[dict[str, Any], Bandwidths | None, str]:
    """(arguments of ``tierflow.aio.open``, known rates, what to say) for a store over ``paths``.

    A profile's weights and rates hold for the folders that it was made for, and others on the same file systems.
    """
    options = config.aio_options()
    if not config.tuned or not paths:
        return options, config.drive, ""
    weights = [_tuned_weight(config.tuned, path) for path in paths]
    if len(paths) != len(config.tuned) or None in weights:
        made, used = (", ".join(names) for names in ((folder for folder, _ in config.tuned), paths))
        return options, None, (
            f"the profile {config.aio.profile} was made for {made}, and nvme_path is {used}: its settings are used, its "
            f"rates and weights are not; run `tierflow tune {' '.join(paths)}` for a profile of these"
        )  # fmt: skip
    return options | ({"weights": weights} if len(paths) > 1 else {}), config.drive, ""


def _tuned_weight(tuned: Sequence[tuple[str, float]], path: str) -> float | None:
    same = [weight for folder, weight in tuned if os.path.realpath(folder) == os.path.realpath(path)]
    there = os.stat(machine.existing(path)).st_dev
    beside = [weight for folder, weight in tuned if os.path.isdir(folder) and os.stat(folder).st_dev == there]
    return next(iter(same + beside), None)


def missing_nvme_path() -> ConfigError:
    """The error for a kind on NVMe without a folder to put it."""
    return ConfigError(
        'a kind is placed on "nvme" and no path is given: set zero_optimization.offload_optimizer.nvme_path (and '
        "offload_param.nvme_path) to a folder on the drive, or a list of folders on several"
    )


def pick_tiers(config: Config) -> tuple[Any, Any]:
    """(param, optimizer) tiers as the config names them; None where it says auto. Raises ConfigError."""
    from tierflow.swap import Tier

    tiers = {"none": Tier.DEVICE, "cpu": Tier.HOST, "nvme": Tier.NVME, "auto": None}
    zero = config.zero_optimization
    param, optimizer = tiers[zero.offload_param.device], tiers[zero.offload_optimizer.device]
    if config.tierflow.gradients != "nvme" or optimizer is Tier.NVME:
        return param, optimizer
    if optimizer is None:
        return param, Tier.NVME
    raise ConfigError(
        'tierflow.gradients is "nvme" and zero_optimization.offload_optimizer.device is '
        f'"{zero.offload_optimizer.device}": gradients wait on NVMe for states that live there, so set the device to '
        '"nvme", or tierflow.gradients to "host"'
    )


def pick_format(config: Config, dtypes: set[torch.dtype]) -> str:
    """The state format: lossless for bf16 models, fp32 for others, unless the config says.

    Raises ConfigError for one that does not serve a dtype among the trained parameters'.
    """
    import torch

    from tierflow.cpu_adam.formats import resolve

    wanted = config.tierflow.optimizer_state
    if wanted == "auto":
        return "lossless" if torch.bfloat16 in dtypes else "fp32"
    for dtype in sorted(dtypes & {torch.float32, torch.bfloat16, torch.float16}, key=str):
        try:
            resolve(wanted, dtype)
        except ValueError:
            instead = "int8" if wanted == "int8-24bit" else "auto"
            raise ConfigError(
                f'tierflow.optimizer_state is "{wanted}", which serves bfloat16 parameters, and this model trains '
                f'{str(dtype)[6:]} ones: {_WHY[wanted]}; set it to "{instead}", or make the model bfloat16 (bf16.enabled)'
            ) from None
    return wanted


#: Why these formats do not serve every dtype.
_WHY = {
    "lossless": "16 bits more do not make an fp32 of it",
    "int8-24bit": "its 8 bits of master weight correct a bfloat16",
}
