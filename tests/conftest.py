"""Shared by all tests: models small enough for a second, caps that leave no room to cache, and the gpu marker."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

EMULATED = "--emulated-cuda" in sys.argv
if EMULATED:  # here, since other files beside tests import torch, which then knows its devices
    import emulated_cuda

    emulated_cuda.install()
    emulated_cuda.inputs_follow_models()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulated-cuda", action="store_true", help="run the tests, and those marked gpu, on an emulated device")


@pytest.fixture(autouse=True)
def _no_races() -> Iterator[None]:
    yield
    if EMULATED:
        emulated_cuda.native.synchronize()
        assert emulated_cuda.native.races() == 0, "bytes changed on the device while an operator read them"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    import torch

    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are tiny: a second thread in torch's operators only waits, and long on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
