"""The memory plan: bytes per tier and kind, pools, pieces, and what it says when they do not fit.

All figures are bytes. Everything here is arithmetic over sizes: no tensor is made and nothing allocated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import torch

from tierflow.cpu_adam.formats import resolve
from tierflow.scheduler.choice import choose_homes
from tierflow.scheduler.homes import Homes, needs_of, second_slots
from tierflow.scheduler.placement import BUFFERS, PIECE_ELEMENTS, Caps, DoesNotFit, Placement, Together
from tierflow.scheduler.units import STATES, Unit
from tierflow.swap import IO_BYTES, Kind, Tier

#: Endurance that the table relates the writes to: a common consumer drive's rating.
TBW_BYTES = 600 * 10**12


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per tier and kind, sizes of the pools, and NVMe traffic of one optimizer step."""

    placement: Placement
    homes: Homes
    caps: Caps
    resident: dict[tuple[Tier, Kind], int]
    working: dict[Tier, int]
    least: dict[Tier, int]  # of working memory, below which some module or piece could not run
    piece_elements: int
    pieces_in_flight: int
    parameters: int
    spare: int = 0  # second slots on NVMe, for updates that may be undone
    nvme_read: int = 0
    nvme_written: int = 0
    grain: int = IO_BYTES  # a piece is so many elements, or a multiple
    states: dict[Kind, int] = field(default_factory=dict)  # bytes of optimizer state, wherever they live
    trained: int = 0  # parameters that have some
    window: int = 0  # of HOST, for gradients that live on NVMe

    @property
    def format_text(self) -> str:
        """The state format, and its bytes as they are in this model, padding included."""
        total = sum(self.states.values())
        each = total / self.trained if self.trained else 0.0
        lossy = ", lossy: norms, biases and small parameters stay exact" if self.lossy else ""
        parts = " + ".join(f"{kind.value} {n:,}" for kind, n in self.states.items())
        return (
            f"{self.placement.state_format} states of {self.placement.rule.name}{lossy}: {total:,} bytes beside the weights "
            f"({parts}), {each:.3f} a parameter"
        )

    @property
    def lossy(self) -> bool:
        """Whether the numbers are other than those of fp32 states."""
        return resolve(self.placement.state_format, torch.bfloat16).lossy  # which a name says, whatever the dtype

    def resident_bytes(self, tier: Tier) -> int:
        """Bytes that stay in the tier for good."""
        return sum(n for (t, _), n in self.resident.items() if t is tier)

    def total(self, tier: Tier) -> int:
        """All that tierflow takes of the tier: the arena's, or the store's, exact size."""
        apart = {Tier.NVME: self.spare, Tier.HOST: self.window}.get(tier, 0)
        return self.resident_bytes(tier) + self.working.get(tier, 0) + apart

    def landing(self, units: list[Unit]) -> int:
        """Bytes of HOST through which weights come up from NVMe: nothing where they are read into DEVICE itself."""
        on_nvme = [u.chunk.nbytes for u in units if self.homes.of(u, Kind.PARAM) is Tier.NVME]
        return 0 if self.placement.direct else sum(sorted(on_nvme)[-BUFFERS:])

    @property
    def steps_to_tbw(self) -> float:
        """Optimizer steps until TBW_BYTES are written, or infinity."""
        return TBW_BYTES / self.nvme_written if self.nvme_written else float("inf")


def make_plan(
    units: list[Unit], placement: Placement, caps: Caps, together: Together, order: list[int]
) -> MemoryPlan:
    """The plan, or DoesNotFit with the table and the settings that would do; its NVMe traffic is still to be counted.

    ``order``: unit indices in order of use.
    """
    homes = choose_homes(units, placement, caps, together, order)
    needs = needs_of(homes, units, placement, together)
    table = homes.resident(units)
    spare = sum(c.nbytes for u in units for c in second_slots(u, homes)) if placement.speculative else 0
    stay = {t: homes.stay(units, t) for t in Tier}
    stay[Tier.NVME] += spare
    least = {Tier.DEVICE: _whole(needs.device_min), Tier.HOST: _whole(needs.host_min), Tier.NVME: 0}
    useful = {Tier.DEVICE: sum(u.chunk.nbytes for u in homes.streamed(units)), Tier.HOST: needs.host_good}
    room = {t: caps.of(t) - stay[t] for t in Tier}
    working = {t: max(least[t], min(_below(room[t]), _whole(useful[t]))) for t in (Tier.DEVICE, Tier.HOST)}
    piece, depth = _pieces(working[Tier.HOST], needs.staged, needs.grain)
    states = {kind: sum(c.nbytes for u in units for c in u.states if c.kind is kind) for kind in STATES}
    plan = MemoryPlan(
        placement, homes, caps, table, working, least, piece, depth,
        sum(s.numel for u in units for s in u.slots), spare, grain=needs.grain,
        states={kind: total for kind, total in states.items() if total},
        trained=sum(s.numel for u in units if u.trainable for s in u.slots), window=homes.window(units),
    )  # fmt: skip
    short = {t: stay[t] + least[t] for t in Tier if stay[t] + least[t] > caps.of(t)}
    over = {t: plan.total(t) for t, have in caps.machine.items() if plan.total(t) > have}
    if short or over:
        raise DoesNotFit(_explain(plan, short, over), short)
    return plan


def _whole(nbytes: int) -> int:
    return -(-max(nbytes, 0) // IO_BYTES) * IO_BYTES


def _below(nbytes: int) -> int:
    return max(nbytes, 0) // IO_BYTES * IO_BYTES


def _pieces(working: int, per_element: Fraction, grain: int) -> tuple[int, int]:
    """(elements of a piece, pieces in flight) that fit the host working pool; a piece is a multiple of ``grain``."""
    if not per_element:  # at most weights that no use brings up whole, and HOST has SPAN_BYTES for those
        return PIECE_ELEMENTS, 2
    for least in (4, 2):
        fit = int(working // (least * per_element)) // grain * grain
        if fit >= 1 << 18:
            break
    piece = min(max(fit, grain), PIECE_ELEMENTS)
    return piece, max(int(working // (piece * per_element)), 2)


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
    movable = {"offload_param": (Kind.PARAM,), "offload_optimizer": STATES}
    blocks = [block for block, kinds in movable.items() if any(plan.resident.get((tier, kind)) for kind in kinds)]
    if tier is Tier.HOST and plan.placement.gradients == "host" and plan.placement.optimizer is Tier.NVME:
        return ', or set tierflow.gradients to "auto"'
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
        if tier is Tier.HOST and plan.window:
            out.append((tier.name, "window (gradients on their way)", plan.window))
    if plan.spare:
        out.append((Tier.NVME.name, "second slots (updates to undo)", plan.spare))
    return out


def table_text(plan: MemoryPlan) -> str:
    """The plan as plain text: bytes per tier and kind, the caps and what the machine has."""
    lines = [f"{'tier':8}{'what':36}{'bytes':>18}"]
    lines += [f"{tier:8}{what:36}{n:>18,}" for tier, what, n in rows(plan)]
    for tier in Tier:
        have = plan.caps.machine.get(tier)
        free = "" if have is None else f", free on this machine {have:,}"
        lines.append(f"{tier.name:8}{'total':36}{plan.total(tier):>18,}  cap {plan.caps.of(tier):,}{free}")
    if plan.states:
        lines.append(plan.format_text)
    if plan.nvme_written:
        lines.append(f"NVMe per step: {plan.nvme_read:,} bytes read, {plan.nvme_written:,} bytes written")
        lines.append(f"{plan.steps_to_tbw:,.0f} steps to 600 TBW")
    return "\n".join(lines)
