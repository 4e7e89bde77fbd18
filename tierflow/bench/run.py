"""A training run on random tokens: prepared, stepped and measured."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tierflow.bench.loss import chunked_loss, has_plain_head
from tierflow.bench.options import Options, effective_config, in_options, read_size
from tierflow.bench.shapes import Shape, load_shape
from tierflow.bench.weights import random_weights
from tierflow.bench.work import Work, count_work
from tierflow.config import Config, ConfigError
from tierflow.finetune.estimate import transients
from tierflow.finetune.meter import Meter, StepRecord, peak_rss
from tierflow.finetune.train import token_loss
from tierflow.loading import build_from_config
from tierflow.optimizer import OffloadOptimizer
from tierflow.scheduler.blocks import deliver_in_blocks
from tierflow.scheduler.placement import DoesNotFit
from tierflow.settings import pick_device
from tierflow.swap import Tier
from tierflow.training import TrainingEngine, initialize

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Beside activations, what CUDA libraries hold of the device: workspaces, and what the caching allocator rounds up.
_CUDA_SLACK = 1 << 30


@dataclass
class Run:
    """A prepared run. Memory in bytes: resident before the model was built, and at most until it was in place."""

    options: Options
    config: Config
    shape: Shape
    dtype: torch.dtype
    device: torch.device
    engine: TrainingEngine
    work: Work
    rss_before: int
    rss_built: int
    build_seconds: float
    meter: Meter | None = None

    @property
    def optimizer(self) -> OffloadOptimizer:
        """The engine's."""
        return self.engine.optimizer

    @property
    def batch(self) -> int:
        """Sequences of a micro-batch."""
        return self.config.train_micro_batch_size_per_gpu or 1

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimizer step."""
        return self.config.gradient_accumulation_steps or 1

    @property
    def tokens_per_step(self) -> int:
        """Trained tokens of an optimizer step."""
        return self.batch * self.accumulation * self.options.sequence_length


def prepare(options: Options) -> Run:
    """Reads all input before anything is built; then places random weights, one parameter at a time.

    Raises ValueError naming the option, DoesNotFit, OSError.
    """
    try:
        config = effective_config(options)
        device = pick_device(config)
        if options.head_chunk is not None and device.type != "cpu":
            raise ValueError("--head-chunk: only on a CPU so far; leave it out")
        shape = load_shape(options.shape, options.layers)
        dtype = pick_dtype(options.dtype, device)
        before, began = peak_rss(), time.perf_counter()
        _limit_private_memory(options)
        model = _build(options, shape, dtype)
        config = _hold_process(config, device, model, options)
        std = float(getattr(shape.config.get_text_config(), "initializer_range", None) or 0.02)
        engine = initialize(model, config, source=random_weights(options.seed, std))
    except ConfigError as error:
        raise ConfigError(*(in_options(p) for p in error.problems)) from None
    except DoesNotFit as error:
        raise DoesNotFit(in_options(str(error)) + _untried(options), error.needed) from None
    if options.head_chunk is not None:
        deliver_in_blocks(model, engine.optimizer.engine.gradients.slots)
    work = count_work(model, options.checkpointing)
    return Run(
        options, config, shape, dtype, device, engine, work, before, peak_rss(), time.perf_counter() - began
    )


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The parameters' dtype; "auto" is bfloat16 on an accelerator and float32 on a CPU. Raises ValueError."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise ValueError(f"--dtype {name}: expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _build(options: Options, shape: Shape, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    kind = shape.config.model_type
    try:
        model = build_from_config(AutoModelForCausalLM, shape.config, dtype)
    except ValueError as error:
        raise ValueError(
            f"--shape {shape.name}: transformers builds no causal language model from a {kind!r} config: "
            f"{str(error).splitlines()[0][:200]}"
        ) from None
    limit = getattr(shape.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and options.sequence_length > limit:
        raise ValueError(
            f"--sequence-length {options.sequence_length}: {shape.origin} has {limit} positions; give that or less"
        )
    if options.checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ValueError(f"--checkpointing: transformers has none for a {kind!r} model; leave it out")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if options.head_chunk is not None and not has_plain_head(model):
        raise ValueError(f"--head-chunk: a {kind!r} model does more with its logits than a product; leave it out")
    model.train()
    return model


def _limit_private_memory(options: Options) -> None:
    """Has the kernel refuse the process more private writable memory than this."""
    if options.private_memory is None:
        return
    limit, hard = read_size("--private-memory", options.private_memory), resource.getrlimit(resource.RLIMIT_DATA)[1]
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    except ValueError:
        raise ValueError(f"--private-memory {options.private_memory}: above this process's own limit, {hard:,}") from None


def _untried(options: Options) -> str:
    return "" if options.nvme else "\nnothing was tried on NVMe: give --nvme PATH for that"


def _hold_process(config: Config, device: torch.device, model: nn.Module, options: Options) -> Config:
    """On CUDA, holds the whole process to --device-memory: what activations need comes off tierflow's share."""
    if device.type != "cuda" or options.device_memory in (None, "auto"):
        return config
    cap = config.tierflow.device_memory
    assert cap is not None
    have = torch.cuda.get_device_properties(device).total_memory
    if cap > have:
        raise ValueError(f"--device-memory {options.device_memory}: {device} has {have:,} bytes; give that or less")
    torch.cuda.set_per_process_memory_fraction(cap / have, device)
    outside = transients(model, config.train_micro_batch_size_per_gpu or 1, options.sequence_length)
    activations = 0 if options.checkpointing else outside.activations
    share = cap - activations - outside.logits - outside.gradients - _CUDA_SLACK
    if share <= 0:
        raise ValueError(
            f"--device-memory {options.device_memory}: activations, logits and autograd's gradients alone are estimated "
            f"at {cap - share:,} bytes; lower --batch or --sequence-length, use --checkpointing, or raise it"
        )
    return config.model_copy(update={"tierflow": config.tierflow.model_copy(update={"device_memory": share})})


def steps(run: Run) -> Iterator[StepRecord]:
    """Trains ``options.steps`` steps, a new random batch each, and yields their records."""
    meter = run.meter = Meter(run.optimizer.engine)
    meter.engine.take_report()  # the set-up's traffic is no step's
    generator = torch.Generator().manual_seed(run.options.seed)
    for index in range(run.options.steps):
        yield _step(run, meter, index, lambda: _tokens(run, generator))


def _tokens(run: Run, generator: torch.Generator) -> torch.Tensor:
    vocabulary = run.shape.config.get_text_config().vocab_size
    size = (run.batch, run.options.sequence_length)
    return torch.randint(0, vocabulary, size, generator=generator).to(run.device)


def _step(run: Run, meter: Meter, index: int, batch: Callable[[], torch.Tensor]) -> StepRecord:
    began = time.perf_counter()
    predicted = run.batch * run.accumulation * (run.options.sequence_length - 1)
    ids = [batch() for _ in range(run.accumulation)]
    loss = run.engine.train_batch(ids, lambda model, part: _loss(run, model, part, predicted), meter.enter).item()
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    lr, norm = float(run.optimizer.param_groups[0]["lr"]), run.optimizer.last_grad_norm or 0.0
    record = meter.end_step(index, loss, lr, run.tokens_per_step, norm)
    return replace(record, seconds=time.perf_counter() - began)


def _loss(run: Run, model: nn.Module, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    if run.options.head_chunk is None:
        return token_loss(model, ids, ids, tokens)
    return chunked_loss(model, ids, tokens, run.options.head_chunk)


def held(run: Run) -> dict[Tier, int]:
    """Bytes of each tier that were in use at most."""
    pools = run.optimizer.engine.manager.pools
    peaks: dict[Tier, Any] = {t: pools[t].resident.peak + pools[t].working.peak for t in (Tier.DEVICE, Tier.HOST)}
    return peaks | {Tier.NVME: run.optimizer.engine.plan.total(Tier.NVME)}
