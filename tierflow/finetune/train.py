"""The training loop of ``tierflow finetune``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tierflow.checkpoint import load_checkpoint, save_checkpoint
from tierflow.config import SchedulerBlock
from tierflow.finetune.data import IGNORED, Batches
from tierflow.finetune.evaluate import HeldOut
from tierflow.finetune.meter import Meter, StepRecord
from tierflow.finetune.options import Options
from tierflow.finetune.schedule import Schedule
from tierflow.optimizer import NonFiniteGradient, OffloadOptimizer
from tierflow.training import TrainingEngine


class LossNotFinite(FloatingPointError):
    """The loss became NaN or infinite; the weights are those from before that step."""

    def __init__(self, step: int, what: str):
        self.step = step
        super().__init__(
            f"step {step + 1}: {what}; this step changed no weight. Lower --lr, add --warmup, or look at this batch's text"
        )


@dataclass
class History:
    """What a run has seen: one record a step, held-out results by step."""

    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[tuple[int, list[HeldOut]]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, and for the checkpoint."""
        return {
            "steps": [s.as_dict() for s in self.steps],
            "evaluations": [[n, [[r.name, r.tokens, r.loss] for r in results]] for n, results in self.evaluations],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        """Back from ``as_dict``."""
        evaluations = [(n, [HeldOut(*r) for r in results]) for n, results in data["evaluations"]]
        return cls([StepRecord(**s) for s in data["steps"]], evaluations)


class LearningRate:
    """The rate of each step: the command line's schedule, else the config's, else cosine."""

    def __init__(self, configured: SchedulerBlock | None, options: Options, total: int):
        self._configured = configured if options.schedule is None else None
        self._schedule = Schedule(options.schedule or "cosine", options.warmup, total)
        self._total = total

    def __call__(self, base: float, step: int) -> float:
        if self._configured is not None:
            return self._configured.lr(step, base, self._total)
        return base * self._schedule(step)


@dataclass
class Trainer:
    """Runs steps [history's end, total) and keeps the history."""

    engine: TrainingEngine
    batches: Batches
    options: Options
    total: int
    meter: Meter
    learning_rate: LearningRate
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self.model: nn.Module = self.engine.module
        self.optimizer: OffloadOptimizer = self.engine.optimizer
        self._base = [float(g["lr"]) for g in self.optimizer.param_groups]

    def resume(self) -> int:
        """Restores the checkpoint; returns the step to go on with. Raises WeightsError."""
        state = load_checkpoint(self.model, self.optimizer, self.options.checkpoint)
        self.history = History.from_dict(state["history"])
        self._base = state["base_lr"]
        return int(state["next_step"])

    def save(self, next_step: int) -> None:
        """Writes the checkpoint that ``resume`` reads."""
        state = {"next_step": next_step, "history": self.history.as_dict(), "base_lr": self._base}
        save_checkpoint(self.model, self.optimizer, self.options.checkpoint, state)

    def run(self, first: int, after_step: Callable[[StepRecord], None]) -> None:
        """Trains; ``after_step`` is called with each record. Raises LossNotFinite, and what a transfer raised."""
        self.model.train()
        every = self.options.save_every
        for step in range(first, self.total):
            self.history.steps.append(self._step(step))
            after_step(self.history.steps[-1])
            if every and (step + 1) % every == 0:
                self.save(step + 1)

    def _step(self, step: int) -> StepRecord:
        for group, base in zip(self.optimizer.param_groups, self._base, strict=True):
            group["lr"] = self.learning_rate(base, step - self.optimizer.skipped_steps)  # as DeepSpeed: steps taken
        scale = self.optimizer.loss_scale if self.optimizer.scale is not None else None
        loss = _StepLoss(self.batches, step)
        try:
            self.engine.train_batch(range(self.batches.accumulation), loss, self.meter.enter)
        except NonFiniteGradient as error:
            raise LossNotFinite(step, str(error)) from error
        lr = float(self.optimizer.param_groups[0]["lr"])
        norm = self.optimizer.last_grad_norm or 0.0
        record = self.meter.end_step(step, loss.value, lr, self.batches.tokens_per_step, norm)
        return replace(record, loss_scale=scale, skipped=self.optimizer.overflow)


class _StepLoss:
    """The loss of each micro-batch of one step, weighed by its learned tokens."""

    def __init__(self, batches: Batches, step: int):
        self._batches, self._step = batches, step
        self._wanted = batches.learned_tokens(step)
        self._values = [0.0] * batches.accumulation

    @property
    def value(self) -> float:
        """The whole step's, added up micro-batch by micro-batch."""
        return sum(self._values)

    def __call__(self, model: nn.Module, micro: int) -> torch.Tensor:
        device = next(model.parameters()).device
        batch = {k: v.to(device) for k, v in self._batches.micro(self._step, micro).items()}
        loss = token_loss(model, batch["input_ids"], batch["labels"], self._wanted)
        value = self._values[micro] = loss.item()
        if not math.isfinite(value):
            raise LossNotFinite(self._step, f"the loss is {value}")
        return loss


def token_loss(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor, tokens: int) -> torch.Tensor:
    """Cross-entropy summed over the micro-batch's learned tokens, over ``tokens`` of the whole step.

    So micro-batches with few learned tokens weigh what they hold. ``ids``, ``labels``: (batch, length) int64.
    """
    logits = model(input_ids=ids, use_cache=False).logits
    # labels are shifted, not logits: a shifted view of the logits would be copied whole
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets, ignore_index=IGNORED, reduction="sum") / tokens
