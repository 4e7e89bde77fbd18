"""The profile: what ``tierflow tune`` found, as a JSON file that a config takes as ``"aio": "profile.json"``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from tierflow.scheduler.rates import Bandwidths

FORMAT: Literal["tierflow-tune-1"] = "tierflow-tune-1"
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoadFigures(_Part):
    """One load. Rates in bytes per second: medians by direction (0 for one that it lacks), lowest and highest of both
    together; latencies in seconds, of requests of one block; CPU seconds per GiB."""

    read: Annotated[float, Field(ge=0)]
    write: Annotated[float, Field(ge=0)]
    low: Rate
    high: Rate
    latency_p50: float
    latency_p99: float
    cpu_per_gib: float
    samples: Annotated[int, Field(ge=1)]


class Tried(_Part):
    """A setting that was looked at. ``score``: bytes per second of a step (of reads, where only these were measured)."""

    engine: str
    block_size: int
    queue_depth: int
    rings: int
    huge_pages: bool
    score: float
    rates: dict[str, float]


class Profile(_Part):
    """``queue_depth``: blocks in flight on a path, all ``rings`` together; threads, for that engine. ``weights``: each
    path's share.

    ``read``, ``write`` and ``mixed`` are None where they were not measured; ``mixed_ratio``: reads to writes.
    """

    format: Literal["tierflow-tune-1"] = FORMAT
    made: str
    command: str
    paths: list[str]
    weights: list[Rate]
    engine: Literal["io_uring", "threads"]
    block_size: Annotated[int, Field(ge=1, le=1 << 30)]
    queue_depth: Annotated[int, Field(ge=1, le=1024)]
    rings: Annotated[int, Field(ge=1, le=64)]
    huge_pages: bool
    size: Count
    mixed_ratio: tuple[int, int]
    read: LoadFigures
    write: LoadFigures | None = None
    mixed: LoadFigures | None = None
    effects: dict[str, dict[str, float]] = {}
    tried: list[Tried] = []
    complete: bool
    seconds: float
    bytes_written: Count
    cautions: list[str] = []
    machine: dict[str, Any] = {}
    sustained: dict[str, Any] | None = None

    @field_validator("weights")
    @classmethod
    def _one_for_each_path(cls, weights: list[float], info: ValidationInfo) -> list[float]:
        if len(weights) != len(info.data.get("paths", weights)):
            raise ValueError("there must be one for each path")
        return weights

    def aio_settings(self) -> dict[str, Any]:
        """As the keys of a config's ``aio`` block."""
        threads = {"intra_op_parallelism": self.queue_depth} if self.engine == "threads" else {}
        depth = {} if self.engine == "threads" else {"queue_depth": self.queue_depth}
        rings = {"rings": self.rings} if self.rings > 1 else {}
        return {"block_size": self.block_size, **depth, **threads, **rings}

    def bandwidths(self) -> Bandwidths | None:
        """The drive's rates as the scheduler takes them; None where writes were not measured."""
        if self.write is None or self.mixed is None:
            return None
        return Bandwidths(self.read.read, self.write.write, self.mixed.read, self.mixed.write)

    def deepspeed_block(self) -> dict[str, Any]:
        """The same setting in the names that DeepSpeed 0.19 reads.

        Its ``intra_op_parallelism`` (before: ``thread_count``, which is no longer read) is how many threads share a
        tensor, each with a queue of its own: rings here, or threads with one block in flight each.
        """
        threads = self.engine == "threads"
        return {
            "block_size": self.block_size,
            "queue_depth": 1 if threads else self.queue_depth // self.rings,
            "intra_op_parallelism": self.queue_depth if threads else self.rings,
            "single_submit": False,
            "overlap_events": True,
            "use_gds": False,
        }

    def write_to(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        partial = Path(f"{path}.partial")
        try:
            partial.write_text(self.model_dump_json(indent=1) + "\n")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def read_profile(path: str | Path) -> Profile:
    """Raises ValueError with one sentence that names the file, the field and the remedy."""
    remedy = "run `tierflow tune PATH --output FILE` anew"
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the profile {path} cannot be read: {error.strerror or error}; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"the profile {path} is not JSON: {error}; {remedy}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f'{path} is no profile of `tierflow tune`: its "format" is not "{FORMAT}"; {remedy}')
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"the profile {path} cannot be used: {field}: {first['msg']}; {remedy}") from None
