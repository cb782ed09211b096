"""The peers do what their sources say, to the budget that was asked."""

import math

import pytest
import torch
from conftest import biased_model, small_model

from gqalib import InputError
from gqalib.measure.perplexity import perplexity
from gqalib.model import load, surgery
from gqalib.model.shapes import count_parameters, has_attention, layer_shape, layer_shapes
from gqalib.peers import controls, depth, flap, llm_pruner, osscar, torch_pruning, two_ssp, v2, wanda_sp
from gqalib.prune import plans, sublayers
from gqalib.prune.scores import backward

METHODS = (
    controls.magnitude, controls.random, depth.layer_removal, depth.shortgpt, flap.flap, llm_pruner.llm_pruner,
    osscar.osscar, torch_pruning.torch_pruning_gqa, two_ssp.two_ssp, wanda_sp.wanda_sp,
)  # fmt: skip
PEERS = {function.__name__: function for function in METHODS}
DEPTH = ["shortgpt", "layer_removal"]
WIDTH = sorted(set(PEERS) - set(DEPTH))


def removed(model, dense) -> int:
    return count_parameters(dense)["backbone"] - count_parameters(model)["backbone"]


def output_projections(layer) -> dict[str, torch.nn.Linear]:
    return {"o_proj": layer.self_attn.o_proj, "down_proj": layer.mlp.down_proj}


def features(model, index, windows) -> dict[str, torch.Tensor]:
    """What flows into o_proj and down_proj of a layer, float64 [tokens, width]."""
    seen, projections = {}, output_projections(model.model.layers[index])
    hooks = [
        x.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1).double()}))
        for name, x in projections.items()
    ]
    with torch.no_grad():
        model(windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


# ---------------------------------------------------------------- every peer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WIDTH)
def test_width_budget_runs_saves_and_loads(model, name, windows, clone, logits_of, tmp_path):
    dense = clone(model)
    PEERS[name](model, windows, 0.25)
    channel = 3 * 32
    assert abs(removed(model, dense) - 0.25 * count_parameters(dense)["backbone"]) <= channel
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load.load_model(str(tmp_path))), logits_of(model))
    assert torch.isfinite(logits_of(model)).all() and not torch.equal(logits_of(model), logits_of(dense))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(windows[:1], **options), model.generate(windows[:1], use_cache=False, **options))


@pytest.mark.parametrize("name", DEPTH)
@pytest.mark.parametrize(("fraction", "layers_left"), [(0.05, 2), (0.25, 2), (0.45, 2), (0.55, 1)])
def test_depth_budget(model, name, fraction, layers_left, windows, clone, logits_of, tmp_path):
    dense = clone(model)
    PEERS[name](model, windows, fraction)
    assert len(model.model.layers) == layers_left  # the nearest to 3 × (1 − fraction), at least one gone
    assert removed(model, dense) == count_parameters(dense)["backbone"] * (3 - layers_left) // 3
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load.load_model(str(tmp_path))), logits_of(model))


@pytest.mark.parametrize("name", sorted(PEERS))
def test_impossible_budgets_leave_the_model_alone(name, windows, logits_of):
    model = small_model()
    before, config = logits_of(model), model.config.to_dict()
    for fraction, says in ((0.0, "outside"), (1.0, "outside"), (0.98, "lower the fraction")):
        with pytest.raises(InputError, match=says):
            PEERS[name](model, windows, fraction)
    assert torch.equal(logits_of(model), before) and model.config.to_dict() == config


def test_a_model_half_pruned_is_put_back(windows, logits_of, monkeypatch):
    model = small_model()
    before, parameters, config = logits_of(model), list(model.parameters()), model.config.to_dict()

    def stop_at_the_last(model, index, channels, keep=surgery.keep_channels):
        if index == 2:
            surgery.drop_layers(model, [1])
            raise InputError("stop")
        keep(model, index, channels)

    monkeypatch.setattr(sublayers, "keep_channels", stop_at_the_last)
    for name in ("wanda_sp", "flap", "osscar"):
        with pytest.raises(InputError, match="stop"):
            PEERS[name](model, windows, 0.3)
    assert torch.equal(logits_of(model), before) and model.config.to_dict() == config
    assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(model.parameters(), parameters, strict=True))


def test_budget_on_an_uneven_model_with_biases(windows, clone):
    model = small_model(attention_bias=True, mlp_bias=True)
    surgery.keep_groups(model, 0, [1, 2])
    surgery.keep_channels(model, 2, range(15))
    dense = clone(model)
    for name in ("random", "flap", "wanda_sp"):
        pruned = clone(model)
        PEERS[name](pruned, windows, 0.3)
        assert abs(removed(pruned, dense) - 0.3 * count_parameters(dense)["backbone"]) <= 3 * 32 + 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["magnitude", "llm_pruner", "torch_pruning_gqa"])
def test_what_sits_in_biases_stays(name, windows, monkeypatch):
    """Query head 0, its group and channel 0 have small weights and the largest biases; every gradient is its weight."""
    model = biased_model(num_key_value_heads=2)
    for layer in model.model.layers:
        x, mlp = layer.self_attn, layer.mlp
        for linear, rows in ((x.q_proj, 24), (x.k_proj, 6), (x.v_proj, 6), (mlp.gate_proj, 1), (mlp.up_proj, 1)):
            linear.weight.data[:rows] *= 1e-3
            linear.bias.data[: min(rows, 6)] = 10
        x.q_proj.weight.data[:6] *= 1e-3
        x.o_proj.weight.data[:, :24] *= 1e-3
        mlp.down_proj.weight.data[:, 0] *= 1e-3

    def gradients(model, windows):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()

    for module in (llm_pruner, torch_pruning):
        monkeypatch.setattr(module, "backward", gradients)
    PEERS[name](model, windows, 0.4)
    assert (layer_shapes(model)["num_attention_heads"] < 8).any()
    for layer in model.model.layers:
        assert (layer.self_attn.q_proj.bias == 10).sum() == 6 and (layer.mlp.gate_proj.bias == 10).sum() == 1


# ---------------------------------------------------------------- one by one


def test_llm_pruner_counts_the_columns_of_o_proj_that_its_graph_pairs(windows, monkeypatch):
    """Its graph maps the columns of o_proj one to one onto the rows of k_proj: query head 1's columns belong to KV head
    1, though group 0 feeds them."""
    model = small_model(num_attention_heads=4, num_key_value_heads=2)

    def gradients(model, windows):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for layer in model.model.layers:
            columns = layer.self_attn.o_proj.weight.unflatten(1, (4, -1))
            layer.self_attn.o_proj.weight.grad.unflatten(1, (4, -1))[:, 1] = columns[:, 1].detach()

    monkeypatch.setattr(llm_pruner, "backward", gradients)
    second = [layer.self_attn.k_proj.weight[model.config.head_dim :].clone() for layer in model.model.layers]
    llm_pruner.llm_pruner(model, windows, 0.5, protect=False)
    assert (layer_shapes(model)["num_key_value_heads"] == 1).all()
    for layer, rows in zip(model.model.layers, second, strict=True):
        assert torch.equal(layer.self_attn.k_proj.weight, rows)


def test_a_peer_that_raises_freezes_nothing(windows):
    model = small_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    with pytest.raises(InputError, match="loss is nan"):
        llm_pruner.llm_pruner(model, windows, 0.25)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_llm_pruner_protects_the_ends_as_long_as_it_can(windows):
    model = small_model(num_hidden_layers=8)
    llm_pruner.llm_pruner(model, windows, 0.25)
    widths = layer_shapes(model)["intermediate_size"].tolist()
    assert widths[0] == 24 and max(widths[1:]) < 24  # an eighth in front; a sixteenth of 8 layers rounds to none
    model = small_model(num_hidden_layers=8)
    llm_pruner.llm_pruner(model, windows, 0.78)
    assert layer_shapes(model)["intermediate_size"][0] < 24


@pytest.mark.filterwarnings("ignore")
def test_torch_pruning_keeps_kv_heads_and_pairs_rightly(windows, clone, logits_of):
    """Equal to masking the o_proj columns of the query heads and channels that went: nobody reads another's KV head."""
    model = small_model(num_attention_heads=8, num_key_value_heads=2)
    dense = clone(model)
    torch_pruning.torch_pruning_gqa(model, windows, 0.4)
    shapes = layer_shapes(model)
    assert (shapes["num_key_value_heads"] == 2).all() and shapes["num_attention_heads"].min() < 8
    for old, new in zip(dense.model.layers, model.model.layers, strict=True):
        assert new.self_attn.num_key_value_groups * 2 == layer_shape(new)["num_attention_heads"]
        heads = old.self_attn.q_proj.weight.view(8, 6, -1)
        kept = [any(torch.equal(head, x) for x in new.self_attn.q_proj.weight.view(-1, 6, 32)) for head in heads]
        channels = [any(torch.equal(row, x) for x in new.mlp.gate_proj.weight) for row in old.mlp.gate_proj.weight]
        with torch.no_grad():
            old.self_attn.o_proj.weight.mul_(torch.tensor(kept).repeat_interleave(6))
            old.mlp.down_proj.weight.mul_(torch.tensor(channels))
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert torch.allclose(logits_of(model), logits_of(dense), atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_torch_pruning_traces_few_tokens(monkeypatch):
    """Scores read whole windows; the graph does not."""
    model, lengths, gradients = small_model(), [], backward
    windows = torch.randint(1, 61, (2, 64), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch_pruning, "backward", lambda *text: gradients(*text) and lengths.clear())
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].numel()))
    torch_pruning.torch_pruning_gqa(model, windows, 0.3)
    assert lengths and max(lengths) <= 32
    lengths.clear()
    v2.prune_with_dependency_graph(model, {}, windows)
    assert lengths and max(lengths) <= 32


def test_wanda_scores_by_hand():
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    inputs = torch.tensor([[3.0, 1.0], [4.0, 0.0], [0.0, 1.0]])
    scores = wanda_sp.wanda_scores(weight, inputs.double().square().sum(0))
    assert scores.tolist() == pytest.approx([4 * 5.0, 2.5 * 2**0.5])


def test_wanda_reads_the_pruned_stream(model, clone, windows):
    """The last layer's choice is the one that its inputs in the model pruned before it ask for."""
    dense = clone(model)
    wanda_sp.wanda_sp(model, windows, 0.4)
    reference = clone(model)
    reference.model.layers[2] = clone(dense.model.layers[2])
    inputs = features(reference, 2, windows)["o_proj"]
    norms = dense.model.layers[2].self_attn.o_proj.weight.double().abs().sum(0) * inputs.square().sum(0).sqrt()
    groups = layer_shape(dense.model.layers[2])["num_key_value_heads"]
    kept = (
        norms.view(groups, -1)
        .sum(1)
        .argsort(descending=True)[: layer_shape(model.model.layers[2])["num_key_value_heads"]]
    )
    expected = dense.model.layers[2].self_attn.v_proj.weight.view(groups, 6, 32)[kept.sort().values].flatten(0, 1)
    assert torch.equal(model.model.layers[2].self_attn.v_proj.weight, expected)


def test_flap_bias_is_the_mean_of_what_went(model, clone, windows):
    dense = clone(model)
    flap.flap(model, windows, 0.4)
    for index, (old, new) in enumerate(zip(dense.model.layers, model.model.layers, strict=True)):
        inputs = features(dense, index, windows)
        channels = torch.tensor(
            [any(torch.equal(row, x) for x in new.mlp.up_proj.weight) for row in old.mlp.up_proj.weight]
        )
        heads = old.self_attn.q_proj.weight.view(-1, 6, 32)
        kept = [any(torch.equal(head, x) for x in new.self_attn.q_proj.weight.view(-1, 6, 32)) for head in heads]
        for name, gone in (("o_proj", ~torch.tensor(kept).repeat_interleave(6)), ("down_proj", ~channels)):
            before, after = output_projections(old)[name], output_projections(new)[name]
            lost = (inputs[name][:, gone] @ before.weight[:, gone].double().T).mean(0)
            assert torch.allclose(after.bias.double(), lost, atol=1e-5)
            assert after.bias.abs().max() > 1e-3 or not gone.any()


def test_flap_of_constant_features_is_exact(clone, windows, logits_of):
    """Groups and channels that give the same for every token fluctuate least, go first, and their bias replaces them
    whole."""
    model = small_model(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        parameter.data.normal_() if name.endswith("bias") else None
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[:12] = 0  # groups 0 and 1: their values are their bias
            layer.mlp.gate_proj.weight[:10] = 0
            layer.mlp.up_proj.weight[:10] = 0
    for index, layer in enumerate(model.model.layers):  # all others fluctuate alike, so that none is thought as cheap
        for name, linear in output_projections(layer).items():
            scores = features(model, index, windows)[name].var(0) * linear.weight.detach().double().square().sum(0)
            linear.weight.data[:, scores > 1e-9] /= scores[scores > 1e-9].sqrt().float()
    dense = clone(model)
    group, channel = plans.unit_costs(model.model.layers[0])
    fraction = 3 * (2 * group + 10 * channel) / count_parameters(model)["backbone"]
    flap.flap(model, windows, fraction)
    shapes = layer_shapes(model)
    assert (shapes["num_key_value_heads"] == 2).all() and (shapes["intermediate_size"] == 14).all()
    assert torch.allclose(logits_of(model), logits_of(dense), atol=1e-4)


def test_flap_scores_by_hand():
    weight, variance = (
        torch.tensor([[1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 3.0, 1.0]]),
        torch.tensor([4.0, 1.0, 1.0, 0.5]).double(),
    )
    columns = torch.tensor([4.0, 4.0, 9.0, 1.0], dtype=torch.float64)
    assert torch.allclose(flap.flap_scores(weight, variance, 4), (columns - 4.5) / columns.std(correction=0))
    assert flap.flap_scores(weight, variance, 2).tolist() == pytest.approx([-1.0, 1.0])  # means 4 and 5
    squares = columns.square()
    expected = ((squares - squares.mean()) / squares.std(correction=0)).view(2, 2).mean(1)
    assert torch.allclose(flap.flap_scores(weight, variance, 2, by_column=True), expected)
    assert flap.flap_scores(torch.zeros(2, 4), variance, 4).tolist() == [0.0] * 4


def test_cheapest_units_pass_over_what_does_not_fit():
    scores, costs = torch.tensor([5.0, 1.0, 2.0, 3.0, 0.0]), torch.tensor([10, 10, 10, 3, 3])
    protected = torch.tensor([False, False, False, False, True])
    assert flap.cheapest_units(scores, costs, protected, 13).tolist() == [False, True, False, True, False]
    with pytest.raises(InputError, match="not finite"):
        flap.cheapest_units(scores * torch.nan, costs, protected, 13)


@pytest.mark.parametrize("identity", [0, 1, 2])
def test_shortgpt_drops_a_layer_that_is_an_identity_first(model, windows, logits_of, identity):
    with torch.no_grad():
        for linear in output_projections(model.model.layers[identity]).values():
            linear.weight.zero_()
    before, kept = logits_of(model), [layer for i, layer in enumerate(model.model.layers) if i != identity]
    depth.shortgpt(model, windows, 0.33)
    assert all(a is b for a, b in zip(model.model.layers, kept, strict=True))
    assert torch.equal(logits_of(model), before)


def test_layer_removal_drops_the_layer_that_is_missed_least(model, windows, clone):
    without = []
    for index in range(3):
        smaller = clone(model)
        surgery.drop_layers(smaller, [index])
        without.append(perplexity(smaller, windows))
    depth.layer_removal(model, windows, 0.33)
    assert perplexity(model, windows) == pytest.approx(min(without))


# ---------------------------------------------------------------- two stages


def test_two_ssp_splits_as_the_paper_says():
    """Equation 5 by hand. Of Llama-3-8B an MLP has 4.2 times the parameters of an attention."""
    model = load.random_model(load.shape_config("llama-3-8b"), device="meta")
    ratio = 3 * 14_336 / (2 * 4096 + 2 * 1024)
    for fraction, count in ((0.25, 1), (0.375, 2), (0.5, 5)):
        assert count == round(32 * fraction ** (ratio / 1.5))
        dropped, channels = two_ssp.split(model, fraction)
        size, channel = 4096 * (2 * 4096 + 2 * 1024), 3 * 4096
        assert dropped == count and max(channels) - min(channels) <= 1
        assert abs(count * size + sum(channels) * channel - fraction * 6_979_321_856) <= channel / 2


def test_two_ssp_leaves_what_multiples_need():
    model = small_model()  # an attention 4608 of 20 736 parameters, a channel 96; 24 channels are 4 more than 20
    assert two_ssp.split(model, 0.25) == (1, [2, 2, 2])
    assert two_ssp.split(model, 0.25, multiple=5)[0] == 0  # 12 channels have to go for it
    assert two_ssp.split(model, 0.75) == (2, [22, 22, 22])  # the third attention stays
    surgery.keep_groups(model, 1, [0])
    with pytest.raises(InputError, match="between 1,152 and 4,608 parameters"):
        two_ssp.split(model, 0.25)


def test_two_ssp_keeps_the_channels_of_largest_norm(model, clone, windows):
    """The mean over windows of norms, not the norm over all: one loud window counts once."""
    dense = clone(model)
    two_ssp.two_ssp(model, windows, 0.4)
    for index, (old, new) in enumerate(zip(dense.model.layers, model.model.layers, strict=True)):
        norms = features(dense, index, windows)["down_proj"].view(*windows.shape, -1).norm(dim=1).mean(0)
        kept = norms.argsort(descending=True)[: layer_shape(new)["intermediate_size"]].sort().values
        assert len(kept) < 24 and torch.equal(new.mlp.up_proj.weight, old.mlp.up_proj.weight[kept])


def test_two_ssp_drops_the_attention_that_is_missed_least(model, clone, windows, monkeypatch):
    """Each time anew, on the model pruned so far, and on the first windows alone."""
    monkeypatch.setattr(two_ssp, "SECOND_STAGE_TOKENS", 3 * windows.shape[1] + 5)
    monkeypatch.setattr(two_ssp, "split", lambda *_: (2, [10, 10, 10]))
    oracle = clone(model)
    two_ssp.two_ssp(model, windows, 0.3)
    for index, norms in enumerate(two_ssp.channel_norms(oracle, windows)):
        surgery.keep_channels(oracle, index, norms.argsort(descending=True)[:14].tolist())
    for _ in range(2):
        without = []
        for index in (i for i, layer in enumerate(oracle.model.layers) if has_attention(layer)):
            without.append(clone(oracle))
            surgery.drop_attention(without[-1], index)
        oracle = min(without, key=lambda m: perplexity(m, windows[:3]))
    assert layer_shapes(model).equals(layer_shapes(oracle))
    assert perplexity(model, windows) == pytest.approx(perplexity(oracle, windows))


def test_two_ssp_needs_finite_losses(model, windows, logits_of):
    model.lm_head.weight.data[0, 0] = torch.inf
    with pytest.raises(InputError, match="without an attention is not finite"):
        two_ssp.two_ssp(model, windows, 0.4)
    assert all(map(has_attention, model.model.layers)) and layer_shapes(model)["intermediate_size"].eq(24).all()


@pytest.mark.parametrize("name", sorted(PEERS))
def test_a_model_with_less_attention_is_refused_or_loses_layers(name, windows, logits_of):
    model = small_model()
    surgery.drop_attention(model, 1)
    before = logits_of(model)
    if name in DEPTH:
        PEERS[name](model, windows, 0.4)
        assert len(model.model.layers) < 3 and torch.isfinite(logits_of(model)).all()
        return
    with pytest.raises(InputError, match="has no attention whose groups could be pruned: give the dense model"):
        PEERS[name](model, windows, 0.4)
    assert torch.equal(logits_of(model), before)


# ---------------------------------------------------------------- least squares


def problem(num_units=6, size=2, seed=0):
    """A Gram matrix with strong correlations, and a target that the features explain only in part."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, num_units * size, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(num_units * size, num_units * size, dtype=torch.float64, generator=generator)
    y = torch.randn(50, 3, dtype=torch.float64, generator=generator) + x[:, :3]
    return x, y


def error(x, y, units, size=2) -> float:
    columns = (torch.as_tensor(units)[:, None] * size + torch.arange(size)).flatten()
    solution = torch.linalg.lstsq(x[:, columns], y).solution
    return (x[:, columns] @ solution - y).square().sum().item()


def test_rise_and_fall_are_the_exact_changes_of_the_error():
    x, y = problem()
    gram, cross, kept, out = x.T @ x, x.T @ y, [0, 2, 3, 5], [1, 4]
    rise = osscar._rise_without(gram, cross, kept, 2)
    fall = osscar._fall_with(gram, cross, kept, out, 2)
    base = error(x, y, kept)
    assert rise.tolist() == pytest.approx([error(x, y, [k for k in kept if k != u]) - base for u in kept])
    assert fall.tolist() == pytest.approx([base - error(x, y, [*kept, u]) for u in out])


def test_selection_is_no_worse_with_swaps_and_often_the_best():
    from itertools import combinations

    best = 0
    for seed in range(12):
        x, y = problem(seed=seed)
        greedy, swapped = (error(x, y, osscar.select_units(x.T @ x, x.T @ y, 6, 3, rounds)) for rounds in (0, 20))
        optimum = min(error(x, y, units) for units in combinations(range(6), 3))
        assert optimum - 1e-9 <= swapped <= greedy + 1e-9
        best += swapped < optimum + 1e-6
    assert best >= 8


def test_osscar_with_nothing_removed_is_the_identity(model, clone, logits_of, windows, monkeypatch):
    before = logits_of(model)
    nothing = plans.Plan([0.0] * 3, [0] * 3, [0] * 3)
    monkeypatch.setattr(osscar, "uniform_plan", lambda *_, **__: nothing)
    osscar.osscar(model, windows, 0.1)
    assert torch.allclose(logits_of(model), before, atol=1e-3)


def test_osscar_refit_beats_cutting(model, clone, windows):
    """Of the first o_proj, whose inputs no cut has touched: the refit's error against the dense output, and the
    plain cut's."""
    dense = clone(model)
    osscar.osscar(model, windows, 0.4)
    old, new = dense.model.layers[0].self_attn, model.model.layers[0].self_attn
    inputs = features(dense, 0, windows)["o_proj"]
    kept = [
        any(torch.equal(h, x) for x in new.q_proj.weight.view(-1, 6, 32)) for h in old.q_proj.weight.view(-1, 6, 32)
    ]
    columns = torch.tensor(kept).repeat_interleave(6)
    target = inputs @ old.o_proj.weight.double().T
    refitted = (inputs[:, columns] @ new.o_proj.weight.double().T - target).square().sum()
    cut = (inputs[:, columns] @ old.o_proj.weight[:, columns].double().T - target).square().sum()
    assert not columns.all() and refitted < cut


def test_osscar_needs_tokens(model, windows):
    with pytest.raises(InputError, match="20 calibration tokens are too few"):
        osscar.osscar(model, windows[:1], 0.25)
