"""Memory of idle gradients serves the update, and nobody who still looks at a gradient sees that."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
import torch

import tierflow
from tierflow.swap import DebugMemory


def offloaded(path, **block: Any) -> tuple[Any, Any, list[int]]:
    """A model whose update needs more staging memory than there is, its optimizer, and what was borrowed so far."""
    model = tiny.llama()
    caps = tiny.tight(model, "everything", update="deferred")
    config = tiny.config("everything", path, **({"update": "deferred"} | caps | block))
    model, optimizer = tierflow.offload(model, config, debug_memory=DebugMemory(random.Random(5)))
    idle, borrowed = optimizer.engine.updates.stager.idle, []
    lease = idle.lease

    def noted(nbytes: int) -> Any:
        found = lease(nbytes)
        if found is not None:
            borrowed.append(found.nbytes)
        return found

    idle.lease = noted
    return model, optimizer, borrowed


def backward(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()


def first_linear(model: Any) -> torch.nn.Parameter:
    return model.model.layers[0].self_attn.q_proj.weight


BATCHES = [step[0] for step in tiny.batches(5)]


def test_it_is_borrowed_in_the_forward_and_free_for_the_next_gradients(tmp_path) -> None:
    model, optimizer, borrowed = offloaded(tmp_path)
    idle = optimizer.engine.updates.stager.idle
    for ids in BATCHES:
        backward(model, ids)
        assert not idle._lent
        optimizer.step()
        optimizer.zero_grad()
    assert len(borrowed) > len(BATCHES)
    mine = tiny.weights(model)
    optimizer.engine.close()

    plain, optimizer, unborrowed = offloaded(tmp_path, update="immediate")
    for ids in BATCHES:
        backward(plain, ids)
        optimizer.step()
        optimizer.zero_grad()
    assert not unborrowed
    other = tiny.weights(plain)
    optimizer.engine.close()
    assert all(torch.equal(mine[name], other[name]) for name in other)


def test_gradients_that_are_kept_as_zeros_lend_nothing(tmp_path) -> None:
    model, optimizer, borrowed = offloaded(tmp_path)
    for ids in BATCHES:
        backward(model, ids)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert not borrowed
    optimizer.engine.close()


@pytest.mark.parametrize("kept", ["handle", "view", "detached"])
def test_a_gradient_that_the_user_kept_stays_what_it_was(kept: str, tmp_path) -> None:
    model, optimizer, borrowed = offloaded(tmp_path)
    for ids in BATCHES[:3]:
        backward(model, ids)
        optimizer.step()
        optimizer.zero_grad()
    assert borrowed
    backward(model, BATCHES[3])
    optimizer.step()
    found = first_linear(model).grad
    assert found is not None
    before = found.clone()
    mine = {"handle": found, "view": found[1:], "detached": found.detach()}[kept]
    before = before[1:] if kept == "view" else before
    del found
    optimizer.zero_grad()
    with torch.no_grad():
        model(input_ids=BATCHES[4])
    optimizer.engine.settle()
    assert torch.equal(mine.clone(), before)
    optimizer.engine.close()


def test_a_gradient_that_the_user_assigns_finds_its_memory_free(tmp_path) -> None:
    model, optimizer, borrowed = offloaded(tmp_path)
    twin = tiny.llama()
    plain = tiny.plain_adamw(twin)
    for step, ids in enumerate(BATCHES):
        for mine, opt in ((model, optimizer), (twin, plain)):
            if step == 3:  # the forward has lent the memory, and no backward comes
                with torch.no_grad():
                    mine(input_ids=ids)
                torch.manual_seed(1)
                for p in mine.parameters():
                    p.grad = torch.randn(p.shape)
            else:
                backward(mine, ids)
            opt.step()
            opt.zero_grad()
    assert borrowed
    mine = tiny.weights(model)
    optimizer.engine.close()
    assert all(torch.equal(mine[name], p.detach()) for name, p in twin.named_parameters())
