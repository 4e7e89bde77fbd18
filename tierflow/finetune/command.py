"""``tierflow finetune``: prepares a run, shows what it will take, trains, and reports."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.logging import RichHandler

from tierflow.checkpoint import save_weights
from tierflow.config import Config, load_config
from tierflow.finetune.data import Batches, DataError, Tokens, load_sequences, load_tokens
from tierflow.finetune.estimate import transients
from tierflow.finetune.evaluate import held_out, sample, together
from tierflow.finetune.meter import Meter, StepRecord, peak_rss
from tierflow.finetune.options import SAMPLE_TOKENS, Options
from tierflow.finetune.outputs import plot, write_metrics
from tierflow.finetune.train import LearningRate, LossNotFinite, Trainer
from tierflow.loading import load
from tierflow.sizes import format_size as size
from tierflow.swap import Tier
from tierflow.tables import plan_notes, plan_table, print_config, resolved_config
from tierflow.training import TrainingEngine

#: Learning rate when neither the command line nor a config names one.
DEFAULT_LR = 2e-5


@dataclass
class Run:
    """A prepared run: the offloaded model and everything around it."""

    options: Options
    config: Config
    tokenizer: Any
    trainer: Trainer
    held_out: list[Tokens]
    rss_before: int


def finetune(options: Options, console: Console) -> None:
    """The whole command. Raises ConfigError, DataError, WeightsError, DoesNotFit, LossNotFinite, OSError."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    _quiet_transformers()
    torch.manual_seed(options.seed)
    with _folders(options):
        _run(prepare(options, console), console)


def _run(run: Run, console: Console) -> None:
    try:
        if run.config.tierflow.report:
            show(run, console)
        _train(run, console)
    finally:
        run.trainer.engine.close()


def prepare(options: Options, console: Console) -> Run:
    """Reads config and data before the model, so that a mistake shows at once; then loads to the tiers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = effective_config(options)
    if not (options.model / "config.json").exists():
        raise DataError(f"{options.model}: no config.json; --model takes the folder of a Hugging Face model")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    sequences = load_sequences(options.data, tokenizer, options.sequence_length)
    scored = load_tokens(options.eval_data, tokenizer)
    micro, accumulation = config.train_micro_batch_size_per_gpu or 1, config.gradient_accumulation_steps or 1
    batches = Batches(sequences, micro, accumulation, options.seed)
    before = peak_rss()
    with console.status("streaming weights to their tiers"):
        swap = [str(folder) for folder in options.swap]
        model, optimizer = load(AutoModelForCausalLM, options.model, config, nvme_path=swap, owned_loop=True)
    total = options.steps or batches.steps_for(options.epochs)
    learning_rate = LearningRate(config.scheduler, options, total)
    engine = TrainingEngine(model, optimizer, config)
    trainer = Trainer(engine, batches, options, total, Meter(optimizer.engine), learning_rate)
    return Run(options, config, tokenizer, trainer, scored, before)


@contextlib.contextmanager
def _folders(options: Options) -> Iterator[None]:
    """Makes the folder for what is trained, before the work. It goes again, as do its parents, if new and empty in the end."""
    if options.output.is_file():
        raise DataError(f"{options.output}: --output is a file; name a folder")
    own = () if options.nvme_path else options.swap  # perhaps left by a run that was killed
    made = [folder for folder in (options.output, *options.output.parents) if not folder.exists()]
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in (*own, *made):
            with contextlib.suppress(OSError):  # it holds something, or was never made
                folder.rmdir()


def effective_config(options: Options) -> Config:
    """The file's config, or all "auto", with what the command line says on top."""
    config = load_config(options.config)
    over: dict[str, Any] = {}
    named = config.optimizer.params.lr if config.optimizer is not None else None
    if options.lr is not None or named is None:
        over["optimizer"] = {"params": {"lr": options.lr if options.lr is not None else DEFAULT_LR}}
    if options.accumulation is not None:
        over["gradient_accumulation_steps"] = options.accumulation
    if options.micro_batch is not None:
        over["train_micro_batch_size_per_gpu"] = options.micro_batch
    own = {"trace": None if options.trace is None else str(options.trace), "optimizer_state": options.optimizer_state}
    over["tierflow"] = {name: value for name, value in own.items() if value is not None}
    return load_config(options.config, overrides=over)


def show(run: Run, console: Console) -> None:
    """The resolved config, the table of bytes, and what lies outside it."""
    engine, batches = run.trainer.optimizer.engine, run.trainer.batches
    resolved = resolved_config(run.config, engine)
    batch = {"train_micro_batch_size_per_gpu": batches.micro_batch, "gradient_accumulation_steps": batches.accumulation}
    print_config(console, resolved | batch | {"train_batch_size": batches.sequences_per_step})
    for note in run.config.ignored_notes(scheduler_used=True):
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(plan_table(engine.plan))
    for note in plan_notes(engine.plan):
        console.print(note, highlight=False, soft_wrap=True)
    outside = transients(run.trainer.model, batches.micro_batch, batches.sequences.length)
    console.print(
        f"outside the tiers, estimated: activations {size(outside.activations)}, logits {size(outside.logits)}, "
        f"gradients inside autograd {size(outside.gradients)}",
        highlight=False,
        soft_wrap=True,
    )
    store = engine.manager.store
    if store is not None:
        how = "O_DIRECT" if store.direct else "buffered"
        console.print(f"NVMe: {', '.join(path.path for path in store.paths)} through {store.engine}, {how}", highlight=False, soft_wrap=True)
    console.print(
        f"data: {len(batches.sequences):,} sequences of {batches.sequences.length} tokens; "
        f"{run.trainer.total} steps of {batches.tokens_per_step:,} tokens",
        highlight=False,
        soft_wrap=True,
    )


def _train(run: Run, console: Console) -> None:
    trainer, options = run.trainer, run.options
    first = 0
    if options.resume:
        first = trainer.resume()
        console.print(f"resumed from {options.checkpoint} at step {first + 1}", highlight=False, soft_wrap=True)
    text = _say(run, console, "before") if first == 0 else ""
    if first == 0:
        _evaluate(run, console, 0)
    trainer.meter.engine.take_report()

    def after(record: StepRecord) -> None:
        console.print(record.line(trainer.total), highlight=False, soft_wrap=True)
        if record.step == first and trainer.batches.accumulation > 1:
            console.print(str(trainer.engine.accumulation), highlight=False, soft_wrap=True)
        every = options.eval_every
        if every and (record.step + 1) % every == 0 and record.step + 1 < trainer.total:
            _evaluate(run, console, record.step + 1)
            trainer.model.train()
            trainer.meter.engine.take_report()

    try:
        trainer.run(first, after)
    except LossNotFinite:
        save_weights(trainer.model, options.output, run.tokenizer)
        console.print(f"the weights from before that step are in {options.output}", highlight=False, soft_wrap=True)
        raise
    _evaluate(run, console, trainer.total)
    after_text = _say(run, console, "after")
    _finish(run, console, {"before": text, "after": after_text})


def _evaluate(run: Run, console: Console, step: int) -> None:
    if not run.held_out:
        return
    with console.status("held-out loss") as status:
        results = held_out(
            run.trainer.model, run.held_out, window=run.options.sequence_length, limit=run.options.eval_tokens,
            batch=2, progress=lambda done, of: status.update(f"held-out loss, window {done} of {of}"),
        )  # fmt: skip
    run.trainer.history.evaluations.append((step, results))
    for result in [*results, together(results)] if len(results) > 1 else results:
        console.print(
            f"held out after {step} steps  {Path(result.name).name:32} loss {result.loss:.4f}  perplexity "
            f"{result.perplexity:.2f}  ({result.tokens:,} tokens)",
            highlight=False,
        soft_wrap=True,
        )


def _say(run: Run, console: Console, when: str) -> str:
    prompt = run.options.prompt or _first_words(run)
    text = sample(run.trainer.model, run.tokenizer, prompt, SAMPLE_TOKENS)
    console.print(f"sample {when}: [dim]{_shown(prompt)}[/][bold]{_shown(text)}", highlight=False, soft_wrap=True)
    return prompt + text


def _first_words(run: Run) -> str:
    """A prompt when none was given: the opening of the held-out, else of the training text."""
    if run.held_out:
        return str(run.tokenizer.decode(run.held_out[0].ids[200:216]))
    return str(run.tokenizer.decode(run.trainer.batches.sequences.ids[0][:16]))


def _shown(text: str) -> str:
    return text.replace("\n", " / ").replace("[", "\\[")


def _finish(run: Run, console: Console, samples: dict[str, str]) -> None:
    options, engine = run.options, run.trainer.optimizer.engine
    with console.status("saving weights"):
        save_weights(run.trainer.model, options.output, run.tokenizer)
    plan, peak = engine.plan, peak_rss()
    for tier in (Tier.DEVICE, Tier.HOST):
        pools = engine.manager.pools[tier]
        used = pools.resident.peak + pools.working.peak
        console.print(
            f"{tier.name}: at most {size(used)} in use of the {size(plan.total(tier))} planned and taken", highlight=False, soft_wrap=True
        )
    held = plan.total(Tier.DEVICE) + plan.total(Tier.HOST)
    console.print(
        f"peak resident memory of the process {size(peak)}: {size(run.rss_before)} before the model (Python, torch), "
        f"{size(held)} in the tiers' arenas, {size(peak - run.rss_before - held)} activations, autograd and the C allocator",
        highlight=False,
        soft_wrap=True,
    )
    picture = plot(run.trainer.history, run.trainer.meter, plan, options.output)
    write_metrics(run.trainer.history, plan, peak, samples, options.output)
    if options.report:
        console.print(str(run.trainer.meter.report()), highlight=False, markup=False, soft_wrap=True)
    console.print(f"model, metrics.json and {picture.name} are in {options.output}", highlight=False, soft_wrap=True)


def _quiet_transformers() -> None:
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
