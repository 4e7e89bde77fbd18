"""Where each kind lives, how much memory that takes, and whether the machine has it.

All figures are bytes. Everything here is arithmetic over sizes: no tensor is made and nothing allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil

import torch

from tierflow.cpu_adam.formats import KindLayout, StateFormat, resolve
from tierflow.cpu_adam.rules import ADAM, Rule
from tierflow.scheduler.contents import SPAN_BYTES
from tierflow.scheduler.units import Unit
from tierflow.swap import IO_BYTES, Kind, Tier


@dataclass(frozen=True)
class Placement:
    """The tier in which each kind lives, the state format (one of `cpu_adam.formats.FORMATS`) and the update rule."""

    param: Tier
    optimizer: Tier
    state_format: str
    grad_dtype: torch.dtype | None = None  # None: each parameter's own
    device_is_host: bool = True  # no accelerator: the kernels work on DEVICE memory too
    direct: bool = True  # files are read into DEVICE memory itself
    rule: Rule = ADAM
    gradients: str = "auto"  # "host": they stay there; "nvme": none does; "auto": so many as there is room for
    speculative: bool = False  # with second slots on NVMe, for updates that may be undone

    @property
    def grad(self) -> Tier:
        """Gradients are where the update runs, unless they spill (`homes.py`)."""
        return Tier.DEVICE if self.optimizer is Tier.DEVICE else Tier.HOST

    @property
    def kernels_reach_device(self) -> bool:
        """Whether the update's kernels work on DEVICE memory."""
        return self.device_is_host or self.optimizer is Tier.DEVICE

    def home(self, kind: Kind) -> Tier:
        """The permanent tier of a kind."""
        if kind is Kind.PARAM:
            return self.param
        return self.grad if kind is Kind.GRAD else self.optimizer


def kinds_of(unit: Unit, placement: Placement) -> dict[Kind, KindLayout]:
    """Every kind that the unit has under the placement's format and rule, and what its bytes are."""
    weights = {Kind.PARAM: KindLayout(Kind.PARAM.value, unit.dtype)}
    if not unit.trainable:
        return weights
    if unit.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"parameter {unit.slots[0].names[0]!r} is {str(unit.dtype)[6:]}: float32, bfloat16 and float16 can be trained; "
            "convert it, or freeze it with requires_grad_(False)"
        )
    grad = KindLayout(Kind.GRAD.value, placement.grad_dtype or unit.dtype)
    states = {Kind(layout.name): layout for layout in format_of(unit, placement).kinds(placement.rule)[1:]}
    return weights | {Kind.GRAD: grad} | states


def format_of(unit: Unit, placement: Placement) -> StateFormat:
    """The format of a unit's states. Raises ValueError for one that does not serve its dtype."""
    # of a model of several dtypes, "lossless" is what serves its bf16 parameters
    exact = unit.exact or placement.state_format == "lossless"
    return resolve("auto" if exact else placement.state_format, unit.dtype)


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
class Needs:
    """Working memory in bytes: the least that any order of use runs with, and what lets it run without waiting.

    ``staged``: bytes per element that an update stages in HOST. ``grain``: elements of its smallest piece.
    """

    device_min: int
    device_good: int
    host_min: int
    host_good: int
    staged: Fraction
    grain: int


#: Fetches that may be under way ahead of use, and how many of them are to find room before any weights live on DEVICE.
AHEAD = 4
BUFFERS = 2
#: A piece of the update: large enough for the drive, small enough that many fit beside the gradients. How many are to
#: fit: reads ahead of the step and writes behind it keep the drive busy while nothing can be updated.
PIECE_ELEMENTS = 1 << 20
PIECES = 24


@dataclass(frozen=True)
class Together:
    """Sets of units that are on DEVICE at the same time.

    ``pinned``: while some module runs. ``blocks``: the units of one whole block, which a non-reentrant checkpoint keeps
    from the block's recomputation until its backward has used them.
    """

    pinned: list[list[Unit]]
    blocks: list[list[Unit]]


def staged_kinds(
    unit: Unit, tiers: Callable[[Kind], Collection[Tier]], reach_device: bool, undoable: bool
) -> list[Kind]:
    """What an update of the unit may have in staging memory; a kind twice, if it is there twice.

    ``tiers``: where a kind lives. ``reach_device``: whether kernels work on DEVICE memory. ``undoable``: the unit has second
    slots, and the old weights are kept where memory has them.
    """
    far = (Tier.NVME,) if reach_device else (Tier.NVME, Tier.DEVICE)
    kinds = [kind for kind in unit.chunks if any(tier in far for tier in tiers(kind))]
    return [Kind.PARAM, *kinds] if undoable and Tier.NVME not in tiers(Kind.PARAM) else kinds


def working_needs(
    placement: Placement, together: Together, streamed: list[Unit], from_nvme: list[Unit],
    staging: list[tuple[Unit, Fraction]],
) -> Needs:  # fmt: skip
    """``streamed``: units whose weights come and go; ``from_nvme``: those of them that live on NVMe; ``staging``: units of
    which an update brings something to HOST, and bytes of that per element.
    """
    coming = {u.index: u.chunk.nbytes for u in streamed}

    def most(groups: list[list[Unit]]) -> int:
        return max((sum(coming.get(u.index, 0) for u in group) for group in groups), default=0)

    least = most(together.pinned)
    ahead = sum(sorted(coming.values())[-BUFFERS:])
    landing = [0] if placement.direct else sorted(u.chunk.nbytes for u in from_nvme)
    grain = max((u.grain for u, _ in staging), default=IO_BYTES)
    # norms and biases, exact beside matrices in a lossy format, go in one piece each: they do not set the others' size
    cut = [(u, each) for u, each in staging if not u.exact or u.chunk.numel > grain] or staging
    per_element = max((each for _, each in cut), default=Fraction(0))
    largest = max((u.chunk.numel for u, _ in cut), default=0)
    smallest = max((each * min(max(u.chunk.numel, u.grain), grain) for u, each in staging), default=0)
    # weights get to NVMe and are read by value through HOST, though nothing may be staged there or land
    through = max((u.chunk.nbytes for u in from_nvme), default=0)
    host_least = max(max(landing, default=0), 2 * ceil(smallest), min(through, IO_BYTES))
    pieces = ceil(min(PIECES * PIECE_ELEMENTS, len(cut) * largest) * per_element)
    return Needs(
        least,
        min(max(least, most(together.blocks)) + ahead, sum(coming.values())),
        host_least,
        max(host_least, sum(landing[-BUFFERS:]) + pieces, min(through, SPAN_BYTES)),
        per_element,
        grain,
    )


class DoesNotFit(ValueError):
    """The training state does not fit under the caps or the machine; the message holds the table and a remedy.

    ``needed``: bytes that each tier's cap would have to be at least, where it is less.
    """

    def __init__(self, message: str, needed: dict[Tier, int]):
        self.needed = needed
        super().__init__(message)
