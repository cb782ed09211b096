"""Surgery is exact, or the workbook is worth nothing."""

import pytest
import torch
from conftest import biased_model, kv_heads, only_layers

from gqalib import InputError
from gqalib.model import shapes, surgery
from gqalib.prune import scores


def test_removed_groups_equal_masked_groups(model, clone, logits_of):
    gone, count = [0], kv_heads(model)
    oracle = clone(model)
    surgery.mask_groups(oracle, 1, gone)
    surgery.keep_groups(model, 1, [g for g in range(count) if g not in gone])
    assert torch.allclose(logits_of(model), logits_of(oracle), atol=1e-5)


def test_removed_channels_equal_masked_channels(model, clone, logits_of):
    oracle = clone(model)
    oracle.model.layers[2].mlp.down_proj.weight.data[:, [0, 5, 23]] = 0
    surgery.keep_channels(model, 2, [c for c in range(24) if c not in (0, 5, 23)])
    assert torch.allclose(logits_of(model), logits_of(oracle), atol=1e-5)


def test_keep_all_is_the_identity(model, clone, logits_of):
    before = clone(model)
    surgery.keep_groups(model, 0, range(kv_heads(model)))
    surgery.keep_channels(model, 0, range(24))
    assert torch.equal(logits_of(model), logits_of(before))
    assert shapes.layer_shapes(model).equals(shapes.layer_shapes(before))


def test_permuting_whole_groups_changes_nothing(model, clone, logits_of):
    expected, count = logits_of(model), kv_heads(model)
    attention = model.model.layers[1].self_attn
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3)).tolist()
    size = attention.q_proj.out_features // attention.head_dim // count
    queries = surgery.rows_of_heads(surgery.query_heads(order, size), attention.head_dim)
    keys = surgery.rows_of_heads(order, attention.head_dim)
    with torch.no_grad():
        for linear, rows in ((attention.q_proj, queries), (attention.k_proj, keys), (attention.v_proj, keys)):
            linear.weight.copy_(linear.weight[rows].clone())
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, queries].clone())
    assert torch.allclose(logits_of(model), expected, atol=1e-4)


def test_permuting_heads_across_groups_does_change(clone, logits_of):
    from conftest import small_model

    model = small_model(num_attention_heads=8, num_key_value_heads=2)
    expected = logits_of(model)
    attention = model.model.layers[1].self_attn
    rows = surgery.rows_of_heads([0, 2, 4, 6, 1, 3, 5, 7], attention.head_dim)  # the misaligned reading of the layout
    with torch.no_grad():
        attention.q_proj.weight.copy_(attention.q_proj.weight[rows].clone())
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows].clone())
    assert not torch.allclose(logits_of(model), expected, atol=1e-3)


def test_new_parameters_carry_no_gradient(model, windows):
    scores.backward(model, windows)
    surgery.keep_groups(model, 0, range(1, kv_heads(model)))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.grad is None and attention.q_proj.weight.requires_grad
    assert attention.q_proj.out_features == attention.q_proj.weight.shape[0] == attention.o_proj.in_features
    scores.backward(model, windows)  # the shape mismatch of the founding document


@pytest.mark.parametrize(
    ("layer", "groups", "says"),
    [(9, [0], "layer 9 is out of range"), (-1, [0], "layer -1 is out of range"), (0, [], "no group of layer 0"),
     (0, [0, 99], "group 99 is out of range"), (0, [-1, 0], "group -1 is out of range"), (0, [1, 1], "name one twice")],
)  # fmt: skip
def test_bad_groups_leave_the_model_alone(model, logits_of, layer, groups, says):
    before = logits_of(model)
    with pytest.raises(InputError, match=says):
        surgery.keep_groups(model, layer, groups)
    assert torch.equal(logits_of(model), before)


def test_bad_channels(model):
    with pytest.raises(InputError, match="channel 24 is out of range"):
        surgery.keep_channels(model, 0, [0, 24])
    with pytest.raises(InputError, match="no channel of layer 1"):
        surgery.keep_channels(model, 1, [])


# ---------------------------------------------------------------- whole layers, output biases


def test_dropped_layers_equal_skipped_layers(model, clone, logits_of):
    with only_layers(model, [0, 2]):
        expected = logits_of(model)
    surgery.drop_layers(model, [1])
    assert torch.equal(logits_of(model), expected)
    assert model.config.num_hidden_layers == len(model.config.per_layer_config) == 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


def test_dropped_attention_equals_masked_attention(model, clone, logits_of):
    oracle = clone(model)
    for index in (0, 2):
        surgery.mask_groups(oracle, index, range(kv_heads(oracle)))
        surgery.drop_attention(model, index)
    assert torch.equal(logits_of(model), logits_of(oracle))


def test_dropped_attention_takes_its_output_bias(clone, logits_of):
    model = biased_model()
    oracle = clone(model)
    for parameter in oracle.model.layers[1].self_attn.o_proj.parameters():
        parameter.data.zero_()
    with surgery.without_attention(model.model.layers[1]):
        inside = logits_of(model)
    surgery.drop_attention(model, 1)
    assert torch.equal(logits_of(model), logits_of(oracle)) and torch.equal(inside, logits_of(oracle))
    assert model.config.per_layer_config[1].o_proj_bias is False


def test_attention_comes_back(model, logits_of):
    before, parts = logits_of(model), list(model.modules())
    with surgery.without_attention(model.model.layers[0]):
        assert not torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(model), before)
    with pytest.raises(ValueError, match="stop"), surgery.restored_on_error(model):
        surgery.drop_attention(model, 0)
        surgery.drop_layers(model, [1])
        raise ValueError("stop")
    assert torch.equal(logits_of(model), before) and list(model.modules()) == parts
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


def test_the_cache_counts_attentions(model):
    surgery.drop_attention(model, 1)
    assert [vars(layer.self_attn).get("layer_idx") for layer in model.model.layers] == [0, None, 1]
    surgery.drop_layers(model, [0])
    assert [vars(layer.self_attn).get("layer_idx") for layer in model.model.layers] == [None, 0]


def test_a_layer_without_attention_has_no_groups(model, logits_of):
    surgery.drop_attention(model, 1)
    before = logits_of(model)
    for cut in (
        lambda: surgery.keep_groups(model, 1, [0]),
        lambda: surgery.mask_groups(model, 1, [0]),
        lambda: surgery.drop_attention(model, 1),
        lambda: surgery.add_output_bias(model, 1, "o_proj", torch.zeros(32)),
    ):
        with pytest.raises(InputError, match="has no attention"):
            cut()
    surgery.drop_attention(model, 0)
    with pytest.raises(InputError, match="only layer 2 has attention left"):
        surgery.drop_attention(model, 2)
    with pytest.raises(InputError, match=r"no layer with attention would be left without layers \[2\]"):
        surgery.drop_layers(model, [2])
    with pytest.raises(InputError, match="layer 3 is out of range"):
        surgery.drop_attention(model, 3)
    surgery.keep_channels(model, 1, range(24))
    surgery.add_output_bias(model, 1, "down_proj", torch.zeros(32))
    assert model.model.layers[1].mlp.down_proj.bias is not None and not torch.equal(logits_of(model), before)


def test_output_bias_is_added(model, logits_of, windows):
    bias, seen = torch.linspace(-2, 2, 32), []
    layer = model.model.layers[1]
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        linear.register_forward_hook(lambda module, args, out: seen.append(out - args[0] @ module.weight.T))
    for name in ("o_proj", "down_proj", "down_proj"):
        surgery.add_output_bias(model, 1, name, bias)
    logits_of(model)
    assert torch.allclose(seen[0], bias.expand_as(seen[0]), atol=1e-5)
    assert torch.allclose(seen[1], 2 * bias.expand_as(seen[1]), atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([0, 1, 2], "no layer would be left"),
        ([3], "layer 3 is out of range"),
        ([-1], "out of range"),
        ([1, 1], "twice"),
    ],
)
def test_bad_layers_leave_the_model_alone(model, logits_of, layers, says):
    before = logits_of(model)
    with pytest.raises(InputError, match=says):
        surgery.drop_layers(model, layers)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize(
    ("name", "bias", "says"),
    [
        ("q_proj", torch.zeros(32), "q_proj"),
        ("o_proj", torch.zeros(31), "32 finite numbers"),
        ("o_proj", torch.full((32,), torch.nan), "finite"),
    ],
)
def test_bad_output_bias(model, name, bias, says):
    with pytest.raises(InputError, match=says):
        surgery.add_output_bias(model, 0, name, bias)
    assert model.model.layers[0].self_attn.o_proj.bias is None
