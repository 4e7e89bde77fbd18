"""The ``tierflow`` command. Nothing here imports torch until a command needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from tierflow.stopping import Terminated, exit_code, sigterm_raises

app = typer.Typer(
    help="Train models whose state does not fit the accelerator.", no_args_is_help=True, pretty_exceptions_enable=False
)

bench = typer.Typer(help="Measure training on this machine.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(bench, name="bench")

Paths = list[Path]


@app.callback()
def main() -> None:
    """Train models whose state does not fit the accelerator."""


class _Lists(TyperCommand):
    """Lets ``--data`` and ``--eval-data`` take several values at once, as a shell's ``*.txt`` gives them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Writes the option again before each further value."""
        spread: list[str] = []
        option = None
        for word in args:
            if word.startswith("-"):
                option = word if word in ("--data", "--eval-data") else None
                first = True
            elif option is not None:
                if not first:
                    spread.append(option)
                first = False
            spread.append(word)
        return super().parse_args(ctx, spread)


@app.command(cls=_Lists)
def finetune(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face causal language model with safetensors.")],
    data: Annotated[Paths, typer.Option(help=".txt or .jsonl with `text` or `messages`; several may follow.")],
    output: Annotated[Path, typer.Option(help="Folder for the model, checkpoint, plot and metrics.")],
    config: Annotated[Path | None, typer.Option(help="Offload config (JSON); without one everything is auto.")] = None,
    eval_data: Annotated[Paths | None, typer.Option(help="Held-out files; several may follow.")] = None,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of a training sequence.")] = 256,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Sequences per forward.")] = None,
    accumulation: Annotated[int | None, typer.Option(min=1, help="Micro-batches per optimizer step.")] = None,
    lr: Annotated[float | None, typer.Option(min=0.0, help="Learning rate; default the config's, else 2e-5.")] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Warm-up steps.")] = 0,
    schedule: Annotated[str | None, typer.Option(help="constant, linear or cosine; default the config's, else cosine.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; overrides --epochs.")] = None,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the data.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Order of the data, and torch's generator.")] = 0,
    eval_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each held-out file that are scored.")] = 4096,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0: only before and after.")] = 0,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: none.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUTPUT/checkpoint.")] = False,
    prompt: Annotated[str | None, typer.Option(help="Prompt of the sample; default the first held-out text.")] = None,
    optimizer_state: Annotated[str | None, typer.Option(help="State format: auto, fp32, lossless, bf16, int8 or int8-24bit; the last three are lossy.")] = None,
    nvme_path: Annotated[Paths | None, typer.Option(help="Swap folder if the config names none, again for each further one; default OUTPUT/swap.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Say at the end where a step's time went and what bounds it.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Chrome trace of steps 2 to 4 for Perfetto (JSON).")] = None,
) -> None:
    """Fine-tune every parameter of a pretrained model, its training state wherever there is room."""
    from tierflow.finetune.command import finetune as run
    from tierflow.finetune.options import Options

    options = Options(
        model, tuple(data), output, config, tuple(eval_data or ()), sequence_length, micro_batch, accumulation, lr,
        warmup, schedule, steps, epochs, seed, eval_tokens, eval_every, save_every, resume, prompt, tuple(nvme_path or ()),
        report, trace, optimizer_state,
    )  # fmt: skip
    console = Console()
    with _errors(console):
        run(options, console)


@bench.callback()
def _bench() -> None:
    """Measure training on this machine."""


@bench.command("train")
def bench_train(
    shape: Annotated[str, typer.Option(help="llama-1b, -3b, -7b, -8b, -13b, -70b, or a Hugging Face config file or folder.")],
    device_memory: Annotated[str | None, typer.Option(help="Cap on device memory, as 24GB; with CUDA on all the process takes of it.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="Cap on what tierflow holds in host memory.")] = None,
    nvme: Annotated[Paths | None, typer.Option(help="Folder on the drive for what lives on NVMe; again for each further one.")] = None,
    param: Annotated[str | None, typer.Option(help="Where weights live: device, cpu, nvme or auto.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="Where optimizer states live: device, cpu, nvme or auto.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16; auto: bfloat16 on an accelerator, else float32.")] = "auto",
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences per forward; default the config's, else 1.")] = None,
    accumulation: Annotated[int | None, typer.Option(min=1, help="Micro-batches per optimizer step.")] = None,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps; the first is not in the figures if there are more.")] = 4,
    layers: Annotated[int | None, typer.Option(min=1, help="Cut the model to so many layers: no longer that model.")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Activation checkpointing.")] = False,
    clip: Annotated[float | None, typer.Option(min=0.0, help="Clip the gradient's norm at this.")] = None,
    head_chunk: Annotated[int | None, typer.Option(min=1, help="Tokens whose logits exist at once; head and embedding gradients in blocks. CPU only.")] = None,
    private_memory: Annotated[str | None, typer.Option(help="Have the kernel refuse the process more private memory (RLIMIT_DATA).")] = None,
    optimizer_state: Annotated[str | None, typer.Option(help="State format: auto, fp32, lossless, bf16, int8 or int8-24bit; the last three are lossy.")] = None,
    config: Annotated[Path | None, typer.Option(help="Offload config (JSON) for anything else; options come before it.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and tokens.")] = 0,
) -> None:
    """Train a model of any shape on random weights and tokens, and say what it took."""
    from tierflow.bench.command import train
    from tierflow.bench.options import Options

    options = Options(
        shape, device_memory, host_memory, tuple(nvme or ()), param, optimizer, dtype, batch, accumulation, sequence_length, steps,
        layers, checkpointing, clip, head_chunk, private_memory, config, json, seed, optimizer_state,
    )  # fmt: skip
    console = Console()
    with _errors(console):
        train(options, console)


@app.command()
def tune(
    paths: Annotated[Paths, typer.Argument(help="Folders on the drives; several are used at once.", metavar="PATH...")],
    time: Annotated[float, typer.Option(help="Seconds that all of it takes at most, --sustained apart.")] = 60.0,
    size: Annotated[str, typer.Option(help="Bytes of the file that the result is measured on, for each path.")] = "1GiB",
    read_only: Annotated[bool, typer.Option("--read-only", help="Measure reads alone; each file is still written once.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the profile on stdout, everything else on stderr.")] = False,
    output: Annotated[Path, typer.Option(help="The profile; the heat map beside it ends in .png.")] = Path("aio_profile.json"),
    parameters: Annotated[str | None, typer.Option(help="Say the step-time floor of so large a model, as 13B.")] = None,
    optimizer_state: Annotated[str, typer.Option(help="State format, lossless, fp32, bf16, int8 or int8-24bit: the mixed load's ratio, and the floor's.")] = "lossless",
    sustained: Annotated[str | None, typer.Option(help="Also write so many bytes on end, as 200GB, to find where a write cache is full.")] = None,
) -> None:
    """Find the fastest way to read and write drives, and write it down for "aio" in a config."""
    from tierflow.tune.command import tune as run
    from tierflow.tune.options import Options

    console = Console(stderr=json)
    with _errors(console):
        run(Options(tuple(paths), time, size, read_only, json, output, parameters, optimizer_state, sustained), console)


@app.command()
def env(path: Annotated[Paths | None, typer.Option(help="A folder to check for O_DIRECT and free space; again for each further one.")] = None) -> None:
    """Say what this machine can do for each part, and why not."""
    from tierflow.env import render

    render(path or ())


@contextmanager
def _errors(console: Console) -> Iterator[None]:
    """Turns an expected failure, Ctrl-C or SIGTERM into one message and its exit code; the rest keeps its traceback."""
    try:
        with sigterm_raises():
            yield
    except KeyboardInterrupt as stop:
        console.print("terminated" if isinstance(stop, Terminated) else "interrupted")
        raise typer.Exit(exit_code(stop)) from None
    except (ValueError, OSError, FloatingPointError, ImportError, RuntimeError) as error:
        if not _expected(error):
            raise
        console.print(f"[bold red]error:[/] {error}", highlight=False, markup=True, soft_wrap=True)
        raise typer.Exit(1) from None


def _expected(error: Exception) -> bool:
    """Whether it names what is wrong and the remedy. A RuntimeError that is no CapacityError is a defect."""
    from tierflow.swap.types import CapacityError

    return not isinstance(error, RuntimeError) or isinstance(error, CapacityError)
