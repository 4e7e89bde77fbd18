"""Host memory that is registered with the driver, whatever becomes of its arena; the driver is made up."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import pytest
import torch

from tierflow.scheduler import memory
from tierflow.swap import Arena


class Driver:
    def __init__(self) -> None:
        self.held: list[int] = []

    def cudaHostRegister(self, address: int, _size: int, _flags: int) -> int:
        self.held.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.held.remove(address)
        return 0


def closed(arena: Arena) -> None:
    arena.close()


def dropped(_arena: Arena) -> None:
    """The caller does that."""


@pytest.mark.parametrize("end", [closed, dropped])
def test_nothing_stays_registered(monkeypatch: pytest.MonkeyPatch, end: Callable[[Arena], None]) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(memory, "REGISTER_BYTES", 1 << 20)
    driver, arena = Driver(), Arena(3 << 20)
    assert memory.register(arena, torch.device("cuda", 0), driver) is None
    assert len(driver.held) >= 3
    end(arena)
    del arena
    gc.collect()
    assert not driver.held
