import contextlib
from dataclasses import asdict
from typing import get_args

import pytest
import torch
import transformers
import yaml
from conftest import small_model

from gqalib import InputError
from gqalib.model import shapes
from gqalib.prune import founding
from gqalib.run import presets
from gqalib.run.cli import overrides
from gqalib.run.presets import FOLDER, check_cut, dotted_names, load_preset, preset_names
from gqalib.serve import BLOCK


def test_every_preset_loads():
    assert {"tiny", "llama3-8b", "llama3-8b-shape", "llama3.2-1b", "smollm2", "smollm2-gpu"} <= set(preset_names())
    for name in preset_names():
        assert load_preset(name).name == name


@pytest.mark.parametrize("text", ["model: [x", "", "- model", "tiny", "\tmodel: x"])
def test_a_file_that_is_no_preset_is_one_sentence(text, tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match=r"^preset .*a.yaml cannot be read \(.+\): write names with values as YAML$"):
        load_preset("a")


def test_the_founding_documents_numbers_of_llama3_8b():
    p = load_preset("llama3-8b")
    assert (p.removal.num_examples, p.removal.length) == (50, 128)
    assert (p.calibration.num_examples, p.calibration.length) == (10, 128)
    assert (p.pruning.mean_rate, p.pruning.alpha, p.pruning.min_rate, p.pruning.max_rate) == (0.25, 1.0, 0.15, 0.5)
    assert (p.recovery.learning_rate, p.recovery.lora_r, p.recovery.lora_alpha, p.recovery.num_epochs) == (
        5e-5,
        8,
        16,
        2,
    )
    assert (p.corpus, p.instructions, p.dtype) == ("wikitext2", "alpaca-cleaned", "bfloat16")
    assert (p.model, p.pruning.strategy) == ("meta-llama/Meta-Llama-3-8B-Instruct", "inverse")
    assert (p.evaluation.short_window, p.evaluation.long_window) == (128, 2048)
    assert (p.cost.batch_sizes, p.cost.contexts) == ([1, 8, 32], [128, 2048, 8192])


def test_what_is_pruned_can_be_quantised():
    """Blocks of a .gguf file, and groups of kernels, are multiples of 32 columns."""
    assert not [name for name in preset_names() if load_preset(name).pruning.channel_multiple % BLOCK]


def test_the_shape_differs_from_llama3_8b_in_weights_and_words_alone():
    real, shape = asdict(load_preset("llama3-8b")), asdict(load_preset("llama3-8b-shape"))
    differ = {key for key in real if real[key] != shape[key]}
    assert differ == {"name", "model", "corpus", "instructions", "frontier", "recovery"}
    assert {key for key in real["frontier"] if real["frontier"][key] != shape["frontier"][key]} == {"other_corpus"}
    assert {key for key in real["recovery"] if real["recovery"][key] != shape["recovery"][key]} == {"num_examples"}
    assert (shape["model"], shape["corpus"]) == ("shape:llama-3-8b", "random-tokens")


def test_a_preset_on_top_of_a_base(tmp_path, monkeypatch):
    """Values of sections are replaced one by one; an unknown name in the file is still an error."""
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    base = yaml.safe_load((FOLDER / "tiny.yaml").read_text())
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "b.yaml").write_text("base: a\nmodel: x/y\nfrontier: {test: {length: 64}}\n")
    (tmp_path / "c.yaml").write_text("base: b\npruning: {alpha: 2.0, alhpa: 1.0}\n")
    a, b = load_preset("a"), load_preset("b")
    assert (b.model, b.frontier.test.length, b.frontier.test.num_examples) == ("x/y", 64, a.frontier.test.num_examples)
    assert b.pruning == a.pruning
    (tmp_path / "d.yaml").write_text("model: x/y\n")
    for name, says in {
        "c": "unknown parameter 'pruning.alhpa': did you mean pruning.alpha",
        "d": "'corpus' is missing",
    }.items():
        with pytest.raises(InputError, match=says):
            load_preset(name)


def test_9_query_and_3_kv_heads(windows):
    """SmolLM2's heads and the preset's settings on a small random model: rates, surgery in multiples, sizes."""
    p = load_preset("smollm2", {"pruning.channel_multiple": 8})
    model = small_model(num_attention_heads=9, num_key_value_heads=3, intermediate_size=96, hidden_size=36)
    counts, layers = shapes.count_parameters(model), shapes.layer_shapes(model)
    plan = founding.make_plan(model, torch.tensor([3.0, 1.0, 2.0]), p.pruning)
    table = founding.prune(model, plan, windows)
    assert (table["num_attention_heads"] == 3 * table["num_key_value_heads"]).all() and (
        table["intermediate_size"] % 8 == 0
    ).all()
    assert (table["num_key_value_heads"] < layers["num_key_value_heads"]).any()
    assert shapes.size_of(model, counts)["backbone_removed_percent"] == pytest.approx(25, abs=2)


def test_overrides():
    p = load_preset(
        "tiny", {"pruning.mean_rate": 0.3, "model": "x/y", "recovery.num_examples": None, "recovery.num_epochs": 2}
    )
    assert (p.pruning.mean_rate, p.model, p.recovery.num_examples, p.recovery.num_epochs) == (0.3, "x/y", None, 2.0)
    assert load_preset("tiny").pruning.mean_rate == 0.25


def test_another_corpus_brings_its_own_instructions():
    assert load_preset("tiny", {"corpus": "file:x"}).instructions == "corpus"
    assert load_preset("tiny", {"corpus": "file:x", "instructions": "alpaca-cleaned"}).instructions == "alpaca-cleaned"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pruning.mean_rat": 0.3}, "did you mean pruning.mean_rate"),
        ({"pruning": {}}, "unknown parameter 'pruning'"),
        ({"pruning.mean_rate": "much"}, "pruning.mean_rate = 'much' cannot be: it should be a valid number"),
        ({"pruning.mean_rate": "0.3"}, "pruning.mean_rate = '0.3' cannot be: it should be a valid number"),
        ({"pruning.mean_rate": 1.5}, "pruning.mean_rate = 1.5 cannot be: it should be less than 1"),
        ({"pruning.mean_rate": 0.0}, "cannot be"),
        ({"pruning.mean_rate": 0.9}, "out of reach between pruning.min_rate"),
        ({"pruning.strategy": "best"}, "pruning.strategy = 'best'"),
        ({"recovery.lr_scheduler": "cosin"}, "lr_scheduler = 'cosin' cannot be: it should be 'linear', 'cosine',"),
        ({"recovery.lr_scheduler": "warmup_stable_decay"}, "cannot be: it should be 'linear'"),
        ({"recovery.lora_r": 1.5}, "recovery.lora_r = 1.5 cannot be: it should be a valid integer"),
        ({"recovery.lora_r": True}, "recovery.lora_r = True cannot be"),
        ({"evaluation.num_tokens": -1}, "it should be greater than 0"),
        ({"cost.batch_sizes": []}, "it should have at least 1 item"),
        ({"cost.contexts": [128, 1]}, "cost.contexts.1 = 1 cannot be: it should be greater than 1"),
        ({"pruning.alpha": float("nan")}, "should be a finite number"),
        ({"cost.prices.usd_per_gpu_hour": -2}, "cannot be"),
    ],
)
def test_bad_overrides(changes, says):
    with pytest.raises(InputError, match=says.replace("(", r"\(")):
        load_preset("tiny", changes)


def test_schedules_are_those_that_need_nothing_more():
    def is_enough(name):
        steps = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        with contextlib.suppress(TypeError, ValueError):
            schedule = transformers.get_scheduler(name, steps, num_warmup_steps=2, num_training_steps=10)
            steps.step()
            schedule.step()
            return True

    assert {name.value for name in transformers.SchedulerType if is_enough(name)} == {*get_args(presets.Schedule)}


def test_unknown_preset():
    with pytest.raises(InputError, match="unknown preset 'huge': use one of .*tiny"):
        load_preset("huge")


def test_names():
    names = dotted_names()
    assert "cost.prices.date" in names and "name" not in names and "pruning" not in names


def test_command_line_values():
    assert overrides(["a=0.5", "b=1e-4", "c=[1, 8]", "d=file:x.txt", "e=null"]) == {
        "a": 0.5,
        "b": 1e-4,
        "c": [1, 8],
        "d": "file:x.txt",
        "e": None,
    }
    with pytest.raises(InputError, match=r"\[1, cannot be read .*: write a value as YAML"):
        overrides(["c=[1,"])
    with pytest.raises(InputError, match="is no NAME=VALUE"):
        overrides(["pruning.mean_rate"])


@pytest.mark.parametrize("limits", [{}, {"piqa": 3}])
def test_an_override_takes_the_place_of_what_the_preset_says(limits):
    assert load_preset("smollm2").tasks_in_depth.limits != limits
    assert load_preset("smollm2", {"tasks_in_depth.limits": limits}).tasks_in_depth.limits == limits


def test_a_cut_takes_as_many_samples_as_there_are():
    assert check_cut(remove=0.25, seed=20).seed == 20
    with pytest.raises(InputError, match="seed = 21 cannot be: it should be less than or equal to 20"):
        check_cut(remove=0.25, seed=21)


@pytest.mark.parametrize(("fractions", "middle"), [([0.5], 0.5), ([0.615, 0.25, 0.5], 0.5), ([0.7, 0.25], 0.25)])
def test_the_middle_of_the_sizes(fractions, middle):
    assert load_preset("tiny", {"budgets.fractions": fractions}).budgets.middle == middle
