"""The first notebooks on shapes that they were not drawn for: a single group, one or two layers, layers that differ."""

import builtins
import json
from collections import defaultdict
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import biased_model, small_model

from gqalib.measure import frontier, tasks
from gqalib.model import load, surgery
from gqalib.model.shapes import layer_shapes
from gqalib.reference import training
from gqalib.run import corpora
from gqalib.run.notebook import NOTEBOOKS, Notebook

SMALL = {
    "pruning.channel_multiple": 1,  # small models have 24 channels
    "corpus": "random-tokens", "evaluation.short_window": 16, "evaluation.long_window": 32, "evaluation.num_tokens": 64,
    "evaluation.quick_tokens": 32, "calibration.num_examples": 2, "calibration.length": 16, "removal.num_examples": 2,
    "removal.length": 16, "cost.min_run_s": 0.01, "cost.contexts": [8], "cost.batch_sizes": [1],
    "frontier.fractions": [0.25, 0.7], "frontier.calibration.num_examples": 4, "frontier.calibration.length": 16,
    "frontier.test.num_examples": 2, "frontier.test.length": 16, "frontier.other_corpus": "random-tokens",
}  # fmt: skip


@pytest.fixture
def run(tmp_path, tokenizer, monkeypatch):
    """Every cell of a notebook on a model, in this process, on made-up upstream records, no figures; its names."""
    monkeypatch.setattr(Notebook, "figure", lambda self, fig, name, caption="": plt.close(fig))
    monkeypatch.setattr(Notebook, "upstream", lambda *_: {"metrics": defaultdict(lambda: {"value": 60.0})})

    def execute(number, model, **parameters):
        load.save_model(model, tokenizer, tmp_path / "model")
        overrides = SMALL | {"model": str(tmp_path / "model")}
        names = {"preset": "tiny", "overrides": overrides, "run_dir": tmp_path, "seed": 0}
        for cell in json.loads(next(NOTEBOOKS.glob(f"{number}_*.ipynb")).read_text(encoding="utf-8"))["cells"]:
            given = dict(names) | parameters if "parameters" in cell["metadata"].get("tags", []) else {}
            exec("".join(cell["source"]) if cell["cell_type"] == "code" else "", names)
            names |= given
        return names

    return execute


def uneven_model():
    model = biased_model()
    surgery.keep_groups(model, 0, [0, 2, 3])
    surgery.keep_groups(model, 1, [1])
    surgery.keep_channels(model, 2, range(17))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", ["02", "03", "04"])
def test_a_single_group_is_left_alone(run, number, capsys):
    names = run(number, small_model(num_key_value_heads=1))
    assert "attention is left alone" in capsys.readouterr().out
    changes = {"misread_graph", "factor_pairing", "change_single_layer", "wins_over_random", "change_five_layers"}
    assert {key: names["nb"].metrics[key]["value"] for key in changes & names["nb"].metrics.keys()} == (
        {"misread_graph": 0, "factor_pairing": 1} if number == "02" else {}
    )


@pytest.mark.filterwarnings("ignore")
def test_the_frontier_of_a_model_that_cannot_lose_half(run, monkeypatch):
    """With one group, attention stays: what is looked at more closely is what can be done."""
    methods = ["FLAP", "OSSCAR", frontier.OWN]
    monkeypatch.setattr("gc.collect", lambda: 0)  # a third of a second for each measurement
    left_out = [name for name in frontier.METHODS if name not in methods]
    more = {"frontier.left_out": left_out, "comparison.fractions": [0.1], "comparison.samples": 1}
    for key, value in more.items():
        monkeypatch.setitem(SMALL, key, value)
    names = run("10", small_model(num_key_value_heads=1, num_hidden_layers=2), switched_off={}, more_text=2)
    assert names["middle"] == 0.25 and names["nb"].metrics["ratio_own_25"] and names["nb"].metrics["ratio_own_10"]
    assert set(names["rows"]["sample"]) == {0, 1} and list(names["lengths"].index) == [frontier.OWN]
    names["draw"](0.1)  # what the slider calls
    left, right = plt.gcf().axes
    assert left.get_title().startswith("10 %") and right.lines[-1].get_xdata() == [10, 10]


@pytest.mark.parametrize("num_layers", [1, 2])
def test_few_layers(run, num_layers):
    names = run("04", small_model(num_hidden_layers=num_layers))
    assert names["spread"] == list(range(num_layers)) and names["nb"].metrics["change_five_layers"]


def test_anatomy_of_an_uneven_model_with_biases(run):
    anatomy = run("01", uneven_model())["anatomy"]
    assert (anatomy["on paper"] == anatomy["in the model"]).all()


@pytest.mark.filterwarnings("ignore")
def test_v2_of_a_pruned_model(run, tmp_path):
    """Each layer loses its own share, and no layer its last group."""
    names = run("02", uneven_model())
    shapes = layer_shapes(load.load_model(tmp_path / "models" / "v2"))
    assert [len(names["removed"][layer]) for layer in range(3)] == [1, 0, 1]
    assert shapes.to_numpy().tolist() == [[4, 2, 18], [2, 1, 18], [6, 3, 13]]


@pytest.mark.filterwarnings("ignore")
def test_ticked_kv_heads_are_drawn_as_both_cuts(run, capsys):
    """8 query heads, 4 KV heads, the first of them ticked: what exercise 1 of the notebook does by hand."""
    draw = run("02", small_model(num_hidden_layers=1))["draw"]
    draw(KV0=True, KV1=False, KV2=False, KV3=False)
    assert [ax.get_title("left") for ax in plt.gcf().axes] == ["v2: 3 of 6 misread", "whole groups: 0 of 6 misread"]
    draw(KV0=True, KV1=True, KV2=True, KV3=True)
    assert "one KV head has to stay" in capsys.readouterr().out
    plt.close("all")


def test_groups_of_a_pruned_model(run):
    names = run("03", uneven_model())
    assert [row["layer"] for row in names["nb"].tables["one_group"]] == [0, 2] and names["chosen"] == 2
    assert run("04", uneven_model())["kept"] == {0: 2, 2: 3}


@pytest.mark.filterwarnings("ignore")
def test_full_prune_of_a_model_whose_groups_differ(run):
    """As torch-pruning's peer leaves it: 4 and 2 query heads per KV head."""
    model = small_model(num_key_value_heads=2, num_hidden_layers=2)
    heads = surgery.rows_of_heads([0, 1, 4, 5], 6)
    attention = model.model.layers[1].self_attn
    surgery.replace_weight(attention.q_proj, attention.q_proj.weight[heads])
    surgery.replace_weight(attention.o_proj, attention.o_proj.weight[:, heads])
    surgery.record_shapes(model)
    assert run("05", model, backbone_rates=[0.25])["table"]["4:1"].tolist() == [4, 2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", ["01", "02", "05", "10"])
def test_answers_where_a_preset_asks_for_them(run, number, monkeypatch):
    """Tasks of a made-up harness, another text and a prompt: every model of the notebook has its rows."""
    asked = {"tasks": ["piqa", "arc_easy"], "other_text": "random-tokens", "prompts": ["w5 w6"], "num_new_tokens": 3}
    for key, value in asked.items():
        monkeypatch.setitem(SMALL, f"answers.{key}", value)
    monkeypatch.setitem(SMALL, "frontier.fractions", [0.25])
    monkeypatch.setattr(builtins, "display", lambda *shown: None, raising=False)
    monkeypatch.setattr(tasks, "score_tasks", made_up_answers)
    left_out = [name for name in frontier.METHODS if name not in ("FLAP", frontier.OWN)]
    monkeypatch.setitem(SMALL, "frontier.left_out", left_out)
    few = {"10": {"switched_off": {}}, "05": {"backbone_rates": [0.25]}}.get(number, {})
    tables = run(number, small_model(num_hidden_layers=2), **few)["nb"].tables
    names = [name for name in ASKED if number in ASKED[name]]
    pruned = {"01": set(), "02": {"v2"}, "05": {"v3"}, "10": {"FLAP, 25 %", f"{frontier.OWN}, 25 %"}}[number]
    for name in names:
        assert {row["model"] for row in tables[name]} == {"dense"} | pruned


@pytest.mark.filterwarnings("ignore")
def test_tasks_in_depth_where_a_preset_asks_for_them(run, monkeypatch, tmp_path, tokenizer, capsys):
    """13 on made-up answers: every model has its groups, and recovered ones what came back."""
    smaller = small_model(num_hidden_layers=2)
    surgery.keep_channels(smaller, 0, range(17))
    load.save_model(smaller, tokenizer, tmp_path / "smaller")
    monkeypatch.setattr(Notebook, "made", lambda self, model, notebook: tmp_path / "smaller")
    monkeypatch.setattr(builtins, "display", lambda *shown: None, raising=False)
    monkeypatch.setattr(tasks, "score_tasks", lambda *given: made_up_answers(*given).assign(exact=0.0))
    for key, value in {"answers.tasks": ["piqa", "arc_easy"], "tasks_in_depth.names": ["lambada", "squad"]}.items():
        monkeypatch.setitem(SMALL, key, value)
    also = {"mine": [str(tmp_path / "smaller"), "v3"]}
    tables = run("13_tasks", small_model(num_hidden_layers=2), also=also)["nb"].tables
    kept = pd.DataFrame(tables["groups_kept"]).set_index("model")
    taught = {"taught-own", "taught-other"}
    assert {"dense", "refitted-50", "distilled-50", "v3", "v3_lora", "mine", *taught} == set(kept.index)
    assert (kept["kept"].dropna() == 100).all() and set(kept["group"]) == {"facts", "reasoning", "form"}
    assert (kept.loc[["distilled-50", "v3_lora", "mine"], "back"].dropna() == 0).all() and kept.loc[
        "v3", "back"
    ].isna().all()
    assert set(pd.DataFrame(tables["by_data"])["model"]) == {"dense", *taught}
    assert len(tables["squad"]) == 8 and "mine from v3, taught by data of your own" in capsys.readouterr().out


ASKED = {"tasks": ("01", "05", "10"), "other_text": ("01", "02", "05"), "written": ("05",)}


def made_up_answers(model, tokenizer, names, limit, rows, run_code):
    seen = {"example": range(6), "right": [1, 1, 1, 1, 1, 0], "nats": -1.0}
    return pd.concat([pd.DataFrame(seen).assign(task=name) for name in names], ignore_index=True)


@pytest.mark.filterwarnings("ignore")
def test_how_the_reference_model_was_made(tmp_path, monkeypatch, capsys):
    """00 from text to card, at an eighth of its depth, on a short text: its exercises are not tried, and its figure
    has its caption as alt text."""
    stage, shown, windows = training.Stage, [], torch.randint(1, 4096, (2, 16))
    monkeypatch.setattr(training, "Stage", lambda depth, window, tokens: stage(depth // 8, 16, tokens // 2000))
    monkeypatch.setattr(corpora, "python_docs", lambda split: ["Return the number of words. " * 2000])
    monkeypatch.setattr(corpora, "evaluation_windows", lambda *_: windows)
    monkeypatch.setattr("IPython.display.display", lambda what, **how: shown.append((what, how)))
    names = {}
    for cell in json.loads(next(NOTEBOOKS.glob("00_*.ipynb")).read_text(encoding="utf-8"))["cells"]:
        exec("".join(cell["source"]) if cell["cell_type"] == "code" else "", names)
        names |= {"folder": tmp_path} if "parameters" in cell["metadata"].get("tags", []) else {}
    assert names["model"].config.num_hidden_layers == 4 and names["log"]["validation_loss"].notna().any()
    (fig, how), (caption, _) = shown
    assert fig.axes[0].get_xlabel() == "tokens seen (millions)" and not plt.get_fignums()
    assert caption.data == f"**Figure 0.1.** {how['metadata']['image/png']['alt']}"
    said = capsys.readouterr().out
    assert [f"exercise {number}: not tried yet" in said for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert "4 layers, windows of 16" in said


def test_a_trained_model_that_is_gone_is_trained_again(tmp_path):
    """12 keeps a row for each start and training; where its model was saved and is missing, the row does not count."""
    nb, out, made = Notebook("12_distillation", "smoke", {}, tmp_path, 0, ("budgets",)), tmp_path / "models", []

    def train(told, settings, out, folder):
        made.append(told["start"])
        if out:
            out.mkdir(parents=True, exist_ok=True)
        return {"losses": [1.0, 2.0]}

    names = {"nb": nb, "train": train, "partial": partial, "torch": torch, "ways": {"text": [[1]]}, "test": 1}
    names |= {"settings_of": lambda *how: how, "validation": 1}
    names |= dict.fromkeys(("multiple", "dense", "calibration", "removal_sample"), 1) | {"models": out}
    cells = json.loads((NOTEBOOKS / "12_distillation.ipynb").read_text(encoding="utf-8"))["cells"]
    for function in ("with_losses", "start_of", "recover"):
        exec(next(source for cell in cells if f"def {function}(" in (source := "".join(cell["source"]))), names)
    names["make_start"] = lambda name, fraction, multiple, folder: train({"start": name}, None, out / name, folder)
    for start, folder in [("saved", out / "saved"), ("saved", out / "saved"), ("not saved", None), ("not saved", None)]:
        assert names["recover"](start, "text", 8, folder)["losses"].tolist() == [1, 2]
        assert names["start_of"]("start", 0.5)["losses"].tolist() == [1, 2]
    assert made == ["saved", "start", "not saved"]
    for folder in ("saved", "start"):
        (out / folder).rmdir()
    names["recover"]("saved", "text", 8, out / "saved"), names["start_of"]("start", 0.5), names["start_of"]("start", 0.4)
    assert made == ["saved", "start", "not saved", "saved", "start", "start"] and (out / "saved").is_dir()


def test_the_stale_gradient_is_the_loss_own_and_costs_are_summed(run):
    """04: the loss' backward pass fails on weights cut by .data; freezing hides it, a new Parameter mends it."""
    nb = run("04", small_model(num_hidden_layers=3), num_pruned=2)["nb"]
    shown = ("stale_gradient_fails", "freezing_hides_stale_gradient", "freezing_needed")
    assert [nb.metrics[name]["value"] for name in shown] == [1, 1, 0]
    costs = {row["pruned"]: row["nats per token"] for row in nb.tables["additivity"]}
    single = sum(cost for name, cost in costs.items() if name.startswith("layer"))
    assert single == pytest.approx(costs["sum"], abs=1e-5)
    assert costs["sum"] - costs["all together"] == pytest.approx(nb.metrics["additivity_gap"]["value"], abs=1e-5)
