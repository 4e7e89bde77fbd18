"""Every state format under every rule: each build against the plain torch reference, bit for bit."""

import itertools
from fractions import Fraction

import pytest
import torch

from tierflow.cpu_adam import formats, kernels, reference
from tierflow.cpu_adam.formats import GROUP, StateFormat, resolve
from tierflow.cpu_adam.rules import ADAGRAD, ADAM, LION, Hyper

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LOSSY = [("bf16", F32), ("bf16", BF16), ("bf16", F16), ("int8", F32), ("int8", BF16), ("int8", F16), ("int8-24bit", BF16)]
EXACT = [("fp32", F32), ("lossless", BF16), ("fp32", BF16), ("fp32", F16)]
RULES = {"adam": ADAM, "lion": LION, "adagrad": ADAGRAD}
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2, "decoupled": True}
WIDEST = 16


def label(value):
    return getattr(value, "name", str(value).removeprefix("torch."))


def fresh(name, param, n, rule=ADAM, seed=0):
    """All kinds of a state of n elements."""
    fmt = resolve(name, param)
    state = {k.name: torch.zeros(k.numel(n), dtype=k.dtype) for k in fmt.kinds(rule)}
    weight = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    if fmt.master == torch.int16:
        state["param"], state["master"] = reference.split(weight)
    else:
        state["param"].copy_(weight)
        if fmt.master == F32:
            state["master"].copy_(weight)
    return state


def copies(state):
    return {k: t.clone() for k, t in state.items()}


def gradient(n, dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=gen) * 10 ** (torch.rand(n, generator=gen) * 6 - 6)).to(dtype)


def by_kernel(rule, state, grad, step, **options):
    _by(kernels.rule_step, rule, state, grad, step, **options)


def by_reference(rule, state, grad, step, **options):
    _by(reference.rule_step, rule, state, grad, step, **options)


def _by(function, rule, state, grad, step, *, seed=3, index=0, scaling=None, **options):
    where = {name: options.pop(name) for name in ("isa", "threads") if name in options}
    hyper = Hyper(step, **{**HYPER, **options})
    moments = {name: state[name] for name in RULES[rule].moments}
    function(
        RULES[rule], state["param"], grad, moments, hyper=hyper, master=state.get("master"), scale=state.get("scale"),
        seed=seed, index=index, **where, **(scaling or {}),
    )  # fmt: skip


def same(a, b):
    """Equal in every bit, or NaN in both."""
    equal = (a.view(torch.uint8) == b.view(torch.uint8)).view(-1, a.itemsize).all(1)
    return bool((equal | (a.isnan() & b.isnan())).all()) if a.is_floating_point() else bool(equal.all())


def assert_same(got, expected, *what):
    for name, tensor in got.items():
        assert same(tensor, expected[name]), (name, *what)


VARIANTS = {
    "plain": {},
    "scaled": {"scaling": {"unscale": 1 / 3, "clip": 0.7, "maximize": True}},
    "long": {"beta2": 0.9999, "weight_decay": 0.0},
    "short": {"beta2": 0.95, "beta1": 0.4, "decoupled": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("name", "param"), LOSSY + EXACT, ids=label)
def test_every_isa_equals_the_reference(name, param, rule, variant):
    n = 1500 + 7
    start = fresh(name, param, n, RULES[rule])
    for grad_dtype in (F32, BF16, F16):
        expected = copies(start)
        grads = [gradient(n, grad_dtype, seed) for seed in range(3)]
        for step, grad in enumerate(grads, 1):
            by_reference(rule, expected, grad, step, index=GROUP * 10, **VARIANTS[variant])
        for isa in kernels.isas():
            got = copies(start)
            for step, grad in enumerate(grads, 1):
                by_kernel(rule, got, grad, step, index=GROUP * 10, isa=isa, **VARIANTS[variant])
            assert_same(got, expected, isa, grad_dtype)


@pytest.mark.parametrize("step", [1, 2, 1_000_000])
@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.9999])
@pytest.mark.parametrize(("name", "param"), LOSSY, ids=label)
def test_steps_and_averaging_times(name, param, beta2, step):
    n = 700
    expected = fresh(name, param, n)
    by_reference("adam", expected, gradient(n, F32, 0), 1)
    got = copies(expected)
    grad = gradient(n, F32, 1)
    by_reference("adam", expected, grad, step, beta2=beta2)
    for isa in kernels.isas():
        mine = copies(got)
        by_kernel("adam", mine, grad, step, beta2=beta2, isa=isa)
        assert_same(mine, expected, isa)


@pytest.mark.parametrize(("name", "param"), [("bf16", BF16), ("int8", BF16), ("int8", F32), ("int8-24bit", BF16)], ids=label)
def test_threads_and_pieces_change_nothing(name, param):
    n = 150_000 + 13
    start, grads = fresh(name, param, n), [gradient(n, BF16, seed) for seed in range(2)]
    expected = copies(start)
    for step, grad in enumerate(grads, 1):
        by_kernel("adam", expected, grad, step, threads=1, isa="scalar")
    for isa, threads in itertools.product(kernels.isas(), range(1, 9)):
        got = copies(start)
        for step, grad in enumerate(grads, 1):
            by_kernel("adam", got, grad, step, threads=threads, isa=isa)
        assert_same(got, expected, isa, threads)
    got = copies(start)
    cuts = [0, GROUP, 4096, 4096 * 5 + GROUP * 3, 4096 * 30, n]
    kinds = {k.name: k for k in resolve(name, param).kinds()}
    for step, grad in enumerate(grads, 1):
        for begin, end in itertools.pairwise(cuts):
            piece = {k: t[kinds[k].numel(begin) : kinds[k].numel(end)] for k, t in got.items()}
            by_kernel("adam", piece, grad[begin:end], step, index=begin, threads=2)
    assert_same(got, expected, "pieces")
    # and what the index is for: a piece that claims another place rounds otherwise
    other = copies(start)
    by_kernel("adam", other, grads[0], 1, index=GROUP)
    first = copies(start)
    by_kernel("adam", first, grads[0], 1)
    assert not same(other["exp_avg"], first["exp_avg"])


LENGTHS = [*range(2 * WIDEST + 2), GROUP - 1, GROUP, GROUP + 1, 2 * GROUP - 1, 2 * GROUP, 2 * GROUP + 1]


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("rule", ["adam", "lion"])
@pytest.mark.parametrize(("name", "param"), [("bf16", BF16), ("int8", F32), ("int8", BF16), ("int8-24bit", BF16)], ids=label)
def test_every_length_and_misalignment(name, param, rule, isa):
    """Nothing before or after the arrays is touched, each at an offset of its own."""
    margin = 80
    for n in LENGTHS:
        start = {**fresh(name, param, n, RULES[rule]), "grad": gradient(n, BF16, 1)}
        expected = copies(start)
        by_reference(rule, expected, expected["grad"], 1)
        for offset in range(WIDEST):
            state, sentinels = {}, []
            for k, (kind, t) in enumerate(start.items()):
                begin = margin + (offset * (k + 1)) % WIDEST
                buffer = torch.full((begin + t.numel() + margin,), 7 + k, dtype=t.dtype)
                state[kind] = buffer[begin : begin + t.numel()]
                state[kind].copy_(t)
                sentinels.append((buffer[:begin], 7 + k))
                sentinels.append((buffer[begin + t.numel() :], 7 + k))
            by_kernel(rule, state, state["grad"], 1, isa=isa)
            assert_same(state, expected, n, offset)
            assert all(bool((t == fill).all()) for t, fill in sentinels), (n, offset)


SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 1e-30, 1e-20, 1.0, -3.5, 1e18, -1e25, 3.4e38]
NOT_FINITE = [float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("name", "param"), LOSSY, ids=label)
def test_infinities_nan_denormals_and_overflow(name, param, rule):
    """Each special value in a group of its own, in one of them all, and as a weight."""
    values = SPECIAL + NOT_FINITE
    ordinary = gradient(GROUP, F32, 0) * 1e-3
    groups = [torch.cat((torch.tensor([v]), ordinary[1:])) for v in values]
    groups += [torch.full((GROUP,), v) for v in values]
    grad = torch.cat([*groups, torch.tensor(values)])
    start = fresh(name, param, grad.numel(), RULES[rule])
    start["param"][: len(values)] = torch.tensor(values).to(param)
    for grad_dtype in (F32, BF16, F16):
        expected = copies(start)
        for step in (1, 2):
            by_reference(rule, expected, grad.to(grad_dtype), step)
        for isa in kernels.isas():
            got = copies(start)
            for step in (1, 2):
                by_kernel(rule, got, grad.to(grad_dtype), step, isa=isa)
            assert_same(got, expected, isa, grad_dtype)


@pytest.mark.parametrize("value", [*NOT_FINITE, 1e30])
def test_a_moment_that_is_not_finite_makes_its_group_nan_and_no_other(value):
    state = fresh("int8", F32, 3 * GROUP)
    grad = gradient(3 * GROUP, F32, 0)
    grad[GROUP + 5] = value
    by_kernel("adam", state, grad, 1)
    scale = state["scale"].view(3, 2)
    # The square of 1e30 is infinite; the moving average of 1e30 itself is not.
    assert scale[1, 1].isnan() and scale[1, 0].isnan() == (value != 1e30)
    assert scale[[0, 2]].isfinite().all()
    # The step itself is each element's own ...
    assert state["param"].isnan().sum() == (0 if value == 1e30 else 1)
    by_kernel("adam", state, gradient(3 * GROUP, F32, 1), 2)
    # ... the next one is the group's.
    assert state["param"][GROUP : 2 * GROUP].isnan().all()
    assert state["param"][:GROUP].isfinite().all() and state["param"][2 * GROUP :].isfinite().all()


def test_a_group_of_zeros_and_one_too_small_have_scale_zero():
    state = fresh("int8", F32, 2 * GROUP)
    grad = torch.zeros(2 * GROUP)
    grad[GROUP:] = 1e-30
    before = state["param"].clone()
    by_kernel("adam", state, grad, 1, weight_decay=0.0)
    assert (state["scale"].view(2, 2)[:, 0] == 0).all() and (state["exp_avg"] == 0).all()
    assert (state["param"] == before).all()


def test_a_root_far_below_its_group_s_largest_is_kept_above_zero():
    """Else the element's next step would be divided by eps alone."""
    n = GROUP
    state, grad = fresh("int8", F32, n), torch.full((n,), 1e-7)
    grad[0] = 1.0
    by_kernel("adam", state, grad, 1)
    assert (state["exp_avg_sq"] >= 1).all() and state["exp_avg_sq"][0] == 255
    before = state["param"].clone()
    by_kernel("adam", state, torch.zeros(n), 2, weight_decay=0.0)
    assert ((state["param"] - before).abs() <= 2 * HYPER["lr"]).all()


def decoded(state, name):
    decode = reference.decode_signed if name == "exp_avg" else reference.decode_root
    return decode(state[name], state["scale"].view(-1, 2)[:, 0 if name == "exp_avg" else 1])


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_rounding_by_chance_is_unbiased(name):
    """The mean over seeds of a moment after a step is what fp32 gives, far within one step of the code."""
    n, seeds = 40 * GROUP, 200
    grad = gradient(n, F32, 0)
    exact = fresh("fp32", F32, n)
    by_kernel("adam", exact, grad, 1)
    total = {"exp_avg": torch.zeros(n, dtype=torch.float64), "exp_avg_sq": torch.zeros(n, dtype=torch.float64)}
    for seed in range(seeds):
        state = fresh(name, F32, n)
        by_kernel("adam", state, grad, 1, seed=seed)
        for key, mean in total.items():
            value = decoded(state, key) if name == "int8" else state[key].float()
            mean += (value.sqrt() if key == "exp_avg_sq" and name == "int8" else value).double() / seeds
    for key, mean in total.items():
        want = exact[key].double()
        if name == "int8":
            largest = want.view(-1, GROUP).abs().amax(1).repeat_interleave(GROUP)
            want = want.sqrt() if key == "exp_avg_sq" else want
            largest = largest.sqrt() if key == "exp_avg_sq" else largest
            top = 14.75 if key == "exp_avg" else 251.0
            quantum = (largest / top + want.abs()) / 32
            kept = want.abs() > 2 * largest / top / 32  # below it the smallest code stands in
            error = ((mean - want) / quantum)[kept]
        else:
            error = (mean - want) / (want.abs() * 2**-7)
        # A sample's error is at most half a quantum's deviation: the mean of all has 1 / sqrt(n * seeds) of it.
        assert error.abs().max() < 5 * 0.5 / seeds**0.5
        assert error.mean().abs() < 5 * 0.5 / (seeds * error.numel()) ** 0.5


def test_the_noise_has_uniform_bits_and_none_is_another_s():
    random = reference.noise(1, 1, 0, 1 << 16)
    assert random.unique().numel() > (1 << 16) - 4
    bits = torch.stack([(random >> k) & 1 for k in range(32)]).double()
    assert ((bits.mean(1) - 0.5).abs() < 5 * 0.5 / 2**8).all()
    correlation = torch.corrcoef(bits)
    assert (correlation - torch.eye(32)).abs().max() < 6 / 2**8
    for other in (reference.noise(2, 1, 0, 1 << 16), reference.noise(1, 2, 0, 1 << 16), random.roll(1), random.roll(GROUP)):
        pair = torch.corrcoef(torch.stack([random.double(), other.double()]))
        assert pair[0, 1].abs() < 5 / 2**8
    assert torch.equal(reference.noise(1, 1, GROUP * 3, 100), random[GROUP * 3 : GROUP * 3 + 100])


def test_a_24_bit_master_is_within_one_of_its_last_places_and_unbiased():
    n = 200_000
    weight = torch.randn(n, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(n, dtype=torch.float64)
    for seed in range(20):
        half, correction = reference.split24(weight, reference.noise(seed, 1, 0, n) & 0xFF)
        joined = reference.join24(half, correction)
        last_place = 2.0 ** (weight.abs().log2().floor() - 15)
        assert ((joined - weight).abs() < last_place).all()
        total += ((joined - weight) / last_place).double()
    assert (total.mean() / 20).abs() < 5 * 0.5 / (20 * n) ** 0.5


@pytest.mark.parametrize(
    ("name", "param", "rule", "rest", "state", "io"),
    [
        ("fp32", F32, ADAM, 12, 8, 1024),
        ("lossless", BF16, ADAM, 12, 10, 2048),
        ("bf16", BF16, ADAM, 8, 6, 2048),
        ("int8", BF16, ADAM, Fraction(49, 8), Fraction(33, 8), 32768),
        ("int8-24bit", BF16, ADAM, Fraction(41, 8), Fraction(25, 8), 32768),
        ("int8", F32, ADAM, Fraction(49, 8), Fraction(17, 8), 32768),
        ("int8-24bit", BF16, LION, 4 + Fraction(1, 16), 2 + Fraction(1, 16), 65536),
    ],
    ids=label,
)
def test_bytes(name, param, rule, rest, state, io):
    fmt = resolve(name, param)
    assert (fmt.bytes_at_rest(rule), fmt.state_bytes(rule), fmt.io_elements(rule=rule)) == (rest, state, io)
    n = 3 * io
    tensors = [torch.zeros(k.numel(n), dtype=k.dtype) for k in fmt.kinds(rule)]
    assert sum(t.nbytes for t in tensors) == rest * n and all(t.nbytes % 4096 == 0 for t in tensors)


def test_names_and_what_keeps_fp32():
    assert resolve("auto", BF16).name == "lossless" and resolve("auto", F16).name == "fp32"
    assert not any(resolve("auto", p).lossy for p in (F32, BF16, F16))
    lossy = [name for name in formats.FORMATS if resolve(name, BF16).lossy]
    assert lossy == ["bf16", "int8", "int8-24bit"]
    int8 = resolve("int8", BF16)
    assert int8.keeps_fp32((8192,)) and int8.keeps_fp32(()) and int8.keeps_fp32((63, 65))
    assert not int8.keeps_fp32((64, 64)) and not resolve("lossless", BF16).keeps_fp32((3,))
    assert int8.for_shape((8192,)).name == "lossless" and int8.for_shape((64, 64)) is int8
    for bad, message in (
        (("int4", BF16), "Invalid state_format: 'int4'"),
        (("int8-24bit", F32), "serves bfloat16"),
        (("lossless", F16), "lossless"),
        (("int8", torch.float64), "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(*bad)
    with pytest.raises(TypeError, match="goes with 8-bit moments"):
        StateFormat("x", BF16, torch.int8, F32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scale": None}, TypeError, "scale is missing"),
        ({"scale": torch.zeros(3)}, ValueError, "scale has 3 elements, but 4 are expected"),
        ({"exp_avg": torch.zeros(100)}, TypeError, "exp_avg_sq must have one of the dtypes torch.float32"),
        ({"master": torch.zeros(100)}, TypeError, "is not a format"),
        ({"index": 32}, ValueError, "index must be a multiple of 64"),
    ],
)
def test_bad_arguments(changes, error, message):
    state = fresh("int8", F32, 100)
    arguments = {"index": 0, "master": None, **state, **changes}
    param = arguments.pop("param")
    hyper = dict(HYPER)
    with pytest.raises(error, match=message):
        kernels.adam_step(param, torch.zeros(100), step=1, **hyper, **arguments)
