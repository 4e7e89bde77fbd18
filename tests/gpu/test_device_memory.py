"""The GPU's memory: allocated once, handed on, given back, and never more than there is."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from wide import CUDA, ROOM, offload, train, wide, wide_loss

import tierflow
from tierflow.swap import CudaArena, Pool, Tier

pytestmark = pytest.mark.gpu


def test_no_device_memory_is_allocated_in_the_steady_state(tmp_path) -> None:
    model = wide()
    optimizer = offload(model, tmp_path, "everything", device_memory=ROOM[torch.float32], accumulation=2)
    train(model, optimizer, wide_loss, steps=3, accumulation=2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(CUDA)
    train(model, optimizer, wide_loss, steps=4, accumulation=2)
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats(CUDA)
    for name in ("num_device_alloc", "segment.all.allocated", "reserved_bytes.all.current"):
        assert after.get(name) == before.get(name), name
    optimizer.close()


def test_device_gradients_are_dropped_as_they_cross(tmp_path) -> None:
    model = wide(depth=8)
    optimizer = offload(model, tmp_path, "param_host", device_memory=ROOM[torch.float32])
    train(model, optimizer, wide_loss, steps=1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(CUDA)
    before = torch.cuda.memory_allocated(CUDA)
    wide_loss(model, 1).backward()
    torch.cuda.synchronize()
    torch.empty(1, device=CUDA)
    assert torch.cuda.memory_allocated(CUDA) - before < 8 << 20  # of 67 MB of gradients none is held
    optimizer.close()


def test_close_gives_device_memory_back(tmp_path) -> None:
    wide_loss(wide().to(CUDA), 0).backward()  # cuBLAS takes its workspaces, one a thread
    torch.cuda.empty_cache()
    free = torch.cuda.memory_reserved(CUDA)
    model = wide()
    optimizer = offload(model, tmp_path, "device")
    train(model, optimizer, wide_loss, steps=1)
    optimizer.close()
    del optimizer, model
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(CUDA) - free <= 32 << 20  # cuBLAS keeps a workspace


def test_leases_have_storages_of_their_own() -> None:
    pool = Pool("device", CudaArena(1 << 20, CUDA), 0, 1 << 20)
    a, b = pool.lease(4096), pool.lease(8192)
    assert a.aliases() == b.aliases() == 0
    view = a.view(torch.float32)[3:7].view(2, 2)
    assert a.aliases() == 2 and b.aliases() == 0 and view.device == CUDA  # the view, and what autograd takes it for a view of
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.data = view
    del view
    assert a.aliases() == 1 and parameter.is_cuda and parameter.data_ptr() == a.bytes().data_ptr() + 12
    assert not a.bytes().any() and a.bytes().data_ptr() % 256 == 0


def test_caps_are_of_the_device() -> None:
    from tierflow.settings import available

    assert available(CUDA, ())[Tier.DEVICE] <= torch.cuda.mem_get_info(CUDA)[1]
    with pytest.raises(tierflow.DoesNotFit, match="device"):
        tierflow.offload(wide(), tiny.config("device", "/tmp", device_memory="1MB", device="cuda:0"))
