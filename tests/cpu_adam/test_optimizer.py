"""CPUAdamW as a torch.optim.Optimizer."""

import copy
import io
import pickle

import pytest
import torch

from tierflow.cpu_adam import CPUAdamW

INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(INTS[a.element_size()]), b.view(INTS[b.element_size()]))


def param(dtype=torch.float32, shape=(5, 7), seed=0):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def train(optimizer, params, steps, seed=1):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "state_format", "keys"),
    [
        (torch.float32, "auto", set()),
        (torch.float32, "lossless", set()),
        (torch.bfloat16, "auto", {"remainder"}),
        (torch.bfloat16, "fp32", {"master"}),
        (torch.float16, "auto", {"master"}),
    ],
)
def test_state_keys_and_resume_bit_for_bit(dtype, state_format, keys):
    p = param(dtype)
    first = CPUAdamW([p], state_format=state_format)
    train(first, [p], 5)
    state = first.state[p]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"} | keys
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    assert state["step"].item() == 5 and state["step"].dtype == torch.float32

    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    q = torch.nn.Parameter(p.detach().clone())
    second = CPUAdamW([q], state_format=state_format)
    second.load_state_dict(torch.load(file))
    for key, value in state.items():
        assert same(second.state[q][key], value), key
    train(first, [p], 5, seed=2)
    train(second, [q], 5, seed=2)
    assert same(p.detach(), q.detach())
    for key, value in state.items():
        assert same(second.state[q][key], value), key


def test_a_16_bit_weight_follows_the_fp32_arithmetic():
    half = {s: param(torch.bfloat16) for s in ("fp32", "lossless")}
    for state_format, p in half.items():
        optimizer = CPUAdamW([p], lr=1e-6, state_format=state_format)
        before = p.detach().clone()
        for _ in range(3000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        # bf16 alone would lose every one of these steps.
        assert ((before - p).float() - 3e-3).abs().max() < 2e-2 and (before != p).any()


def test_load_copies_and_takes_torch_s_own_state():
    p, q = param(), param()
    theirs = torch.optim.AdamW([p], lr=3e-4, foreach=True)
    train(theirs, [p], 3)
    q.data.copy_(p.data)
    ours = CPUAdamW([q])
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 3e-4
    assert ours.state[q]["exp_avg"].data_ptr() != theirs.state[p]["exp_avg"].data_ptr()
    train(theirs, [p], 3, seed=2)
    train(ours, [q], 3, seed=2)
    assert torch.allclose(p, q, rtol=1e-6, atol=1e-8)
    assert same(ours.state[q]["exp_avg"], theirs.state[p]["exp_avg"])
    # And back.
    theirs.load_state_dict(ours.state_dict())
    train(theirs, [p], 1)


def test_load_runs_the_user_s_hooks_and_refuses_what_does_not_fit():
    p = param(torch.bfloat16)
    optimizer = CPUAdamW([p])
    train(optimizer, [p], 2)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(lambda _, s: {**s, "state": {}})
    optimizer.load_state_dict(saved)
    assert not optimizer.state[p]
    for key, value in (("exp_avg", torch.zeros(3)), ("remainder", torch.zeros(5, 7))):
        wrong = copy.deepcopy(saved)
        wrong["state"][0][key] = value
        with pytest.raises(ValueError, match=key):
            CPUAdamW([p]).load_state_dict(wrong)


def test_pickle_and_deepcopy():
    p = param()
    optimizer = CPUAdamW([p])
    train(optimizer, [p], 2)
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        (q,) = other.param_groups[0]["params"]
        train(other, [q], 2, seed=3)
        assert other.state[q]["step"].item() == 4


def test_groups_schedulers_and_closures():
    a, b, frozen = param(seed=0), param(torch.bfloat16, seed=1), param(seed=2)
    groups = [
        {"params": [a], "lr": 0.5},
        {"params": [b, frozen], "weight_decay": 0.0, "state_format": "fp32"},
    ]
    optimizer = CPUAdamW(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t else 1.0)
    before = [p.detach().clone() for p in (a, b, frozen)]

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = a.sum() + b.float().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None
    assert set(optimizer.state[b]) >= {"master"} and frozen not in optimizer.state
    assert not torch.equal(a, before[0]) and not torch.equal(b, before[1]) and torch.equal(frozen, before[2])
    assert torch.allclose((before[1] - b).float(), torch.full((5, 7), 0.1), atol=2e-2)
    scheduler.step()
    after = a.detach().clone()
    optimizer.step(closure)
    assert torch.equal(a, after)


def test_tensor_lr_and_changed_lr():
    p, q = param(), param()
    train(CPUAdamW([p], lr=torch.tensor(0.01)), [p], 2)
    train(CPUAdamW([q], lr=float(torch.tensor(0.01))), [q], 2)
    assert same(p.detach(), q.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype):
    """Transposed, sliced, scalar and empty parameters, and a gradient of another layout."""
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = [base.clone().t(), base.clone()[:, ::2], base.clone()[0, 0].clone(), base.clone()[:0]]
    plain = [torch.nn.Parameter(v.contiguous().clone()) for v in views]
    odd = [torch.nn.Parameter(v) for v in views]
    first, second = CPUAdamW(plain), CPUAdamW(odd)
    for _ in range(3):
        for p, q in zip(plain, odd, strict=True):
            p.grad = torch.randn(p.shape).to(dtype)
            q.grad = p.grad.t().contiguous().t() if p.dim() == 2 else p.grad.clone()
        first.step()
        second.step()
    for p, q in zip(plain, odd, strict=True):
        assert same(p.detach(), q.detach().contiguous())


@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_autograd_sees_that_the_parameter_changed(shape):
    p = param(shape=shape)
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    CPUAdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_grad_scaler():
    p = param()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = CPUAdamW([p])
    scaler.scale((p * 2).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.state[p]["step"].item() == 1
    assert torch.allclose(optimizer.state[p]["exp_avg"], torch.full((5, 7), 0.2))


SAME_AS_TORCH = [
    {"lr": -1.0},
    {"lr": float("nan")},
    {"lr": torch.tensor([1.0, 2.0])},
    {"eps": -1e-8},
    {"betas": (1.0, 0.999)},
    {"betas": (0.9, -0.1)},
    {"betas": (torch.tensor(0.9), 0.999)},
    {"weight_decay": -0.1},
]


@pytest.mark.parametrize("options", SAME_AS_TORCH, ids=str)
def test_errors_are_torch_s(options):
    with pytest.raises(ValueError, match=r".") as theirs:
        torch.optim.AdamW([param()], **options)
    with pytest.raises(ValueError, match=r".") as ours:
        CPUAdamW([param()], **options)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amsgrad": True}, "amsgrad"),
        ({"fused": True}, "fused=True is not supported"),
        ({"capturable": True}, "capturable=True is not supported"),
        ({"state_format": "int4"}, "Invalid state_format: 'int4'"),
    ],
)
def test_what_it_does_not_do(options, message):
    with pytest.raises(ValueError, match=message):
        CPUAdamW([param()], **options)


def test_parameters_it_cannot_serve():
    for p, message in (
        (torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)), "float64"),
        (torch.nn.Parameter(torch.zeros(2, device="meta")), "meta"),
    ):
        with pytest.raises(ValueError, match=message):
            CPUAdamW([p])
    with pytest.raises(ValueError, match="lossless"):
        CPUAdamW([param(torch.float16)], state_format="lossless")
    with pytest.raises(ValueError, match="empty parameter list"):
        CPUAdamW([])
    optimizer = CPUAdamW([param()])
    with pytest.raises(ValueError, match="lossless"):
        optimizer.add_param_group({"params": [param(torch.float16)], "state_format": "lossless"})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_and_a_late_amsgrad():
    table = torch.nn.Embedding(4, 3, sparse=True)
    optimizer = CPUAdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    theirs = torch.optim.AdamW([param()], amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad"):
        CPUAdamW([param()]).load_state_dict(theirs.state_dict())
