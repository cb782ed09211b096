import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gqalib import InputError
from gqalib.prune import allocate
from gqalib.prune.allocate import cheapest
from gqalib.prune.founding import layer_rates, layer_weights
from gqalib.prune.plans import some_units, whole_units

LAYERS = st.integers(1, 40)
POSITIVE = st.floats(1e-6, 1e6)


@st.composite
def problems(draw):
    n = draw(LAYERS)
    weights = torch.tensor(draw(st.lists(POSITIVE, min_size=n, max_size=n)), dtype=torch.float64)
    sizes = torch.tensor(draw(st.lists(st.floats(1, 1e6), min_size=n, max_size=n)), dtype=torch.float64)
    low, mean, high = sorted(draw(st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3)))
    return weights, sizes, mean, low, high


@given(problems())
def test_water_filling(problem):
    weights, sizes, mean, low, high = problem
    rates = layer_rates(weights, sizes, mean, low, high)
    assert ((rates >= low - 1e-12) & (rates <= high + 1e-12)).all()
    assert ((rates * sizes).sum() / sizes.sum()).item() == pytest.approx(mean, rel=1e-9)
    free = (rates > low + 1e-9) & (rates < high - 1e-9)
    if free.any():  # between the bounds the rates are proportional to the weights
        level = (rates / weights)[free]
        assert torch.allclose(level, level[0].expand_as(level), rtol=1e-6)
    order = torch.argsort(weights)
    assert (rates[order].diff() >= -1e-9).all()


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 60)), min_size=1, max_size=40))
def test_whole_units_meet_the_target_within_one(layers):
    rates = torch.tensor([rate for rate, _ in layers], dtype=torch.float64)
    counts = torch.tensor([count for _, count in layers])
    removed = torch.tensor(whole_units(rates, counts))
    assert ((removed >= 0) & (removed < counts)).all()
    reachable = torch.minimum(rates * counts, (counts - 1).double())
    assert abs(removed.sum().item() - reachable.sum().item()) <= 0.5 + 1e-9
    assert ((removed - reachable).abs() < 1 + 1e-9).all()


@given(st.integers(2, 40), st.integers(1, 4), st.floats(0.05, 0.95))
def test_equal_layers_lose_equally_many_groups(num_layers, count, rate):
    rates, counts = torch.full((num_layers,), rate, dtype=torch.float64), torch.full((num_layers,), count)
    (removed,) = set(whole_units(rates, counts, alike=True))
    assert abs(removed - min(rate * count, count - 1)) <= 0.5 + 1e-9


@pytest.mark.parametrize("multiple", [4, 8])
def test_whole_units_keep_multiples(multiple):
    """Whatever the widths are; a layer that loses nothing stays as it is."""
    counts = torch.tensor([64, 70, 33, 30])
    removed = whole_units(torch.tensor([0.3, 0.9, 0.99, 0.0]), counts, multiple)
    assert all((c - r) % multiple == 0 and c > r > 0 for c, r in zip(counts[:3].tolist(), removed, strict=False))
    assert removed[3] == 0
    with pytest.raises(InputError, match="a layer of 30 channels cannot keep a multiple of 32: lower"):
        whole_units(torch.ones(4), counts, 32)


@given(st.integers(2, 40), st.integers(2, 4), st.floats(0.05, 0.95))
def test_rounding_is_no_burden_of_the_first_layers(num_layers, count, rate):
    """Equal layers at one rate: wherever the model is parted in two, both sides pay for whole units alike."""
    rates, counts = torch.full((num_layers,), rate, dtype=torch.float64), torch.full((num_layers,), count)
    removed = np.cumsum(whole_units(rates, counts))
    even = removed[-1] * np.arange(1, num_layers + 1) / num_layers
    assert abs(removed - even).max() < 1 + 1e-9


def test_some_units_are_one_at_least_and_leave_one():
    assert [some_units(*pair) for pair in ((8, 0.25), (8, 0.01), (8, 0.99), (2, 0.1), (1, 0.5))] == [2, 1, 7, 1, 0]


def test_inverse_weights_by_hand():
    importance = torch.tensor([1.0, 4.0, 1.0])
    weights = layer_weights(importance, "inverse", 1.0)
    assert weights[0] / weights[1] == pytest.approx((4 + 0.002) / (1 + 0.002))
    assert torch.equal(layer_weights(importance, "uniform"), torch.ones(3, dtype=torch.float64))
    assert layer_weights(importance, "proportional", 2.0)[1].item() == pytest.approx(16, rel=1e-2)


def test_negative_importance_counts_as_zero():
    weights = layer_weights(torch.tensor([-5.0, 0.0, 2.0]))
    assert weights[0] == weights[1] > weights[2]
    assert torch.equal(layer_weights(torch.tensor([-1.0, -2.0])), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("mean", "low", "high", "says"),
    [
        (0.0, 0.0, 0.5, "outside"),
        (1.0, 0.1, 1.0, "outside"),
        (0.6, 0.1, 0.5, "out of reach"),
        (0.05, 0.1, 0.5, "out of reach"),
    ],
)
def test_impossible_rates(mean, low, high, says):
    with pytest.raises(InputError, match=says):
        layer_rates(torch.ones(3), torch.ones(3), mean, low, high)


def test_importance_must_be_finite():
    with pytest.raises(InputError, match="not all finite"):
        layer_weights(torch.tensor([1.0, float("nan")]))


# ---------------------------------------------------------------- the dynamic programme


@pytest.mark.parametrize("seed", range(20))
def test_cheapest_equals_brute_force(seed):
    generator = np.random.default_rng(seed)
    sizes = [generator.integers(0, 12, generator.integers(2, 5)) * 6 for _ in range(4)]
    costs = [generator.random(len(size)) for size in sizes]
    target, slack = int(generator.integers(1, sum(size.max() for size in sizes) + 1)), int(generator.integers(6, 20))
    sums = {sum(options) for options in itertools.product(*sizes)}
    if not any(target <= total <= target + slack for total in sums):
        with pytest.raises(InputError, match="cannot go"):
            cheapest(costs, sizes, target, slack)
        return
    chosen = cheapest(costs, sizes, target, slack)
    assert target <= sum(size[i] for size, i in zip(sizes, chosen, strict=True)) <= target + slack
    least = min(
        sum(cost[i] for cost, i in zip(costs, options, strict=True))
        for options in itertools.product(*(range(len(size)) for size in sizes))
        if target <= sum(size[i] for size, i in zip(sizes, options, strict=True)) <= target + slack
    )
    assert sum(cost[i] for cost, i in zip(costs, chosen, strict=True)) == pytest.approx(least)


def test_cheapest_without_a_solution():
    with pytest.raises(InputError, match="11 parameters cannot go, 10 at most"):
        cheapest([np.zeros(2)] * 2, [np.array([0, 5])] * 2, 11, 5)


def test_sizes_without_a_common_divisor_take_no_longer(monkeypatch):
    """As biases make them: the sum is met to a step for each item, and costs hardly more than the exact one."""
    draw = np.random.default_rng(3)
    sizes = [np.arange(20) * prime for prime in (10_007, 10_009, 10_037, 10_039)]
    costs = [np.sort(draw.random(20)) for _ in sizes]
    exact = cheapest(costs, sizes, 300_000, 10_039)
    monkeypatch.setattr(allocate, "MOST_UNITS", 500)
    arrays, full = [], np.full
    monkeypatch.setattr(np, "full", lambda length, value: arrays.append(length) or full(length, value))
    chosen = cheapest(costs, sizes, 300_000, 10_039)
    total, cost = (sum(row[i] for row, i in zip(rows, chosen, strict=True)) for rows in (sizes, costs))
    assert 300_000 <= total <= 310_039 + 4 * 620 and max(arrays) <= 502
    assert cost <= 1.02 * sum(row[i] for row, i in zip(costs, exact, strict=True))
