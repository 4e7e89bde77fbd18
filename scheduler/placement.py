"""Where each kind lives, how much memory that takes, and whether the machine has it.

All figures are bytes. Everything here is arithmetic over sizes: no tensor is made and nothing allocated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tierflow.scheduler.units import Unit
from tierflow.swap import IO_BYTES, Kind, Tier

#: Endurance that the table relates the writes to: a common consumer drive's rating.
TBW_BYTES = 600 * 10**12


@dataclass(frozen=True)
class Placement:
    """The tier in which each kind lives, and the state format ("fp32" or "lossless")."""

    param: Tier
    optimizer: Tier
    state_format: str
    grad_dtype: torch.dtype | None = None  # None: each parameter's own
    device_is_host: bool = True  # no accelerator: the kernels work on DEVICE memory too

    @property
    def grad(self) -> Tier:
        """Gradients are where the update runs."""
        return Tier.DEVICE if self.optimizer is Tier.DEVICE else Tier.HOST

    def home(self, kind: Kind, trainable: bool = True) -> Tier:
        """The permanent tier of a kind."""
        if kind is Kind.PARAM:
            return self.param
        return self.grad if kind is Kind.GRAD else self.optimizer


def kinds_of(unit: Unit, placement: Placement) -> dict[Kind, int]:
    """Bytes per element of every kind that the unit has under the placement's format."""
    size = unit.dtype.itemsize
    kinds = {Kind.PARAM: size}
    if not unit.trainable:
        return kinds
    if unit.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"parameter {unit.slots[0].names[0]!r} is {str(unit.dtype)[6:]}: float32, bfloat16 and float16 can be trained; "
            "convert it, or freeze it with requires_grad_(False)"
        )
    kinds[Kind.GRAD] = (placement.grad_dtype or unit.dtype).itemsize
    if unit.dtype != torch.float32:
        lossless = placement.state_format == "lossless" and unit.dtype == torch.bfloat16
        kinds[Kind.MASTER] = 2 if lossless else 4
    return kinds | {Kind.EXP_AVG: 4, Kind.EXP_AVG_SQ: 4}


@dataclass(frozen=True)
class Caps:
    """What tierflow may hold in each tier, and what the machine has there now."""

    device: int
    host: int
    nvme: int
    machine: dict[Tier, int] = field(default_factory=dict)

    def of(self, tier: Tier) -> int:
        """The cap of a tier."""
        return {Tier.DEVICE: self.device, Tier.HOST: self.host, Tier.NVME: self.nvme}[tier]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per tier and kind, sizes of the pools, and NVMe traffic of one optimizer step."""

    placement: Placement
    caps: Caps
    resident: dict[tuple[Tier, Kind], int]
    working: dict[Tier, int]
    least: dict[Tier, int]  # of working memory, below which some module or piece could not run
    piece_elements: int
    pieces_in_flight: int
    parameters: int
    nvme_read: int
    nvme_written: int

    def resident_bytes(self, tier: Tier) -> int:
        """Bytes that stay in the tier for good."""
        return sum(n for (t, _), n in self.resident.items() if t is tier)

    def total(self, tier: Tier) -> int:
        """All that tierflow takes of the tier: the arena's, or the store's, exact size."""
        return self.resident_bytes(tier) + self.working.get(tier, 0)

    @property
    def steps_to_tbw(self) -> float:
        """Optimizer steps until TBW_BYTES are written, or infinity."""
        return TBW_BYTES / self.nvme_written if self.nvme_written else float("inf")


class DoesNotFit(ValueError):
    """The training state does not fit under the caps or the machine; the message holds the table and a remedy."""


@dataclass(frozen=True)
class Needs:
    """The least working memory that any order of use needs, and what the update pipeline wants."""

    device_min: int
    host_min: int
    device_all: int
    piece_bytes_per_element: int


def resident_bytes(units: list[Unit], placement: Placement) -> dict[tuple[Tier, Kind], int]:
    """Bytes of every (home tier, kind) over all units."""
    table: dict[tuple[Tier, Kind], int] = {}
    for unit in units:
        for kind, chunk in unit.chunks.items():
            key = placement.home(kind), kind
            table[key] = table.get(key, 0) + chunk.nbytes
    return table


def working_needs(units: list[Unit], placement: Placement, together: list[list[Unit]]) -> Needs:
    """``together``: sets of units that are pinned at once while some module runs."""
    nbytes = {u.index: u.chunk.nbytes for u in units}
    staged = 0
    weights_cross = placement.optimizer is Tier.HOST and placement.param is Tier.DEVICE and not placement.device_is_host
    if placement.optimizer is Tier.NVME or weights_cross:
        staged = max((_staged_bytes(u, placement) for u in units), default=0)
    if placement.param is Tier.DEVICE:
        return Needs(0, 2 * IO_BYTES * staged, 0, staged)
    device_min = max((sum(nbytes[u.index] for u in group) for group in together), default=0)
    host_min = max(nbytes.values(), default=0) if placement.param is Tier.NVME else 0
    return Needs(device_min, max(host_min, 2 * IO_BYTES * staged), sum(nbytes.values()), staged)


def _staged_bytes(unit: Unit, placement: Placement) -> int:
    kinds = (Kind.PARAM, Kind.MASTER, Kind.EXP_AVG, Kind.EXP_AVG_SQ)
    return sum(
        chunk.itemsize
        for kind, chunk in unit.chunks.items()
        if kind in kinds and unit.trainable and placement.home(kind) is not Tier.HOST
    )


#: A piece of the update: large enough for the drive, small enough that several fit beside the gradients.
_PIECE_ELEMENTS = 1 << 21
_PIECES = 6


def make_plan(
    units: list[Unit], placement: Placement, caps: Caps, together: list[list[Unit]], traffic: tuple[int, int]
) -> MemoryPlan:
    """The plan, or DoesNotFit with the table and the settings that would do.

    ``traffic``: NVMe bytes read and written by one step, as ``traffic.estimate`` gives them.
    """
    table = resident_bytes(units, placement)
    needs = working_needs(units, placement, together)
    stay = {t: sum(n for (tier, _), n in table.items() if tier is t) for t in Tier}
    least = {Tier.DEVICE: needs.device_min, Tier.HOST: needs.host_min, Tier.NVME: 0}
    room = {t: caps.of(t) - stay[t] for t in Tier}
    most_pieces = _PIECES * _PIECE_ELEMENTS * needs.piece_bytes_per_element
    cache = needs.device_all if placement.param is Tier.NVME else 0
    useful = {Tier.DEVICE: needs.device_all, Tier.HOST: max(cache, most_pieces, least[Tier.HOST])}
    least = {t: _whole(n) for t, n in least.items()}
    working = {t: max(least[t], min(_below(room[t]), _whole(useful[t]))) for t in (Tier.DEVICE, Tier.HOST)}
    piece, depth = _pieces(working[Tier.HOST], needs.piece_bytes_per_element)
    plan = MemoryPlan(
        placement, caps, table, working, least, piece, depth,
        sum(s.numel for u in units for s in u.slots), *traffic,
    )  # fmt: skip
    short = {t: stay[t] + least[t] for t in Tier if stay[t] + least[t] > caps.of(t)}
    over = {t: plan.total(t) for t, have in caps.machine.items() if plan.total(t) > have}
    if short or over:
        raise DoesNotFit(_explain(plan, short, over))
    return plan


def _whole(nbytes: int) -> int:
    return -(-max(nbytes, 0) // IO_BYTES) * IO_BYTES


def _below(nbytes: int) -> int:
    return max(nbytes, 0) // IO_BYTES * IO_BYTES


def _pieces(working: int, per_element: int) -> tuple[int, int]:
    """(elements of a piece, pieces in flight) that fit the host working pool."""
    if not per_element:
        return _PIECE_ELEMENTS, _PIECES
    for depth in (_PIECES, 4, 2):
        fit = working // (depth * per_element) // IO_BYTES * IO_BYTES
        if fit >= min(_PIECE_ELEMENTS, 1 << 18):
            return min(fit, _PIECE_ELEMENTS), depth
    return max(working // (2 * per_element) // IO_BYTES * IO_BYTES, IO_BYTES), 2


def _explain(plan: MemoryPlan, short: dict[Tier, int], over: dict[Tier, int]) -> str:
    lines = ["the training state does not fit:", table_text(plan)]
    names = {Tier.DEVICE: "device_memory", Tier.HOST: "host_memory", Tier.NVME: "nvme_capacity"}
    for tier, need in short.items():
        if tier not in over:
            lines.append(
                f"tierflow.{names[tier]} is {plan.caps.of(tier):,} bytes; at least {need:,} are needed: "
                f'set "{names[tier]}": "{-(-need // 10**6)}MB" or more{_slower(plan, tier)}'
            )
    for tier, need in over.items():
        lower = f" or lower tierflow.{names[tier]}" if tier not in short else ""
        lines.append(
            f"the machine has {plan.caps.machine[tier]:,} bytes of {tier.value} free and the plan takes {need:,}: "
            f"free some{lower}{_slower(plan, tier)}"
        )
    return "\n".join(lines)


def _slower(plan: MemoryPlan, tier: Tier) -> str:
    """The remedy of moving what lives in the tier for good, where something does that can move."""
    movable = {Kind.PARAM: "offload_param", Kind.EXP_AVG: "offload_optimizer"}
    blocks = [block for kind, block in movable.items() if plan.resident.get((tier, kind))]
    if tier is Tier.NVME or not blocks:
        return ""
    target = '"cpu" or "nvme"' if tier is Tier.DEVICE else '"nvme"'
    return f", or set the device of zero_optimization.{' and '.join(blocks)} to {target}"


def rows(plan: MemoryPlan) -> list[tuple[str, str, int]]:
    """(tier, what, bytes) of every part of the plan, in tier order."""
    out = []
    for tier in Tier:
        for kind in Kind:
            if n := plan.resident.get((tier, kind)):
                out.append((tier.name, kind.value, n))
        if n := plan.working.get(tier, 0):
            out.append((tier.name, "working (fetched units, staging)", n))
    return out


def table_text(plan: MemoryPlan) -> str:
    """The plan as plain text: bytes per tier and kind, the caps and what the machine has."""
    lines = [f"{'tier':8}{'what':36}{'bytes':>18}"]
    lines += [f"{tier:8}{what:36}{n:>18,}" for tier, what, n in rows(plan)]
    for tier in Tier:
        have = plan.caps.machine.get(tier)
        free = "" if have is None else f", free on this machine {have:,}"
        lines.append(f"{tier.name:8}{'total':36}{plan.total(tier):>18,}  cap {plan.caps.of(tier):,}{free}")
    if plan.nvme_written:
        lines.append(f"NVMe per step: {plan.nvme_read:,} bytes read, {plan.nvme_written:,} bytes written")
        lines.append(f"{plan.steps_to_tbw:,.0f} steps to 600 TBW")
    return "\n".join(lines)
