import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import biased_model, kv_heads, small_model

from gqalib import InputError
from gqalib.measure.perplexity import perplexity
from gqalib.model import surgery
from gqalib.model.shapes import count_parameters, layer_shapes
from gqalib.peers import v2
from gqalib.prune import founding, plans
from gqalib.prune.scores import backward, channel_scores, group_scores, largest
from gqalib.run.presets import load_preset


@pytest.mark.parametrize("sequential", [True, False])
def test_prune_meets_the_budget(model, windows, sequential):
    before = count_parameters(model)["backbone"]
    rates = torch.tensor([0.2, 0.5, 0.35], dtype=torch.float64)
    target = float((rates * plans.layer_sizes(model)).sum())
    table = founding.prune(model, plans.Plan.from_rates(model, rates), windows, sequential=sequential)
    removed = before - count_parameters(model)["backbone"]
    assert abs(removed - target) <= 3 * 32  # one channel
    assert (table["num_attention_heads"] % table["num_key_value_heads"] == 0).all()
    assert table["rate_asked"].tolist() == rates.tolist()
    assert perplexity(model, windows) > 1


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_budget_with_biases(windows, rate):
    """The rate is one of the whole backbone: output biases count, and as they never go, channels go for them."""
    model = biased_model(num_hidden_layers=8)
    before = count_parameters(model)["backbone"]
    settings = load_preset("tiny", {"pruning.channel_multiple": 1}).pruning
    plan = founding.make_plan(model, torch.arange(1.0, 9), settings, mean_rate=rate)
    founding.prune(model, plan, windows, group_statistic="magnitude", channel_statistic="magnitude")
    assert abs(before - count_parameters(model)["backbone"] - rate * before) <= 3 * 32 + 2  # one channel


def test_first_layer_is_scored_alike(model, clone, windows):
    """Before anything is cut, sequential and one-shot scores are the same; so the first layer must come out the
    same."""
    plan = plans.Plan([0.4, 0.0, 0.0], [kv_heads(model) // 2, 0, 0], [9, 0, 0])
    one_shot = clone(model)
    founding.prune(model, plan, windows)
    founding.prune(one_shot, plan, windows, sequential=False)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, one_shot.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight, one_shot.model.layers[0].self_attn.k_proj.weight)


def test_sequential_scores_the_pruned_model(model, clone, windows):
    """The second layer's choice must be the one that the model with the first layer cut asks for."""
    groups, reference = kv_heads(model) // 2, clone(model)
    founding.prune(model, plans.Plan([0.4] * 3, [groups, 0, 0], [12, 12, 0]), windows)
    backward(reference, windows)
    scores = group_scores(reference.model.layers[0])
    channels = channel_scores(reference.model.layers[0])
    surgery.keep_groups(reference, 0, largest(scores, len(scores) - groups))
    surgery.keep_channels(reference, 0, largest(channels, 12))
    backward(reference, windows)
    expected = largest(channel_scores(reference.model.layers[1]), 12)
    surgery.keep_channels(reference, 1, expected)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, reference.model.layers[1].mlp.up_proj.weight)


def test_nothing_removed_is_the_identity(model, logits_of, windows):
    before = logits_of(model)
    founding.prune(model, plans.Plan([0.0] * 3, [0] * 3, [0] * 3), windows)
    assert torch.equal(logits_of(model), before)


def test_impossible_plan_leaves_the_model_alone(model, logits_of, windows):
    before = logits_of(model)
    with pytest.raises(InputError, match="layer 1 cannot lose"):
        founding.prune(model, plans.Plan([0.0] * 3, [0, 99, 0], [1, 0, 0]), windows)
    with pytest.raises(InputError, match="names 2 layers"):
        founding.prune(model, plans.Plan([0.0] * 2, [0, 0], [1, 0]), windows)
    assert torch.equal(logits_of(model), before)


def test_make_plan_scales_the_bounds(model):
    settings = load_preset("tiny", {"pruning.channel_multiple": 1}).pruning
    plan = founding.make_plan(model, torch.tensor([1.0, 2.0, 4.0]), settings, mean_rate=0.5)
    assert sum(plan.rates) / 3 == pytest.approx(0.5)
    assert min(plan.rates) >= 0.3 - 1e-9 and max(plan.rates) <= 0.75 + 1e-9


def test_extreme_rate_keeps_one_unit_each(windows):
    model = small_model()
    plan = plans.Plan.from_rates(model, torch.full((3,), 0.93, dtype=torch.float64))
    founding.prune(model, plan, windows, sequential=False)
    shapes = layer_shapes(model)
    assert (shapes["num_key_value_heads"] == 1).all() and (shapes["intermediate_size"] >= 1).all()


# ---------------------------------------------------------------- v2


def llama_like():
    return small_model(num_attention_heads=32, num_key_value_heads=8, head_dim=4)


@pytest.mark.filterwarnings("ignore")
def test_dependency_graph_gives_30_and_6(windows):
    model = llama_like()
    v2.prune_with_dependency_graph(model, {layer: [1, 5] for layer in range(3)}, windows[:1])
    shape = layer_shapes(model).iloc[0]
    assert (shape["num_attention_heads"], shape["num_key_value_heads"], shape["intermediate_size"]) == (30, 6, 24)
    assert torch.isfinite(model(windows).logits).all()  # the fused kernel does not complain
    v2.truncate_query_heads(model, [4] * 3)
    assert layer_shapes(model)["num_attention_heads"].tolist() == [24] * 3
    model.set_attn_implementation("eager")
    assert torch.isfinite(model(windows).logits).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(120)  # a trace with rotate_half never ends at 2:1
@pytest.mark.parametrize("kv_heads", [4, 2, 1, 8])
def test_dependency_graph_ends_for_every_group_size(windows, kv_heads):
    model = small_model(num_attention_heads=8, num_key_value_heads=kv_heads)
    v2.prune_with_dependency_graph(model, {1: [0]} if kv_heads > 1 else {}, windows[:1])
    shape = layer_shapes(model).iloc[1]
    assert (shape["num_attention_heads"], shape["num_key_value_heads"]) == (
        (7, kv_heads - 1) if kv_heads > 1 else (8, 1)
    )


def test_truncation_of_layers_that_differ():
    model = small_model()  # 2:1
    surgery.keep_groups(model, 0, [1])
    v2.truncate_query_heads(model, [2, 1, 2])
    assert layer_shapes(model)["num_attention_heads"].tolist() == [2, 4, 8]


@pytest.mark.filterwarnings("ignore")
def test_tracing_without_rotate_half_changes_no_group(windows, monkeypatch):
    model, untouched = llama_like(), llama_like()
    v2.prune_with_dependency_graph(model, {0: [1, 5], 2: [0]}, windows[:1])
    monkeypatch.setattr(v2, "patch", SimpleNamespace(object=lambda *_: contextlib.nullcontext()))
    v2.prune_with_dependency_graph(untouched, {0: [1, 5], 2: [0]}, windows[:1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_graph_removes_the_query_heads_of_the_same_number(windows, clone):
    model = llama_like()
    dense = clone(model).model.layers[0].self_attn
    v2.prune_with_dependency_graph(model, {0: [1, 5]}, windows[:1])
    left = v2.heads_left(32, [1, 5])
    rows = surgery.rows_of_heads(left, 4)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, dense.q_proj.weight[rows])
    assert torch.equal(model.model.layers[0].self_attn.o_proj.weight, dense.o_proj.weight[:, rows])


def test_pairing_says_what_attention_does():
    """The map of the notebook against the attention itself: give each KV head its own number as value and read it
    off."""
    model = llama_like()
    attention = model.model.layers[0].self_attn
    kept_kv, kept_q = [0, 2, 3, 4, 6, 7], v2.heads_left(32, [1, 5])
    value = torch.tensor(kept_kv, dtype=torch.float32).view(1, 6, 1, 1).expand(1, 6, 5, 4)
    query, key = torch.zeros(1, 30, 5, 4), torch.zeros(1, 6, 5, 4)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert attention.head_dim == 4
    assert out[0, :, 0, 0].round().int().tolist() == [read for _, read, _ in v2.pairing(kept_q, kept_kv, 4)]


def test_whole_groups_are_never_misread():
    kept = [0, 2, 3, 7]
    assert v2.num_misread(v2.pairing(surgery.query_heads(kept, 4), kept, 4)) == 0
    assert v2.num_misread(v2.pairing(v2.heads_left(32, [6, 7])[:24], range(6), 4)) == 10


def test_heads_that_do_not_divide():
    with pytest.raises(InputError, match="7 query heads do not divide by 3 KV heads"):
        v2.pairing(range(7), range(3), 2)


def test_shuffle_breaks_only_the_pairing(windows, logits_of, clone):
    model = llama_like()
    shuffled = v2.shuffle_kv_heads(clone(model), 0)
    sums = [m.model.layers[1].self_attn.k_proj.weight.sum() for m in (model, shuffled)]
    assert torch.allclose(*sums, atol=1e-4)
    assert not torch.allclose(logits_of(shuffled), logits_of(model), atol=1e-3)


def test_shuffle_takes_biases_along(clone):
    """Each row keeps its bias, and all heads move."""
    model = biased_model()
    shuffled = v2.shuffle_kv_heads(clone(model))
    for old, new in zip(model.model.layers, shuffled.model.layers, strict=True):
        for name in ("k_proj", "v_proj"):
            linears = (getattr(layer.self_attn, name) for layer in (old, new))
            before, after = (torch.cat([x.weight, x.bias[:, None]], 1).tolist() for x in linears)
            assert sorted(before) == sorted(after) and not any(a == b for a, b in zip(before, after, strict=True))
