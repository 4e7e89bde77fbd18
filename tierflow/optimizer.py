"""The optimizer that ``offload`` returns: torch's interface, the states wherever the plan put them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from tierflow.cpu_adam.rules import ADAM, Hyper, Rule
from tierflow.loss_scale import LossScale, ScaleAtMinimum
from tierflow.scheduler.engine import Engine
from tierflow.scheduler.gradients import GradSlot
from tierflow.scheduler.param_step import ParamStep

log = logging.getLogger("tierflow")

#: What a param group that leaves a key out has: torch.optim.AdamW's own, and DeepSpeed's Lion's and Adagrad's.
_ADAMW: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "maximize": False,
    "decoupled_weight_decay": True,
}
_OWN: dict[str, dict[str, Any]] = {
    "Lion": {"weight_decay": 0.0},
    "Adagrad": {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.0, "decoupled_weight_decay": False},
}


def defaults_of(rule: Rule) -> dict[str, Any]:
    """What a param group of the rule's has for the keys that it leaves out; the rule does not look at every key."""
    return _ADAMW | _OWN.get(rule.name, {})


class NonFiniteGradient(FloatingPointError):
    """A gradient holds infinity or NaN; no weight or state was changed."""

    def __init__(self, step: int, parameter: str, why: str = ""):
        self.step, self.parameter = step, parameter
        super().__init__(
            f"optimizer step {step}: the gradient of {parameter!r} is not finite{why}; nothing was updated. Lower the "
            "learning rate, clip (gradient_clipping), or look for a NaN loss or bad data in this batch"
        )


class OffloadOptimizer(torch.optim.Optimizer):
    """AdamW (or Adam with L2 decay, Lion, Adagrad) over managed states; a real ``torch.optim.Optimizer``.

    ``param_groups`` are live for LR schedulers. ``state`` stays empty and ``state_dict()`` is a cheap manifest of
    groups and step counts: states are saved by ``tierflow.save_checkpoint``. ``step()`` raises NonFiniteGradient
    before anything changes, and whatever a transfer raised.

    ``scale`` is there under ``fp16``: ``backward`` applies it, gradients and norms are without it, and while it is
    dynamic a gradient that is not finite makes ``step()`` skip the update instead of raising. ``overflow`` says
    whether the last step was skipped (an LR scheduler should then not advance), ``skipped_steps`` counts them.
    """

    def __init__(
        self,
        engine: Engine,
        groups: list[dict[str, Any]],
        gradient_clipping: float = 0.0,
        scale: LossScale | None = None,
        rule: Rule = ADAM,
    ):
        self.engine = engine
        self.gradient_clipping = gradient_clipping
        self.scale = scale
        self.steps_taken = 0
        self.skipped_steps = 0
        self.overflow = False
        self.last_grad_norm: float | None = None
        self._asked_at: int | None = None  # a GradScaler is about to step, or to leave the step out: after so many uses
        engine.gradients.scaling.resting = None if scale is not None else 1.0
        super().__init__(groups, defaults_of(rule))

    @property
    def loss_scale(self) -> float:
        """What ``backward`` multiplies the loss by; 1.0 without ``fp16``."""
        return 1.0 if self.scale is None else self.scale.scale

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch.amp.GradScaler asks before it steps, or leaves the step out without a word; `zero_grad` then ends it.

        The one place to tell it that the loss is scaled already.
        """
        if self.scale is not None:
            raise RuntimeError(
                "torch.amp.GradScaler and fp16.enabled both scale the loss: leave out the GradScaler and call "
                "optimizer.backward(loss) and optimizer.step(), or leave out the fp16 block"
            )
        self._asked_at = self.engine.recorder.uses
        return False

    def backward(self, loss: torch.Tensor, retain_graph: bool = False) -> None:
        """``loss.backward()``, with the loss scale under ``fp16``. ``loss``: of one element.

        Hooks that run inside the backward see gradients times the scale; ``p.grad`` afterwards is without it.
        """
        self.engine.usable()
        if self.scale is None:
            loss.backward(retain_graph=retain_graph)
            return
        for slot in self.engine.gradients.slots.values():
            if not slot.present():
                slot.collect()  # assigned by the loop: this backward may not add scaled to unscaled
        with self.engine.gradients.scaling.carrying(self.scale.scale):
            (loss.float() * self.scale.scale).backward(retain_graph=retain_graph)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters that the model had, trainable, when it was offloaded."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            unknown = [p for p in group["params"] if id(p) not in self.engine.gradients.slots]
            if unknown:
                raise ValueError(
                    f"{len(unknown)} parameter(s) of the new group have no optimizer state (frozen or not in the model "
                    "when it was offloaded); call tierflow.offload again on the changed model"
                )
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient. ``closure`` is called first, with grad enabled.

        Under a dynamic loss scale an overflow lowers the scale and changes nothing else (see ``overflow``).
        """
        self.engine.usable()
        self._asked_at = None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slots = self.engine.gradients.present(self.engine.units)
        if self.gradient_clipping and any(s.user_scaled and s.norm_was_read for s in slots):
            raise RuntimeError(
                "gradients were clipped by the training loop and gradient_clipping is set too: remove one of the two"
            )
        bad = next((s.name for s in slots if not s.stats().finite), None)
        self.overflow = bad is not None
        if bad is not None:
            self._skip(bad)
        else:
            self._update(slots)
        for slot in slots:
            slot.updated()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, or zeroes them."""
        asked_at, self._asked_at = self._asked_at, None
        if asked_at is not None and not self.engine.closed:
            self.engine.left_out(asked_at)
        super().zero_grad(set_to_none)
        self.engine.gradients.rest()

    def expect_step(self) -> None:
        """Says before a step's first backward that ``step()`` will follow it, with the hyperparameters set now.

        Updates may then run in the backward; where the step turns out otherwise they are undone, bit for bit.
        """
        if self.engine.speculation is not None:
            self.engine.speculation.start(self._steps(1.0))

    def _update(self, slots: list[GradSlot]) -> None:
        steps = self._steps(self._clip_factor(slots))
        ready = [s for s in slots if id(s.param) in steps]
        self.engine.update(steps, ready)
        for slot in ready:
            self.engine.step_counts[id(slot.param)] += 1
        self.steps_taken += 1
        if self.scale is not None:
            self.scale.update(overflow=False)

    def _skip(self, parameter: str) -> None:
        """Lowers the loss scale for a gradient that is not finite; raises NonFiniteGradient where none can be lowered."""
        self.engine.left_out(self.engine.recorder.uses)
        step, scale = self.steps_taken + 1, self.scale
        if scale is None or not scale.dynamic:
            why = f" at the constant fp16.loss_scale {scale.scale:g}" if scale is not None else ""
            raise NonFiniteGradient(step, parameter, why)
        before = scale.scale
        try:
            scale.update(overflow=True)
        except ScaleAtMinimum as error:
            raise NonFiniteGradient(step, parameter, f" and {error}") from error
        self.skipped_steps += 1
        self.last_grad_norm = None
        log.info(
            "step skipped: the gradient of %r is not finite at loss scale %g; the scale is now %g",
            parameter, before, scale.scale,
        )  # fmt: skip

    def _clip_factor(self, slots: list[GradSlot]) -> float:
        """The factor for ``gradient_clipping``, as torch's clip_grad_norm_ computes it in fp32."""
        self.last_grad_norm = self.engine.grad_norm(slots)
        if not self.gradient_clipping:
            return 1.0
        norm = torch.tensor(self.last_grad_norm, dtype=torch.float32)
        return float(torch.clamp(self.gradient_clipping / (norm + 1e-6), max=1.0))

    def _steps(self, clip: float) -> dict[int, ParamStep]:
        steps = {}
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                slot = self.engine.gradients.slots[id(p)]
                hyper = Hyper(
                    self.engine.step_counts[id(p)] + 1, float(group["lr"]), float(beta1), float(beta2),
                    group["eps"], group["weight_decay"], group["decoupled_weight_decay"],
                )  # fmt: skip
                steps[id(p)] = ParamStep(hyper, group["maximize"], slot.factor, clip)
        return steps

    def state_dict(self) -> dict[str, Any]:
        """Groups, step counts and the loss scale; no state tensor is read."""
        manifest = super().state_dict()
        counts = [self.engine.step_counts[id(p)] for g in self.param_groups for p in g["params"]]
        manifest["tierflow"] = {"steps_taken": self.steps_taken, "step_counts": counts}
        if self.scale is not None:
            manifest["tierflow"] |= {"skipped_steps": self.skipped_steps, "loss_scale": self.scale.state_dict()}
        return manifest

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes groups, step counts and the loss scale from a manifest. Raises ValueError for a state dict of another optimizer."""
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
        self.skipped_steps = mine.get("skipped_steps", 0)
        if self.scale is not None:
            self.scale.load_state_dict(mine.get("loss_scale", {}))

    def close(self) -> None:
        """Gives all memory and disk back; the model's parameters hold no data afterwards."""
        self.engine.close()


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError for hyperparameters that no rule takes, with torch's own messages."""
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
    names = set(_ADAMW) | {"params", "amsgrad", "differentiable", "capturable", "initial_lr"}
    groups = []
    for group in optimizer.param_groups:
        kept = {k: v for k, v in group.items() if k in names}
        kept["decoupled_weight_decay"] = group.get("decoupled_weight_decay", decoupled)
        groups.append(kept)
    return groups
