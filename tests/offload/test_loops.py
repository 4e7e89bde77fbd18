"""Ordinary training loops: what users do to parameters and modules must act, or raise with the remedy."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
from loops import Tower, check, ids, loss_of, pair, tower_step
from torch import nn
from torch.nn import functional as F

import tierflow
from tierflow.cpu_adam import CPUAdamW


def test_touching_an_evicted_parameter_raises_and_names_the_remedy(tmp_path) -> None:
    _, _, model, b = pair(tmp_path)
    p = model.model.layers[0].mlp.up_proj.weight
    for touch in (
        lambda: p.sum(), lambda: p + 1, lambda: p.clone(), lambda: p.numpy(), lambda: copy.deepcopy(model),
        lambda: p.data.add_(1), lambda: model.to(torch.float64), lambda: p.detach(), lambda: torch.save(p, tmp_path / "x"),
        lambda: nn.init.zeros_(p), lambda: p.tolist(), lambda: p.data_ptr(),
    ):  # fmt: skip
        with pytest.raises(tierflow.EvictedParameterError, match=r"parameter .* tierflow\.gathered"):
            touch()
    assert p.shape == (64, 32) and p.numel() == 2048 and p.dtype == torch.float32 and p.requires_grad
    assert isinstance(p, nn.Parameter) and "offloaded parameter" in repr(p) and len(p) == 64
    assert p.device.type == "cpu" and p.is_leaf and p.element_size() == 4
    b.close()


def test_gathered_reads_and_writes(tmp_path) -> None:
    model = tiny.llama(layers=2, hidden=32)
    plain, a, model, b = pair(tmp_path, model, **tiny.tight(model, slack=4.0))
    with torch.no_grad(), tierflow.gathered(model.model.layers[1]):
        for m in (plain, model):
            m.model.layers[1].mlp.up_proj.weight[0].fill_(0.5)
    for m, o in ((plain, a), (model, b)):
        loss_of(m).backward()
        o.step()
    check(plain, model)
    b.close()


def test_gathered_leaves_alone_what_is_not_managed(tmp_path) -> None:
    model = tiny.llama(layers=2, hidden=32)
    _, b = tierflow.offload(model, tiny.config("everything", tmp_path))
    model.extra = nn.Linear(4, 4)
    with tierflow.gathered(model):
        assert model.extra.weight.shape == (4, 4) and model.model.norm.weight.sum() == 32
    b.close()


def test_gathered_is_checked_against_the_cap(tmp_path) -> None:
    model = tiny.llama(layers=12, hidden=32)
    _, b = tierflow.offload(model, tiny.config("everything", tmp_path, **tiny.tight(model)))
    with pytest.raises(tierflow.CapacityError, match="device_memory"), tierflow.gathered(model):
        pass
    loss_of(model).backward()
    b.step()
    b.close()


def test_state_dict_materializes_and_loads(tmp_path) -> None:
    plain, a, model, b = pair(tmp_path)
    for m, o in ((plain, a), (model, b)):
        loss_of(m).backward()
        o.step()
        o.zero_grad()
    mine, theirs = model.state_dict(), plain.state_dict()
    assert tiny.same(mine, theirs)
    fresh = {k: v + 1 for k, v in theirs.items()}
    for m in (plain, model):
        m.load_state_dict(fresh)
    for m, o in ((plain, a), (model, b)):
        loss_of(m).backward()
        o.step()
    check(plain, model)
    b.close()


def test_optimizer_state_dict_is_a_small_manifest(tmp_path) -> None:
    _, _, model, b = pair(tmp_path)
    loss_of(model).backward()
    b.step()
    manifest = b.state_dict()
    assert manifest["state"] == {} and manifest["tierflow"]["steps_taken"] == 1
    b.load_state_dict(manifest)
    with pytest.raises(ValueError, match="load_checkpoint"):
        b.load_state_dict(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1).state_dict())
    b.close()


def test_eval_and_no_grad_between_steps(tmp_path) -> None:
    plain, a, model, b = pair(tmp_path)
    for step in range(3):
        for m, o in ((plain, a), (model, b)):
            loss_of(m, step).backward()
            with torch.no_grad():
                m.eval()
                m(input_ids=ids(9))
                m.train()
            o.step()
            o.zero_grad()
        with torch.no_grad():
            assert torch.equal(plain(input_ids=ids(8)).logits, model(input_ids=ids(8)).logits)
    check(plain, model)
    b.close()


def test_generate(tmp_path) -> None:
    plain, _, model, b = pair(tmp_path)
    out = [m.generate(ids()[:1, :4], max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (plain, model)]
    assert torch.equal(*out)
    b.close()


def test_module_order_may_change_and_modules_may_run_twice(tmp_path) -> None:
    torch.manual_seed(3)
    plain, a, model, b = pair(tmp_path, Tower())
    orders = [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [0, 0, 1, 1], [3], [1, 4, 1, 4, 2], [0, 1, 2, 3, 4]]
    for step, order in enumerate(orders):
        losses = []
        for m, o in ((plain, a), (model, b)):
            loss = tower_step(m, order, step)
            loss.backward()
            losses.append(loss.item())
            assert m.idle.weight.grad is None
            o.step()
            o.zero_grad()
        assert losses[0] == losses[1]
        b.engine.manager.ledger.check()
    check(plain, model)
    b.close()


def test_frozen_parameters_keep_no_state(tmp_path) -> None:
    torch.manual_seed(3)
    model = Tower()
    for i in (0, 2):
        model.blocks[i].requires_grad_(False)
    model.blocks[1][0].bias.requires_grad_(False)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    plain, a, model, b = pair(tmp_path, model)
    assert len(b.engine.gradients.slots) == sum(p.requires_grad for p in model.parameters())
    for step in range(3):
        for m, o in ((plain, a), (model, b)):
            tower_step(m, None, step).backward()
            o.step()
            o.zero_grad()
    assert frozen > 0
    check(plain, model)
    b.close()


def test_param_groups_and_lr_scheduler(tmp_path) -> None:
    model = tiny.llama(layers=2, hidden=32)
    plain = copy.deepcopy(model)

    def groups(m):
        decay = [p for n, p in m.named_parameters() if p.dim() > 1]
        rest = [p for n, p in m.named_parameters() if p.dim() <= 1]
        return [{"params": decay, "weight_decay": 0.2, "lr": 5e-3}, {"params": rest, "weight_decay": 0.0, "betas": (0.8, 0.9)}]

    a = CPUAdamW(groups(plain), lr=1e-2)
    taken = torch.optim.AdamW(groups(model), lr=1e-2)
    config = tiny.config("everything", tmp_path, **tiny.tight(model))
    _, b = tierflow.offload(model, config, optimizer=taken)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 / (s + 1)) for o in (a, b)]
    for step in range(3):
        for m, o, s in zip((plain, model), (a, b), schedulers, strict=True):
            loss_of(m, step).backward()
            o.step()
            s.step()
            o.zero_grad()
    assert [g["lr"] for g in a.param_groups] == [g["lr"] for g in b.param_groups]
    check(plain, model)
    b.close()


def test_adam_with_l2_decay_and_maximize(tmp_path) -> None:
    model = tiny.llama(layers=2, hidden=32)
    plain = copy.deepcopy(model)
    a = torch.optim.Adam(plain.parameters(), lr=1e-3, weight_decay=0.1, maximize=True)
    taken = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1, maximize=True)
    _, b = tierflow.offload(model, tiny.config("nvme", tmp_path, **tiny.tight(model, "nvme")), optimizer=taken)
    for m, o in ((plain, a), (model, b)):
        loss_of(m).backward()
        o.step()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-5 * 1e-3 + 1e-7
    b.close()


def test_torch_autograd_grad_and_exceptions_leave_no_pins(tmp_path) -> None:
    _, _, model, b = pair(tmp_path)
    x = model.get_input_embeddings()
    assert x is not None
    with pytest.raises(ValueError):
        model(input_ids=ids(), inputs_embeds=torch.zeros(1))
    with pytest.raises(IndexError):
        model(input_ids=ids() + 1000)
    loss_of(model).backward()
    b.step()
    b.engine.settle()
    assert not any(b.engine.manager.ledger.pins(u.chunk, t) for u in b.engine.units for t in tierflow.swap.Tier)
    b.close()


def test_closure_and_autocast(tmp_path) -> None:
    plain, a, model, b = pair(tmp_path)

    def closure(m):
        def run():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(m)
            loss.backward()
            return loss

        return run

    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        pass
    losses = [o.step(closure(m)).item() for m, o in ((plain, a), (model, b))]
    assert losses[0] == losses[1] and math.isfinite(losses[0])
    check(plain, model)
    b.close()


def test_a_view_that_a_user_holds_is_never_overwritten(tmp_path) -> None:
    torch.manual_seed(3)
    plain, _, model, b = pair(tmp_path, Tower())
    kept: list[torch.Tensor] = []
    handle = model.blocks[0][0].register_forward_hook(lambda m, a, o: kept.append(m.weight.detach()))
    tower_step(model).backward()
    handle.remove()
    for order in ([1, 2, 3, 4], [4, 3, 2, 1]):
        tower_step(model, order).backward()  # nothing may take the memory that the view looks at
        assert torch.equal(kept[0], plain.blocks[0][0].weight)
    b.close()


def test_double_offload_unknown_group_and_closed_engine(tmp_path) -> None:
    _, _, model, b = pair(tmp_path)
    with pytest.raises(ValueError, match="offloaded already"):
        tierflow.offload(model, tiny.config("everything", tmp_path))
    with pytest.raises(ValueError, match="have no optimizer state"):
        b.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    b.close()
    b.close()
    with pytest.raises(RuntimeError, match="closed"):
        loss_of(model)


def test_functional_use_of_a_foreign_weight_is_fetched_on_demand(tmp_path) -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = torch.tanh(block(x))
            return F.linear(x, self.blocks[0].weight.t()) @ self.blocks[2].weight

    torch.manual_seed(1)
    model = Shares()
    plain = copy.deepcopy(model)
    x = torch.randn(3, 16)
    a = tiny.plain_adamw(plain)
    _, b = tierflow.offload(model, tiny.config("everything", tmp_path, **tiny.tight(model, slack=2.0)))
    for _ in range(2):
        for m, o in ((plain, a), (model, b)):
            m(x).square().sum().backward()
            o.step()
            o.zero_grad()
    check(plain, model)
    b.close()


@pytest.mark.parametrize("state", ["lossless", "fp32"])
def test_weights_written_in_place_become_the_master(tmp_path, state) -> None:
    model = tiny.llama(layers=1, hidden=32, dtype=torch.bfloat16)
    fresh = {k: torch.full_like(v, 0.25) for k, v in model.state_dict().items()}
    results = []
    for placement in ("host", "everything"):
        m = copy.deepcopy(model)
        caps = tiny.tight(m, placement, optimizer_state=state)
        _, o = tierflow.offload(m, tiny.config(placement, tmp_path, optimizer_state=state, **caps))
        loss_of(m).backward()
        o.step()
        o.zero_grad()
        m.load_state_dict(fresh)
        loss_of(m).backward()
        o.step()
        results.append(tiny.weights(m))
        assert not any(torch.equal(w, fresh[n]) for n, w in results[-1].items() if "proj" in n)
        assert all((w.float() - 0.25).abs().max() < 0.05 for w in results[-1].values())
        o.close()
    assert tiny.same(*results)


def test_a_failed_prefetch_leaves_no_pin(tmp_path, monkeypatch) -> None:
    _, _, model, b = pair(tmp_path)
    ledger, calls = b.engine.manager.ledger, []

    def fails() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the read of another unit")

    monkeypatch.setattr(b.engine, "prefetch", fails)
    with pytest.raises(OSError, match="another unit"):
        loss_of(model)
    assert not any(ledger.pins(u.chunk, t) for u in b.engine.units for t in tierflow.swap.Tier)
    b.close()
