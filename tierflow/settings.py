"""From what the user wrote and what the machine has to the settings of one run: every "auto" settled."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierflow import machine
from tierflow.config import Config, ConfigError

if TYPE_CHECKING:
    import torch

    from tierflow.scheduler.placement import Caps
    from tierflow.scheduler.rates import Bandwidths

#: Of what is free now, the share that "auto" takes; the rest is for activations, autograd and everything else.
AUTO_SHARE = 0.6
#: A disk is not filled to the brim.
DISK_SHARE = 0.9


@dataclass(frozen=True)
class Settings:
    """What building an engine needs beside the plan: the device, where NVMe is, and how to read and write there."""

    device: torch.device
    nvme_path: str | None
    aio: dict[str, Any]
    prefetch: bool
    update: str
    #: The drive's rates where a profile has them; else they are measured when they are needed.
    drive: Bandwidths | None = None


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


def available(device: torch.device, nvme_path: str | None) -> dict[Any, int]:
    """Bytes free now in each tier."""
    import torch

    from tierflow.swap import Tier

    have = {Tier.HOST: machine.mem_available()}
    if device.type == "cuda":
        have[Tier.DEVICE] = torch.cuda.mem_get_info(device)[0]
    else:
        have[Tier.DEVICE] = have[Tier.HOST]
    if nvme_path is not None:
        have[Tier.NVME] = machine.disk_free(nvme_path)
    return have


def make_caps(config: Config, device: torch.device, nvme_path: str | None) -> Caps:
    """The caps: what the config says, else a share of what is free."""
    from tierflow.scheduler.placement import Caps
    from tierflow.swap import Tier

    have, block = available(device, nvme_path), config.tierflow
    shared = device.type == "cpu"  # DEVICE and HOST are then the same memory
    share = AUTO_SHARE / 2 if shared else AUTO_SHARE
    dev = block.device_memory if block.device_memory is not None else int(have[Tier.DEVICE] * share)
    host = block.host_memory if block.host_memory is not None else int(have[Tier.HOST] * share)
    disk = have.get(Tier.NVME, 0)
    nvme = block.nvme_capacity if block.nvme_capacity is not None else int(disk * DISK_SHARE)
    return Caps(dev, host, nvme, have)


def nvme_directory(config: Config, default: str | None) -> str | None:
    """The folder for the swap store: the config's, else ``default``, else None."""
    zero = config.zero_optimization
    path = zero.offload_param.nvme_path or zero.offload_optimizer.nvme_path
    if path is None and default is not None:
        os.makedirs(default, exist_ok=True)
        return default
    return path


def missing_nvme_path() -> ConfigError:
    """The error for a kind on NVMe without a folder to put it."""
    return ConfigError(
        'a kind is placed on "nvme" and no path is given: set zero_optimization.offload_optimizer.nvme_path (and '
        "offload_param.nvme_path) to a folder on the drive"
    )


def pick_tiers(config: Config) -> tuple[Any, Any]:
    """(param, optimizer) tiers as the config names them; None where it says auto."""
    from tierflow.swap import Tier

    tiers = {"none": Tier.DEVICE, "cpu": Tier.HOST, "nvme": Tier.NVME, "auto": None}
    zero = config.zero_optimization
    return tiers[zero.offload_param.device], tiers[zero.offload_optimizer.device]


def pick_format(config: Config, dtypes: set[Any]) -> str:
    """The state format: lossless for bf16 models, fp32 for others, unless the config says."""
    import torch

    wanted = config.tierflow.optimizer_state
    if wanted != "auto":
        return wanted
    return "lossless" if torch.bfloat16 in dtypes else "fp32"
