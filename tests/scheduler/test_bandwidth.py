"""The probe on this machine: it ends, leaves nothing, and stays inside what it may take. No rate is judged."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tierflow.cpu_adam.formats import resolve
from tierflow.cpu_adam.rules import LION
from tierflow.scheduler import bandwidth
from tierflow.scheduler.bandwidth import Paths, probe

CPU = torch.device("cpu")


def test_every_path_in_use_has_a_rate_and_the_folder_is_as_it_was(tmp_path: Path) -> None:
    began = time.perf_counter()
    rates = probe(Paths(CPU, str(tmp_path), {"queue_depth": 4}, resolve("int8-24bit", torch.bfloat16), LION, torch.bfloat16))
    assert time.perf_counter() - began < 60  # the promise is two seconds on an idle machine
    assert all(0 < value < math.inf for value in vars(rates).values()), rates
    assert os.listdir(tmp_path) == []


def test_without_a_store_the_drive_is_not_in_use() -> None:
    rates = probe(Paths(CPU))
    assert rates.read == rates.write == rates.mixed_read == rates.mixed_write == math.inf
    assert max(rates.to_device, rates.to_host, rates.update, rates.intake) < math.inf


@pytest.mark.parametrize(
    ("free", "size"), [(10**12, 256 << 20), (300 << 20, 150 << 20), (40_000, 16384), (16384, 8192)]
)
def test_the_file_takes_half_of_what_is_free_and_no_more_than_its_size(monkeypatch, free: int, size: int) -> None:
    monkeypatch.setattr(bandwidth.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert bandwidth._file_bytes("/") == size


def test_a_full_disk_is_said(monkeypatch) -> None:
    monkeypatch.setattr(bandwidth.shutil, "disk_usage", lambda path: SimpleNamespace(free=16383))
    with pytest.raises(OSError, match="16384 bytes"):
        bandwidth._file_bytes("/")


def test_a_small_file_serves_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bandwidth, "FILE_BYTES", 16384)
    rates = probe(Paths(CPU, str(tmp_path)))
    assert 0 < rates.mixed_read < math.inf and 0 < rates.mixed_write < math.inf
