"""tierflow: ``options`` name the tiers of weights and states; caps leave no room to cache what is on NVMe."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

import tierflow
from tierflow.scheduler.report import Report
from tierflow.swap import Lanes, paged_bytes
from train.measure import Phases
from train.model import build, parameters
from train.spec import ADAMW, CLIP, Spec

#: fp32 gradients, weights and moments: bytes a parameter of each.
FP32 = 4
#: Elements of one piece of the update's staging, and how many are in flight: tierflow's own.
PIECE, PIECES = 1 << 20, 24
#: Blocks that fit the device beside the largest parameter when weights live on NVMe: one running, two on their way.
BLOCKS = 3


class Trainer:
    """A step that the engine runs whole."""

    def __init__(self, spec: Spec):
        model = build(spec.shape)
        self.parameters = parameters(model)
        self.config = settings(model, spec)
        self.engine = tierflow.initialize(model, self.config)
        self.optimizer = self.engine.optimizer
        self.lanes: list[Lanes] = []

    def step(self, micro_batches: list[torch.Tensor], phases: Phases) -> float:
        """One optimizer step; the mean of the micro-batches' losses."""
        batches = [{"input_ids": ids, "labels": ids} for ids in micro_batches]
        loss = self.engine.train_batch(batches, observer=phases.enter).item()
        assert self.optimizer.engine.last_step is not None
        self.lanes.append(self.optimizer.engine.last_step)
        return loss

    def settle(self) -> None:
        """Until no update is due or under way."""
        self.optimizer.engine.settle()

    def counts(self) -> dict[str, float]:
        """The engine's own seconds and bytes since the last call."""
        self.lanes.clear()
        report = asdict(self.optimizer.engine.take_report())
        report.pop("grad_norm")  # a value, not a count
        flat = report.pop("traffic") | report
        return {name: value for name, value in flat.items() if isinstance(value, int | float)}

    def floor(self) -> dict[str, Any]:
        """What the slowest resource needs for a mean step, at the rates measured now."""
        mean = sum(self.lanes[1:], self.lanes[0]) / len(self.lanes)
        report = self.optimizer.engine.report(mean, len(self.lanes))
        return {"seconds": report.floor.seconds, "resources": report.floor.resources, "lanes": text_of(report)}

    def facts(self) -> dict[str, Any]:
        """Settings and versions; how files are read and written."""
        store = self.optimizer.engine.manager.store
        io = {"engine": store.engine, "direct": store.direct, "note": store.note} if store else None
        return {"parameters": self.parameters, "tierflow": tierflow.__version__, "config": self.config, "io": io}

    def close(self) -> None:
        """Gives memory and disk back."""
        self.engine.close()


def text_of(report: Report) -> list[str]:
    """The report's lines."""
    return report.text().splitlines()


def settings(model: nn.Module, spec: Spec) -> dict[str, Any]:
    """The config, in DeepSpeed's keys."""
    param, optimizer = spec.options["param"], spec.options["optimizer"]
    gradients = spec.options.get("gradients", "host")
    own = {"device": "cpu", "update": spec.options.get("update", "auto"), "gradients": gradients}
    return {
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "gradient_clipping": float(spec.options.get("clip", CLIP)),
        "train_micro_batch_size_per_gpu": spec.batch,
        "gradient_accumulation_steps": spec.accumulation,
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": param, "nvme_path": spec.folder},
            "offload_optimizer": {"device": optimizer, "nvme_path": spec.folder},
        },
        "tierflow": own | caps(model, param, optimizer, gradients, update=own["update"]),
    }


def caps(model: nn.Module, param: str, optimizer: str, gradients: str = "host", update: str = "auto") -> dict[str, int]:
    """device_memory and host_memory in bytes: what lives there for good, and room to work, but none to cache.

    For states on NVMe that is a few staged pieces; for weights on NVMe the largest parameter and a few blocks on the
    device, and as much on the way there, which the update uses for its staging. Gradients on NVMe leave a window in host
    memory for two of the largest. An update that may be undone keeps the old weights beside both moments.
    """
    every = FP32 * padded(model)
    weights = dict(model.named_parameters())
    largest = FP32 * max(p.numel() for p in weights.values())
    block = FP32 * max(padded(child) for m in model.modules() if isinstance(m, nn.ModuleList) for child in m)
    kinds = 3 if param == "nvme" or update == "speculative" else 2  # the weight, and both moments
    staging = min(PIECES * PIECE, padded(model) // 5) * FP32 * kinds
    if param == "nvme":
        host = every + max(largest, staging) + 2 * block
        if gradients == "nvme":
            host = 2 * paged_bytes(largest) + max(largest, staging // kinds * 4) + 2 * block
        return {"device_memory": largest + BLOCKS * block, "host_memory": host}
    if optimizer == "nvme":
        return {"device_memory": every, "host_memory": every + staging}
    if optimizer == "cpu":
        return {"device_memory": every, "host_memory": 3 * every}
    return {"device_memory": 4 * every, "host_memory": staging}


def padded(module: nn.Module) -> int:
    """Elements, and no less than alignment can add to them however the module is cut into units."""
    own = [m for m in module.modules() if any(p is not None for p in m._parameters.values())]
    params = list(module.parameters())
    return sum(p.numel() for p in params) + 128 * len(params) + 2048 * len(own)
