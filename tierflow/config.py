"""The configuration: DeepSpeed's JSON where DeepSpeed has a key, and one ``tierflow`` block beside it.

    cfg = load_config("ds_config.json")
    cfg.zero_optimization.offload_param.device   # "none", "cpu", "nvme" or "auto"
    cfg.tierflow.device_memory                   # bytes, or None for auto
    cfg.resolved()                               # what is honoured, for printing

None stands for "auto" wherever the word itself does not. docs/config.md lists every key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from tierflow.config_keys import KEYS, NOT_YET, Role
from tierflow.config_models import (
    TAKES,
    AioBlock,
    Bf16Block,
    Block,
    DataTypesBlock,
    Fp16Block,
    Number,
    OptimizerBlock,
    Positive,
    SchedulerBlock,
    TierflowBlock,
    ZeroBlock,
)
from tierflow.config_reader import ConfigError, Note, list_notes, read, read_file, show
from tierflow.scheduler.rates import Bandwidths
from tierflow.sizes import parse_size

__all__ = ["Config", "ConfigError", "Note", "load_config"]

Source = Mapping[str, Any] | str | os.PathLike[str] | None


class Config(Block):
    """The whole configuration, checked. Made by ``load_config``; ``Config()`` is "auto" throughout."""

    tierflow: TierflowBlock = TierflowBlock()
    train_batch_size: Positive | None = None
    train_micro_batch_size_per_gpu: Positive | None = None
    gradient_accumulation_steps: Positive | None = None
    #: 0.0 is off; None is "auto": the training loop's own affair.
    gradient_clipping: Number | None = 0.0
    bf16: Bf16Block = Bf16Block()
    fp16: Fp16Block = Fp16Block()
    data_types: DataTypesBlock = DataTypesBlock()
    optimizer: OptimizerBlock | None = None
    scheduler: SchedulerBlock | None = None
    zero_optimization: ZeroBlock = ZeroBlock()
    aio: AioBlock = AioBlock()
    #: The keys that were accepted and have no effect of their own.
    notes: tuple[Note, ...] = Field(default=(), exclude=True, repr=False)
    #: What the profile of ``tierflow tune`` measured of the drive.
    drive: Bandwidths | None = Field(default=None, exclude=True, repr=False)
    #: The folders that the profile was made for, and the share of each.
    tuned: tuple[tuple[str, float], ...] = Field(default=(), exclude=True, repr=False)

    @property
    def computed(self) -> tuple[str, ...]:
        """Dotted paths of the given keys whose figures tierflow works out itself."""
        return tuple(note.path for note in self.notes if note.role is Role.COMPUTED)

    def ignored_notes(self, *, scheduler_used: bool = False) -> list[str]:
        """The given keys that have no effect of their own, and why; a line for each reason."""
        lines = list_notes(self.notes)
        if self.scheduler is not None and not scheduler_used:
            lines.append(
                f"scheduler.type = {show(self.scheduler.type)}: followed by `tierflow finetune` only; in your own loop "
                "put a torch.optim.lr_scheduler on the optimizer"
            )
        return lines

    def aio_options(self) -> dict[str, Any]:
        """The keyword arguments of ``tierflow.aio.open`` that are set."""
        threads = self.aio.intra_op_parallelism or self.aio.thread_count
        options = {
            "block_size": self.aio.block_size, "queue_depth": self.aio.queue_depth, "threads": threads, "rings": self.aio.rings
        }  # fmt: skip
        return {"engine": self.tierflow.engine} | {k: v for k, v in options.items() if v is not None}

    def resolved(self) -> dict[str, Any]:
        """Everything that is honoured, JSON-able, "auto" where it is not settled; load_config takes it again."""
        dump: dict[str, Any] = self.model_dump(mode="json")
        return {name: _say_auto(value) for name, value in dump.items() if name not in _ABSENT or value is not None}


#: Blocks without which there is no optimizer or schedule, rather than one that is chosen.
_ABSENT = ("optimizer", "scheduler")


def _say_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _say_auto(inner) for name, inner in value.items()}
    return "auto" if value is None else value


def load_config(source: Source | Config, *, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads and checks a configuration: a mapping, the path of a JSON file, a Config (as it is), or None (all auto).

    ``overrides`` is laid over it, block by block, before anything is checked; it needs a source other than a Config.
    Raises ConfigError with one sentence for each problem.
    """
    if isinstance(source, Config):
        if overrides:
            raise ConfigError("overrides cannot be laid over a Config: give the mapping or path that it came from")
        return source
    if source is None:
        source = {}
    elif isinstance(source, str | os.PathLike):
        source = read_file(Path(source))
    if not isinstance(source, Mapping):
        raise ConfigError(f"a configuration is a mapping, a path or None, not {type(source).__name__}")
    return _build(_laid_over(source, overrides or {}))


def _laid_over(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in top.items():
        below = merged.get(name)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[name] = _laid_over(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _build(source: Mapping[str, Any]) -> Config:
    reading = read(source)
    problems = reading.problems
    _refuse_optimizer(reading.values, problems)
    try:
        config = Config.model_validate(reading.values | {"notes": tuple(reading.notes)})
    except ValidationError as error:
        problems += _sentences(error, reading.values)
        raise ConfigError(*problems) from None
    problems += _contradictions(config)
    sizes, trouble = _batch_sizes(reading.values, config)
    problems += trouble
    if problems:
        raise ConfigError(*problems)
    return _with_profile(config.model_copy(update=sizes))


def _with_profile(config: Config) -> Config:
    """The settings of the profile that ``aio`` names, where the config has none of its own."""
    if config.aio.profile is None:
        return config
    from tierflow.tune.profile import read_profile

    try:
        profile = read_profile(config.aio.profile)
    except ValueError as error:
        raise ConfigError(f"aio.profile: {error}") from None
    engine = config.tierflow.engine
    if engine not in ("auto", profile.engine):
        # depths of one engine say nothing of the other, and neither do its rates
        return config.model_copy(update={"aio": _filled(config.aio, {"block_size": profile.block_size})})
    return config.model_copy(
        update={
            "aio": _filled(config.aio, profile.aio_settings()),
            "tierflow": config.tierflow.model_copy(update={"engine": profile.engine}),
            "drive": profile.bandwidths(),
            "tuned": tuple(zip(profile.paths, profile.weights, strict=True)),
        }
    )


def _filled(block: AioBlock, settings: dict[str, int]) -> AioBlock:
    if block.thread_count is not None:  # the same setting by its other name
        settings = {name: value for name, value in settings.items() if name != "intra_op_parallelism"}
    return block.model_copy(update={name: value for name, value in settings.items() if getattr(block, name) is None})


def _refuse_optimizer(values: dict[str, Any], problems: list[str]) -> None:
    block = values.get("optimizer")
    name = block.get("type") if isinstance(block, dict) else None
    if not isinstance(name, str) or name.lower() in ("auto", *(own.lower() for own in TAKES)):
        return
    # what another optimizer's params are called is beside the point then
    problems[:] = [p for p in problems if "optimizer.params." not in p]
    del values["optimizer"]
    problems.append(
        f"optimizer.type is {show(name)}, which is not available: {', '.join(TAKES)} are, so write one of these, as in "
        '"optimizer": {"type": "AdamW", ...}'
    )


def _sentences(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """Pydantic's findings in the words of the key table, each field once."""
    found: dict[str, str] = {}
    for item in error.errors(include_url=False):
        # the place inside a list, or the branch of a union, comes after the key's own path
        path = ""
        for part in item["loc"]:
            path = f"{path}.{part}" if path else str(part)
            if path in KEYS:
                break
        if item["type"] == "missing":
            found[path] = f"{path} is missing: expected {KEYS[path].expect}"
        else:
            found[path] = _sentence(path, _at(values, path))
    return list(found.values())


def _at(values: Mapping[str, Any], path: str) -> Any:
    here: Any = values
    for name in path.split("."):
        here = here[name]
    return here


def _sentence(path: str, value: Any) -> str:
    if isinstance(value, str) and (path, value) in NOT_YET:
        return f"{path} is {show(value)}: {NOT_YET[path, value]}"
    expect = KEYS[path].expect
    if isinstance(value, str) and KEYS[path].unit == "bytes":
        try:
            parse_size(value)
        except ValueError as reason:
            return f"{path} is {show(value)}: {reason}"
    return f"{path} is {show(value)}: expected {expect}"


_SPEED = ("none", "cpu", "nvme")


def _contradictions(config: Config) -> Iterator[str]:
    for check in (_check_half, _check_stage, _check_order, _check_paths, _check_adam, _check_params, _check_threads):
        yield from check(config)


def _check_half(config: Config) -> Iterator[str]:
    fp16 = config.fp16
    if fp16.enabled and config.bf16.enabled:
        yield "fp16.enabled and bf16.enabled are both true: the model has one dtype, so set one of them to false"
    if fp16.enabled and not fp16.loss_scale and 2.0**fp16.initial_scale_power < fp16.min_loss_scale:
        yield (
            f"fp16.initial_scale_power is {fp16.initial_scale_power}, so the scale would start at "
            f"{show(2.0**fp16.initial_scale_power)}, below fp16.min_loss_scale, {show(fp16.min_loss_scale)}: raise the one or "
            "lower the other"
        )


def _check_stage(config: Config) -> Iterator[str]:
    zero = config.zero_optimization
    param, optim = zero.offload_param.device, zero.offload_optimizer.device
    if param in ("cpu", "nvme") and zero.stage < 3:
        yield (
            f'zero_optimization.offload_param.device is "{param}" and zero_optimization.stage is {zero.stage}: as in '
            "DeepSpeed, offload_param needs stage 3; set stage to 3 or leave it out"
        )
    if optim in ("cpu", "nvme") and zero.stage < 1:
        yield (
            f'zero_optimization.offload_optimizer.device is "{optim}" and zero_optimization.stage is 0: as in '
            "DeepSpeed, offload_optimizer needs stage 1, 2 or 3; set one of these or leave stage out"
        )


def _check_order(config: Config) -> Iterator[str]:
    param = config.zero_optimization.offload_param.device
    optim = config.zero_optimization.offload_optimizer.device
    if "auto" in (param, optim) or _SPEED.index(optim) >= _SPEED.index(param):
        return
    yield (
        f'zero_optimization.offload_param.device is "{param}" and zero_optimization.offload_optimizer.device is '
        f'"{optim}": the states, needed once a step, would lie in a faster tier than the weights, needed twice; set '
        f'offload_optimizer.device to "{param}" or "auto", or offload_param.device to "{optim}"'
    )


def _check_paths(config: Config) -> Iterator[str]:
    zero = config.zero_optimization
    param, optim = zero.offload_param.nvme_path, zero.offload_optimizer.nvme_path
    if param is None or optim is None or _absolute(param) == _absolute(optim):
        return
    yield (
        f"zero_optimization.offload_param.nvme_path is {show(param)} and "
        f"zero_optimization.offload_optimizer.nvme_path is {show(optim)}: there is one swap store so far; "
        "give the same in both"
    )


def _absolute(paths: str | tuple[str, ...]) -> list[str]:
    return [os.path.abspath(path) for path in ([paths] if isinstance(paths, str) else paths)]


def _check_adam(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer is not None and optimizer.type == "AdamW" and not optimizer.params.adam_w_mode:
        yield (
            'optimizer.params.adam_w_mode is false and optimizer.type is "AdamW": for L2 decay in the gradient set '
            'optimizer.type to "Adam", for AdamW leave adam_w_mode out'
        )


def _check_params(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer is None:
        return
    for name in sorted(optimizer.params.model_fields_set - optimizer.takes):
        yield (
            f'optimizer.params.{name} is no setting of {optimizer.type}, which takes '
            f"{', '.join(n for n in type(optimizer.params).model_fields if n in optimizer.takes)}: leave it out"
        )


def _check_threads(config: Config) -> Iterator[str]:
    old, new = config.aio.thread_count, config.aio.intra_op_parallelism
    if old is not None and new is not None and old != new:
        yield (
            f"aio.thread_count is {old} and aio.intra_op_parallelism is {new}: they are two names of one "
            "setting; keep one"
        )


_TRAIN, _MICRO, _STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def _batch_sizes(values: Mapping[str, Any], config: Config) -> tuple[dict[str, int], list[str]]:
    """The third of the three batch figures from two, or two from one as DeepSpeed does, on one rank."""
    train, micro, steps = (getattr(config, name) for name in (_TRAIN, _MICRO, _STEPS))
    open_to_loop = _STEPS in values or (micro is None and _MICRO in values)  # "auto" leaves a figure to the loop
    if steps is None and not open_to_loop and (train is None) != (micro is None):
        steps = 1
    if train is None:
        train = micro * steps if micro is not None and steps is not None else None
    elif micro is not None and steps is not None and train != micro * steps:
        return {}, [
            f"{_TRAIN} is {train}, but {_MICRO} x {_STEPS} is {micro} x {steps} = {micro * steps} on one rank: change "
            "one of the three, or leave one out"
        ]
    elif micro is not None or steps is not None:
        given, name = (micro, _MICRO) if micro is not None else (steps, _STEPS)
        if train % given:
            return {}, [f"{_TRAIN} is {train}, which is no multiple of {name}, {given}: change one of them"]
        micro, steps = (micro, train // micro) if micro is not None else (train // steps, steps)
    found = {_TRAIN: train, _MICRO: micro, _STEPS: steps}
    return {name: size for name, size in found.items() if size is not None}, []
