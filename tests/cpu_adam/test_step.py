"""adam_step: every build against the plain torch reference, bit for bit."""

import itertools

import pytest
import torch

from tierflow.cpu_adam import kernels, reference

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}
VARIANTS = {
    "adamw": {},
    "adam_l2": {"decoupled": False},
    "no_decay": {"weight_decay": 0.0},
    "maximize": {"maximize": True},
    "low_beta1": {"beta1": 0.3, "decoupled": False, "maximize": True},
    "beta1_zero": {"beta1": 0.0, "beta2": 0.0},
    "scaled": {"unscale": 1 / 3, "clip": 0.7},
}
FORMATS = ["fp32", "lossless", "bf16 master", "fp16 master"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDEST = 16
INTS = {2: torch.int16, 4: torch.int32}


def bits(t):
    return t.view(INTS[t.element_size()])


def same(a, b):
    """Equal in every bit, or NaN in both."""
    if a.is_floating_point():
        return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())
    return bool((a == b).all())


def state(weight, fmt):
    """param, master, exp_avg, exp_avg_sq of a fresh weight."""
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    if fmt == "fp32":
        return [weight.clone(), None, m, v]
    if fmt == "lossless":
        param, remainder = reference.split(weight)
        return [param, remainder, m, v]
    dtype = torch.bfloat16 if fmt == "bf16 master" else torch.float16
    return [weight.to(dtype), weight.clone(), m, v]


def gradients(n, dtype, steps, seed=1):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        size = 10 ** (torch.rand(n, generator=gen) * 6 - 6)
        yield (torch.randn(n, generator=gen) * size).to(dtype)


def run(step_fn, tensors, grads, **options):
    param, master, m, v = tensors
    for t, g in enumerate(grads, start=1):
        step_fn(param, g, m, v, master=master, step=t, **{**HYPER, **options})


def copies(tensors):
    return [None if t is None else t.clone() for t in tensors]


def assert_same(got, expected, what):
    for name, a, b in zip(("param", "master", "exp_avg", "exp_avg_sq"), got, expected, strict=True):
        assert a is b or same(a, b), f"{name}: {what}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_isa_equals_the_reference(fmt, grad_dtype, variant):
    n = 2000 + 7
    start = state(torch.randn(n, generator=torch.Generator().manual_seed(0)), fmt)
    grads = list(gradients(n, grad_dtype, 4))
    expected = copies(start)
    run(reference.adam_step, expected, grads, **VARIANTS[variant])
    for isa in kernels.isas():
        got = copies(start)
        run(kernels.adam_step, got, grads, isa=isa, **VARIANTS[variant])
        assert_same(got, expected, f"{isa}, {fmt}, {grad_dtype}, {variant}")


@pytest.mark.parametrize("fmt", FORMATS)
def test_threads_and_isas_agree(fmt):
    n = 150_000 + 13
    start = state(torch.randn(n, generator=torch.Generator().manual_seed(0)), fmt)
    grads = list(gradients(n, torch.bfloat16, 2))
    expected = None
    for isa, threads in itertools.product(kernels.isas(), (1, 2, 3, 8)):
        got = copies(start)
        run(kernels.adam_step, got, grads, isa=isa, threads=threads)
        expected = expected or got
        assert_same(got, expected, f"{isa}, {threads} threads")


def guarded(source, offset, fill):
    """A copy of `source` at an element offset, in the middle of a buffer of `fill`."""
    buffer = torch.full((64 + offset + source.numel() + 64,), fill, dtype=source.dtype)
    view = buffer[64 + offset : 64 + offset + source.numel()]
    view.copy_(source)
    return buffer, view


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_length_and_misalignment(fmt, isa):
    """0..2N-1 elements at every offset of N; nothing before or after them is touched."""
    grad_dtype = torch.float16 if fmt == "fp32" else torch.bfloat16
    full = state(torch.randn(2 * WIDEST, generator=torch.Generator().manual_seed(0)), fmt)
    grads = list(gradients(2 * WIDEST, grad_dtype, 1))
    expected = copies(full)
    run(reference.adam_step, expected, grads)
    for n, offset in itertools.product(range(2 * WIDEST), range(WIDEST)):
        # Each array at an offset of its own.
        buffers = [
            None if t is None else guarded(t[:n], (offset * (k + 1)) % WIDEST, 7 + k)
            for k, t in enumerate([*full, grads[0]])
        ]
        param, master, m, v, g = [None if b is None else b[1] for b in buffers]
        kernels.adam_step(param, g, m, v, master=master, step=1, isa=isa, **HYPER)
        assert_same([param, master, m, v], [None if t is None else t[:n] for t in expected], f"{n}, {offset}")
        for k, b in enumerate(buffers):
            if b is not None:
                begin = 64 + (offset * (k + 1)) % WIDEST
                assert (b[0][:begin] == 7 + k).all() and (b[0][begin + n :] == 7 + k).all(), (n, offset, k)


SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 1e-20, 1.0, -3.5, 1e20, 3.4e38, -3.3962e38]
SPECIAL += [65504.0, 65519.9, 65520.0, 6e-8, 2.9e-8, float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_infinities_nan_denormals_and_overflow(fmt, grad_dtype, isa):
    values = torch.tensor(SPECIAL)
    k = len(SPECIAL)
    weight, grad = values.repeat_interleave(k), values.repeat(k).to(grad_dtype)
    start = state(weight, fmt)
    start[2].copy_(weight.flip(0) * 1e-3)
    start[3].copy_(weight.flip(0).abs() * 1e-3)
    got, expected = copies(start), copies(start)
    run(kernels.adam_step, got, [grad] * 3, isa=isa)
    run(reference.adam_step, expected, [grad] * 3)
    assert_same(got, expected, f"{isa}, {fmt}, {grad_dtype}")


def test_denormals_are_not_flushed():
    tiny = torch.full((40,), 1e-41)
    for isa in kernels.isas():
        param, m, v = tiny.clone(), torch.zeros(40), torch.zeros(40)
        kernels.adam_step(param, tiny.clone(), m, v, step=1, isa=isa, **{**HYPER, "lr": 0.0})
        assert (param == tiny).all() and (m > 0).all()


def test_lossless_holds_all_32_bits_of_the_fp32_master():
    n, steps = 20_000, 60
    weight = torch.randn(n, generator=torch.Generator().manual_seed(0))
    plain, split = state(weight, "fp32"), state(weight, "lossless")
    grads = list(gradients(n, torch.bfloat16, steps))
    run(kernels.adam_step, plain, grads)
    run(kernels.adam_step, split, grads)
    assert same(reference.join(split[0], split[1]), plain[0])
    assert same(split[2], plain[2]) and same(split[3], plain[3])
    assert (split[0].float() - plain[0]).abs().max() <= 2.0**-8 * plain[0].abs().max()


def test_multipliers_of_one_change_nothing_and_round_one_after_the_other():
    n = 3000
    grad = next(gradients(n, torch.float32, 1))
    results = []
    # 3 * (1/3) rounds, so a product taken beforehand would differ.
    for g, options in (
        (grad, {"unscale": 3.7, "clip": 0.3}),
        (grad * 3.7 * 0.3, {}),
        (grad * (3.7 * 0.3), {}),
    ):
        tensors = state(torch.ones(n), "fp32")
        run(kernels.adam_step, tensors, [g], **options)
        results.append(tensors)
    assert same(results[0][2], results[1][2]) and not same(results[0][2], results[2][2])


def arguments(**changes):
    given = {
        "param": torch.zeros(8),
        "grad": torch.zeros(8),
        "exp_avg": torch.zeros(8),
        "exp_avg_sq": torch.zeros(8),
        "step": 1,
        **HYPER,
    }
    return {**given, **changes}


BAD = {
    "grad has 7": ({"grad": torch.zeros(7)}, ValueError),
    "exp_avg must have one of": ({"exp_avg": torch.zeros(8, dtype=torch.float64)}, TypeError),
    "exp_avg_sq must be 1-D": ({"exp_avg_sq": torch.zeros(2, 4)}, ValueError),
    "grad must be 1-D and contiguous": ({"grad": torch.zeros(16)[::2]}, ValueError),
    "grad must be on the CPU": ({"grad": torch.zeros(8, device="meta")}, ValueError),
    "param must be a torch.Tensor": ({"param": None}, TypeError),
    "grad must be a dense": ({"grad": torch.zeros(8).to_sparse()}, ValueError),
    "is not a format": ({"master": torch.zeros(8)}, TypeError),
    "no master and moments of torch.float32 is not a format": ({"param": torch.zeros(8, dtype=torch.bfloat16)}, TypeError),
    "fp16 an fp32 master": (
        {"param": torch.zeros(8, dtype=torch.float16), "master": torch.zeros(8, dtype=torch.int16)},
        TypeError,
    ),
    "step counts from 1": ({"step": 0}, ValueError),
    "instruction set 'mmx' is not available": ({"isa": "mmx"}, ValueError),
    "threads must be": ({"threads": 0}, ValueError),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    changes, error = BAD[message]
    with pytest.raises(error, match=message):
        kernels.adam_step(**arguments(**changes))


def test_overlap_is_refused():
    shared = torch.zeros(12)
    with pytest.raises(ValueError, match=r"exp_avg and param overlap|param and exp_avg overlap"):
        kernels.adam_step(**arguments(param=shared[:8], exp_avg=shared[4:]))
    kernels.adam_step(
        **arguments(param=shared[:0], **{k: shared[:0] for k in ("grad", "exp_avg", "exp_avg_sq")})
    )


def test_set_threads():
    before = kernels.threads()
    try:
        kernels.set_threads(3)
        assert kernels.threads() == 3
        with pytest.raises(ValueError, match="threads must be"):
            kernels.set_threads(0)
    finally:
        kernels.set_threads(before)
