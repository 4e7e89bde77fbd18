"""Tables and sentences for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from tierflow.sizes import format_size
from tierflow.tune.device import Device
from tierflow.tune.facts import Facts
from tierflow.tune.floor import Format, step_seconds
from tierflow.tune.knobs import size
from tierflow.tune.profile import LoadFigures, Profile
from tierflow.tune.sustained import Sustained

_NAMES = {"read": "reads", "write": "writes", "mixed": "mixed"}
_KNOBS = {"block_size": "block size", "queue_depth": "blocks in flight", "huge_pages": "pages"}


def device_table(facts: Facts) -> Table:
    """One row for each path, and one for each device beneath it."""
    table = Table(title="what is there", title_justify="left")
    table.add_column("path or device", overflow="fold")
    table.add_column("here", overflow="fold")
    for path in facts.paths:
        direct = f"O_DIRECT, aligned to {path.alignment} B" if path.direct else "no O_DIRECT"
        table.add_row(Text(path.path, style="bold"), f"{path.file_system} at {path.mount}; {format_size(path.free)} free; {direct}")
        if path.device is None:
            table.add_row("  no block device", "none that this process can see")
        for depth, device in path.device.walk() if path.device else ():
            table.add_row("  " * (depth + 1) + device.name, "; ".join(_describe(device)))
    limit = "no limit" if facts.memlock is None else format_size(facts.memlock)
    lifted = ", lifted by CAP_IPC_LOCK" if facts.memlock is not None and facts.may_lock_more else ""
    engines = ", ".join(facts.engines)
    table.add_row("machine", f"engines: {engines}; transparent huge pages: {facts.huge_pages or 'none'}; locked memory: {limit}{lifted}")
    return table


def _describe(device: Device) -> Iterator[str]:
    yield f"{device.kind} {device.level}".strip() + (f" over {len(device.members)}" if len(device.members) > 1 else "")
    if device.model:
        yield device.model
    if device.rotational is not None:
        yield "rotational by the kernel's word" if device.rotational else "not rotational"
    if device.logical_block:
        yield f"blocks of {device.logical_block} B (physical {device.physical_block} B)"
    if device.max_request:
        yield f"requests up to {size(device.max_request)} in {device.max_segments} segments"
    if device.stripe:
        yield f"stripe {size(device.stripe)}"
    if device.scheduler:
        yield f"scheduler {device.scheduler}"
    if device.write_cache:
        yield f"cache: {device.write_cache}"
    if device.pcie:
        yield f"PCIe {device.pcie}"
    if device.numa_node is not None:
        yield f"NUMA node {device.numa_node}"


def figures_table(profile: Profile) -> Table:
    """What the profile's setting gives."""
    table = Table(title=f"with {setting_text(profile)}", title_justify="left")
    headings = ("", "GB/s (median)", "lowest to highest", "p50 ms", "p99 ms", "CPU s per GiB")
    for heading in headings:
        table.add_column(heading, justify="left" if not heading else "right")
    for kind, name in _NAMES.items():
        figures: LoadFigures | None = getattr(profile, kind)
        if figures is None:
            continue
        rate = f"{(figures.read + figures.write) / 1e9:.2f}"
        if kind == "mixed":
            rate = f"{figures.read / 1e9:.2f} + {figures.write / 1e9:.2f}"
            name = f"mixed, {profile.mixed_ratio[0]} read : {profile.mixed_ratio[1]} written"
        table.add_row(
            name, rate, f"{figures.low / 1e9:.2f} to {figures.high / 1e9:.2f}", f"{figures.latency_p50 * 1e3:.2f}",
            f"{figures.latency_p99 * 1e3:.2f}", f"{figures.cpu_per_gib:.3f}",
        )  # fmt: skip
    table.caption = f"latency: one request of {size(profile.block_size)} with the queue full; {profile.read.samples} samples of each load"
    table.caption_justify = "left"
    return table


def effects_table(profile: Profile) -> Table:
    """What each knob alone does to the score."""
    what = "a step's bytes per second" if profile.write else "reads"
    table = Table(title=f"each knob alone: {what}, relative to the setting found", title_justify="left")
    table.add_column("knob")
    table.add_column("value: ratio", overflow="fold")
    for knob, values in profile.effects.items():
        own = str(getattr(profile, knob))
        words = [_value(knob, value, ratio, value == own) for value, ratio in values.items()]
        if len(words) > 1:
            table.add_row(_KNOBS.get(knob, knob), Text.assemble(*_joined(words)))
    return table


def _value(knob: str, value: str, ratio: float, own: bool) -> tuple[str, str]:
    shown = value
    if knob == "block_size":
        shown = size(int(value))
    elif knob == "huge_pages":
        shown = "huge" if value == "True" else "4 KiB"
    return f"{shown}: {ratio:.2f}", "bold green" if own else ""


def _joined(words: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for number, word in enumerate(words):
        if number:
            yield "   ", ""
        yield word


def setting_text(profile: Profile) -> str:
    """The setting in words."""
    pages = "huge pages" if profile.huge_pages else "4 KiB pages"
    depth = f"{profile.queue_depth} threads" if profile.engine == "threads" else f"{profile.queue_depth} in flight"
    rings = f", {profile.rings} rings" if profile.rings > 1 else ""
    return f"{profile.engine}, blocks of {size(profile.block_size)}, {depth}{rings}, {pages}"


def floor_lines(profile: Profile, parameters: int, state: Format) -> list[str]:
    """The step-time floor of a model, a line for each placement."""
    rates = profile.bandwidths()
    if rates is None:
        return ["no step-time floor: --read-only measured no writes"]
    lines = [f"floor of a step of {parameters:,} parameters, state format {state.name} (the drive alone; compute comes beside it):"]
    placements = (("optimizer states on NVMe", state.states), ("everything on NVMe", state.everything))
    for name, (read, written) in placements:
        seconds = step_seconds(parameters, (read, written), rates)
        lines.append(
            f"  {name}: {seconds:.2f} s  ({format_size(round(parameters * read))} read, {format_size(round(parameters * written))} written; "
            f"{read} + {written} bytes per parameter)"
        )
    return lines


def deepspeed_lines(profile: Profile) -> list[str]:
    """The block for DeepSpeed's config."""
    return [
        "DeepSpeed's names for it (found with tierflow's engine; DeepSpeed's own was not measured):",
        f'"aio": {json.dumps(profile.deepspeed_block(), indent=2)}',
    ]


def sustained_lines(found: Sustained) -> list[str]:
    """Where the write cache ended."""
    lines = [f"sustained writes: {found.before / 1e9:.2f} GB/s"]
    if found.cache is None:
        lines[0] += ", with no collapse up to the end"
    else:
        lines[0] += f" until {format_size(found.cache)} were written, then {found.after / 1e9:.2f} GB/s"
    if found.rewrote:
        lines.append("places were written more than once, for the file is shorter than --sustained: that may hide or bring a collapse")
    return lines
