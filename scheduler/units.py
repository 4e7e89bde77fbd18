"""Units: the parameters that are fetched and released together, and where each lies in the flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import lcm

import torch
from torch import nn

from tierflow.cpu_adam.formats import KindLayout
from tierflow.swap import ALIGN_BYTES, IO_BYTES, Chunk, Kind

#: In elements, so that all kinds of a unit share one layout; for dtypes of 2 bytes and more. It is whole groups of the
#: 8-bit formats (64): no group reaches into the next parameter, and a parameter's state does not depend on its neighbours.
_PARAM_ALIGN = ALIGN_BYTES // 2
_UNIT_ALIGN = IO_BYTES // 2

#: What an update reads and writes beside the working weights, as far as the format and the rule have it.
STATES = (Kind.MASTER, Kind.EXP_AVG, Kind.EXP_AVG_SQ, Kind.SCALE)


@dataclass(frozen=True)
class Slot:
    """One parameter's place: ``numel`` elements at element ``offset`` of its unit. ``names`` include ties."""

    names: tuple[str, ...]
    shape: torch.Size
    numel: int
    offset: int
    order: int  # index in model.parameters()


@dataclass(eq=False)
class Unit:
    """Parameters of one dtype, one trainability and one state format that move together. ``numel`` includes padding.

    ``exact``: they keep exact states in a lossy format too (`StateFormat.keeps_fp32`). ``layouts``: what each kind's bytes
    are. ``grain``: in elements, of where the unit may be cut, so that a piece of every kind is whole I/O blocks. ``chunks``:
    every kind as a whole; states that are cut are in no tier themselves, their ``parts`` are. ``cuts``: the elements at
    which an update is cut, for what lives in several tiers.
    """

    index: int
    name: str
    dtype: torch.dtype
    trainable: bool
    slots: list[Slot]
    params: list[nn.Parameter] = field(repr=False)
    numel: int = 0
    exact: bool = False
    chunks: dict[Kind, Chunk] = field(default_factory=dict, repr=False)
    layouts: Mapping[Kind, KindLayout] = field(default_factory=dict, repr=False)
    grain: int = IO_BYTES
    cuts: tuple[int, ...] = ()
    _parts: dict[Kind, list[Chunk]] = field(default_factory=dict, init=False, repr=False)

    @property
    def label(self) -> str:
        """The name for people: that of the module whose parameters these are."""
        return self.name or "model"

    @property
    def chunk(self) -> Chunk:
        """The working weights."""
        return self.chunks[Kind.PARAM]

    @property
    def states(self) -> list[Chunk]:
        """What an update needs beside the weights and their gradient; none without training."""
        return [part for kind in STATES if kind in self.chunks for part in self.parts(kind)]

    def parts(self, kind: Kind) -> list[Chunk]:
        """The chunks that hold the kind, in order: one, or one for each tier that it is split over."""
        return self._parts.get(kind) or [self.chunks[kind]]

    def part(self, kind: Kind, element: int) -> Chunk:
        """The one of them that holds the element."""
        return next(p for p in self.parts(kind) if element < p.begin + p.numel)

    def split_states(self, cuts: Sequence[int], ids: Iterator[int]) -> None:
        """Cuts the states at these elements, multiples of the grain; ``ids`` are those of the new chunks."""
        self.cut_pieces(cuts)
        ends = [0, *cuts, self.chunk.numel]
        for kind in STATES if cuts else ():
            if kind in self.chunks:
                whole = self.chunks[kind]
                self._parts[kind] = [replace(whole, id=next(ids), numel=b - a, begin=a) for a, b in pairwise(ends)]

    def cut_pieces(self, cuts: Sequence[int]) -> None:
        """No piece of an update goes across these elements, multiples of the grain."""
        self.cuts = tuple(sorted({*self.cuts, *cuts}))


@dataclass(frozen=True)
class ShardGeometry:
    """How a unit's padded buffer is cut over ``world`` ranks: N equal shards."""

    rank: int = 0
    world: int = 1

    def padded(self, numel: int, grain: int = _UNIT_ALIGN) -> int:
        """Elements of the whole buffer after padding, so that every rank's shard is a multiple of ``grain``."""
        grain *= self.world
        return -(-max(numel, 1) // grain) * grain


def module_units(model: nn.Module, units: list[Unit]) -> dict[nn.Module, list[Unit]]:
    """For every module over managed parameters: the units that must be present while its ``forward`` runs.

    A module needs the units that hold its own parameters (shared ones too, wherever they live) and, if it is
    the owner of units, those: a block brings up all that its children use.
    """
    by_param = {id(p): u for u in units for p in u.params}
    by_name = dict(model.named_modules())
    need: dict[nn.Module, list[Unit]] = {}
    for module in model.modules():
        wanted = [by_param[id(p)] for p in module._parameters.values() if p is not None and id(p) in by_param]
        need[module] = list(dict.fromkeys(wanted))
    for unit in units:
        owner = by_name[unit.name.split("/")[0]]
        if unit not in need[owner]:
            need[owner].append(unit)
    return {m: us for m, us in need.items() if any(id(p) in by_param for p in m.parameters())}


def units_together(model: nn.Module, units: list[Unit]) -> list[list[Unit]]:
    """For every module that needs units: those, and what the modules around it hold meanwhile."""
    needed = module_units(model, units)
    groups: list[list[Unit]] = []

    def walk(module: nn.Module, above: list[Unit]) -> None:
        here = list(dict.fromkeys([*above, *needed.get(module, [])]))
        if module in needed:
            groups.append(here)
        for child in module.children():
            walk(child, here)

    walk(model, [])
    return groups


def units_of_blocks(model: nn.Module, units: list[Unit]) -> list[list[Unit]]:
    """For every outermost element of an ``nn.ModuleList`` or ``nn.Sequential``: the units that it uses."""
    by_param = {id(p): u for u in units for p in u.params}
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    inner = {id(m) for outer in lists for m in outer.modules() if m is not outer}
    blocks = [block for outer in lists if id(outer) not in inner for block in outer]
    return [list(dict.fromkeys(by_param[id(p)] for p in b.parameters() if id(p) in by_param)) for b in blocks]


def partition(
    model: nn.Module, max_bytes: int | None = None, keeps_fp32: Callable[[Sequence[int]], bool] = lambda shape: False
) -> list[Unit]:
    """Cuts the model into units in module order.

    An element of an ``nn.ModuleList`` or ``nn.Sequential`` is one unit with all its children if it has at most
    ``max_bytes``; otherwise, and outside such lists, each module's own parameters are one. Mixed dtypes and
    frozen beside trainable parameters are units of their own, and so are trainable parameters of a shape that
    ``keeps_fp32`` beside others. A shared parameter belongs to its first module.
    """
    names: dict[int, list[str]] = {}
    order: dict[int, int] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
        order.setdefault(id(param), len(order))
        owner = getattr(param, "_tierflow_owner", None)
        if owner is not None and not owner.closed:
            raise ValueError(
                f"parameter {name!r} is offloaded already, with another model or as a part of this one: close that "
                "optimizer first, or offload one module that holds both"
            )
    taken: set[int] = set()
    units: list[Unit] = []
    for path, params in _owners(model, "", False, max_bytes):
        fresh = [p for p in dict.fromkeys(params) if id(p) not in taken]
        taken.update(id(p) for p in fresh)
        groups: dict[tuple[torch.dtype, bool, bool], list[nn.Parameter]] = {}
        for p in fresh:
            groups.setdefault((p.dtype, p.requires_grad, p.requires_grad and keeps_fp32(p.shape)), []).append(p)
        for i, ((dtype, trainable, exact), group) in enumerate(groups.items()):
            what = f"{'' if trainable else 'frozen-'}{str(dtype)[6:]}{'-exact' if exact else ''}"
            unit = _unit(len(units), path if i == 0 else f"{path}/{what}", dtype, trainable, group, names, order)
            unit.exact = exact
            units.append(unit)
    return units


def _owners(
    module: nn.Module, path: str, block: bool, limit: int | None
) -> Iterator[tuple[str, list[nn.Parameter]]]:
    params = list(module.parameters())
    if block and (limit is None or sum(p.numel() * p.element_size() for p in params) <= limit):
        if params:
            yield path, params
        return
    own = [p for p in module._parameters.values() if p is not None]
    if own:
        yield path, own
    listed = isinstance(module, (nn.ModuleList, nn.Sequential))
    for name, child in module.named_children():
        yield from _owners(child, f"{path}.{name}" if path else name, listed or block, limit)


def _unit(
    index: int,
    label: str,
    dtype: torch.dtype,
    trainable: bool,
    params: list[nn.Parameter],
    names: dict[int, list[str]],
    order: dict[int, int],
) -> Unit:
    slots, offset = [], 0
    align = ALIGN_BYTES if dtype.itemsize == 1 else _PARAM_ALIGN
    for p in params:
        slots.append(Slot(tuple(names[id(p)]), p.shape, p.numel(), offset, order[id(p)]))
        offset += -(-p.numel() // align) * align
    return Unit(index, label, dtype, trainable, slots, params, offset)


def make_chunks(units: list[Unit], layouts: dict[int, dict[Kind, KindLayout]], geometry: ShardGeometry) -> None:
    """Gives each unit its chunks: ``layouts[unit.index]`` says what each of its kinds is."""
    ids = 0
    for unit in units:
        unit.layouts = layouts[unit.index]
        block = _io_elements(unit.layouts.values())
        unit.numel = geometry.padded(unit.numel, lcm(_UNIT_ALIGN, block))
        unit.grain = lcm(IO_BYTES, block)
        for kind, layout in unit.layouts.items():
            size = layout.per_group * layout.dtype.itemsize
            shard = unit.numel // geometry.world
            unit.chunks[kind] = Chunk(ids, unit.index, kind, size, shard, geometry.rank, geometry.world, layout.group)
            ids += 1


def _io_elements(layouts: Iterable[KindLayout]) -> int:
    """The fewest elements whose bytes are whole I/O blocks in every kind."""
    return lcm(*((IO_BYTES / layout.bytes_per_element).numerator for layout in layouts))
