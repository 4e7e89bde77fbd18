"""``initialize``: a training engine for loops written for DeepSpeed, and for a step that the engine runs whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tierflow.accumulation import Accumulation, Choice
from tierflow.config import Config, load_config
from tierflow.fill import Source
from tierflow.offloading import ConfigLike, offload
from tierflow.optimizer import OffloadOptimizer
from tierflow.scheduler.report import Report
from tierflow.settings import Folders
from tierflow.swap import DebugMemory

#: (model, micro-batch) -> its share of the step's loss, to run backward from.
LossOf = Callable[[nn.Module, Any], torch.Tensor]


def initialize(
    model: nn.Module,
    config: ConfigLike = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    param_groups: Iterable[Any] | None = None,
    nvme_path: Folders | None = None,
    source: Source | None = None,
    debug_memory: DebugMemory | None = None,
) -> TrainingEngine:
    """Offloads the model and returns the engine that trains it. Arguments and errors are those of ``offload``."""
    model, made = offload(
        model, config, optimizer=optimizer, param_groups=param_groups, nvme_path=nvme_path, source=source,
        owned_loop=True, debug_memory=debug_memory,
    )  # fmt: skip
    return TrainingEngine(model, made, load_config(config))


class TrainingEngine:
    """Trains an offloaded model, call by call as DeepSpeed's engine does, or a whole step at a time.

        loss = engine(**batch).loss; engine.backward(loss); engine.step()      # steps at each accumulation boundary
        loss = engine.train_batch([batch, batch, ...])                          # the same, and the order is free

    Updates may run in a step's last backward (``tierflow.update``), so set learning rates before a step's first backward;
    a change after it is right too, and slower. ``module`` and ``optimizer`` are what ``offload`` returned. It is a context manager that closes them.
    """

    def __init__(self, model: nn.Module, optimizer: OffloadOptimizer, config: Config):
        self.module, self.optimizer = model, optimizer
        self._steps = config.gradient_accumulation_steps
        self._accumulation = Accumulation(optimizer.engine, config.tierflow)
        self.micro_steps = 0
        self.global_steps = 0

    # ---- call by call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> TrainingEngine:
        """Puts the model in training mode."""
        self.module.train(mode)
        return self

    def eval(self) -> TrainingEngine:
        """Puts the model in evaluation mode."""
        return self.train(False)

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches in a step; 1 where the config leaves it open."""
        return self._steps or 1

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch under way is the last of its step."""
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Runs the backward from the loss over gradient_accumulation_steps, and returns that."""
        steps = self.gradient_accumulation_steps()
        scaled = loss / steps if steps > 1 else loss
        if self.micro_steps % steps == 0:
            self.optimizer.expect_step()
        self.optimizer.backward(scaled)
        return scaled

    def step(self) -> None:
        """Ends a micro-batch; at the boundary updates the weights and zeroes the gradients, else does nothing more.

        Raises what ``optimizer.step`` does.
        """
        if self.is_gradient_accumulation_boundary():
            self._update()
        self.micro_steps += 1

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.global_steps += 1

    # ---- a whole step

    def train_batch(
        self,
        micro_batches: Iterable[Any],
        loss: LossOf | None = None,
        observer: Callable[[str | None], None] | None = None,
    ) -> torch.Tensor:
        """Trains one step and returns its loss, detached: the sum of what ``loss`` gave for each micro-batch.

        ``micro_batches``: a list of what makes the step, or an iterator, from which gradient_accumulation_steps are
        taken. By default each is called as ``model(**mapping)``, ``model(*tuple)`` or ``model(tensor)``, and the result's
        ``loss`` counts by its share of the step, so that the sum is their mean; ``loss(model, micro_batch)`` replaces
        that. ``observer`` is told what runs: "forward", "backward", "update", None.

        In layer-major order (``tierflow.accumulation``) micro-batches run in turns in threads, one at a time:
        ``loss`` and the model must not keep a micro-batch's values where another finds them.

        Raises what the model, a transfer or the update raised, ValueError for a wrong number of micro-batches.
        """
        if self.micro_steps % self.gradient_accumulation_steps():
            raise RuntimeError("train_batch() between backward() and the step that it belongs to: call step() first")
        batches = self._take(micro_batches)
        of = loss or partial(_share_of_loss, count=len(batches))
        jobs = [partial(self._micro_batch, of, batch) for batch in batches]
        self.optimizer.expect_step()
        losses = self._accumulation.run(jobs, max(_nbytes(b) for b in batches), observer)
        if observer is not None:
            observer("update")
        try:
            self._update()
        finally:
            if observer is not None:
                observer(None)
        self.micro_steps += self.gradient_accumulation_steps()
        total = losses[0]
        for part in losses[1:]:
            total = total + part
        return total

    def _take(self, micro_batches: Iterable[Any]) -> list[Any]:
        if isinstance(micro_batches, Iterator):
            batches = list(islice(micro_batches, self.gradient_accumulation_steps()))
        elif isinstance(micro_batches, Mapping | torch.Tensor):
            raise ValueError("train_batch() takes a list of micro-batches: put this one in [...]")
        else:
            batches = list(micro_batches)
        if not batches or (self._steps is not None and len(batches) != self._steps):
            raise ValueError(
                f"train_batch() was given {len(batches)} micro-batches and gradient_accumulation_steps is "
                f"{self._steps or 'open'}: give as many as make a step"
            )
        return batches

    def _micro_batch(self, loss_of: LossOf, batch: Any) -> torch.Tensor:
        self._accumulation.phase("forward")
        loss = loss_of(self.module, batch)
        self._accumulation.phase("backward")
        self.optimizer.backward(loss)
        return loss.detach()

    @property
    def accumulation(self) -> Choice | None:
        """The order in which ``train_batch`` runs micro-batches, and why; None before it is settled."""
        return self._accumulation.choice

    # ---- around it

    def report(self) -> Report:
        """Where the last step's time went, beside its floor, and the order of its micro-batches.

        Raises RuntimeError before the first step has ended.
        """
        report = self.optimizer.engine.report()
        return replace(report, notes=(str(self.accumulation),)) if self.accumulation else report

    def close(self) -> None:
        """Gives all memory and disk back; the model's parameters hold no data afterwards."""
        self._accumulation.close()
        self.optimizer.close()

    def __enter__(self) -> TrainingEngine:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _share_of_loss(model: nn.Module, batch: Any, count: int) -> torch.Tensor:
    if isinstance(batch, Mapping):
        out = model(**batch)
    else:
        out = model(*batch) if isinstance(batch, list | tuple) else model(batch)
    loss = out if isinstance(out, torch.Tensor) else getattr(out, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.dim() > 0:
        raise TypeError(
            f"train_batch() found no loss in the model's {type(out).__name__}: give labels, or "
            "loss=lambda model, micro_batch: ..."
        )
    return loss / count if count > 1 else loss


def _nbytes(batch: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))
