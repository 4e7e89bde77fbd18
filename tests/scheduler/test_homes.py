"""Homes: what room there is under the caps is used to the byte, and a unit's states may be in all three tiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from outcome import Stack, checkpoint_into_other_caps, states_of
from torch import nn

import tierflow
from tierflow.scheduler import placement
from tierflow.scheduler.choice import choose_homes
from tierflow.scheduler.homes import needs_of
from tierflow.scheduler.placement import Caps, Placement, Together, kinds_of
from tierflow.scheduler.units import (
    STATES,
    ShardGeometry,
    Unit,
    make_chunks,
    partition,
    units_of_blocks,
    units_together,
)
from tierflow.swap import Kind, Tier

MB = 10**6


class Blocks(nn.Module):
    def __init__(self, sizes: list[int]):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(n, n, bias=False) for n in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            width = block.in_features
            x = torch.tanh(block(x[:, :width].repeat(1, -(-width // x.shape[1]))[:, :width]))
        return x.square().mean()


def units_for(model: nn.Module, placement: Placement) -> list[Unit]:
    units = partition(model)
    make_chunks(units, {u.index: kinds_of(u, placement) for u in units}, ShardGeometry())
    return units


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=5), device=st.integers(0, 6 * MB), host=st.integers(0, 12 * MB),
    states=st.sampled_from(["fp32", "bf16", "int8"]), accelerator=st.booleans(), slowest=st.sampled_from([Tier.HOST, Tier.NVME]),
)  # fmt: skip
def test_no_room_is_left_while_anything_is_slower(
    sizes: list[int], device: int, host: int, states: str, accelerator: bool, slowest: Tier
) -> None:
    placement = Placement(Tier.NVME, slowest, states, device_is_host=not accelerator, direct=not accelerator)
    model = Blocks(sizes)
    units = units_for(model, placement)
    together, caps = Together(units_together(model, units), units_of_blocks(model, units)), Caps(device, host, 1 << 40)
    homes = choose_homes(units, placement, caps, together, list(range(len(units))))
    table, needs = homes.resident(units), needs_of(homes, units, placement, together)
    room = {
        tier: cap - good - sum(n for (t, _), n in table.items() if t is tier)
        for tier, cap, good in ((Tier.DEVICE, device, needs.device_good), (Tier.HOST, host, needs.host_good))
    }
    for unit in units:
        for kind in STATES:
            if kind in unit.chunks:
                assert sum(homes.bytes_in(unit, kind, tier) for tier in Tier) == unit.chunks[kind].nbytes
        assert all(n % unit.grain == 0 for kind in unit.chunks for n in homes.cuts(unit, kind))
        assert all(n > 0 for kind in unit.chunks for _, n in homes.parts(unit, kind))

    def anything(*tiers: Tier) -> bool:
        return any(table.get((tier, kind)) for tier in tiers for kind in STATES)

    parts = {u.index: homes.bytes_in(u, Kind.PARAM, Tier.DEVICE) for u in homes.streamed(units)}
    cut = [units[i] for i, nbytes in parts.items() if nbytes]
    assert len(cut) <= 1 and all(room[Tier.DEVICE] + parts[u.index] < u.chunk.nbytes for u in homes.streamed(units))
    assert all(room[Tier.DEVICE] < u.chunk.bytes_of(u.grain) or parts[u.index] >= u.chunk.bytes_of(u.numel - u.grain) for u in cut)
    left = [u for u in homes.from_nvme(units) if sum(homes.cuts(u, Kind.PARAM)[-1:]) < u.chunk.numel - u.grain]
    assert not left or room[Tier.HOST] < max(u.chunk.bytes_of(u.grain) for u in left)
    grain = max(sum(chunk.bytes_of(u.grain) for chunk in u.states) for u in units)
    waits_for_device = (Tier.NVME,) if accelerator else (Tier.HOST, Tier.NVME)
    assert room[Tier.DEVICE] < grain or homes.streamed(units) or not anything(*waits_for_device)
    assert not (homes.streamed(units) and anything(Tier.DEVICE))
    assert room[Tier.HOST] < grain or not anything(Tier.NVME)
    if accelerator and anything(Tier.DEVICE):  # only what HOST has no room for
        assert room[Tier.HOST] < grain + max(sum(chunk.nbytes for chunk in u.states) for u in units)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=5), on_device=st.integers(0, 5), short=st.integers(-1, 4 * MB),
    states=st.sampled_from(["fp32", "int8"]),
)  # fmt: skip
def test_nothing_is_on_nvme_where_memory_has_room_for_all(sizes: list[int], on_device: int, short: int, states: str) -> None:
    """An update stages nothing then: room that only staging needs must not keep the last states out of memory."""
    placement = Placement(Tier.NVME, Tier.NVME, states, gradients="host")
    model = Blocks(sizes)
    units = units_for(model, placement)
    together = Together(units_together(model, units), units_of_blocks(model, units))
    device = min(sum(sorted(u.chunk.nbytes for u in units)[-3:]), sum(u.chunk.nbytes for u in units[:on_device]))
    order = list(range(len(units)))

    def on_nvme(host: int) -> dict[Kind, int]:
        homes = choose_homes(units, placement, Caps(device, host, 1 << 40), together, order)
        return {kind: n for (tier, kind), n in homes.resident(units).items() if tier is Tier.NVME}

    everything = sum(chunk.nbytes for u in units for chunk in u.chunks.values())
    assert not on_nvme(everything)
    found = [sum(on_nvme(everything - less).values()) for less in (0, short // 2, short)] if short > 0 else []
    assert found == sorted(found)


def test_a_large_unit_on_the_device_leaves_its_buffers_to_units_before_it() -> None:
    """These were refused while room for the large one on its way was kept; whole they spare more than cut."""
    model = nn.Sequential(*(nn.Linear(160, 160) for _ in range(12)), nn.Linear(160, 640))
    placement = Placement(Tier.NVME, Tier.NVME, "fp32", gradients="host")
    units = units_for(model, placement)
    together = Together(units_together(model, units), units_of_blocks(model, units))
    order = list(range(13)) + list(range(13))[::-1]
    for device in range(800_000, 1_600_000, 50_000):
        homes = choose_homes(units, placement, Caps(device, 1_900_000, 1 << 40), together, order)
        assert homes.of(units[12], Kind.PARAM) is Tier.DEVICE
        streamed = homes.streamed(units)
        free = device - homes.stay(units, Tier.DEVICE) - needs_of(homes, units, placement, together).device_good
        assert sum(homes.bytes_in(u, Kind.PARAM, Tier.DEVICE) > 0 for u in streamed) <= 1
        assert not streamed or free < min(u.chunk.nbytes for u in streamed)


def test_a_part_ends_with_its_unit() -> None:
    """Small units that move after a large one was refused leave more room than it had then: here, more than it needs."""
    sizes = [(64, 64), (300, 16), (100, 600), (100, 300), (600, 16)]
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in sizes))
    placement = Placement(Tier.DEVICE, Tier.NVME, "fp32")
    units = units_for(model, placement)
    together = Together(units_together(model, units), units_of_blocks(model, units))
    homes = choose_homes(units, placement, Caps(1068847, 1269937, 1 << 40), together, list(range(5)))
    assert all(n > 0 for u in units for kind in u.chunks for _, n in homes.parts(u, kind))
    assert homes.ahead == {(3, kind): {Tier.DEVICE: 4096} for kind in (Kind.EXP_AVG, Kind.EXP_AVG_SQ)}
    assert homes.of(units[3], Kind.EXP_AVG) is Tier.HOST


@pytest.mark.parametrize("update", ["immediate", "deferred"])
@pytest.mark.parametrize("state_format", ["fp32", "int8"])
def test_a_unit_whose_states_are_in_three_tiers_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state_format: str, update: str
) -> None:
    monkeypatch.setattr(placement, "PIECE_ELEMENTS", 1 << 12)

    def run(place: str, **block: object) -> tuple[list[float], dict[str, torch.Tensor], list[set[Tier]], tuple[int, int]]:
        model = Blocks([1200])
        made = tiny.config(place, tmp_path, clip=0.05, optimizer_state=state_format, update=update, **block)
        model, optimizer = tierflow.offload(model, made)
        engine, losses = optimizer.engine, []
        for seed in range(4):
            loss = model(torch.randn(4, 1200, generator=torch.Generator().manual_seed(seed)))
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            engine.settle()
            moved = engine.take_report().traffic
        tiers = [{engine.manager.home(c) for c in u.parts(Kind.EXP_AVG)} for u in engine.units]
        assert engine.plan.nvme_read == moved.nvme_read and engine.plan.nvme_written == moved.nvme_written
        found = losses, states_of(engine), tiers, (moved.nvme_read, moved.nvme_written)
        engine.manager.ledger.check()
        optimizer.close()
        return found

    whole = run("device")
    numel = 1200 * 1200
    states = sum(n for name, t in whole[1].items() if not name.endswith(".param") for n in [t.nbytes])
    third = states // 3 + (1 << 16)
    # the weights and a third of the states; the gradient, room to stage some of the unit, and a third of the states
    staged = int((2 << 16) / numel * (4 * numel + states))  # two of the smallest pieces of 8-bit states
    split = run("nvme", device_memory=4 * numel + third, host_memory=4 * numel + staged + third)
    assert whole[2] == [{Tier.DEVICE}] and split[2] == [set(Tier)]
    assert whole[0] == split[0] and tiny.same(whole[1], split[1])
    assert 0 < split[3][0] == split[3][1] < states // 2


def test_a_checkpoint_does_not_know_of_the_split(tmp_path: Path) -> None:
    tight = {"device_memory": 4 * 1200 * 1200 + (3 << 20), "host_memory": 18 << 20}
    plan = checkpoint_into_other_caps(tmp_path, "nvme", lambda: Stack(layers=1, width=1200), tight)
    assert any(plan.homes.ahead.values())
