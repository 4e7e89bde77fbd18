"""Fetches whose bytes arrive late, memory that is short, and waits that Ctrl-C ends."""

from __future__ import annotations

import copy
import random
import time

import pytest
import tiny
import torch
from torch import nn

import tierflow
from tierflow.cpu_adam.kernels import grad_stats
from tierflow.scheduler.gradients import GradContext, GradSlot
from tierflow.scheduler.placement import Placement
from tierflow.swap import CopyState, DebugMemory, HostLane, Ticket, Tier
from tierflow.swap.lanes import CudaLane
from tierflow.swap.staging import Staging
from tierflow.swap.timeline import Inline


class Late:
    """A ticket that is not done before somebody waits; ``interrupts`` waits end with Ctrl-C first."""

    def __init__(self, inner: Ticket, interrupts: int = 0):
        self.inner, self.interrupts, self.waited, self.times = inner, interrupts, False, inner.times

    def done(self) -> bool:
        return self.waited

    def wait(self) -> None:
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        self.inner.wait()
        self.waited = True


class Fill:
    """A copy on a side stream: it runs when something waits for it, which the host may not notice at once."""

    def __init__(self, lane: SideStream, dst: torch.Tensor, src: torch.Tensor):
        self.lane, self.dst, self.src, self.ran, self.seen = lane, dst, src, False, False
        self.times = Inline(time.perf_counter())

    def done(self) -> bool:
        self.seen = self.seen or (self.ran and self.lane.rng.random() < 0.3)
        return self.seen

    def wait(self) -> None:
        self.lane.run_until(self)
        self.seen = True


class SideStream(HostLane):
    """Fills run in order and late: when compute needs one, or by chance."""

    direct = False

    def __init__(self, seed: int):
        self.rng, self.queue = random.Random(seed), list[Fill]()

    def fill(self, dst: torch.Tensor, src: torch.Tensor) -> Ticket:
        if self.queue and self.rng.random() < 0.3:
            self.run_until(self.queue[0])
        self.queue.append(Fill(self, dst, src))
        return self.queue[-1]

    def run_until(self, fill: Fill) -> None:
        while not fill.ran:
            first = self.queue.pop(0)
            first.dst.copy_(first.src)
            first.ran = True

    def before_use(self, ticket: Ticket) -> None:
        assert isinstance(ticket, Fill)
        self.run_until(ticket)


class Net(nn.Module):
    """Blocks of several sizes; the root uses a weight of its own between them."""

    def __init__(self, width: int = 32, sizes: tuple[int, ...] = (1, 2, 1, 3)):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(width, width) * 0.1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, k * width), nn.Tanh(), nn.Linear(k * width, width)) for k in sizes
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh((x + block(x)) @ self.mix)
        return x


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    return model(torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))).square().mean()


def least_device_memory(make, path) -> int:
    low, high = 4096, 1 << 24
    while high - low > 4096:
        middle = (low + high) // 2 // 4096 * 4096
        try:
            _, b = tierflow.offload(make(), tiny.config("everything", path, device_memory=str(middle), host_memory="200KB"))
            b.close()
            high = middle
        except tierflow.DoesNotFit:
            low = middle
    return high


def net() -> Net:
    torch.manual_seed(5)
    return Net()


@pytest.mark.parametrize("placement", ["everything", "param_host"])
@pytest.mark.parametrize("seed", range(3))
def test_fills_that_end_late_change_no_bit(tmp_path, monkeypatch, placement, seed) -> None:
    monkeypatch.setattr("tierflow.scheduler.memory.make_lane", lambda device, debug: SideStream(seed))
    model = net()
    plain = copy.deepcopy(model)
    a = tiny.plain_adamw(plain)
    caps = tiny.tight(model, placement, direct=False)
    if placement == "everything":
        caps["device_memory"] = "80KB"
    debug = DebugMemory(random.Random(seed), through_host=True)
    _, b = tierflow.offload(model, tiny.config(placement, tmp_path, **caps), debug_memory=debug)
    b.engine.updates.stager.on_device = False
    for step in range(4):
        losses = []
        for m, o in ((plain, a), (model, b)):
            loss = loss_of(m, step)
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                loss_of(m, step)
            o.step()
            o.zero_grad()
        assert losses[0] == losses[1]
        b.engine.manager.ledger.check()
    assert tiny.same(tiny.weights(plain), tiny.weights(model))
    b.close()


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_the_least_device_memory_of_the_plan_is_enough_wherever_units_lie(tmp_path, seed) -> None:
    model = net()
    cap = least_device_memory(net, tmp_path)
    plain = copy.deepcopy(model)
    a = tiny.plain_adamw(plain)
    debug = None if seed is None else DebugMemory(random.Random(seed))
    _, b = tierflow.offload(model, tiny.config("everything", tmp_path, device_memory=str(cap)), debug_memory=debug)
    for step in range(3):
        for m, o in ((plain, a), (model, b)):
            loss_of(m, step).backward()
            o.step()
            o.zero_grad()
    assert tiny.same(tiny.weights(plain), tiny.weights(model))
    b.close()


def late_reads(engine, interrupts: int = 0) -> list[Late]:
    """From here on no read is done before it is waited for."""
    made: list[Late] = []
    read = engine.manager.nvme.read

    def slow(*args, **kw):
        made.append(Late(read(*args, **kw), interrupts))
        return made[-1]

    engine.manager.nvme.read = slow
    return made


def test_what_comes_up_ahead_of_use_gives_way_to_what_is_needed_now(tmp_path) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    _, b = tierflow.offload(model, tiny.config("everything", tmp_path, device_memory="40KB", host_memory="200KB"))
    manager, units = b.engine.manager, b.engine.units
    late_reads(b.engine)
    began = 0
    for unit in units[1:]:
        if not manager.fetches.start(unit.chunk, b.engine.victims(0), hint=True):
            break
        began += 1
    assert began and manager.pools[Tier.DEVICE].working.free < units[0].chunk.nbytes
    manager.fetches.start(units[0].chunk, b.engine.victims())
    manager.pin(units[0].chunk)
    manager.unpin(units[0].chunk)
    manager.fetches.settle()
    manager.ledger.check()
    b.close()


def test_a_hint_without_room_on_the_device_does_not_wait_and_ends_on_the_host(tmp_path) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(12)))
    config = tiny.config("everything", tmp_path, device_memory="17KB", host_memory="250KB")
    _, b = tierflow.offload(model, config, debug_memory=DebugMemory(random.Random(1), through_host=True))
    manager, units = b.engine.manager, b.engine.units
    for unit in units[0], units[2]:
        manager.fetches.start(unit.chunk, b.engine.victims())
        manager.pin(unit.chunk)
    reads = late_reads(b.engine)
    assert not manager.fetches.start(units[1].chunk, b.engine.victims(), hint=True)
    assert len(reads) == 1 and not reads[0].waited and units[1].chunk in manager.fetches
    reads[0].wait()
    manager.fetches.pump()
    assert manager.ledger.valid(units[1].chunk, Tier.HOST) and not manager.ledger.pins(units[1].chunk, Tier.HOST)
    manager.unpin(units[0].chunk)
    manager.unpin(units[2].chunk)
    b.close()


def test_weights_written_while_a_prefetch_reads_them_are_what_is_used(tmp_path) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    fresh = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    plain = copy.deepcopy(model)
    plain.load_state_dict(fresh)
    _, b = tierflow.offload(model, tiny.config("everything", tmp_path, device_memory="40KB", host_memory="200KB"))
    late_reads(b.engine)
    for unit in b.engine.units:
        b.engine.manager.fetches.start(unit.chunk, b.engine.victims(), hint=True)
    model.load_state_dict(fresh)
    x = torch.randn(2, 32)
    assert torch.equal(model(x), plain(x))
    b.close()


def test_ctrl_c_ends_a_wait_and_not_before_the_transfer_has_left_its_memory(tmp_path) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(12)))
    plain = copy.deepcopy(model)
    _, b = tierflow.offload(model, tiny.config("everything", tmp_path, device_memory="16KB", host_memory="205KB"))
    manager = b.engine.manager
    read = manager.nvme.read
    made = late_reads(b.engine, interrupts=1)
    x = torch.randn(2, 32)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert made[0].waited
    manager.nvme.read = read
    for ticket in made:
        ticket.interrupts = 0
    assert torch.equal(model(x), plain(x))
    for unit in b.engine.units:
        assert not manager.ledger.pins(unit.chunk, Tier.DEVICE) and not manager.ledger.pins(unit.chunk, Tier.HOST)
        assert manager.ledger.state(unit.chunk, Tier.HOST) is not CopyState.FILLING
    b.close()


def test_a_store_that_takes_no_more_reads_leaks_nothing(tmp_path) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(12)))
    _, b = tierflow.offload(model, tiny.config("everything", tmp_path, device_memory="16KB", host_memory="205KB"))
    manager, unit = b.engine.manager, b.engine.units[0]
    read, manager.nvme.read = manager.nvme.read, lambda *args, **kw: (_ for _ in ()).throw(OSError("no more reads"))
    with pytest.raises(OSError, match="no more"):
        model(torch.randn(2, 32))
    assert all(manager.pools[t].working.leased == 0 for t in (Tier.DEVICE, Tier.HOST))
    manager.ledger.check()
    manager.nvme.read = read
    manager.fetches.start(unit.chunk, b.engine.victims())
    b.close()


def test_staging_gives_every_piece_once_and_in_order() -> None:
    rng = random.Random(4)
    memory = torch.zeros(16 * 1024, dtype=torch.uint8)
    staging, given, taken = Staging(memory), [], []

    class Copy:
        def __init__(self, dst: torch.Tensor, src: torch.Tensor):
            self.dst, self.src, self.times = dst, src, Inline(time.perf_counter())

        def done(self) -> bool:
            return False

        def wait(self) -> None:
            self.dst.copy_(self.src)

    for i in range(400):
        data = torch.full((rng.randrange(1, staging.piece_bytes),), i % 251, dtype=torch.uint8)
        piece = staging.place(data.numel())
        staged = staging.enter(Copy(piece, data), i, piece, lambda at, p: taken.append((at, p.clone())))
        given.append((i, data))
        if rng.random() < 0.05:
            while not staged.taken:
                staging.take_oldest()
    while len(taken) < len(given):
        staging.take_oldest()
    assert [i for i, _ in taken] == [i for i, _ in given]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(given, taken, strict=True))


def test_gradients_that_pass_through_staging_add_up() -> None:
    class Lane(CudaLane):
        def __init__(self) -> None:
            self._staging = Staging(torch.zeros(4096, dtype=torch.uint8))

        def drain(self, dst: torch.Tensor, src: torch.Tensor, transient: bool = False) -> Ticket:
            assert transient
            return Late(HostLane().drain(dst, src))

    lane, generator = Lane(), torch.Generator().manual_seed(1)
    shapes = [(3,), (40, 50), (0,), (700,), (1, 5)] * 3
    slots, sums = [], []
    for i, shape in enumerate(shapes):
        first = torch.randn(shape, generator=generator)
        slots.append(GradSlot(str(i), nn.Parameter(torch.zeros(shape)), first.clone(), GradContext(lane)))
        sums.append(first)
    for _ in range(2):
        for slot, total in zip(slots, sums, strict=True):
            grad = torch.randn(total.shape, generator=generator).bfloat16()
            slot.settle()
            slot.transfer = lane.drain_pieces(grad, slot._taker(accumulate=True))
            total.add_(grad)
    for slot, total in zip(slots, sums, strict=True):
        whole = slot.stats()
        assert torch.equal(slot.memory, total) and whole == grad_stats(total.view(-1))


def test_weights_on_an_accelerator_are_updated_through_the_host(tmp_path, monkeypatch) -> None:
    made = []

    def accelerator(*args):
        made.append(Placement(*args[:4], device_is_host=False, direct=False))
        return made[-1]

    monkeypatch.setattr("tierflow.offloading.Placement", accelerator)
    model = net()
    plain = copy.deepcopy(model)
    a = tiny.plain_adamw(plain)
    _, b = tierflow.offload(model, tiny.config("host", tmp_path))
    b.engine.updates.stager.on_device = False
    for step in range(3):
        for m, o in ((plain, a), (model, b)):
            loss_of(m, step).backward()
            o.step()
            o.zero_grad()
    assert tiny.same(tiny.weights(plain), tiny.weights(model)) and b.engine.plan.working[Tier.HOST]
    b.close()
