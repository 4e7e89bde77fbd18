"""An error in the update itself, where no transfer is to blame."""

from __future__ import annotations

import pytest
import tiny
import torch

import tierflow
from tierflow.scheduler import stager


@pytest.mark.parametrize("update", ["deferred", "immediate"])
def test_an_error_in_a_kernel_is_raised_at_once_and_the_run_is_over(update: str, tmp_path, monkeypatch) -> None:
    model = tiny.llama()
    model, optimizer = tierflow.offload(model, tiny.config("everything", tmp_path, update=update))
    ids = torch.randint(0, 160, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()

    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("no such kernel")

    monkeypatch.setattr(stager, "Steps", broken)
    with pytest.raises(ValueError, match="no such kernel"):
        optimizer.step()
        optimizer.zero_grad()
        model(input_ids=ids)
    with pytest.raises(RuntimeError, match="resume from a checkpoint"):
        optimizer.step()
    optimizer.engine.close()
