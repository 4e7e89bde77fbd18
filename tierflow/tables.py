"""Tables for the terminal."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from tierflow.config import Config
from tierflow.scheduler.engine import Engine
from tierflow.scheduler.plan import MemoryPlan, rows
from tierflow.sizes import format_size as size
from tierflow.swap import Tier

_CAPS = {Tier.DEVICE: "device_memory", Tier.HOST: "host_memory", Tier.NVME: "nvme_capacity"}


def plan_table(plan: MemoryPlan) -> Table:
    """Bytes per tier and kind beside the caps and what the machine has."""
    table = Table(title="where the training state lives", title_justify="left")
    for name, justify in (("tier", "left"), ("what", "left"), ("bytes", "right"), ("", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    listed = rows(plan)
    for tier in Tier:
        for name, what, nbytes in listed:
            if name == tier.name:
                table.add_row(name, what, f"{nbytes:,}", size(nbytes))
        have = plan.caps.machine.get(tier)
        free = "" if have is None else f", machine has {size(have)} free"
        cap = f"cap {size(plan.caps.of(tier))} ({_CAPS[tier]}){free}"
        table.add_row(f"[bold]{tier.name}", f"[bold]total[/], {cap}", f"[bold]{plan.total(tier):,}", size(plan.total(tier)))
        table.add_section()
    return table


def plan_notes(plan: MemoryPlan) -> list[str]:
    """Traffic, wear, and why the caps suffice, a line each."""
    state = sum(n for (_, kind), n in plan.resident.items())
    held = plan.total(Tier.DEVICE) + plan.total(Tier.HOST)
    lines = [
        f"training state {size(state)} for {plan.parameters:,} parameters, format {plan.placement.state_format}; "
        f"device and host together hold at most {size(held)} of it"
    ]
    if plan.states:
        lines.append(plan.format_text)
    lines.append(
        f"these caps suffice: working memory needs {size(plan.least[Tier.DEVICE])} on DEVICE for the modules that run at "
        f"once and {size(plan.least[Tier.HOST])} on HOST for staging, and has {size(plan.working[Tier.DEVICE])} and "
        f"{size(plan.working[Tier.HOST])}; the rest caches what is used next"
    )
    if plan.total(Tier.NVME):
        lines.append(
            f"NVMe per step with one micro-batch: {size(plan.nvme_read)} read, {size(plan.nvme_written)} written; "
            f"{plan.steps_to_tbw:,.0f} steps to 600 TBW"
        )
        lines.append(
            f"update: {plan.pieces_in_flight} pieces of {plan.piece_elements:,} parameters in flight, "
            "staged in the host's working memory; fetched units share it during forward and backward"
        )
    return lines


def resolved_config(config: Config, engine: Engine) -> dict[str, Any]:
    """The config with every "auto" replaced by what this run settled on."""
    plan, store = engine.plan, engine.manager.store
    names = {Tier.DEVICE: "none", Tier.HOST: "cpu", Tier.NVME: "nvme"}
    out = config.resolved()
    zero = out["zero_optimization"]
    names_of = [path.path for path in store.paths] if store else []
    folders = names_of[0] if len(names_of) == 1 else names_of
    for block, tier in (("offload_param", plan.placement.param), ("offload_optimizer", plan.placement.optimizer)):
        zero[block] = {"device": names[tier]} | ({"nvme_path": folders} if store and tier is Tier.NVME else {})
    out["tierflow"] |= {
        "device_memory": plan.caps.device, "host_memory": plan.caps.host, "nvme_capacity": plan.caps.nvme,
        "optimizer_state": plan.placement.state_format, "device": str(engine.device),
        "engine": store.engine if store else "none", "piece_elements": plan.piece_elements,
    }  # fmt: skip
    return out


def print_config(console: Console, resolved: dict[str, Any]) -> None:
    """The resolved config as JSON, a block on each line."""
    console.print("[bold]resolved config")
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in resolved.items()]
    console.print("{\n" + ",\n".join(lines) + "\n}", highlight=False, markup=False, soft_wrap=True)
