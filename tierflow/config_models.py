"""The blocks of the configuration as frozen models. None stands for "auto" wherever the word itself does not."""

from __future__ import annotations

import math
import os
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator

from tierflow.config_schedule import warmup_cosine, warmup_decay
from tierflow.sizes import parse_size


def _whole(value: Any) -> Any:
    # JSON written by Python often has 5e8 where a whole number is meant
    return int(value) if isinstance(value, float) and math.isfinite(value) and value == int(value) else value


def _path(value: Any) -> Any:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("expected a path")
    return os.path.expanduser(value)


def _paths(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return _path(value)
    found = tuple(map(_path, value))
    if not found or len(set(map(os.path.abspath, found))) < len(found):
        raise ValueError("expected different paths")
    return found


def _betas(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Whole = Annotated[int, BeforeValidator(_whole)]
Positive = Annotated[Whole, Field(ge=1)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Size = Annotated[int, BeforeValidator(parse_size)]
Directory = Annotated[str, BeforeValidator(_path)]
#: One, or several that make one store.
Directories = Annotated[str | tuple[str, ...], BeforeValidator(_paths)]
Where = Literal["none", "cpu", "nvme", "auto"]


class Block(BaseModel):
    """A frozen block whose values have the very types they are declared with; "auto" is None or the default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    #: Fields in which "auto" is a value of its own.
    says_auto: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _derive_auto(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            known = cls.model_fields.get(name)
            if (
                value is None
                or not (isinstance(value, str) and value == "auto")
                or known is None
                or known.is_required()
                or name in cls.says_auto
            ):
                kept[name] = value
            elif type(None) in get_args(known.annotation):
                kept[name] = None
        return kept


class TierflowBlock(Block):
    """What DeepSpeed has no key for. Memory figures are caps in bytes on what tierflow holds in that tier."""

    says_auto = frozenset({"optimizer_state", "device", "engine", "update", "accumulation", "gradients"})
    device_memory: Size | None = None
    host_memory: Size | None = None
    nvme_capacity: Size | None = None
    optimizer_state: Literal["auto", "fp32", "lossless", "bf16", "int8", "int8-24bit"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:(0|[1-9][0-9]{0,3}))?)$")] = "auto"
    engine: Literal["auto", "io_uring", "threads"] = "auto"
    prefetch: bool = True
    update: Literal["auto", "immediate", "deferred", "speculative"] = "auto"
    accumulation: Literal["auto", "layer_major", "micro_batch"] = "auto"
    gradients: Literal["auto", "host", "nvme"] = "auto"
    piece_elements: Positive | None = None
    report: bool = True
    trace: Directory | None = None


class OffloadBlock(Block):
    """Where a kind of state lives, and on which directories' drives when that is NVMe."""

    says_auto = frozenset({"device"})
    device: Where = "auto"
    nvme_path: Directories | None = None


class ZeroBlock(Block):
    """``zero_optimization``: where parameters and optimizer states live."""

    stage: Annotated[Whole, Field(ge=0, le=3)] = 3
    offload_param: OffloadBlock = OffloadBlock()
    offload_optimizer: OffloadBlock = OffloadBlock()


class AioBlock(Block):
    """How files are read and written; None leaves a setting to the profile, if there is one, else to the I/O engine."""

    profile: Directory | None = None
    block_size: Annotated[Size, Field(le=1 << 30)] | None = None
    queue_depth: Annotated[Positive, Field(le=4096)] | None = None
    thread_count: Annotated[Positive, Field(le=1024)] | None = None
    intra_op_parallelism: Annotated[Positive, Field(le=1024)] | None = None
    rings: Annotated[Positive, Field(le=64)] | None = None


class Bf16Block(Block):
    """``enabled`` casts the model to bf16; None (auto) and False leave the model's own dtype."""

    enabled: bool | None = False


class Fp16Block(Block):
    """``enabled`` casts the model to fp16 and scales the loss; ``loss_scale`` 0 is dynamic. None (auto) is off."""

    enabled: bool | None = False
    auto_cast: bool = False
    loss_scale: Number = 0.0
    initial_scale_power: Annotated[Whole, Field(ge=0, le=127)] = 16
    loss_scale_window: Positive = 1000
    hysteresis: Positive = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class DataTypesBlock(Block):
    """``grad_accum_dtype``: of the host's gradient accumulator; None is fp32 with accumulation."""

    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] | None = None


class OptimizerParams(Block):
    """Settings of the rules, of which each has its own (`OptimizerBlock.takes`); None is "auto", left to whoever makes the
    optimizer."""

    lr: Number | None = 1e-3
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_betas)] | None = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1e-8
    weight_decay: Number | None = 0.0
    adam_w_mode: bool = True
    torch_adam: bool = False
    maximize: bool = False


def _name_optimizer(value: Any) -> Any:
    # DeepSpeed takes its own optimizers' names in any case
    names = {name.lower(): name for name in TAKES}
    return names.get(value.lower(), value) if isinstance(value, str) else value


_ADAM = frozenset({"lr", "betas", "eps", "weight_decay", "adam_w_mode", "torch_adam", "maximize"})
#: The settings of each optimizer, as DeepSpeed's own has them.
TAKES: dict[str, frozenset[str]] = {
    "AdamW": _ADAM,
    "Adam": _ADAM,
    "Lion": frozenset({"lr", "betas", "weight_decay"}),
    "Adagrad": frozenset({"lr", "eps", "weight_decay"}),
}
#: Where its defaults are not Adam's.
_DEFAULTS: dict[str, dict[str, Any]] = {"Adagrad": {"lr": 1e-2, "eps": 1e-10}}


class OptimizerBlock(Block):
    """AdamW, Adam, Lion or Adagrad; DeepSpeed's Adam is AdamW unless ``adam_w_mode`` is false."""

    type: Annotated[Literal["AdamW", "Adam", "Lion", "Adagrad"], BeforeValidator(_name_optimizer)] = "AdamW"
    params: OptimizerParams = OptimizerParams()

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, data: Any) -> Any:
        # [Note: weight decay] DeepSpeed's own Adam decays nothing unless told to; torch's AdamW decays by 0.01. With
        # torch_adam DeepSpeed hands over to torch, default included.
        params = data.get("params", {}) if isinstance(data, dict) else None
        own = _DEFAULTS.get(str(_name_optimizer(data.get("type"))), {}) if isinstance(params, dict) else {}
        if isinstance(params, dict) and own:
            return data | {"params": own | params}
        if not isinstance(params, dict) or params.get("torch_adam") is not True or "weight_decay" in params:
            return data
        decoupled = params.get("adam_w_mode", True) is True
        return data | {"params": params | {"weight_decay": 0.01 if decoupled else 0.0}}

    @property
    def takes(self) -> frozenset[str]:
        """The names of the settings that this optimizer has."""
        return TAKES[self.type]

    @model_serializer(mode="wrap")
    def _own_params(self, handler: Any) -> dict[str, Any]:
        dump: dict[str, Any] = handler(self)
        return dump | {"params": {name: value for name, value in dump["params"].items() if name in self.takes}}

    @property
    def decoupled(self) -> bool:
        """Whether weight decay acts on the weight (AdamW, Lion) rather than on the gradient."""
        return self.params.adam_w_mode and self.type != "Adagrad"

    def group(self) -> dict[str, Any]:
        """As the keys of a torch param group; a value is None where the config says "auto"."""
        p = self.params
        values = {"lr": p.lr, "betas": p.betas, "eps": p.eps, "weight_decay": p.weight_decay, "maximize": p.maximize}
        return {name: value for name, value in values.items() if name in self.takes} | {
            "decoupled_weight_decay": self.decoupled
        }


class SchedulerParams(Block):
    """None is "auto": the optimizer's lr, the run's number of steps, or DeepSpeed's default."""

    warmup_min_lr: Number = 0.0
    warmup_max_lr: Number | None = None
    warmup_num_steps: Positive | None = 1000
    warmup_type: Literal["log", "linear"] = "log"
    total_num_steps: Positive | None = None
    warmup_min_ratio: Share = 0.0
    cos_min_ratio: Share = 1e-4


class SchedulerBlock(Block):
    """One of DeepSpeed's warm-up schedules, with its numbers."""

    type: Literal["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]
    params: SchedulerParams = SchedulerParams()

    def lr(self, step: int, base_lr: float, total_steps: int, warmup_steps: int = 0) -> float:
        """The learning rate of optimizer step ``step`` (0 is the first).

        ``base_lr``, ``total_steps`` and ``warmup_steps`` are the run's, for what the config leaves to it.
        """
        p = self.params
        warmup = warmup_steps if p.warmup_num_steps is None else p.warmup_num_steps
        total = p.total_num_steps or total_steps
        if self.type == "WarmupCosineLR":
            lowest = (p.warmup_min_ratio, p.cos_min_ratio)
            return base_lr * warmup_cosine(step, warmup, p.warmup_type, total, lowest)
        top = base_lr if p.warmup_max_lr is None else p.warmup_max_lr
        factor = warmup_decay(step, warmup, p.warmup_type, total if self.type == "WarmupDecayLR" else None)
        return p.warmup_min_lr + (top - p.warmup_min_lr) * factor
