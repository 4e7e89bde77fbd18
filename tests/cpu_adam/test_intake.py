"""intake and grad_stats: the sum as torch's, the statistics equal in every bit whatever carries them out."""

import itertools
import math

import pytest
import torch

from tierflow.cpu_adam import kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTS = {2: torch.int16, 4: torch.int32}


def same(a, b):
    ints = INTS[a.element_size()]
    return bool(((a.view(ints) == b.view(ints)) | (a.isnan() & b.isnan())).all())


def values(n, dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=gen) * 10 ** (torch.rand(n, generator=gen) * 8 - 6)).to(dtype)


def tree_sum(t):
    """The written order, in Python: lane i % 16, lanes pairwise, blocks of 4096 pairwise."""
    blocks = []
    for block in t.double().split(4096):
        lanes = [0.0] * 16
        for i, x in enumerate(block.tolist()):
            lanes[i % 16] += x * x
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [lanes[k] + lanes[k + half] for k in range(half)]
        blocks.append(lanes[0])

    def pairwise(part):
        if len(part) == 1:
            return part[0]
        half = 1 << ((len(part) - 1).bit_length() - 1)
        return pairwise(part[:half]) + pairwise(part[half:])

    return pairwise(blocks) if len(t) else 0.0


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("src_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dst_dtype", DTYPES, ids=str)
def test_values_are_torch_s(dst_dtype, src_dtype, accumulate):
    n = 5003
    dst, src = values(n, dst_dtype, 0), values(n, src_dtype, 1)
    expected = dst.float() + src.float() if accumulate else src.float()
    expected = expected.to(dst_dtype)
    if accumulate and dst_dtype == src_dtype:
        assert same(expected, dst.clone().add_(src))
    for isa in kernels.isas():
        got = dst.clone()
        stats = kernels.intake(got, src, accumulate=accumulate, isa=isa)
        assert same(got, expected)
        assert stats == kernels.grad_stats(got, isa=isa) and stats.finite == math.isfinite(stats.sum_squares)
        assert stats.sum_squares == tree_sum(got)


def test_sum_is_the_same_for_every_isa_thread_count_and_alignment():
    n = 300_000 + 5
    src = values(n, torch.bfloat16, 0)
    sums = set()
    for isa, threads, offset in itertools.product(kernels.isas(), (1, 2, 5), (0, 3)):
        moved = torch.zeros(n + offset, dtype=torch.bfloat16)[offset:]
        sums.add(kernels.intake(moved, src, accumulate=True, isa=isa, threads=threads).sum_squares)
        sums.add(kernels.grad_stats(moved, isa=isa, threads=threads).sum_squares)
    assert sums == {tree_sum(src)}


@pytest.mark.parametrize("isa", kernels.isas())
def test_every_length_and_misalignment(isa):
    full_dst, full_src = values(32, torch.bfloat16, 0), values(32, torch.float16, 1)
    for n, offset in itertools.product(range(33), range(16)):
        buffer = torch.full((n + offset + 64,), 7.0, dtype=torch.bfloat16)
        dst = buffer[32 + offset : 32 + offset + n]
        dst.copy_(full_dst[:n])
        src = torch.cat([torch.zeros(offset), full_src[:n]]).half()[offset:]
        stats = kernels.intake(dst, src, accumulate=True, isa=isa)
        assert same(dst, (full_dst[:n].float() + full_src[:n].float()).bfloat16())
        assert (buffer[: 32 + offset] == 7).all() and (buffer[32 + offset + n :] == 7).all()
        assert stats.sum_squares == tree_sum(dst)


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 15, 4095, 4096, 9999])
def test_one_bad_value_anywhere_is_found(isa, bad, at):
    src = torch.ones(10_000, dtype=torch.bfloat16)
    assert kernels.grad_stats(src, isa=isa) == (10_000.0, True)
    src[at] = bad
    assert not kernels.grad_stats(src, isa=isa).finite
    assert not kernels.intake(torch.zeros(10_000), src, accumulate=True, isa=isa).finite


def test_what_becomes_infinite_on_the_way_is_found_and_the_largest_is_finite():
    largest = torch.full((100_000,), torch.finfo(torch.float32).max)
    for isa in kernels.isas():
        assert kernels.grad_stats(largest, isa=isa).finite
        assert not kernels.intake(largest.clone(), largest, accumulate=True, isa=isa).finite
        assert not kernels.intake(
            torch.zeros(9).half(), torch.full((9,), 65520.0), accumulate=False, isa=isa
        ).finite


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_16_bit_patterns_and_the_ties_between_them(dtype, isa):
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(1 << 16)
    kernels.intake(wide, patterns, accumulate=False, isa=isa)
    assert same(wide, patterns.float())
    # Around each value, its ties and their neighbours.
    near = wide.view(torch.int32)[:, None] + torch.tensor(
        [-0x8000, -0x1001, -0x1000, -1, 0, 1, 0xFFF, 0x1000, 0x8000]
    )
    near = near.to(torch.int32).view(torch.float32).flatten()
    tiny = torch.arange(1 << 16).float() * 2.0**-27
    for source in (near, tiny):
        back = torch.empty(source.numel(), dtype=dtype)
        kernels.intake(back, source, accumulate=False, isa=isa)
        assert same(back, source.to(dtype))


def test_bad_arguments():
    with pytest.raises(ValueError, match="src has 3 elements"):
        kernels.intake(torch.zeros(4), torch.zeros(3), accumulate=True)
    with pytest.raises(TypeError, match="dst must have one of"):
        kernels.intake(torch.zeros(4, dtype=torch.int32), torch.zeros(4), accumulate=True)
    with pytest.raises(ValueError, match="overlap"):
        shared = torch.zeros(8)
        kernels.intake(shared[:4], shared[2:6], accumulate=True)
    assert kernels.grad_stats(torch.zeros(0)) == (0.0, True)
