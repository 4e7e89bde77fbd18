"""DeepSpeed's ZeRO-3 with one rank on its CPU accelerator: ``options`` name the devices it offloads to.

Given an ordinary fp32 model and parameters on NVMe, DeepSpeed 0.19.8 swaps them as bf16 wherever its accelerator has no
fp16, as most CPUs, and fails at the first product. Made under ``zero.Init`` (option "model": "zero.Init") a model keeps
its dtype; it then needs settings under which weights really leave memory and buffers are given back.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

# Before deepspeed is imported: it chooses its accelerator then, and wants a launcher's variables even for one rank.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["TORCH_EXTENSIONS_DIR"] = os.path.join(sys.prefix, "operators")  # where install_deepspeed.sh built them
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1")

import deepspeed
import torch
from torch import nn

from train.measure import Phases
from train.model import build, parameters
from train.spec import ADAMW, CLIP, Shape, Spec

#: Pipelined reads and writes assert with fewer buffers; the sub-groups are as long as those buffers hold.
NVME_OPTIMIZER = {"buffer_count": 12, "pipeline_read": True, "pipeline_write": True}
SUB_GROUP = int(2e7)
AIO = {"block_size": 8 << 20, "queue_depth": 32, "single_submit": False, "overlap_events": True}
#: A parameter smaller than a block of I/O, and than 1 MiB, stays in host memory.
PARAM_BLOCK = 1 << 20
#: About one block of the model is live: with the defaults nothing is released and "Not enough buffers" ends the run.
PARAM_LIMITS = {
    "stage3_max_live_parameters": 4_000_000,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 1_000_000,
}


class Trainer:
    """DeepSpeed's own loop: its engine scales the loss, clips and steps at the accumulation's end."""

    def __init__(self, spec: Spec):
        os.environ["MASTER_PORT"] = str(_free_port())
        deepspeed.init_distributed("gloo")
        model = build(spec.shape)
        self.parameters = parameters(model)  # before ZeRO-3 takes them away
        self.config = settings(spec, largest=max(p.numel() for p in model.parameters()))
        if spec.options.get("model") == "zero.Init":
            model = _partitioned(model, spec.shape, self.config)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=self.config
        )

    def step(self, micro_batches: list[torch.Tensor], phases: Phases) -> float:
        """One optimizer step; the mean of the micro-batches' losses."""
        total = 0.0
        for ids in micro_batches:
            with phases("forward"):
                loss = self.engine(input_ids=ids, labels=ids).loss
            with phases("backward"):
                self.engine.backward(loss)
            with phases("step"):
                self.engine.step()
            total += loss.item()
        return total / len(micro_batches)

    def counts(self) -> dict[str, float]:
        """DeepSpeed counts none of its own traffic."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Settings and versions."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        kind = type(inner)
        return {
            "parameters": self.parameters,
            "deepspeed": deepspeed.__version__,
            "optimizer": f"{kind.__module__}.{kind.__qualname__}",
            "config": self.config,
        }

    def close(self) -> None:
        """Ends the process group."""
        deepspeed.comm.destroy_process_group()


def settings(spec: Spec, largest: int) -> dict[str, Any]:
    """The config. ``largest``: elements of the largest parameter, which a parameter buffer must hold."""
    zero: dict[str, Any] = {"stage": 3}
    param, optimizer = spec.options["param"], spec.options["optimizer"]
    if optimizer != "none":
        zero["offload_optimizer"] = {"device": optimizer}
    if optimizer == "nvme":
        zero["offload_optimizer"] |= {"nvme_path": spec.folder, **NVME_OPTIMIZER}
        zero["sub_group_size"] = SUB_GROUP
    if param == "nvme":
        zero["offload_param"] = {
            "device": "nvme", "nvme_path": spec.folder, "buffer_count": 8, "buffer_size": largest, "max_in_cpu": 0,
        }  # fmt: skip
        zero |= PARAM_LIMITS
    return {
        "train_micro_batch_size_per_gpu": spec.batch,
        "gradient_accumulation_steps": spec.accumulation,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "zero_optimization": zero,
        "aio": AIO | ({"block_size": PARAM_BLOCK} if param == "nvme" else {}),
        "steps_per_print": 1 << 30,
    }


def _partitioned(model: nn.Module, shape: Shape, config: dict[str, Any]) -> nn.Module:
    """The same weights in a model that DeepSpeed takes apart while it is made."""
    with deepspeed.zero.Init(config_dict_or_path=config):
        made = build(shape)
    weights = dict(model.named_parameters())
    for name, p in made.named_parameters():
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            p.data.copy_(weights[name].data)
    return made


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
