"""Units: the parameters that are fetched and released together, and where each lies in the flat buffer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from tierflow.swap import ALIGN_BYTES, IO_BYTES, Chunk, Kind

#: In elements, so that all kinds of a unit share one layout; for dtypes of 2 bytes and more.
_PARAM_ALIGN = ALIGN_BYTES // 2
_UNIT_ALIGN = IO_BYTES // 2


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
    """Parameters of one dtype and one trainability that move together. ``numel`` includes padding."""

    index: int
    name: str
    dtype: torch.dtype
    trainable: bool
    slots: list[Slot]
    params: list[nn.Parameter] = field(repr=False)
    numel: int = 0
    chunks: dict[Kind, Chunk] = field(default_factory=dict, repr=False)

    @property
    def label(self) -> str:
        """The name for people: that of the module whose parameters these are."""
        return self.name or "model"

    @property
    def chunk(self) -> Chunk:
        """The working weights."""
        return self.chunks[Kind.PARAM]


@dataclass(frozen=True)
class ShardGeometry:
    """How a unit's padded buffer is cut over ``world`` ranks: N equal shards."""

    rank: int = 0
    world: int = 1

    def padded(self, numel: int, itemsize: int = 2) -> int:
        """Elements of the whole buffer after padding, so that every kind's shard is a multiple of IO_BYTES."""
        grain = _UNIT_ALIGN * self.world * (2 if itemsize == 1 else 1)
        return -(-max(numel, 1) // grain) * grain

    def shard(self, numel: int) -> int:
        """Elements of one rank's shard."""
        return self.padded(numel) // self.world


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


def partition(model: nn.Module, max_bytes: int | None = None) -> list[Unit]:
    """Cuts the model into units in module order.

    An element of an ``nn.ModuleList`` or ``nn.Sequential`` is one unit with all its children if it has at most
    ``max_bytes``; otherwise, and outside such lists, each module's own parameters are one. Mixed dtypes and
    frozen beside trainable parameters are units of their own. A shared parameter belongs to its first module.
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
        keys = dict.fromkeys((p.dtype, p.requires_grad) for p in fresh)
        for i, (dtype, trainable) in enumerate(keys):
            group = [p for p in fresh if (p.dtype, p.requires_grad) == (dtype, trainable)]
            label = path if i == 0 else f"{path}/{'' if trainable else 'frozen-'}{str(dtype)[6:]}"
            units.append(_unit(len(units), label, dtype, trainable, group, names, order))
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


def make_chunks(units: list[Unit], kinds: dict[int, dict[Kind, int]], geometry: ShardGeometry) -> None:
    """Gives each unit its chunks: ``kinds[unit.index]`` maps a kind to its bytes per element."""
    ids = 0
    for unit in units:
        unit.numel = geometry.padded(unit.numel, unit.dtype.itemsize)
        for kind, itemsize in kinds[unit.index].items():
            shard = geometry.shard(unit.numel)
            unit.chunks[kind] = Chunk(ids, unit.index, kind, itemsize, shard, geometry.rank, geometry.world)
            ids += 1
