import pytest

from gqalib import InputError
from gqalib.__main__ import overrides
from gqalib.presets import dotted_names, load_preset, preset_names


def test_every_preset_loads():
    assert {"tiny", "llama3-8b"} <= set(preset_names())
    for name in preset_names():
        assert load_preset(name).name == name


def test_the_seed_numbers_of_llama3_8b():
    p = load_preset("llama3-8b")
    assert (p.removal.num_examples, p.removal.length) == (50, 128)
    assert (p.calibration.num_examples, p.calibration.length) == (10, 128)
    assert (p.pruning.mean_rate, p.pruning.alpha, p.pruning.min_rate, p.pruning.max_rate) == (0.25, 1.0, 0.15, 0.5)
    assert (p.recovery.learning_rate, p.recovery.lora_r, p.recovery.lora_alpha, p.recovery.num_epochs) == (5e-5, 8, 16, 2)
    assert (p.corpus, p.instructions, p.dtype) == ("wikitext2", "alpaca-cleaned", "bfloat16")


def test_overrides():
    p = load_preset("tiny", {"pruning.mean_rate": 0.3, "model": "x/y", "recovery.num_examples": None, "recovery.num_epochs": 2})
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
        ({"pruning.mean_rate": "much"}, "pruning.mean_rate = 'much' is a str: give float"),
        ({"pruning.mean_rate": 1.5}, "pruning.mean_rate = 1.5 cannot be"),
        ({"pruning.mean_rate": 0.0}, "cannot be"),
        ({"pruning.mean_rate": 0.9}, "out of reach between pruning.min_rate"),
        ({"pruning.strategy": "best"}, "pruning.strategy = 'best'"),
        ({"recovery.lora_r": 1.5}, "recovery.lora_r = 1.5 is a float: give int"),
        ({"recovery.lora_r": True}, "is a bool"),
        ({"evaluation.num_tokens": -1}, "a positive number"),
        ({"cost.batch_sizes": []}, "a list of positive batch sizes"),
        ({"pruning.alpha": float("nan")}, "cannot be"),
        ({"cost.prices.usd_per_gpu_hour": -2}, "cannot be"),
    ],
)
def test_bad_overrides(changes, says):
    with pytest.raises(InputError, match=says.replace("(", r"\(")):
        load_preset("tiny", changes)


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
    with pytest.raises(InputError, match="is no NAME=VALUE"):
        overrides(["pruning.mean_rate"])
