import pytest
import torch
from conftest import biased_model, kv_heads, only_layers, small_model

from gqalib import InputError
from gqalib.measure import perplexity as measure
from gqalib.measure.perplexity import perplexity, ratio_with_error, window_losses
from gqalib.model import surgery
from gqalib.peers.llm_pruner import misaligned_group_scores
from gqalib.peers.two_ssp import least_missed
from gqalib.prune.founding import removal_importance, taylor_scores
from gqalib.prune.scores import (
    activation_importance,
    backward,
    channel_scores,
    element_scores,
    group_scores,
    group_scores_by_part,
    head_scores,
    largest,
)
from gqalib.stream import hidden_states_before


def test_group_scores_by_hand(model, windows):
    """The definition, written out element by element."""
    backward(model, windows)
    attention, count = model.model.layers[1].self_attn, kv_heads(model)
    size = attention.q_proj.out_features // attention.head_dim // count
    d = attention.head_dim
    for group in range(count):
        expected = 0.0
        for linear, first, rows in (
            (attention.q_proj, group * size * d, size * d),
            (attention.k_proj, group * d, d),
            (attention.v_proj, group * d, d),
        ):
            part = slice(first, first + rows)
            expected += (linear.weight[part] * linear.weight.grad[part]).abs().double().sum().item()
        assert group_scores(model.model.layers[1])[group].item() == pytest.approx(expected, rel=1e-6)


def test_o_proj_adds_its_columns(model, windows):
    backward(model, windows)
    layer = model.model.layers[0]
    difference = group_scores(layer, include_o_proj=True) - group_scores(layer)
    assert torch.allclose(difference, group_scores_by_part(layer)["o_proj"])
    total = element_scores(layer.self_attn.o_proj.weight, "taylor").sum()
    assert difference.sum().item() == pytest.approx(total.item())


def test_channel_scores_by_hand(model, windows):
    backward(model, windows)
    mlp = model.model.layers[2].mlp
    scores = channel_scores(model.model.layers[2])
    expected = sum((w * g).abs().double().sum().item() for w, g in (
        (mlp.gate_proj.weight[7], mlp.gate_proj.weight.grad[7]), (mlp.up_proj.weight[7], mlp.up_proj.weight.grad[7]),
        (mlp.down_proj.weight[:, 7], mlp.down_proj.weight.grad[:, 7])))  # fmt: skip
    assert scores.shape == (24,) and scores[7].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("statistic", ["magnitude", "taylor"])
def test_a_unit_is_all_that_surgery_removes(clone, statistic):
    """Biases too. Where every gradient is its weight, Taylor scores are magnitudes: Σ w² of what is gone."""
    model = biased_model()
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    layer, squares = model.model.layers[1], lambda m: sum(p.double().square().sum().item() for p in m.parameters())
    without_group, without_channel = clone(model), clone(model)
    surgery.keep_groups(without_group, 1, [0, 1, 3])
    surgery.keep_channels(without_channel, 1, range(1, 24))
    group, channel = (squares(model) - squares(pruned) for pruned in (without_group, without_channel))
    assert group_scores(layer, statistic, include_o_proj=True)[2].item() == pytest.approx(group)
    assert channel_scores(layer, statistic)[0].item() == pytest.approx(channel)
    folds = misaligned_group_scores(layer, statistic), group_scores(layer, statistic)
    assert folds[0].sum().item() == pytest.approx(folds[1].sum().item())


def test_misaligned_fold_is_caught(windows):
    """On a layer where one group is worthless the aligned fold finds it; LLM-Pruner's gives most of its
    worthlessness to others."""
    model = small_model(num_attention_heads=8, num_key_value_heads=2)
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.q_proj.weight[: 4 * attention.head_dim] *= 1e-3  # query heads 0–3: all of group 0
    backward(model, windows)
    layer = model.model.layers[1]
    parts = group_scores_by_part(layer, "magnitude")["q_proj"]
    heads = head_scores(layer, "magnitude")
    misaligned = misaligned_group_scores(layer, "magnitude") - heads["k_proj"] - heads["v_proj"]
    assert parts[0] < 1e-4 * parts[1]
    assert misaligned[0] > 0.3 * misaligned[1]


def test_frozen_and_unfrozen_scores_agree(model, windows):
    surgery.keep_groups(model, 0, range(max(1, kv_heads(model) - 1)))
    backward(model, windows)
    unfrozen = group_scores(model.model.layers[2]), channel_scores(model.model.layers[2])
    backward(model, windows, [2])
    assert model.model.layers[1].mlp.up_proj.weight.grad is None
    stream = hidden_states_before(model, windows, 2)
    frozen = group_scores(model.model.layers[2]), channel_scores(model.model.layers[2])
    backward(model, windows, [2], stream, 2)
    from_stream = group_scores(model.model.layers[2]), channel_scores(model.model.layers[2])
    for a, b, c in zip(unfrozen, frozen, from_stream, strict=True):
        assert torch.allclose(a, b, rtol=1e-5) and torch.allclose(a, c, rtol=1e-4)


def test_gradients_do_not_depend_on_the_batch(model, windows, monkeypatch):
    backward(model, windows)
    whole = group_scores(model.model.layers[0])
    monkeypatch.setattr("gqalib.stream.BATCH_TOKENS", 40)
    backward(model, windows)
    assert torch.allclose(group_scores(model.model.layers[0]), whole, rtol=1e-4)


def test_many_batches_of_bf16_add_up_in_float32(monkeypatch):
    """The scores are those of the float32 sum of 16 windows' gradients; `backward` rounds that sum once."""
    windows = torch.randint(1, 61, (16, 20), generator=torch.Generator().manual_seed(1))
    model, totals = small_model().bfloat16(), {}
    layers = model.model.layers
    for window in windows.split(1):
        backward(model, window)
        totals = {p: totals.get(p, 0) + p.grad.float() / 16 for p in layers.parameters() if p.grad is not None}
    monkeypatch.setattr("gqalib.stream.BATCH_TOKENS", 20)
    backward(model, windows)
    assert all(torch.equal(p.grad, total.bfloat16()) for p, total in totals.items())
    for index, (_, channels) in (taylor_scores(model, windows) | taylor_scores(model, windows, [1])).items():
        mlp = layers[index].mlp
        gate, up, down = ((x.weight * totals[x.weight]).abs() for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        assert torch.allclose(channels.float(), gate.sum(1) + up.sum(1) + down.sum(0), rtol=1e-5)


def test_removal_importance_by_the_definition(model, windows):
    dense = perplexity(model, windows)
    for layer, rise in enumerate(removal_importance(model, windows)):
        with only_layers(model, [i for i in range(3) if i != layer]):
            assert rise.item() == pytest.approx(perplexity(model, windows) - dense, rel=1e-4, abs=1e-5)
    assert len(model.model.layers) == 3


def test_a_layer_that_does_nothing_has_no_importance(model, windows):
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    assert removal_importance(model, windows)[1].item() == pytest.approx(0, abs=1e-9)
    assert activation_importance(model, windows)[1].item() == pytest.approx(0, abs=1e-6)
    assert activation_importance(model, windows)[0].item() > 1e-3


def test_largest_prefers_the_lower_index():
    assert largest(torch.tensor([1.0, 3.0, 3.0, 0.0]), 2) == [1, 2]
    assert largest(torch.tensor([1.0, 1.0, 1.0]), 2) == [0, 1]


def test_errors(model, windows):
    with pytest.raises(InputError, match="no gradient"):
        group_scores(model.model.layers[0])
    with pytest.raises(InputError, match="unknown statistic 'best'"):
        channel_scores(model.model.layers[0], "best")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="calibration loss is nan"):
        backward(model, windows)


def test_infinite_gradient_is_an_error(model, windows):
    model.model.layers[2].mlp.up_proj.weight.register_hook(lambda g: g * float("inf"))
    for layers in (None, [2]):
        with pytest.raises(InputError, match="gradient of layer 2 is not finite"):
            backward(model, windows, layers)


def test_perplexity_is_that_of_the_loss(model, windows):
    with torch.no_grad():
        loss = model(windows, labels=windows, use_cache=False).loss
    assert perplexity(model, windows) == pytest.approx(loss.exp().item(), rel=1e-5)
    assert perplexity(model, windows, hidden_states_before(model, windows, 2), 2) == pytest.approx(
        loss.exp().item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("dtype", "fast", "rounded"), [("auto", True, True), ("auto", False, False), ("bfloat16", False, True)]
)
def test_evaluations_round_products_if_told(dtype, fast, rounded, model, windows, monkeypatch):
    exact = window_losses(model, windows)
    monkeypatch.setattr("gqalib.device.bf16_is_fast", lambda device: fast)
    measure.evaluate_in(dtype)
    losses = window_losses(model, windows)
    assert torch.equal(losses, exact) != rounded and losses == pytest.approx(exact, abs=0.02)
    assert torch.equal(window_losses(model, windows, exact=True), exact)
    with measure.in_products(model):
        stream = hidden_states_before(model, windows, 1)
    assert torch.equal(window_losses(model, windows, stream, 1), losses)
    assert window_losses(model.bfloat16(), windows).dtype == torch.float64  # its own products, whatever was said


def test_what_a_perplexity_decides_is_the_same_whatever_evaluations_round(model, windows, monkeypatch):
    importance, attention = removal_importance(model, windows), least_missed(model, windows)
    monkeypatch.setattr("gqalib.device.bf16_is_fast", lambda device: True)
    measure.evaluate_in("auto")
    assert not torch.equal(window_losses(model, windows), window_losses(model, windows, exact=True))
    assert torch.equal(removal_importance(model, windows), importance) and least_missed(model, windows) == attention


def test_window_losses_and_their_ratio(model, clone, windows):
    losses = window_losses(model, windows)
    assert losses.shape == (len(windows),)
    assert losses[2].exp().item() == pytest.approx(perplexity(model, windows[2:3]), rel=1e-6)
    assert ratio_with_error(losses, losses) == (1.0, 0.0)
    pruned = clone(model)
    surgery.keep_channels(pruned, 0, range(6))
    ratio, error = ratio_with_error(window_losses(pruned, windows), losses)
    assert ratio == pytest.approx(perplexity(pruned, windows) / perplexity(model, windows), rel=1e-6)
    assert 0 < error < 1
