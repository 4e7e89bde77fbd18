"""Gradients on NVMe: the same bits, memory for a window of them and no more, and bytes as planned."""

from __future__ import annotations

import errno
import gc
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from loops import ids, loss_of
from outcome import Stack, states_of
from torch import nn

import tierflow
from tierflow.config import ConfigError
from tierflow.scheduler.placement import DoesNotFit
from tierflow.swap import Kind, Tier, paged_bytes

UNIT = 24576  # bytes of one layer of Stack(width=64), padded


def train(model: nn.Module, path: Path, placement: str, steps: int = 4, **block: Any) -> tuple[Any, list[float], list[tuple[int, int]]]:
    """The optimizer, losses, and (read, written) of every step once its update has ended."""
    _, optimizer = tierflow.offload(model, tiny.config(placement, path, clip=0.05, **block))
    losses, moved = [], []
    for step in range(steps):
        loss = loss_of(model, step)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        optimizer.engine.settle()
        optimizer.engine.manager.ledger.check()
        traffic = optimizer.engine.take_report().traffic
        moved.append((traffic.nvme_read, traffic.nvme_written))
    return optimizer, losses, moved


def resident(engine: Any) -> int:
    """Bytes of the gradients' address space that have a page behind them, from smaps."""
    arena = engine.spilled._memory._arena
    low, high = arena.address, arena.address + arena.nbytes
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) < high and int(found[2], 16) > low
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@pytest.mark.parametrize("placement", ["nvme", "param_host_states_nvme", "everything"])
@pytest.mark.parametrize("state_format", ["fp32", "int8"])
def test_the_bits_are_those_of_gradients_in_memory_and_the_bytes_those_of_the_plan(tmp_path, placement, state_format) -> None:
    model = tiny.llama(layers=4)
    tight = tiny.tight(model, placement, gradients="nvme", optimizer_state=state_format)
    expected, losses, _ = train(tiny.llama(layers=4), tmp_path, "device", optimizer_state=state_format)
    optimizer, found, moved = train(model, tmp_path, placement, gradients="nvme", optimizer_state=state_format, **tight)
    plan = optimizer.engine.plan
    grads = sum(u.chunks[Kind.GRAD].nbytes for u in optimizer.engine.units)
    assert plan.resident[Tier.NVME, Kind.GRAD] == grads and (Tier.HOST, Kind.GRAD) not in plan.resident
    assert found == losses and tiny.same(states_of(optimizer.engine), states_of(expected.engine))
    assert moved[-1][1] == pytest.approx(plan.nvme_written, rel=0.02)
    if placement == "nvme":  # no weights are fetched; which gradients are last in memory the plan can only guess
        assert abs(moved[-1][0] - plan.nvme_read) <= plan.window
    expected.close()
    optimizer.close()


def test_no_more_is_in_memory_than_the_window(tmp_path) -> None:
    model = Stack(layers=12, width=800)  # each gradient of two huge pages
    _, optimizer = tierflow.offload(model, tiny.config("nvme", tmp_path, gradients="nvme", host_memory="1GB", device_memory="1GB"))
    engine, seen = optimizer.engine, list[int]()
    each = paged_bytes(engine.units[0].chunks[Kind.GRAD].nbytes)
    assert engine.plan.window == 2 * each
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _p: seen.append(resident(engine)))
    for step in range(3):
        model(model.input(step)).backward()
        for p in model.parameters():
            p.grad.abs().sum()
            seen.append(resident(engine))
        optimizer.step()
        engine.settle()
    assert each <= max(seen) <= engine.plan.window
    optimizer.close()


def test_they_go_to_nvme_only_where_host_memory_is_short(tmp_path) -> None:
    def plan(host: int) -> Any:
        model = Stack(layers=8, width=64)
        _, optimizer = tierflow.offload(model, tiny.config("everything", tmp_path, gradients="auto", host_memory=host, device_memory=4 * UNIT))
        found = optimizer.engine.plan
        optimizer.close()
        return found

    def least(gradients: str) -> int:
        model = Stack(layers=8, width=64)
        block = {"gradients": gradients, "device_memory": 4 * UNIT}
        with pytest.raises(DoesNotFit) as refused:
            tierflow.offload(model, tiny.config("everything", tmp_path, host_memory=4096, **block))
        assert ('or set tierflow.gradients to "auto"' in str(refused.value)) == (gradients == "host")
        return refused.value.needed[Tier.HOST]

    in_memory, fewest = least("host"), least("auto")
    assert fewest < in_memory
    assert (Tier.NVME, Kind.GRAD) not in plan(in_memory).resident
    short = plan(in_memory - 4096)
    assert short.resident[Tier.NVME, Kind.GRAD] and short.total(Tier.HOST) <= in_memory - 4096
    none_left = plan(fewest)
    assert (Tier.HOST, Kind.GRAD) not in none_left.resident
    assert "window (gradients on their way)" in tierflow.scheduler.plan.table_text(none_left)


def test_a_kept_handle_and_a_kept_view_show_their_gradient(tmp_path) -> None:
    """What nobody can see any more is not written; what somebody kept is."""
    plain, model = tiny.llama(layers=4), tiny.llama(layers=4)
    _, optimizer = tierflow.offload(model, tiny.config("everything", tmp_path, gradients="nvme"))
    kept = []
    for m in (plain, model):
        loss_of(m, 0).backward()
        last, first = m.model.layers[3].mlp.up_proj.weight, m.model.layers[0].mlp.up_proj.weight
        kept.append((last.grad, first.grad.view(-1)[5:9]))
        m.zero_grad()
        with torch.no_grad():
            m(input_ids=ids(3))
    for p, q in zip(model.model.layers[1].parameters(), model.model.layers[2].parameters(), strict=True):
        loss = (p.float().sum() + q.float().sum()) * 2  # other units' gradients pass through the window
        loss.backward()
    assert torch.equal(kept[0][0], kept[1][0].clone()) and torch.equal(kept[0][1], kept[1][1].clone())
    optimizer.close()


def test_an_operation_on_gradients_of_more_units_than_have_room(tmp_path) -> None:
    model = Stack(layers=6, width=64)
    _, optimizer = tierflow.offload(model, tiny.config("everything", tmp_path, gradients="nvme"))
    model(model.input(0)).backward()
    weights = [layer.weight.grad for layer in model.layers]
    two = torch.stack(weights[:2])
    assert torch.equal(two[0], weights[0].clone())
    with pytest.raises(tierflow.CapacityError, match=r'set tierflow\.gradients to "host"'):
        torch.stack(weights)
    norms = torch._foreach_norm(weights)
    assert [n.item() for n in norms] == [w.norm().item() for w in weights]
    assert torch.equal(torch._foreach_pow(2.0, weights)[5], 2.0 ** weights[5].clone())
    optimizer.step()
    optimizer.close()


def test_a_failed_write_is_said_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    model = Stack(layers=6, width=64)
    _, optimizer = tierflow.offload(model, tiny.config("nvme", tmp_path, gradients="nvme"))
    engine = optimizer.engine
    model(model.input(0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    engine.settle()

    monkeypatch.setattr(engine.manager.nvme, "write", lambda *args, **kw: Failing())
    with pytest.raises(OSError, match="no space left"):
        model(model.input(1)).backward()
    monkeypatch.undo()
    optimizer.zero_grad()
    model(model.input(2)).backward()  # the next one is whole again
    optimizer.step()
    engine.manager.ledger.check()
    optimizer.close()
    assert not list(tmp_path.iterdir())


def assign(model: Stack) -> None:
    for layer in model.layers:
        layer.weight.grad = torch.full(layer.weight.shape, 0.01)


def clip_twice(model: Stack) -> None:
    for most in (0.05, 0.01):
        nn.utils.clip_grad_norm_(model.parameters(), most)


def again(model: Stack) -> None:
    model(model.input(1)).backward()


def zero_rows(model: Stack) -> None:
    for layer in model.layers:
        layer.weight.grad[:3] = 0.0


@pytest.mark.parametrize("change", [assign, clip_twice, again, zero_rows])
def test_what_changes_while_it_is_away_is_kept(tmp_path, change) -> None:
    seen = []
    for gradients in ("host", "nvme"):
        model = Stack(layers=6, width=64)
        _, optimizer = tierflow.offload(model, tiny.config("nvme", tmp_path, gradients=gradients))
        model(model.input(0)).backward()
        change(model)
        optimizer.engine.gradients.present(optimizer.engine.units)  # takes in what was assigned
        norms = [[p.grad.norm().item() for p in model.parameters()] for _ in range(2)]
        optimizer.step()
        seen.append((norms, states_of(optimizer.engine)))
        optimizer.close()
    assert seen[0][0] == seen[1][0] and seen[1][0][0] == seen[1][0][1]
    assert tiny.same(seen[0][1], seen[1][1])


def test_a_gradient_outlives_its_engine_in_memory_only(tmp_path) -> None:
    model = Stack(layers=6, width=64)
    _, optimizer = tierflow.offload(model, tiny.config("nvme", tmp_path, gradients="nvme"))
    model(model.input(0)).backward()
    kept = model.layers[5].weight.grad
    del model, optimizer, _
    gc.collect()
    with pytest.raises(RuntimeError, match="the optimizer that it belonged to is gone"):
        kept.sum()


def test_the_bytes_of_several_micro_batches(tmp_path) -> None:
    model = tiny.llama(layers=6)
    engine = tierflow.initialize(model, tiny.config("nvme", tmp_path, 0.0, 3, gradients="nvme"))
    inner = engine.optimizer.engine
    for batches in tiny.batches(3, 3):
        engine.train_batch([{"input_ids": b, "labels": b} for b in batches])
        inner.settle()
        moved = inner.take_report().traffic
    assert abs(moved.nvme_read - inner.plan.nvme_read) <= 3 * inner.plan.window
    assert abs(moved.nvme_written - inner.plan.nvme_written) <= 3 * inner.plan.window
    assert moved.nvme_written > 2 * inner.plan.resident[Tier.NVME, Kind.GRAD]  # each micro-batch's addition
    engine.close()


class Failing:
    """A transfer that moved nothing."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        raise OSError(errno.ENOSPC, "no space left on the drive")


def test_a_gradient_whose_update_is_still_due_is_not_lost(tmp_path, monkeypatch) -> None:
    """The loop has dropped it, and others want its room before its update has begun."""
    seen = []
    for placement, gradients in (("device", "host"), ("nvme", "nvme")):
        model = Stack(layers=8, width=64)
        _, optimizer = tierflow.offload(model, tiny.config(placement, tmp_path, gradients=gradients, update="deferred"))
        engine = optimizer.engine
        model(model.input(0)).backward()
        with monkeypatch.context() as patch:
            patch.setattr(engine.updates, "advance", lambda **_: None)
            optimizer.step()
            optimizer.zero_grad()
            if gradients == "nvme":
                assert engine.spilled.here(engine.units[0]) and engine.updates.pending(engine.units[0])
                for index in (5, 6, 7):
                    engine.spilled.need(index)
                assert not engine.spilled.here(engine.units[0])
        seen.append(states_of(engine))
        optimizer.close()
    assert tiny.same(*seen)


@pytest.mark.parametrize("failures", [1, 3])
def test_a_gradient_that_could_not_be_written_stays_in_memory(tmp_path, monkeypatch, failures) -> None:
    plain, model = Stack(layers=6, width=64), Stack(layers=6, width=64)
    _, optimizer = tierflow.offload(model, tiny.config("nvme", tmp_path, gradients="nvme"))
    for m in (plain, model):
        m(m.input(0)).backward()
    manager, first = optimizer.engine.manager, model.layers[0].weight
    write, left = manager.nvme.write, [failures]

    def fails(*args: Any, **kw: Any) -> Any:
        if left[0]:
            left[0] -= 1
            return Failing()
        return write(*args, **kw)

    first.grad.mul_(torch.ones(64, 1))  # it changed: NVMe has not got it
    monkeypatch.setattr(manager.nvme, "write", fails)
    for layer in range(1, 6):
        for _ in range(failures + 1):
            try:
                model.layers[layer].weight.grad.add_(0.0)
                break
            except OSError:
                continue
    assert not left[0]
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad.clone())
    monkeypatch.undo()
    optimizer.step()
    optimizer.engine.manager.ledger.check()
    optimizer.close()


def test_states_that_do_not_live_on_nvme_refuse_it(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r'tierflow\.gradients is "nvme".*offload_optimizer\.device is "cpu"'):
        tierflow.offload(Stack(), tiny.config("host", tmp_path, gradients="nvme"))
