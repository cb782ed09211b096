"""The cost table, plans against their budget, the search and the targets against their promises."""

import copy
import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import biased_model, kl_to

from gqalib import InputError
from gqalib.measure.perplexity import perplexity
from gqalib.model import surgery
from gqalib.model.shapes import count_parameters, layer_shapes
from gqalib.prune import allocate, founding, plans, refit, scores, search
from gqalib.stream import streamed

QUICK = refit.Ingredients(newton_rounds=0)


@pytest.fixture
def table(model, windows):
    table = allocate.cost_table(model, windows, scores.gradient_covariances(model, windows), QUICK)
    return table.with_layers(founding.removal_importance(model, windows), perplexity(model, windows))


@pytest.fixture
def trial(model, windows):
    return search.Trial(model, windows, scores.gradient_covariances(model, windows), QUICK)


def removed(plan, table):
    return sum(
        g * group + c * channel for g, c, (group, channel) in zip(plan.groups, plan.channels, table.prices, strict=True)
    )


# ---------------------------------------------------------------- the table and its plans


def test_table(model, windows, table, logits_of):
    before = logits_of(model)
    shapes = layer_shapes(model)
    assert [len(row) for row in table.groups] == shapes["num_key_value_heads"].tolist()
    for row in (*table.groups, *table.channels):
        assert row[0] == 0 and (np.diff(row) >= -1e-12).all()
    assert (table.layers >= 0).all() and torch.equal(logits_of(model), before)


def test_table_is_what_the_loss_is_weighed_by(model, windows):
    """Twice the gradient's covariance, twice the cost."""
    covariances = scores.gradient_covariances(model, windows)
    once = allocate.cost_table(model, windows, covariances, QUICK)
    twice = allocate.cost_table(model, windows, [(2 * a, 2 * b) for a, b in covariances], QUICK)
    assert np.allclose(2 * once.channels[1], twice.channels[1]) and np.allclose(2 * once.groups[0], twice.groups[0])


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.25, 0.5, 0.8])
def test_plans_meet_the_budget(table, fraction):
    """Within one channel where channels go, within one group otherwise, whatever the costs are."""
    for seed in range(5):
        factors = np.exp(np.random.default_rng(seed).standard_normal((3, 3)))
        rows = [
            [f * row for f, row in zip(*pair, strict=True)] for pair in zip(factors, (table.groups, table.channels))
        ]
        plan = dataclasses.replace(table, groups=rows[0], channels=rows[1], layers=factors[2] * table.layers).plan(
            fraction
        )
        over = removed(plan, table) - fraction * table.backbone
        rows = zip(plan.groups, plan.channels, table.widths, strict=True)
        partly = [channels for groups, channels, widths in rows if (groups, channels) != tuple(widths)]
        assert -1 <= over < table.prices[0][1 if any(partly) else 0]


@pytest.mark.parametrize("multiple", [4, 5])
def test_plans_in_multiples(model, windows, multiple):
    """Of the channels that stay: 24 are no multiple of 5."""
    table = allocate.cost_table(model, windows, scores.gradient_covariances(model, windows), QUICK, multiple=multiple)
    both = [table.plan(0.4), plans.uniform_plan(model, 0.4, multiple=multiple)]
    for plan in both:
        assert all((24 - count) % multiple == 0 and count < 24 for count in plan.channels) and any(plan.channels)
        assert abs(removed(plan, table) - 0.4 * table.backbone) < multiple * table.prices[0][1]
    assert removed(both[0], table) >= 0.4 * table.backbone


def test_plans_go_down_to_one_channel(model, windows):
    """Also where a level is many channels; and a table in multiples, asked for other ones, has plans in those."""
    few = dataclasses.replace(QUICK, cuts=2)
    table = allocate.cost_table(model, windows, scores.gradient_covariances(model, windows), few, multiple=5)
    least = sum(group + channel for group, channel in table.prices)
    plan = dataclasses.replace(table, multiple=1).plan(1 - (least + 1) / table.backbone)
    assert table.steps == [10] * 3 and plan.channels == [23] * 3
    assert [len(row) - 1 for row in table.groups] == plan.groups


def test_a_multiple_that_no_layer_has(model, windows):
    with pytest.raises(InputError, match="a layer of 24 channels cannot keep a multiple of 32: lower"):
        allocate.cost_table(model, windows, [], QUICK, multiple=32)


def test_a_layer_that_does_nothing_goes_whole(model, windows, logits_of):
    for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        linear.weight.data.zero_()
    before, covariances = logits_of(model), scores.gradient_covariances(model, windows)
    table = allocate.cost_table(model, windows, covariances, QUICK)
    table = table.with_layers(founding.removal_importance(model, windows), perplexity(model, windows))
    assert table.layers[1] == pytest.approx(0, abs=1e-6)
    plan = dataclasses.replace(table, layers=np.array([9.0, 0.0, 9.0])).plan(
        1 / 3
    )  # without the others, a random model may be better
    assert plan.whole_layers(model) == [1]
    refit.sweep(model, plan, windows, QUICK, covariances=covariances)
    assert len(model.model.layers) == 2 and torch.allclose(logits_of(model), before, atol=1e-2)


def test_whole_layers_take_their_output_biases_along(windows):
    model = biased_model(num_hidden_layers=8)
    before, covariances = count_parameters(model)["backbone"], scores.gradient_covariances(model, windows)
    table = allocate.cost_table(model, windows, covariances, QUICK)
    plan = dataclasses.replace(table, layers=np.zeros(8)).plan(0.7)
    refit.sweep(model, plan, windows, QUICK, covariances=covariances)
    assert len(model.model.layers) <= 3
    assert 0 <= before - count_parameters(model)["backbone"] - 0.7 * before < table.prices[0][1]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_fractions_that_cannot_be(table, fraction):
    with pytest.raises(InputError, match="outside"):
        table.plan(fraction)


def test_fraction_out_of_reach(model, windows):
    table = allocate.cost_table(model, windows, scores.gradient_covariances(model, windows), QUICK)
    with pytest.raises(InputError, match="parameters cannot go"):
        table.plan(0.99)


# ---------------------------------------------------------------- trying plans out


def test_search_stays_in_the_budget_and_never_gets_worse(trial, table, windows, logits_of, monkeypatch):
    before, tried, original = logits_of(trial.model), [], search.Trial.__call__
    monkeypatch.setattr(
        search.Trial, "__call__", lambda self, plan, **how: tried.append(plan) or original(self, plan, **how)
    )
    found = search.in_context(trial, table, 0.4, windows, candidates=6)
    group = table.prices[0][0]
    assert 2 < len(tried) == len(found.history) <= 6 and found.history["candidate"].tolist()[:3] == [
        "uniform",
        "cheapest",
        "step 1",
    ]
    assert all(abs(removed(plan, table) - 0.4 * table.backbone) <= group for plan in tried)
    assert found.history["best"].is_monotonic_decreasing and found.history["kl"].min() == found.history["best"].iloc[-1]
    assert kl_to(trial.model, original(trial, found.plan), windows) == pytest.approx(found.history["best"].iloc[-1])
    assert torch.equal(logits_of(trial.model), before)


def test_changes_are_the_derivative_towards_another_level(trial, table, windows):
    """Moved a little from a plan's weight towards another level's, a module changes the divergence by as much."""
    plan, weights, nothing = plans.uniform_plan(trial.model, 0.4), {}, plans.Plan([0.0] * 3, [0] * 3, [0] * 3)
    without = dataclasses.replace(trial, ingredients=dataclasses.replace(QUICK, refit=False, input_refit=False))
    assert search.look(without, table, nothing, windows)[0] == 0
    kl, changes = search.look(trial, table, plan, windows)
    model = trial(plan, mending=partial(search._at_levels, weights, table))
    assert kl == pytest.approx(kl_to(trial.model, trial(plan), windows), rel=1e-4)  # zeros are as good as surgery
    for index, layer in enumerate(model.model.layers):
        for half, linear in enumerate((layer.self_attn.o_proj, layer.mlp.down_proj)):
            own, level = linear.weight.data, weights[index, half][1]
            towards, found = torch.zeros_like(own), []
            towards[:, level[1]] = level[2]
            for part in (0.02, -0.02):
                linear.weight.data = own + part * (towards - own)
                found.append(kl_to(trial.model, model, windows))
            linear.weight.data = own
            expected = dict(map(tuple, changes[index][half]))
            assert expected[level[0]] == pytest.approx((found[0] - found[1]) / 0.04, rel=0.02, abs=1e-5)
            assert expected[(plan.groups, plan.channels)[half][index]] == 0


def test_steps_begin_from_the_best_plan_and_learn_caution(trial, table, windows, monkeypatch):
    """2.5 times as much after a step that did not help, half after one that kept most of its promise."""
    tried = [plans.uniform_plan(trial.model, fraction) for fraction in (0.1, 0.2, 0.3)]
    reached, promised = iter([1.0, 0.9, 0.95, 0.82, 0.81]), iter([0.7, 0.8, 0.4])
    monkeypatch.setattr(search, "look", lambda *_: (next(reached), []))
    asked, new = [], iter(tried)

    def step(table, fraction, plan, seen, caution, tried):
        asked.append((plan, caution))
        return next(new), next(promised), caution

    monkeypatch.setattr(search, "_step", step)
    found = search.in_context(trial, table, 0.4, windows, candidates=5)
    cheapest = dataclasses.replace(table, layers=None).plan(0.4)
    assert asked == [(cheapest, 1.0), (cheapest, 2.5), (tried[1], 1.25)] and found.plan == tried[2]


def test_a_search_ends_where_nothing_is_promised(trial, table, windows, monkeypatch):
    """Where the better of the first two is where all distances lead back to."""
    nothing, reached = [([(0, 0.0), (3, 0.0)], [(0, 0.0), (23, 0.0)])] * 3, iter([1.0, 0.9])
    monkeypatch.setattr(search, "look", lambda *_: (next(reached), nothing))
    history = search.in_context(trial, table, 0.4, windows, candidates=9).history
    assert history["candidate"].tolist() == ["uniform", "cheapest"]


def test_layers_in_host_memory_change_nothing(trial, table, windows):
    plan = plans.uniform_plan(trial.model, 0.4)
    expected = search.look(trial, table, plan, windows)
    apart = dataclasses.replace(trial, model=streamed(copy.deepcopy(trial.model), "cpu"))
    kl, changes = search.look(apart, table, plan, windows)
    assert kl == pytest.approx(expected[0], rel=1e-6)
    for found, right in zip(changes, expected[1], strict=True):
        for half in (0, 1):
            assert np.allclose(found[half], right[half], rtol=1e-3, atol=1e-7)


def test_a_table_seen_from_a_plan(table):
    """What stays costs nothing; what is expected to help costs less; enough caution keeps the plan."""
    table = dataclasses.replace(table, layers=None)
    plan = table.plan(0.4)
    changes = [([(0, 0.0), (3, 0.0)], [(0, 0.0), (23, 0.0)])] * 3
    there = search.as_seen(table, plan, search.Seen(0.0, changes), 1.0)
    assert there.cost(plan) == 0 < there.cost(table.plan(0.5)) and there.plan(0.4) == plan
    helped = [([(0, 0.0), (3, 0.0)], [(0, 0.0), (23, -5.0)]), *changes[1:]]
    assert search.as_seen(table, plan, search.Seen(0.0, helped), 1.0).plan(0.4).channels[0] == 23 > plan.channels[0]
    assert search.as_seen(table, plan, search.Seen(0.0, helped), 1e9).plan(0.4) == plan


def test_prune_to_perplexity(trial, table, windows, tmp_path):
    limit = 1.5 * perplexity(trial.model, windows)
    trials = search.prune_to(trial, table, windows, limit, trials=5)
    best = trials[trials["perplexity"] <= limit]["fraction"].max()
    assert perplexity(trial.model, windows) == pytest.approx(trials.set_index("fraction")["perplexity"][best])
    assert perplexity(trial.model, windows) <= limit and trials["fraction"].gt(best).any()
    left = count_parameters(trial.model)["backbone"] / table.backbone
    assert 1 - left == pytest.approx(best, abs=0.02)
    trial.model.save_pretrained(tmp_path)
    again = type(trial.model).from_pretrained(tmp_path)
    assert perplexity(again, windows) == pytest.approx(perplexity(trial.model, windows), rel=1e-5)


def test_trials_begin_where_the_table_expects_the_limit(trial, table, windows, monkeypatch):
    """Twice as much damage as it says, and the second trial is where it says half of the limit's."""
    wanted, tried = table.cost(table.plan(0.4)), []

    def measured(model, text, exact):
        if model is trial.model:
            return 10.0
        fraction = 1 - count_parameters(model)["backbone"] / table.backbone
        tried.append(table.cost(table.plan(fraction)))
        return 10.0 * math.exp(2 * tried[-1])

    monkeypatch.setattr(search, "perplexity", measured)
    rows = search.prune_to(trial, table, windows, 10.0 * math.exp(wanted), trials=2)
    promised = [[table.cost(table.plan(fraction + step)) for step in (-0.01, 0.01)] for fraction in rows["fraction"]]
    assert promised[0][0] < wanted < promised[0][1] and promised[1][0] < wanted / 2 < promised[1][1]
    assert promised[1][1] < promised[0][0] and len(tried) == 2


def test_a_target_that_no_trial_meets_leaves_the_model_dense(trial, table, windows, logits_of, monkeypatch):
    before = logits_of(trial.model)
    monkeypatch.setattr(search, "perplexity", lambda model, text, exact: 2.0 if model is trial.model else 9.0)
    trials = search.prune_to(trial, table, windows, 2.1, trials=2)
    assert trials["perplexity"].tolist() == [9.0, 9.0] and trials["fraction"].gt(0).all()
    assert torch.equal(logits_of(trial.model), before)


def test_a_sweep_that_fails_is_no_model_too_far(trial, table, windows, logits_of):
    """Too little text, or a singular matrix, is said; it is no perplexity."""
    before, few = logits_of(trial.model), dataclasses.replace(trial, windows=windows[:1])
    with pytest.raises(InputError, match="20 calibration tokens are too few"):
        search.prune_to(few, table, windows, 2 * perplexity(trial.model, windows))
    assert torch.equal(logits_of(trial.model), before)


def test_a_limit_that_the_dense_model_does_not_meet(trial, table, windows, logits_of):
    before = logits_of(trial.model)
    with pytest.raises(InputError, match="not above the dense model's"):
        search.prune_to(trial, table, windows, 1.0)
    assert torch.equal(logits_of(trial.model), before)


def test_a_whole_layer_may_go_only_in_the_sweep(model, windows):
    plan = plans.Plan([0.0] * 3, [0, layer_shapes(model)["num_key_value_heads"][1], 0], [0, 24, 0])
    with pytest.raises(InputError, match="at least one must stay"):
        founding.prune(model, plan, windows)


def test_layers_taken_from_a_copy_follow_the_models_own_configuration(model, clone):
    surgery.take_layers(model, clone(model))
    model.set_attn_implementation("eager")
    assert all(layer.self_attn.config._attn_implementation == "eager" for layer in model.model.layers)
