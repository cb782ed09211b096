"""The reference model's training: its stages, its growth, and that an interruption changes nothing."""

import pytest
import torch

from gqalib.measure.perplexity import perplexity
from gqalib.model.load import load_model
from gqalib.recover.distill import Distiller
from gqalib.reference import training
from gqalib.reference.training import Recipe, Stage


@pytest.fixture
def recipe():
    return Recipe(stages=(Stage(1, 16, 256), Stage(2, 16, 256)), decay_tokens=128, batch_tokens=64, warmup_steps=2)


@pytest.fixture
def ids():
    return torch.randint(1, 4096, (1500,), generator=torch.Generator().manual_seed(0))


def run(recipe, ids, folder, **options):
    return training.train(ids, ids[:64].view(4, 16), recipe, folder, micro_tokens=32, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_text_covers_a_pass_once_and_goes_on_where_it_was():
    first, later = (training.text_from(torch.arange(1000), seen, 16, 0) for seen in (0, 160))
    assert sorted(first[:, 0].tolist()) == list(range(0, 992, 16)) and (first.diff(dim=1) == 1).all()
    assert torch.equal(later, first.roll(-10, 0))


def test_interrupted_training_equals_uninterrupted(recipe, ids, tmp_path, monkeypatch):
    whole, log = run(recipe, ids, tmp_path / "whole")
    assert log["tokens"].tolist() == list(range(64, 513, 64)) and log["validation_loss"].notna().all()
    assert log["learning_rate"].tolist() == pytest.approx([0.01, 0.02, 0.02, 0.02, 0.01, 0.02, 0.02, 0.01])
    step, count = Distiller.training_step, iter(range(100))

    def killed(*arguments):
        if next(count) == 10:  # just after the growth in depth; two micro-batches a step
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Distiller, "training_step", killed)
        run(recipe, ids, tmp_path / "killed")
    assert (tmp_path / "killed" / "stage-1" / "checkpoint-1").exists()
    resumed, resumed_log = run(recipe, ids, tmp_path / "killed")
    assert resumed.config.num_hidden_layers == 2 and same(whole, resumed)
    assert resumed_log.drop(columns="seconds").equals(log.drop(columns="seconds"))


def test_deepen_splits_each_layer(ids):
    model = training.initial_model(training.reference_config(2), 0)
    deeper = training.deepen(model, 4)
    for index, layer in enumerate(deeper.model.layers):
        original = model.model.layers[index // 2]
        assert torch.equal(layer.self_attn.q_proj.weight, original.self_attn.q_proj.weight)
        assert torch.equal(layer.mlp.down_proj.weight, original.mlp.down_proj.weight / 2)
    windows = ids[:64].view(4, 16)
    assert perplexity(deeper, windows) == pytest.approx(perplexity(model, windows), rel=0.02)
    with pytest.raises(ValueError, match="5 layers are no multiple of the model's 2"):
        training.deepen(model, 5)


def test_a_shipped_model_is_trained_further(recipe, ids, tmp_path):
    tokenizer = training.train_tokenizer(["some words"], vocab_size=300)
    training.publish(run(recipe, ids, tmp_path / "first")[0], tokenizer, tmp_path / "shipped", "card", recipe)
    longer = training.one_more_stage(tmp_path / "shipped", Stage(2, 16, 128))
    assert longer.stages == (*recipe.stages, Stage(2, 16, 128)) and longer.num_tokens == recipe.num_tokens + 128
    further, log = run(longer, ids, tmp_path / "further", start_from=tmp_path / "shipped")
    shipped = load_model(str(tmp_path / "shipped"))
    assert not same(further, shipped) and log["tokens"].tolist() == [576, 640]
