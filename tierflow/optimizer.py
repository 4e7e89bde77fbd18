"""The optimizer that ``offload`` returns: torch's interface, the states wherever the plan put them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tierflow.scheduler.engine import Engine
from tierflow.scheduler.gradients import GradSlot
from tierflow.scheduler.rules import Rule

#: What a param group that leaves a key out has: torch.optim.AdamW's own.
DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "maximize": False,
    "decoupled_weight_decay": True,
}


class NonFiniteGradient(FloatingPointError):
    """A gradient holds infinity or NaN; no weight or state was changed."""

    def __init__(self, step: int, parameter: str):
        self.step, self.parameter = step, parameter
        super().__init__(
            f"optimizer step {step}: the gradient of {parameter!r} is not finite; nothing was updated. Lower the "
            "learning rate, clip (gradient_clipping), or look for a NaN loss or bad data in this batch"
        )


class OffloadOptimizer(torch.optim.Optimizer):
    """AdamW (or Adam with L2 decay) over managed states; a real ``torch.optim.Optimizer``.

    ``param_groups`` are live for LR schedulers. ``state`` stays empty and ``state_dict()`` is a cheap manifest of
    groups and step counts: states are saved by ``tierflow.save_checkpoint``. ``step()`` raises NonFiniteGradient
    before anything changes, and whatever a transfer raised.
    """

    def __init__(self, engine: Engine, groups: list[dict[str, Any]], gradient_clipping: float = 0.0):
        self.engine = engine
        self.gradient_clipping = gradient_clipping
        self.steps_taken = 0
        self.last_grad_norm: float | None = None
        super().__init__(groups, dict(DEFAULTS))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters that the model had, trainable, when it was offloaded."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            unknown = [p for p in group["params"] if id(p) not in self.engine.slots]
            if unknown:
                raise ValueError(
                    f"{len(unknown)} parameter(s) of the new group have no optimizer state (frozen or not in the model "
                    "when it was offloaded); call tierflow.offload again on the changed model"
                )
        except ValueError:
            self.param_groups.pop()
            raise

    def backward(self, loss: torch.Tensor) -> None:
        """Runs the backward from the loss."""
        loss.backward()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient. ``closure`` is called first, with grad enabled."""
        self.engine.usable()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slots = self.engine.managed_grads()
        clip = self._clip_factor(slots)
        rules = self._rules(clip)
        self.engine.update(rules, [s for s in slots if id(s.param) in rules])
        for slot in slots:
            if id(slot.param) in rules:
                self.engine.step_counts[id(slot.param)] += 1
                slot.updated()
        self.steps_taken += 1
        return loss

    def _clip_factor(self, slots: list[GradSlot]) -> float:
        """The factor for ``gradient_clipping``, as torch's clip_grad_norm_ computes it in fp32."""
        if self.gradient_clipping and any(s.user_scaled and s.norm_was_read for s in slots):
            raise RuntimeError(
                "gradients were clipped by the training loop and gradient_clipping is set too: remove one of the two"
            )
        for slot in slots:
            if not slot.stats().finite:
                raise NonFiniteGradient(self.steps_taken + 1, slot.name)
        self.last_grad_norm = self.engine.grad_norm(slots)
        self.engine.report.grad_norm = self.last_grad_norm
        if not self.gradient_clipping:
            return 1.0
        norm = torch.tensor(self.last_grad_norm, dtype=torch.float32)
        return float(torch.clamp(self.gradient_clipping / (norm + 1e-6), max=1.0))

    def _rules(self, clip: float) -> dict[int, Rule]:
        rules = {}
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                slot = self.engine.slots[id(p)]
                rules[id(p)] = Rule(
                    self.engine.step_counts[id(p)] + 1, float(group["lr"]), float(beta1), float(beta2),
                    group["eps"], group["weight_decay"], group["decoupled_weight_decay"], group["maximize"],
                    slot.scale, clip,
                )  # fmt: skip
        return rules

    def state_dict(self) -> dict[str, Any]:
        """Groups and step counts; no state tensor is read."""
        manifest = super().state_dict()
        counts = [self.engine.step_counts[id(p)] for g in self.param_groups for p in g["params"]]
        manifest["tierflow"] = {"steps_taken": self.steps_taken, "step_counts": counts}
        return manifest

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes groups and step counts from a manifest. Raises ValueError for a state dict of another optimizer."""
        if "tierflow" not in state_dict:
            raise ValueError(
                "this is not a manifest of a tierflow optimizer: states are restored with tierflow.load_checkpoint"
            )
        own = dict(state_dict)
        mine = own.pop("tierflow")
        super().load_state_dict(own)
        params = [p for g in self.param_groups for p in g["params"]]
        for p, count in zip(params, mine["step_counts"], strict=True):
            self.engine.step_counts[id(p)] = count
        self.steps_taken = mine["steps_taken"]

    def close(self) -> None:
        """Gives all memory and disk back; the model's parameters hold no data afterwards."""
        self.engine.close()


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError for hyperparameters that AdamW does not take, with torch's own messages."""
    beta1, beta2 = group["betas"]
    if float(group["lr"]) < 0.0:
        raise ValueError(f"Invalid learning rate: {group['lr']}")
    if group["eps"] < 0.0:
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
    for i, beta in enumerate((beta1, beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if group["weight_decay"] < 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    for unsupported in ("amsgrad", "differentiable", "capturable"):
        if group.get(unsupported):
            raise ValueError(f"{unsupported}=True is not supported by tierflow's optimizer: leave it out")


def groups_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Param groups of a torch Adam or AdamW, ready for OffloadOptimizer. Raises TypeError or ValueError."""
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam):
        raise TypeError(
            f"optimizer is {type(optimizer).__name__}: tierflow takes over torch.optim.AdamW and torch.optim.Adam; for "
            "others give param_groups= or the config's `optimizer` block"
        )
    if optimizer.state:
        raise ValueError(
            "optimizer has state already (it has stepped): offload the model before the first step, or give "
            "param_groups= and restore states with tierflow.load_checkpoint"
        )
    decoupled = isinstance(optimizer, torch.optim.AdamW)
    names = set(DEFAULTS) | {"params", "amsgrad", "differentiable", "capturable", "initial_lr"}
    groups = []
    for group in optimizer.param_groups:
        kept = {k: v for k, v in group.items() if k in names}
        kept["decoupled_weight_decay"] = group.get("decoupled_weight_decay", decoupled)
        groups.append(kept)
    return groups
