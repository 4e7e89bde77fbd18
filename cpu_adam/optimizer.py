"""torch.optim.AdamW's interface on the SIMD kernels, with fp32 arithmetic for 16-bit parameters too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from . import kernels

__all__ = ["CPUAdamW"]

OPTIMIZER_STATES = ("auto", "fp32", "lossless")
_PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTERS = {"master": torch.float32, "remainder": torch.int16}


class CPUAdamW(Optimizer):
    """AdamW for parameters on the CPU; arguments, groups and state_dict as in torch.optim.AdamW.

    Args:
        optimizer_state: how the fp32 weight behind a 16-bit parameter is kept. "fp32": whole, in
            ``state["master"]``. "lossless": bf16 parameters keep the 16 bits that they lack in
            ``state["remainder"]``; the numbers are fp32 AdamW's, at two bytes less a parameter. "auto":
            lossless for bf16, fp32 otherwise. An fp32 parameter is its own master in all of them. May differ
            by group.
        decoupled_weight_decay: False gives Adam with L2 decay, as in torch.optim.Adam.

    The moments are fp32 whatever the parameter is. The step comes from the parameter's state and the master,
    not from a parameter that was written to in between: to change weights by hand, drop their ``state``
    entry.

    For fp32 parameters ``kernels.adam_step`` says how equal the numbers are to torch's.
    """

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
        optimizer_state: str = "auto",
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
            "optimizer_state": optimizer_state,
        }
        _check_options(defaults)
        defaults["betas"] = tuple(float(b) for b in betas)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            for p in group["params"]:
                _check_param(p, group["optimizer_state"])
        except Exception:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("amsgrad", False)
            group.setdefault("maximize", False)
            group.setdefault("decoupled_weight_decay", True)
            group.setdefault("optimizer_state", "auto")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments, masters and remainders keep their own dtype and every bit.

        A state_dict of torch.optim.AdamW is taken too: what it lacks is made from the parameters at the next
        step.
        """
        # torch casts every state tensor to its parameter's dtype, which would round fp32 moments to bf16 and
        # misread a remainder. So the values are put back, from the dictionary as the last pre-hook leaves it.
        final: list[dict[str, Any]] = []
        before = self.register_load_state_dict_pre_hook(lambda _, loaded: final.append(loaded))
        after = self.register_load_state_dict_post_hook(lambda _: self._restore(final[-1]), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _restore(self, loaded: dict[str, Any]) -> None:
        for group in self.param_groups:
            _check_options(group)
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for key, value in loaded["state"].get(i, {}).items():
                if key in _MOMENTS or key in _MASTERS:
                    dtype = _MASTERS.get(key, torch.float32)
                    if value.shape != p.shape or (key in _MASTERS and value.dtype != dtype):
                        raise ValueError(
                            f"state {key!r} of parameter {i} is {value.dtype} of shape {tuple(value.shape)}; "
                            f"expected {dtype} of shape {tuple(p.shape)}"
                        )
                    self.state[p][key] = torch.empty(p.shape, dtype=dtype).copy_(value)
                elif key == "step":
                    self.state[p][key] = torch.tensor(float(value))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; `closure`, if given, reevaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Groups are plain dictionaries that anyone may write to, and a later torch may bring options.
            _check_options(group)
            for p in group["params"]:
                if p.grad is not None:
                    self._step_param(p, group)
        return loss

    def _step_param(self, p: Tensor, group: dict[str, Any]) -> None:
        grad = p.grad
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        state, master = self._init_state(p, group["optimizer_state"])
        step = int(state["step"].item()) + 1
        beta1, beta2 = group["betas"]
        # A parameter that is not contiguous passes through a copy; its state is contiguous from the start.
        weight = p.detach().contiguous()
        kernels.adam_step(
            weight.view(-1),
            grad.detach().contiguous().view(-1),
            state["exp_avg"].view(-1),
            state["exp_avg_sq"].view(-1),
            master=None if master is None else state[master].view(-1),
            step=step,
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
        )
        if p.is_contiguous():
            increment_version(p)  # the kernel wrote behind autograd's back
        else:
            p.copy_(weight)
        state["step"].fill_(step)

    def _init_state(self, p: Tensor, optimizer_state: str) -> tuple[dict[str, Any], str | None]:
        """The parameter's state, completed, and the name of its master if it has one."""
        state: dict[str, Any] = self.state[p]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        for key in _MOMENTS:
            if key not in state:
                state[key] = torch.zeros(p.shape, dtype=torch.float32)
        if p.dtype == torch.float32:
            return state, None
        # A master that is there, loaded for instance, says how it is kept.
        for key in _MASTERS:
            if key in state:
                return state, key
        _check_param(p, optimizer_state)
        if optimizer_state == "lossless" or (optimizer_state == "auto" and p.dtype == torch.bfloat16):
            state["remainder"] = torch.zeros(p.shape, dtype=torch.int16)
            return state, "remainder"
        state["master"] = p.detach().to(torch.float32, memory_format=torch.contiguous_format)
        return state, "master"


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
    if options["optimizer_state"] not in OPTIMIZER_STATES:
        raise ValueError(
            f"Invalid optimizer_state: {options['optimizer_state']!r}; "
            f"choose from {', '.join(OPTIMIZER_STATES)}"
        )


def _check_param(p: Tensor, optimizer_state: str) -> None:
    if p.dtype not in _PARAM_DTYPES or not p.is_cpu:
        raise ValueError(
            f"CPUAdamW takes CPU parameters of float32, bfloat16 or float16, got {p.dtype} on {p.device}"
        )
    if optimizer_state == "lossless" and p.dtype == torch.float16:
        raise ValueError(
            'optimizer_state="lossless" cannot serve a float16 parameter: with 16 more bits it does not hold '
            'an fp32; use "fp32" or "auto"'
        )
