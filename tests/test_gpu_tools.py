"""What llm-compressor is told of a pruned model: misfits by name, in a script that is right."""

import ast

import pytest
from conftest import small_model
from test_export import SHAPE

from gqalib.model import surgery
from gqalib.serve import gpu


@pytest.fixture
def model():
    model = small_model(**SHAPE)
    surgery.keep_channels(model, 1, range(41))
    return model


def test_misfits_by_name(model):
    assert gpu.misfits(model, 32) == ["model.layers.1.mlp.down_proj"]
    assert gpu.misfits(model, 1) == []
    assert len(gpu.misfits(model, float("inf"))) == 7 * SHAPE["num_hidden_layers"]
    columns = {name: dict(model.named_modules())[name].in_features for name in gpu.misfits(model, 64)}
    assert columns and all(width % 64 for width in columns.values())


@pytest.mark.parametrize("group", [32, 64])
def test_the_script_ignores_them_and_nothing_else(model, group):
    tree = ast.parse(gpu.w4a16("models/mine", gpu.misfits(model, group), group))
    given = {word.arg: word.value for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords}
    assert ast.literal_eval(given["ignore"]) == ["lm_head", *gpu.misfits(model, group)]
    (weights,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "weights"]
    assert ast.literal_eval(weights)["group_size"] == group and ast.literal_eval(weights)["num_bits"] == 4
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert {"models/mine", "models/mine-w4a16"} <= words


def test_a_model_without_misfits():
    assert 'ignore=["lm_head"],' in gpu.w4a16("models/mine", [])
