"""``offload``: takes a model's training state over and returns the model and its optimizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from tierflow.chrome_trace import StepTrace, claim
from tierflow.config import Config, ConfigError, load_config
from tierflow.cpu_adam.formats import resolve
from tierflow.cpu_adam.rules import ADAGRAD, ADAM, LION, Rule
from tierflow.fill import Source, fill, from_model
from tierflow.loss_scale import LossScale
from tierflow.optimizer import OffloadOptimizer, check_group, defaults_of, groups_of
from tierflow.scheduler.engine import Engine
from tierflow.scheduler.homes import create_chunks, second_slots
from tierflow.scheduler.memory import build_manager
from tierflow.scheduler.placement import DoesNotFit, Placement, Together, kinds_of
from tierflow.scheduler.plan import MemoryPlan, make_plan, table_text
from tierflow.scheduler.traffic import default_order, estimate
from tierflow.scheduler.units import (
    ShardGeometry,
    Unit,
    make_chunks,
    partition,
    units_of_blocks,
    units_together,
)
from tierflow.settings import (
    Folders,
    Settings,
    drive_settings,
    make_caps,
    missing_nvme_path,
    nvme_directories,
    pick_device,
    pick_format,
    pick_tiers,
)
from tierflow.swap import DebugMemory, Tier

log = logging.getLogger("tierflow")

ConfigLike = Config | Mapping[str, Any] | str | Path | None


def offload(
    model: nn.Module,
    config: ConfigLike = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    param_groups: Iterable[Any] | None = None,
    nvme_path: Folders | None = None,
    source: Source | None = None,
    owned_loop: bool = False,
    debug_memory: DebugMemory | None = None,
) -> tuple[nn.Module, OffloadOptimizer]:
    """Moves the model's weights, gradients and optimizer states to their tiers; returns (model, optimizer).

    The model is changed in place and trains in any torch loop. ``config``: a path, mapping or ``Config``; none
    means everything "auto". The optimizer's settings come from ``optimizer`` (a fresh torch AdamW or Adam, taken
    over), ``param_groups``, or the config's ``optimizer`` block: one of the three must be there. With ``param_groups`` that
    block's type is the optimizer's, AdamW without one. ``nvme_path``: the
    folder, or several, for what lives on NVMe when the config names none. ``source`` gives values for parameters on
    the meta device (see ``tierflow.load``). ``owned_loop``: the caller calls ``optimizer.expect_step()`` before each step's
    first backward, as ``tierflow.initialize`` does, so that updates may run in the backward. ``debug_memory`` is for tests: random places, freed memory poisoned.

    Raises ConfigError, DoesNotFit (with the table of needs) before anything is allocated; OSError for the path.
    """
    cfg = load_config(config)
    if not isinstance(config, Config):  # whoever made the Config has seen its notes
        for note in cfg.ignored_notes():
            log.info(note)
    if cfg.tierflow.trace is not None:
        claim(cfg.tierflow.trace)
    groups = _groups(model, cfg, optimizer, param_groups)
    if getattr(model, "_tierflow_engine", None) is not None:
        raise ValueError("this model is offloaded already: close its optimizer before offloading it again")
    rule = ADAM if optimizer is not None else rule_of(cfg)
    _check_groups(model, groups, rule)
    device = pick_device(cfg)
    trained = {id(p) for g in groups for p in g["params"] if p.requires_grad}
    direct = debug_memory is None or not debug_memory.through_host
    units, plan, settings = make_run(model, cfg, device, trained, nvme_path, owned_loop, direct, rule)
    if cfg.tierflow.report:
        log.info(table_text(plan))
    engine = _build(model, units, plan, settings, source or from_model, debug_memory)
    _cast(model, cfg)
    if cfg.fp16.enabled and cfg.fp16.auto_cast:
        engine.keep(model.register_forward_pre_hook(_cast_inputs, with_kwargs=True))
    groups = [g | {"params": [p for p in g["params"] if p.requires_grad]} for g in groups]
    scale = LossScale.of(cfg.fp16) if cfg.fp16.enabled else None
    result = OffloadOptimizer(engine, groups, cfg.gradient_clipping or 0.0, scale, rule)
    model._tierflow_engine = engine  # type: ignore[assignment]
    if cfg.tierflow.trace is not None:
        StepTrace(engine, cfg.tierflow.trace)
    return model, result


def engine_of(model: nn.Module) -> Engine:
    """The engine of an offloaded model. Raises ValueError for any other."""
    engine = getattr(model, "_tierflow_engine", None)
    if not isinstance(engine, Engine):
        raise ValueError("this model was not offloaded with tierflow.offload or tierflow.load")
    return engine


def gathered(params: nn.Module | Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Context in which the given parameters (a whole model's, or some) are present and may be read and changed.

    Changes are written home when it ends. Raises CapacityError if they do not fit tierflow.device_memory together.
    """
    found = list(params.parameters() if isinstance(params, nn.Module) else params)
    owner = next((p._tierflow_owner for p in found if hasattr(p, "_tierflow_owner")), None)
    if not isinstance(owner, Engine):
        raise ValueError("none of these parameters was offloaded with tierflow")
    return owner.values.gathered(found)


def _groups(
    model: nn.Module, cfg: Config, optimizer: torch.optim.Optimizer | None, groups: Iterable[Any] | None
) -> list[dict[str, Any]]:
    if optimizer is not None and groups is not None:
        raise ValueError("give optimizer= or param_groups=, not both")
    if optimizer is not None:
        return groups_of(optimizer)
    block = optimizer_settings(cfg)
    if groups is not None:
        listed = list(groups)
        if listed and not isinstance(listed[0], dict):
            listed = [{"params": listed}]
        return [block | g | {"params": list(g["params"])} for g in listed]
    if cfg.optimizer is None:
        raise ConfigError(
            'no optimizer: pass optimizer=torch.optim.AdamW(...), param_groups=..., or put "optimizer": {"type": '
            '"AdamW", "params": {"lr": 1e-5}} in the config'
        )
    return [block | {"params": [p for p in model.parameters() if p.requires_grad]}]


def rule_of(cfg: Config) -> Rule:
    """The update rule that the config's ``optimizer`` block names; Adam without one."""
    named = {"Lion": LION, "Adagrad": ADAGRAD}
    return ADAM if cfg.optimizer is None else named.get(cfg.optimizer.type, ADAM)


def _check_groups(model: nn.Module, groups: list[dict[str, Any]], rule: Rule) -> None:
    """Raises what the optimizer would, before the model is touched."""
    made = torch.optim.Optimizer([dict(g) for g in groups], defaults_of(rule))
    own = {id(p) for p in model.parameters()}
    for group in made.param_groups:
        check_group(group)
        strange = sum(id(p) not in own for p in group["params"])
        if strange:
            raise ValueError(f"{strange} parameter(s) of a param group are not in the model: give the model's own")


def optimizer_settings(cfg: Config) -> dict[str, Any]:
    """The config's ``optimizer`` block as the keys of a param group; empty without one."""
    if cfg.optimizer is None:
        return {}
    params = {k: v for k, v in cfg.optimizer.group().items() if v is not None}
    return params


def _half(cfg: Config) -> torch.dtype | None:
    """The dtype that the config casts the model to, if any."""
    if cfg.bf16.enabled:
        return torch.bfloat16
    return torch.float16 if cfg.fp16.enabled else None


def _cast(model: nn.Module, cfg: Config) -> None:
    """Buffers follow ``bf16.enabled`` or ``fp16.enabled`` at once; parameters are cast one by one while they are placed."""
    dtype = _half(cfg)
    if dtype is None:
        return
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and not buffer.is_meta:
                module._buffers[name] = buffer.to(dtype)


def _cast_inputs(_model: nn.Module, args: Any, kwargs: Any) -> Any:
    def cast(value: Any) -> Any:
        return value.half() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tree_map(cast, (args, kwargs))


def make_run(
    model: nn.Module, cfg: Config, device: torch.device, trained: set[int],
    nvme_path: Folders | None,
    owned_loop: bool = False, direct: bool = True, rule: Rule | None = None,
) -> tuple[list[Unit], MemoryPlan, Settings]:  # fmt: skip
    """Units, plan and settings; nothing is allocated. Raises DoesNotFit and ConfigError.

    ``owned_loop``: second slots on NVMe are made where they fit, for updates in the backward that may be undone.
    ``direct``: a CPU's DEVICE memory is read into without a stop in HOST. ``rule``: of the update, the config's by default.
    """
    param, optim = pick_tiers(cfg)
    paths = nvme_directories(cfg, nvme_path)
    io_options, drive, note = drive_settings(cfg, paths)
    caps = make_caps(cfg, device, paths, io_options.get("weights", ()))
    error: DoesNotFit | None = None
    update = cfg.tierflow.update if owned_loop else "deferred"
    candidates = ((c, s) for c in _candidates(param, optim) for s in _speculative_or_not(update, device, c[0]))
    for choice, speculative in candidates:
        if Tier.NVME in choice and not paths:
            continue
        limit = None if choice[0] is Tier.DEVICE else max(caps.device // 4, 1)
        units = _units(model, cfg, trained, limit)
        dtypes = {u.dtype for u in units if u.trainable}
        placement = Placement(
            choice[0], choice[1], pick_format(cfg, dtypes), _grad_dtype(cfg), device.type == "cpu",
            direct and device.type == "cpu", rule or rule_of(cfg), cfg.tierflow.gradients, speculative,
        )  # fmt: skip
        make_chunks(units, {u.index: kinds_of(u, placement) for u in units}, ShardGeometry())
        try:
            plan = _plan(model, units, placement, caps, device, cfg)
        except DoesNotFit as refused:
            error = refused
            continue
        return units, plan, Settings(device, paths, io_options, cfg.tierflow.prefetch, cfg.tierflow.update, drive, note)
    if error is None:  # only placements on NVMe were asked for
        raise missing_nvme_path()
    raise error


def _speculative_or_not(update: str, device: torch.device, param: Tier) -> tuple[bool, ...]:
    """Whether the plan has second slots, for updates in the backward: what is wanted most comes first.

    "auto" has them on an accelerator alone: where the processor computes the backward too, deferring was the faster
    (benchmarks/README.md). And with weights on NVMe alone: those in memory would be kept there besides.
    """
    if update == "auto":
        return (True, False) if device.type != "cpu" and param is Tier.NVME else (False,)
    return (update == "speculative",)


def _candidates(param: Tier | None, optim: Tier | None) -> list[tuple[Tier, Tier]]:
    """Placements to try, the fastest first: what the config fixes stays fixed."""
    order = list(Tier)
    pairs = [(p, o) for o in order for p in order if order.index(p) <= order.index(o)]
    return [(p, o) for p, o in pairs if param in (None, p) and optim in (None, o)]


def _units(model: nn.Module, cfg: Config, trained: set[int], limit: int | None) -> list[Unit]:
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in trained]
    for p in frozen:  # a unit is trainable if an optimizer group has it
        p.requires_grad_(False)
    try:
        # which shapes stay exact a name says for every dtype alike; each of them serves bf16
        units = partition(model, limit, resolve(cfg.tierflow.optimizer_state, torch.bfloat16).keeps_fp32)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    dtype = _half(cfg)
    if dtype is not None:
        for unit in units:
            if unit.dtype.is_floating_point:
                unit.dtype = dtype
    return units


def _grad_dtype(cfg: Config) -> torch.dtype | None:
    """The accumulator's dtype: the config's, fp32 when micro-batches are accumulated, else the parameters' own."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if cfg.data_types.grad_accum_dtype in named:
        return named[cfg.data_types.grad_accum_dtype]
    return torch.float32 if (cfg.gradient_accumulation_steps or 1) > 1 else None


def _plan(
    model: nn.Module, units: list[Unit], placement: Placement, caps: Any, device: torch.device, cfg: Config
) -> MemoryPlan:
    order = default_order(model, units)
    together = Together(units_together(model, units), units_of_blocks(model, units))
    plan = make_plan(units, placement, caps, together, order)
    piece = cfg.tierflow.piece_elements
    if piece is not None:  # whole I/O blocks of every kind, and room for two pieces at once
        most = plan.piece_elements * plan.pieces_in_flight // 2 // plan.grain * plan.grain
        plan = replace(plan, piece_elements=min(-(-piece // plan.grain) * plan.grain, most))
    read, written = estimate(units, plan, order, cfg.tierflow.prefetch, cfg.tierflow.update == "immediate")
    return replace(plan, nvme_read=read, nvme_written=written)


def _build(
    model: nn.Module, units: list[Unit], plan: MemoryPlan, settings: Settings, source: Source, debug: Any
) -> Engine:
    manager = build_manager(plan, settings.device, settings.nvme_paths, settings.aio, debug)
    for note in (manager.store.note, settings.note) if manager.store is not None else ():
        if note:
            log.warning(note)
    try:
        create_chunks(manager, units, plan.homes)
        for unit in units if plan.spare else ():
            for chunk in second_slots(unit, plan.homes):
                manager.nvme.add_spare(chunk)
        fill(manager, units, source)
        engine = Engine(model, units, plan, manager, settings.prefetch, settings.update)
        engine.io_options, engine.drive = settings.aio, settings.drive
        _move_buffers(model, settings.device)
        engine.attach()
    except BaseException:
        manager.close()
        raise
    return engine


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
