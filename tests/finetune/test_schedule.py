from __future__ import annotations

import pytest

from tierflow.finetune.schedule import Schedule


def factors(**settings):
    schedule = Schedule(**settings)
    return [schedule(step) for step in range(schedule.total)]


def test_constant_with_warm_up_starts_above_zero():
    assert factors(kind="constant", warmup=3, total=6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_and_cosine_fall_from_one_towards_the_floor():
    assert factors(kind="linear", total=4) == [1.0, 0.75, 0.5, 0.25]
    assert factors(kind="linear", total=4, floor=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    cosine = Schedule("cosine", warmup=2, total=10, floor=0.1)
    assert [cosine(2), cosine(6), cosine(10), cosine(99)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert all(later < earlier for earlier, later in zip(factors(total=9), factors(total=9)[1:], strict=False))


def test_lambda_lr_keeps_it_across_a_state_dict():
    import torch

    def make(schedule):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    first = make(Schedule("linear", total=4))
    first.optimizer.step()
    first.step()
    second = make(Schedule("constant", total=1))
    second.load_state_dict(first.state_dict())
    second.optimizer.step()
    second.step()
    assert (first.get_last_lr(), second.get_last_lr()) == ([1.5], [1.0])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "cosin"}, "did you mean 'cosine'"),
        ({"total": 0}, "1 step or more"),
        ({"warmup": -1}, "negative"),
        ({"kind": "linear", "warmup": 4, "total": 4}, "leave none of 4"),
        ({"floor": 2.0}, "between 0 and 1"),
    ],
)
def test_settings_that_make_no_sense(settings, says):
    with pytest.raises(ValueError, match=says):
        Schedule(**settings)
