"""Shared by all tests: models small enough for a second, caps that leave no room to cache, and the gpu marker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulated-cuda", action="store_true", help="run the tests marked gpu on an emulated device")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("emulated_cuda"):
        import emulated_cuda  # before torch

        emulated_cuda.install()
        emulated_cuda.inputs_follow_models()


@pytest.fixture(autouse=True)
def _no_races(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.config.getoption("emulated_cuda"):
        import emulated_cuda

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
