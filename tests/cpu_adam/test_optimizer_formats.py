"""State formats and the other rules through their torch optimizers."""

import copy
import io

import pytest
import torch

from tierflow.cpu_adam import CPUAdagrad, CPUAdamW, CPULion
from tierflow.cpu_adam.rules import ADAGRAD, ADAM, LION

BF16, F32 = torch.bfloat16, torch.float32
CASES = [("bf16", F32), ("bf16", BF16), ("int8", F32), ("int8", BF16), ("int8-24bit", BF16)]
CLASSES = {CPUAdamW: ADAM, CPULion: LION, CPUAdagrad: ADAGRAD}


def parameters(dtype, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=gen).to(dtype)) for shape in ((96, 80), (128, 65), (80,))]


def train(optimizer, params, steps, seed=1):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
        optimizer.step()


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_state_and_resume_bit_for_bit(cls, name, dtype):
    params = parameters(dtype)
    first = cls(params, lr=1e-3, state_format=name, seed=7)
    train(first, params, 3)
    moments = set(CLASSES[cls].moments)
    kept = BF16 if name == "bf16" else torch.uint8
    large, small = first.state[params[0]], first.state[params[2]]
    assert all(large[m].dtype == kept and small[m].dtype == F32 for m in moments)
    master = {(F32, name): set(), (BF16, name): {"remainder"}, (BF16, "int8-24bit"): {"correction"}}[dtype, name]
    assert set(large) == {"step"} | moments | master | ({"scale"} if kept == torch.uint8 else set())
    assert set(small) == {"step"} | moments | ({"remainder"} if dtype == BF16 else set())
    if kept == torch.uint8:
        assert large["scale"].shape == (96 * 80 // 64, len(moments)) and first.state[params[1]]["scale"].shape[0] == 130
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    second = cls(again, lr=1e-3, state_format=name)
    second.load_state_dict(torch.load(file))
    train(first, params, 2, seed=2)
    train(second, again, 2, seed=2)
    for p, q in zip(params, again, strict=True):
        assert same(p.detach(), q.detach())
        assert all(same(value, second.state[q][key]) for key, value in first.state[p].items())


def test_seeds_differ_and_parameters_do_not_share_noise():
    results = []
    for seed in (0, 0, 1):
        p, q = (torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2))
        optimizer = CPUAdamW([p, q], state_format="bf16", seed=seed)
        p.grad = q.grad = torch.full((64, 64), 0.3)
        optimizer.step()
        results.append((optimizer.state[p]["exp_avg"], optimizer.state[q]["exp_avg"]))
    assert same(results[0][0], results[1][0]) and not same(results[0][0], results[2][0])
    assert not same(results[0][0], results[0][1])


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_long_run_stays_near_fp32_s(name, dtype):
    """A quadratic bowl: the weights of a lossy run follow those of the exact one."""
    runs = {}
    for chosen in ("auto", name):
        gen = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64, 128, generator=gen).to(dtype))
        target = torch.randn(64, 128, generator=gen)
        optimizer = CPUAdamW([p], lr=1e-2, state_format=chosen, weight_decay=0.0)
        for _ in range(400):
            p.grad = (p.detach().float() - target + torch.randn(64, 128, generator=gen)).to(dtype)
            optimizer.step()
        runs[chosen] = (p.detach().float() - target).square().mean().sqrt()
    assert runs["auto"] < 0.25 and runs[name] < 1.1 * runs["auto"]


def broken(saved, change):
    state = copy.deepcopy(saved)
    change(state["state"][0], state["param_groups"][0])
    return state


DAMAGE = {
    "state 'exp_avg' is torch.float32": lambda s, g: s.update(exp_avg=torch.zeros(96, 80)),
    "state 'scale' is torch.float32 of shape": lambda s, g: s.update(scale=s["scale"][:-1]),
    "without scale": lambda s, g: s.pop("scale"),
    "without exp_avg": lambda s, g: s.pop("exp_avg"),
    "negative or infinite": lambda s, g: s["scale"].__setitem__((3, 1), float("inf")),
    "scale is 0 or NaN": lambda s, g: s["scale"].__setitem__((3, 0), 0.0),
    "'exp_avg_sq' has codes where": lambda s, g: s["exp_avg_sq"].view(-1)[64:128].zero_(),
    "'step' is 1.5": lambda s, g: s.update(step=torch.tensor(1.5)),
    "'correction' has no place": lambda s, g: s.update(correction=torch.zeros(96, 80, dtype=torch.int8)),
    "saved with state_format='bf16', this optimizer keeps 'int8'": lambda s, g: g.update(state_format="bf16"),
    "Invalid state_format: 'int3'": lambda s, g: g.update(state_format="int3"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_or_foreign_state_is_refused_and_nothing_is_loaded(message):
    params = parameters(BF16)
    optimizer = CPUAdamW(params, state_format="int8")
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, 1)
    kept = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken(saved, DAMAGE[message]))
    assert all(same(v, optimizer.state[params[0]][k]) for k, v in kept.items())
    assert optimizer.param_groups[0]["state_format"] == "int8"
    optimizer.load_state_dict(saved)


def test_torch_s_state_is_no_8_bit_state():
    params = parameters(F32)
    theirs = torch.optim.AdamW(params)
    train(theirs, params, 1)
    with pytest.raises(ValueError, match=r"'int8' has torch\.uint8"):
        CPUAdamW(params, state_format="int8").load_state_dict(theirs.state_dict())
    CPUAdamW(params, state_format="fp32").load_state_dict(theirs.state_dict())


def test_lion_and_adagrad_follow_their_formulas():
    for cls, options in ((CPULion, {"betas": (0.95, 0.98), "weight_decay": 0.1}), (CPUAdagrad, {"weight_decay": 0.1})):
        p = torch.nn.Parameter(torch.randn(65, 70, generator=torch.Generator().manual_seed(0), dtype=F32))
        weight, moment = p.detach().double().clone(), torch.zeros(65, 70, dtype=torch.float64)
        optimizer, gen = cls([p], lr=1e-2, **options), torch.Generator().manual_seed(1)
        for _ in range(10):
            p.grad = torch.randn(65, 70, generator=gen)
            g = p.grad.double()
            if cls is CPULion:
                weight = weight * (1 - 1e-2 * 0.1) - 1e-2 * (0.95 * moment + 0.05 * g).sign()
                moment = 0.98 * moment + 0.02 * g
            else:
                g = g + 0.1 * weight
                moment = moment + g * g
                weight = weight - 1e-2 * g / (moment.sqrt() + 1e-10)
            optimizer.step()
        assert torch.allclose(p.double(), weight, atol=2e-6)


def test_adagrad_is_torch_s():
    p, q = (torch.nn.Parameter(torch.ones(100)) for _ in range(2))
    ours, theirs = CPUAdagrad([p], lr=0.1, weight_decay=0.01), torch.optim.Adagrad([q], lr=0.1, weight_decay=0.01)
    for seed in range(5):
        p.grad = torch.randn(100, generator=torch.Generator().manual_seed(seed))
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_format": "int4"}, "Invalid state_format: 'int4'"),
        ({"state_format": "int8-24bit"}, "serves bfloat16 parameters"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 1.5}, "seed must be"),
    ],
)
def test_bad_options(options, message):
    for cls in CLASSES:
        with pytest.raises(ValueError, match=message):
            cls([torch.nn.Parameter(torch.zeros(3))], **options)
