"""Host memory is registered with the driver in pieces, and works where the driver refuses."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import tiny
import torch
from wide import CUDA, ROOM, run

from tierflow.scheduler import memory as scheduler_memory
from tierflow.swap import Arena, CudaLane

pytestmark = pytest.mark.gpu


class _Refuses:
    """A driver that registers ``count`` pieces and no more."""

    def __init__(self, count: int):
        self.count, self.held, self._real = count, list[int](), torch.cuda.cudart()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if len(self.held) >= self.count:
            return 2
        self.held.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.held.remove(address)
        return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_refused_registration_is_undone_said_once_and_works(tmp_path, monkeypatch, caplog) -> None:
    expected = run(tmp_path, "everything", torch.float32, accumulation=2, device_memory=ROOM[torch.float32])
    driver = _Refuses(1)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(scheduler_memory, "REGISTER_BYTES", 16 << 20)
    monkeypatch.setattr(scheduler_memory, "_said", set())
    found = run(tmp_path, "everything", torch.float32, accumulation=2, device_memory=ROOM[torch.float32])
    assert expected[0] == found[0] and tiny.same(expected[1], found[1])
    assert not driver.held and sum("cudaHostRegister refused" in r.message for r in caplog.records) == 1


def test_a_refusal_by_the_driver_leaves_no_error_behind() -> None:
    arena = Arena(1 << 20)
    assert scheduler_memory.register(arena, CUDA) is None
    assert scheduler_memory.register(arena, CUDA) is not None  # registered already
    assert torch.ones(4, device=CUDA).sum().item() == 4
    arena.close()


def test_host_memory_of_an_engine_that_was_dropped_is_not_registered_any_more(monkeypatch) -> None:
    driver = _Refuses(1 << 30)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    arena = Arena(1 << 20)
    assert scheduler_memory.register(arena, CUDA) is None and driver.held
    del arena
    gc.collect()
    assert not driver.held


def test_copies_are_cut_where_registrations_end(monkeypatch) -> None:
    arena = Arena(4 << 20)
    monkeypatch.setattr("tierflow.swap.lanes.REGISTER_BYTES", 1 << 20)
    monkeypatch.setattr(scheduler_memory, "REGISTER_BYTES", 1 << 20)
    assert scheduler_memory.register(arena, CUDA) is None
    lane = CudaLane(CUDA, Arena(1 << 20))
    host, device = arena.bytes_at(0, arena.nbytes), torch.zeros(4 << 20, dtype=torch.uint8, device=CUDA)
    host.random_()
    lane.fill(device, host).wait()
    assert torch.equal(device.cpu(), host)
    flipped = device.flip(0)
    lane.drain(host, flipped).wait()
    assert torch.equal(host, device.cpu().flip(0))
    lane.close()
    del host
    arena.close()
