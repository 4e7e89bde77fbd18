"""Steps over parts of the same arrays: the bits of the reference on each part, and nothing changed beside them."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tierflow.cpu_adam import reference
from tierflow.cpu_adam.formats import GROUP, resolve
from tierflow.cpu_adam.rules import ADAGRAD, ADAM, LION, Hyper, Rule
from tierflow.cpu_adam.steps import Steps

KINDS = [(ADAM, "fp32", torch.float32), (ADAM, "lossless", torch.bfloat16), (ADAM, "int8", torch.float32),
         (ADAM, "int8-24bit", torch.bfloat16), (LION, "bf16", torch.bfloat16), (ADAGRAD, "fp32", torch.float16)]  # fmt: skip
N = 40 * GROUP + 7


def arrays(rule: Rule, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    kinds = {k.name: torch.zeros(k.numel(N), dtype=k.dtype) for k in resolve(name, dtype).kinds(rule)}
    kinds["param"].copy_(torch.randn(N))
    return kinds


def given(rule: Rule, kinds: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    return {name: kinds[name] for name in rule.moments}, {"master": kinds.get("master"), "scale": kinds.get("scale")}


def slices(kinds: dict[str, torch.Tensor], rule: Rule, begin: int, end: int) -> dict[str, torch.Tensor]:
    def part(name: str, t: torch.Tensor) -> torch.Tensor:
        each = len(rule.moments)
        return t[begin // GROUP * each : -(-end // GROUP) * each] if name == "scale" else t[begin:end]

    return {name: part(name, t) for name, t in kinds.items()}


@pytest.mark.parametrize(("rule", "name", "dtype"), KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_parts_have_the_bits_of_the_reference(rule: Rule, name: str, dtype: torch.dtype, threads: int) -> None:
    draw = random.Random(1)
    mine = arrays(rule, name, dtype)
    theirs = {k: t.clone() for k, t in mine.items()}
    for step in range(1, 4):
        cuts = [0, *sorted(draw.sample(range(1, 40), 5)), 40]
        moments, rest = given(rule, mine)
        steps = Steps(rule, mine["param"], moments, **rest)
        for i, (a, b) in enumerate(itertools.pairwise(cuts)):
            if i == 2:  # one part has no gradient
                continue
            begin, end = a * GROUP, N if b == 40 else b * GROUP - draw.choice([0, 5])
            options = {
                "hyper": Hyper(step + i, lr=10.0**-i, weight_decay=0.1 * (i % 2)), "maximize": i == 1, "unscale": 0.5,
                "clip": 0.25, "seed": i, "index": draw.choice([0, GROUP]),
            }  # fmt: skip
            grad = torch.randn(end - begin).to(draw.choice([torch.float32, dtype]))
            steps.add(begin, end, grad, **options)
            here = slices(theirs, rule, begin, end)
            moments, rest = given(rule, here)
            reference.rule_step(rule, here["param"], grad.clone(), moments, **rest, **options)
            del grad  # the steps keep what they are to read
        steps.run(threads)
        for k, t in mine.items():
            assert torch.equal(t.view(torch.uint8), theirs[k].view(torch.uint8)), (step, k)


def test_what_is_no_part_is_refused() -> None:
    kinds = arrays(ADAM, "fp32", torch.float32)
    moments, rest = given(ADAM, kinds)
    steps = Steps(ADAM, kinds["param"], moments, **rest)
    steps.add(GROUP, 2 * GROUP, torch.zeros(GROUP), hyper=Hyper(1, 0.1))
    for begin, end in ((0, GROUP), (GROUP, 2 * GROUP), (2 * GROUP, N + 1), (3 * GROUP, 2 * GROUP), (2 * GROUP + 1, 3 * GROUP)):
        with pytest.raises(ValueError, match="a part lies between"):
            steps.add(begin, end, torch.zeros(max(end - begin, 0)), hyper=Hyper(1, 0.1))
    with pytest.raises(ValueError, match="overlap"):
        steps.add(2 * GROUP, 3 * GROUP, kinds["exp_avg"][:GROUP], hyper=Hyper(1, 0.1))
    with pytest.raises(ValueError, match="has 3 elements"):
        steps.add(2 * GROUP, 3 * GROUP, torch.zeros(3), hyper=Hyper(1, 0.1))
