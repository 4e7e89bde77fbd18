"""What a fine-tuning run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: Tokens of each held-out document that are scored.
EVAL_TOKENS = 4096
#: Tokens of the sample before and after.
SAMPLE_TOKENS = 24


@dataclass(frozen=True)
class Options:
    """Everything the command line can say. Lengths in tokens; None means "take it from the config, or auto"."""

    model: Path
    data: tuple[Path, ...]
    output: Path
    config: Path | None = None
    eval_data: tuple[Path, ...] = ()
    sequence_length: int = 256
    micro_batch: int | None = None
    accumulation: int | None = None
    lr: float | None = None
    warmup: int = 0
    schedule: str | None = None
    steps: int | None = None
    epochs: float = 1.0
    seed: int = 0
    eval_tokens: int = EVAL_TOKENS
    eval_every: int = 0
    save_every: int = 0
    resume: bool = False
    prompt: str | None = None
    nvme_path: tuple[Path, ...] = ()
    report: bool = False
    trace: Path | None = None
    optimizer_state: str | None = None

    @property
    def swap(self) -> tuple[Path, ...]:
        """The folders for NVMe when the config names none."""
        return self.nvme_path or (self.output / "swap",)

    @property
    def checkpoint(self) -> Path:
        """Where ``save_every`` writes and ``resume`` reads."""
        return self.output / "checkpoint"
