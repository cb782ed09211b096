"""The reference model's training: its schedule, its growth, and that an interruption changes nothing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gqalib.model.load import load_model
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


def test_schedule(recipe):
    assert recipe.rate(0) == 0.5 and recipe.rate(64) == 1.0 and recipe.rate(320) == 1.0
    assert recipe.rate(448) == 0.5 and recipe.rate(511) == recipe.final_rate
    assert [recipe.stage(t).num_hidden_layers for t in (0, 255, 256, 511, 512)] == [1, 1, 2, 2, 2]


def test_batches_cover_an_epoch_once_and_then_differ():
    ids = torch.arange(1000)
    batches = [training.batch_at(ids, seen, 16, 64, 0) for seen in range(0, 2 * 15 * 64, 64)]
    first = torch.cat(batches[:15])
    assert len({row[0].item() for row in first}) == len(first) and (first.diff(dim=1) == 1).all()
    assert not torch.equal(first, torch.cat(batches[15:]))
    assert torch.equal(training.batch_at(ids, 128, 16, 64, 0), batches[2])


def test_interrupted_training_equals_uninterrupted(recipe, ids, tmp_path, monkeypatch):
    whole = run(recipe, ids, tmp_path / "whole")
    step, count = training.step, iter(range(100))

    def killed(*arguments):
        if next(count) == 5:  # just after the growth in depth
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(training, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, ids, tmp_path / "killed", checkpoint_s=0)
    resumed = run(recipe, ids, tmp_path / "killed")
    assert resumed.config.num_hidden_layers == 2 and same(whole, resumed)
    assert same(run(recipe, ids, tmp_path / "killed"), resumed)  # complete: nothing more is done


def test_deepen_splits_each_layer(ids):
    model = training.initial_model(training.reference_config(2), 0)
    deeper = training.deepen(model, 4)
    for index, layer in enumerate(deeper.model.layers):
        original = model.model.layers[index // 2]
        assert torch.equal(layer.self_attn.q_proj.weight, original.self_attn.q_proj.weight)
        assert torch.equal(layer.mlp.down_proj.weight, original.mlp.down_proj.weight / 2)
    windows = ids[:64].view(4, 16)
    assert training.validation_loss(deeper, windows) == pytest.approx(
        training.validation_loss(model, windows), abs=0.02
    )
    with pytest.raises(ValueError, match="5 layers are no multiple of the model's 2"):
        training.deepen(model, 5)


def test_a_shipped_model_is_trained_further(recipe, ids, tmp_path):
    tokenizer = training.train_tokenizer(["some words"], vocab_size=300)
    training.publish(run(recipe, ids, tmp_path / "first"), tokenizer, tmp_path / "shipped", "card", recipe)
    longer = training.one_more_stage(tmp_path / "shipped", Stage(2, 16, 128))
    assert longer.stages == (*recipe.stages, Stage(2, 16, 128)) and longer.num_tokens == recipe.num_tokens + 128
    further = run(longer, ids, tmp_path / "further", start_from=tmp_path / "shipped")
    shipped = load_model(str(tmp_path / "shipped"))
    assert not same(further, shipped) and (tmp_path / "further" / "log.jsonl").read_text().count('"loss"') == 2


@pytest.mark.parametrize("fast", [True, False])
def test_no_bf16_where_it_is_slow(fast, recipe, ids, monkeypatch):
    """On a CPU without instructions for it neither the model's products nor Muon's are in bf16."""
    monkeypatch.setattr(training, "bf16_is_fast", lambda device: fast)
    model, seen = training.initial_model(training.reference_config(1), 0), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.update(x.dtype for x in args if isinstance(x, torch.Tensor))
            return function(*args, **(kwargs or {}))

    before = {name: p.clone() for name, p in model.named_parameters()}
    with Watch():
        training.step(model, training.optimizers(model, recipe), [ids[:64].view(2, 32)], 1.0)
    assert (torch.bfloat16 in seen) == fast
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_loss_that_is_not_finite_is_an_error(recipe, ids):
    model = training.initial_model(training.reference_config(1), 0)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        training.step(model, training.optimizers(model, recipe), (ids[:32].view(2, 16),), 1.0)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_processes_share_a_step(size, ids, monkeypatch):
    """Each batch with labels is one process', every process has as many, and the weights are those of a mean over tokens."""
    batches = [
        ids[:30].view(3, 10),
        {"input_ids": ids[:10].view(1, 10), "labels": torch.full((1, 10), -100)},
        ids[30:40].view(1, 10),
    ]
    shares = []
    for rank in range(size):
        monkeypatch.setattr(training, "rank_and_size", lambda rank=rank: (rank, size))
        shares.append(training._share(batches))
    assert {len(share) for share in shares} == {-(-2 // size)}
    every = [pair for share in shares for pair in share]
    assert [weight for batch, weight in every if batch is batches[0] and weight] == [0.75]
    assert [weight for batch, weight in every if batch is batches[2]] == [0.25]
    assert sum(weight for _, weight in every) == 1 and not any(batch is batches[1] for batch, _ in every)


def test_a_batch_without_labels_weighs_nothing(ids):
    """A mean over no token is no number."""
    torch.manual_seed(0)
    model = training.initial_model(training.reference_config(1), 0)
    opts = training.optimizers(model, Recipe(stages=(), decay_tokens=1))
    blank = {"input_ids": ids[:10].view(1, 10), "labels": torch.full((1, 10), -100)}
    losses = [
        training.step(model, opts, batches, 0.0)["loss"]
        for batches in ([ids[:30].view(3, 10)], [blank, ids[:30].view(3, 10)])
    ]
    assert losses[0] == losses[1]
