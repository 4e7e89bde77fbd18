"""The lossless layout: bf16 half and 16-bit remainder, over every pattern of fp32."""

import pytest
import torch

from tierflow.cpu_adam import kernels, reference


def split(master, isa=None):
    param = torch.empty(master.numel(), dtype=torch.bfloat16)
    remainder = torch.empty(master.numel(), dtype=torch.int16)
    kernels.split(master, param, remainder, isa=isa)
    return param, remainder


def join(param, remainder, isa=None):
    out = torch.empty(param.numel())
    kernels.join(param, remainder, out, isa=isa)
    return out


def dense_sample():
    """Every upper half with the lower halves that matter and some others."""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xABCD])
    low = torch.cat([low, torch.randint(0, 1 << 16, (24,), generator=torch.Generator().manual_seed(0))])
    high = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int64) << 16
    return (high[:, None] + low).flatten().to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("isa", kernels.isas())
def test_equals_the_reference_and_comes_back(isa):
    master = dense_sample()
    param, remainder = split(master, isa)
    half, rest = reference.split(master)
    assert torch.equal(param.view(torch.int16), half.view(torch.int16)) and torch.equal(remainder, rest)
    back = join(param, remainder, isa)
    assert torch.equal(back.view(torch.int32), reference.join(half, rest).view(torch.int32))
    finite = ~master.isnan()
    assert torch.equal(back.view(torch.int32)[finite], master.view(torch.int32)[finite])
    assert (back.view(torch.int32)[~finite] == 0x7FC00000).all()


@pytest.mark.slow
def test_lossless_over_all_patterns():
    size = 1 << 24
    pattern = torch.arange(size, dtype=torch.int32)
    param, remainder = torch.empty(size, dtype=torch.bfloat16), torch.empty(size, dtype=torch.int16)
    back = torch.empty(size)
    for top in range(-128, 128):
        master = (pattern + (top << 24)).view(torch.float32)
        kernels.split(master, param, remainder)
        kernels.join(param, remainder, back)
        if not torch.equal(back.view(torch.int32), master.view(torch.int32)):
            differs = back.view(torch.int32) != master.view(torch.int32)
            assert bool((master.isnan() & (back.view(torch.int32) == 0x7FC00000))[differs].all())
            assert top in (0x7F, -1), "only NaN may change"


def test_rounds_half_away_from_zero_and_large_values_read_as_infinity_in_the_half():
    master = torch.tensor([1.0 + 2.0**-8, -1.0 - 2.0**-8, 1.0 + 3 * 2.0**-8])
    param, remainder = split(master)
    assert param.tolist() == [1.0 + 2.0**-7, -1.0 - 2.0**-7, 1.0 + 2.0**-6]
    assert remainder.tolist() == [-(1 << 15)] * 3
    edge = torch.tensor([0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000], dtype=torch.int32).view(
        torch.float32
    )
    param, remainder = split(edge)
    assert param.isinf().tolist() == [False, True, True, True]
    assert torch.equal(join(param, remainder), edge)


@pytest.mark.parametrize("isa", kernels.isas())
def test_every_length_and_misalignment(isa):
    full = torch.randn(32, generator=torch.Generator().manual_seed(0))
    for n in range(32):
        for offset in range(16):
            master = torch.cat([torch.zeros(offset), full[:n]])[offset:]
            half = torch.full((n + 32,), 7.0, dtype=torch.bfloat16)
            rest = torch.full((n + 32,), 7, dtype=torch.int16)
            out = torch.full((n + 32,), 7.0)
            views = [t[offset : offset + n] for t in (half, rest, out)]
            kernels.split(master, views[0], views[1], isa=isa)
            kernels.join(*views, isa=isa)
            assert torch.equal(views[2], full[:n])
            for t in (half, rest, out):
                assert (t[:offset] == 7).all() and (t[offset + n :] == 7).all()


def test_bad_arguments():
    with pytest.raises(TypeError, match="remainder must have one of"):
        kernels.split(torch.zeros(4), torch.zeros(4).bfloat16(), torch.zeros(4))
    with pytest.raises(ValueError, match="param has 3"):
        kernels.join(torch.zeros(3).bfloat16(), torch.zeros(4, dtype=torch.int16), torch.zeros(4))
