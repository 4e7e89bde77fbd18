"""torch.optim's interface on the SIMD kernels, with fp32 arithmetic for 16-bit parameters too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import state
from .batch import Batch
from .formats import FORMATS, StateFormat, resolve, shaped
from .operands import FLOATS
from .rules import ADAGRAD, ADAM, LION, Hyper, Rule

__all__ = ["CPUAdagrad", "CPUAdamW", "CPULion"]


class CPUOptimizer(Optimizer):
    """What the rules' optimizers share: groups, state, loading, the step itself."""

    rule: Rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            for p in group["params"]:
                _format(p, group["state_format"])
        except Exception:
            self.param_groups.pop()
            raise

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        super().__setstate__(pickled)
        for group in self.param_groups:
            for name, value in _LATER_OPTIONS.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every state tensor keeps its own dtype and every bit.

        A state_dict of the torch optimizer of the same rule is taken too: what it lacks is made from the parameters at
        the next step. Raises ValueError for a state that is kept in another format than this optimizer's, or that no
        step could have left (a shape, a dtype, a scale); nothing is loaded then.
        """
        # torch casts every state tensor to its parameter's dtype, which would round fp32 moments to bf16 and
        # misread a remainder. So the values are put back, from the dictionary as the last pre-hook leaves it.
        final: list[dict[str, Any]] = []
        kept = [group["state_format"] for group in self.param_groups]
        previous = self.__getstate__()

        def restore(_: Optimizer) -> None:
            try:
                self._restore(final[-1], kept)
            except Exception:
                self.__setstate__(previous)
                raise

        before = self.register_load_state_dict_pre_hook(lambda _, loaded: final.append(loaded))
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _restore(self, loaded: dict[str, Any], kept: list[str]) -> None:
        for group, saved, name in zip(self.param_groups, loaded["param_groups"], kept, strict=True):
            # torch's own optimizers save no format: theirs is any that keeps fp32 moments.
            group["state_format"] = saved.get("state_format", name)
            _check_options(group)
            for i, p in zip(saved["params"], group["params"], strict=True):
                fmt, theirs = resolve(name, p.dtype), resolve(group["state_format"], p.dtype)
                if (fmt.master, fmt.moments) != (theirs.master, theirs.moments):
                    raise ValueError(
                        f"parameter {i} was saved with state_format={theirs.name!r}, this optimizer keeps {fmt.name!r}: "
                        "make the optimizer with the format that was saved"
                    )
                values = loaded["state"].get(i, {})
                self.state[p].update(state.restored(values, p, fmt.for_shape(p.shape), self.rule, f"parameter {i}"))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; `closure`, if given, reevaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Not an attribute from the start: a pickled optimizer comes back without.
        batch = Batch(self.rule, self.__dict__.setdefault("_prepared", {}))
        order = 0
        for group in self.param_groups:
            # Groups are plain dictionaries that anyone may write to, and a later torch may bring options.
            _check_options(group)
            constants = cache(partial(self._constants, group))
            sign = -1.0 if group["maximize"] else 1.0
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse:
                        raise RuntimeError(
                            f"{self.rule.name} does not support sparse gradients, please consider SparseAdam instead"
                        )
                    fmt = _format(p, group["state_format"])
                    batch.add(p, self.state[p], fmt, constants, sign, (group["seed"] << 32) + order)
                order += 1
        batch.run()
        return loss

    def _constants(self, group: dict[str, Any], step: int) -> tuple[list[float], bool]:
        return self.rule.constants(self._hyper(group, step))

    def _hyper(self, group: dict[str, Any], step: int) -> Hyper:
        beta1, beta2 = group["betas"]
        return Hyper(
            step, float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"],
            group["decoupled_weight_decay"],
        )  # fmt: skip


class CPUAdamW(CPUOptimizer):
    """AdamW for parameters on the CPU; arguments, groups and state_dict as in torch.optim.AdamW.

    Args:
        state_format: how moments and the fp32 weight behind a 16-bit parameter are kept. "fp32": whole, the weight in
            ``state["master"]``. "lossless": bf16 parameters keep the 16 bits that they lack in
            ``state["remainder"]``; the numbers are fp32 AdamW's, at two bytes less a parameter. "bf16", "int8": the
            same weight, moments in 16 or 8 bits. "int8-24bit": bf16 parameters keep 8 more bits in
            ``state["correction"]``. "auto": lossless for bf16, fp32 otherwise. An fp32 parameter is its own master in
            all of them. Norms, biases and small parameters keep exact states (`StateFormat.keeps_fp32`). May differ by
            group.
        seed: of the rounding by chance of "bf16", "int8" and "int8-24bit".
        decoupled_weight_decay: False gives Adam with L2 decay, as in torch.optim.Adam.

    The step comes from the parameter's state and the master, not from a parameter that was written to in between: to
    change weights by hand, drop their ``state`` entry.

    For fp32 parameters ``kernels.adam_step`` says how equal the numbers are to torch's.
    """

    rule = ADAM

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = True,
        state_format: str = "auto",
        seed: int = 0,
    ) -> None:
        chosen = [("foreach", foreach), ("capturable", capturable), ("differentiable", differentiable)]
        for name, value in [*chosen, ("fused", fused)]:
            if value:
                raise ValueError(
                    f"{name}=True is not supported: CPUAdamW is one implementation, leave it out"
                )
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "state_format": state_format,
            "seed": seed,
        }
        _check_options(defaults)
        defaults["betas"] = tuple(float(b) for b in betas)
        super().__init__(params, defaults)


class CPULion(CPUOptimizer):
    """Lion, as DeepSpeed's: one moment, the sign of its interpolation as the update, decoupled weight decay.

    For `state_format` and `seed` see `CPUAdamW`.
    """

    rule = LION

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_format: str = "auto",
        seed: int = 0,
    ) -> None:
        defaults = {**_UNUSED, "lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        defaults |= {"state_format": state_format, "seed": seed}
        _check_options(defaults)
        super().__init__(params, defaults)


class CPUAdagrad(CPUOptimizer):
    """Adagrad, as DeepSpeed's and torch's: the sum of squares in ``state["exp_avg_sq"]``, weight decay as L2.

    For `state_format` and `seed` see `CPUAdamW`.
    """

    rule = ADAGRAD

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_format: str = "auto",
        seed: int = 0,
    ) -> None:
        defaults = {**_UNUSED, "lr": lr, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        defaults |= {"state_format": state_format, "seed": seed, "decoupled_weight_decay": False}
        _check_options(defaults)
        super().__init__(params, defaults)


_LATER_OPTIONS: dict[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "decoupled_weight_decay": True,
    "state_format": "auto",
    "seed": 0,
}
# What a rule has no use for, so that one check and one step serve all.
_UNUSED: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 0.0, "amsgrad": False, "decoupled_weight_decay": True}


def _check_options(options: dict[str, Any]) -> None:
    """Raise what torch.optim.AdamW raises for the same mistake."""
    lr, betas, eps, weight_decay = (options[k] for k in ("lr", "betas", "eps", "weight_decay"))
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:  # not "lr < 0": NaN is refused too
        raise ValueError(f"Invalid learning rate: {lr}")
    if not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for i in (0, 1):
        if isinstance(betas[i], Tensor) and betas[i].numel() != 1:
            raise ValueError(f"Tensor betas[{i}] must be 1-element")
        if not 0.0 <= betas[i] < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {betas[i]}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    if options["amsgrad"]:
        raise ValueError("amsgrad=True is not supported by CPUAdamW; use torch.optim.AdamW for it")
    if options["state_format"] not in FORMATS:
        raise ValueError(f"Invalid state_format: {options['state_format']!r}; choose from {', '.join(FORMATS)}")
    if type(options["seed"]) is not int or not 0 <= options["seed"] < 2**31:
        raise ValueError(f"seed must be an integer from 0 to 2**31 - 1, got {options['seed']!r}")


def _format(p: Tensor, state_format: str) -> StateFormat:
    """The format that the parameter gets. Raises ValueError for one that the kernels cannot step."""
    if p.dtype not in FLOATS or not p.is_cpu:
        raise ValueError(
            f"CPU optimizers take CPU parameters of float32, bfloat16 or float16, got {p.dtype} on {p.device}"
        )
    return shaped(state_format, p.dtype, p.shape)
