"""What notebooks say beside perplexity: tasks, another text, what models write. Nothing is fetched."""

import copy
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import small_model

from gqalib import InputError, figures, packages
from gqalib.measure import report_card, tasks
from gqalib.measure.perplexity import window_losses
from gqalib.model.load import save_model
from gqalib.run import notebook
from gqalib.run.corpora import evaluation_windows
from gqalib.run.notebook import Notebook
from gqalib.run.presets import Answers, Task, load_preset, preset_names


def examples(**right):
    """Answers as `score_tasks` gives them: 1 or 0 per example of each task, nats that follow."""
    parts = [
        pd.DataFrame({"task": task, "example": range(len(r)), "right": r, "nats": np.array(r) / 4 - 1})
        for task, r in right.items()
    ]
    return pd.concat(parts, ignore_index=True)


DENSE = examples(piqa=[1, 1, 1, 1, 1, 1, 1, 0], arc_easy=[1, 1, 1, 0, 1, 1, 1, 0], winogrande=[1, 0, 1, 0, 1, 0, 1, 0])
PRUNED = examples(piqa=[1, 1, 1, 1, 0, 1, 1, 0], arc_easy=[1, 0, 0, 0, 1, 1, 1, 0], winogrande=[0, 0, 0, 0, 1, 0, 1, 0])


def open_notebook(tmp_path, name="01_first", **changes):
    overrides = {"corpus": "random-tokens", "evaluation.short_window": 16, "evaluation.long_window": 128}
    overrides |= {"evaluation.num_tokens": 128} | {f"answers.{key}": value for key, value in changes.items()}
    return Notebook(name, "tiny", overrides, tmp_path / "run", reads=("evaluation", "answers"))


@pytest.fixture
def asked(monkeypatch):
    """Counts the models that a fake lm-eval reads; a task's answers follow the model's first weight."""
    seen = []

    def fake(model, tokenizer, names, limit, rows, run_code):
        seen.append((model.dtype, tuple(names), limit))
        return DENSE if next(model.parameters()).flatten()[0] < 100 else PRUNED

    monkeypatch.setattr(tasks, "score_tasks", fake)
    return seen


def pruned_model():
    model = small_model()
    next(model.parameters()).data.flatten()[0] = 200.0
    return model


# ---------------------------------------------------------------- off


def test_presets_that_need_no_network_ask_nothing():
    asked = {name: load_preset(name).answers for name in preset_names()}
    assert all(asked[name] == Answers() for name in ("tiny", "full", "smoke", "llama3-8b-shape"))
    assert (
        asked["smollm2"].tasks
        and len(asked["smollm2"].prompts) == 3
        and asked["smollm2"].other_text == "folder:data/wikitext-2"
    )


def test_off_is_one_line_each_and_touches_neither_model_nor_package(tmp_path, monkeypatch, capsys, tokenizer):
    monkeypatch.setattr(packages, "FOLDER", tmp_path / "packages")
    monkeypatch.setattr(packages, "_fetch", lambda name, *_: pytest.fail(f"{name} was fetched"))
    nb, models = open_notebook(tmp_path), {"dense": "there is no such model"}
    assert report_card.read_tasks(nb, models, tokenizer) == {}
    assert report_card.other_text(nb, models, tokenizer) is None
    assert report_card.written(nb, models, tokenizer) is None
    assert capsys.readouterr().out.splitlines() == [
        "this preset scores no tasks", "this preset reads no other text", "this preset has no prompts",
    ]  # fmt: skip
    assert nb.tables == {} and not (tmp_path / "run" / "progress").exists()
    nb = open_notebook(tmp_path, other_text="folder:data/nowhere")
    assert report_card.other_text(nb, models, tokenizer) is None
    assert capsys.readouterr().out.startswith("folder:data/nowhere is not here: README says")


def test_repeats_are_counted_where_there_are_words_to_count(tmp_path, monkeypatch, capsys, tokenizer):
    """20 times three words make 58 sequences, of which 3 differ; of three sequences no share is given."""
    texts = iter(["one two three " * 20, "one two three four five"])
    monkeypatch.setattr(report_card, "continued", lambda *_: next(texts))
    nb = open_notebook(tmp_path, prompts=["Say something."])
    report_card.written(nb, {"dense": small_model(), "pruned": pruned_model()}, tokenizer)
    assert capsys.readouterr().out.endswith("dense 5 % of 58, pruned too few of 3\n")


def test_a_preset_names_tasks_that_there_are():
    assert set(Task.__args__) == {"all", *tasks.SEVEN}
    with pytest.raises(InputError, match="answers.tasks.1 = 'piqua' cannot be: it should be 'all', 'boolq'"):
        load_preset("tiny", {"answers.tasks": ["piqa", "piqua"]})
    with pytest.raises(InputError, match="answers.limit = 0 cannot be"):
        load_preset("tiny", {"answers.limit": 0})


# ---------------------------------------------------------------- tasks


def test_what_a_model_said_is_kept_by_its_weights_for_every_notebook(tmp_path, asked, tokenizer):
    models = {"dense": small_model(), "pruned": pruned_model()}
    first = report_card.read_tasks(open_notebook(tmp_path, tasks=["piqa"], limit=8), models, tokenizer)
    other = open_notebook(tmp_path, "05_other", tasks=["piqa"], limit=8, prompts=["more"])
    again = report_card.read_tasks(other, models | {"the same": copy.deepcopy(models["dense"])}, tokenizer)
    assert len(asked) == 2 and asked[0][1:] == (("piqa",), 8)
    pd.testing.assert_frame_equal(again["the same"], first["dense"])
    pd.testing.assert_frame_equal(first["pruned"], PRUNED)
    report_card.read_tasks(open_notebook(tmp_path, tasks=["piqa"], limit=9), models, tokenizer)
    assert len(asked) == 4


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_copy_in_bf16_reads_where_that_is_fast(tmp_path, asked, tokenizer, monkeypatch, fast, dtype):
    monkeypatch.setattr(report_card, "bf16_is_fast", lambda device: fast)
    model = small_model()
    report_card.read_tasks(open_notebook(tmp_path, tasks=["all"]), {"dense": model}, tokenizer)
    assert asked == [(dtype, tuple(tasks.SEVEN), None)] and model.dtype == torch.float32


def test_tasks_in_depth_are_asked_more_where_limits_say_so(tmp_path, asked, tokenizer, monkeypatch):
    """PIQA comes from `answers`, ARC with more questions, SciQ by the section's own limit; each is kept."""
    fake = tasks.score_tasks  # of which each task gets the rows that it asks for

    def of_task(model, tokenizer, names, *given):
        rows = fake(model, tokenizer, names, *given).replace({"winogrande": "sciq"})
        return rows[rows["task"].isin(names)]

    monkeypatch.setattr(tasks, "score_tasks", of_task)
    changes = {"answers.tasks": ["piqa", "arc_easy"], "answers.limit": 8, "corpus": "random-tokens"}
    changes |= {f"tasks_in_depth.{key}": value for key, value in {"names": ["sciq"], "limit": 20}.items()}
    changes |= {"tasks_in_depth.limits": {"arc_easy": 99}}
    nb = Notebook("13_x", "tiny", changes, tmp_path / "run", reads=("answers", "tasks_in_depth"))
    rows = [report_card.read_in_depth(nb, {"dense": small_model()}, tokenizer)["dense"] for _ in range(2)]
    assert rows[0]["task"].unique().tolist() == ["piqa", "arc_easy", "sciq"]
    assert [names_and_limit[1:] for names_and_limit in asked] == [
        (("piqa", "arc_easy"), 8), (("arc_easy",), 99), (("sciq",), 20),
    ]  # fmt: skip
    pd.testing.assert_frame_equal(*rows)
    with pytest.raises(InputError, match=r"tasks_in_depth\.limits"):
        load_preset("tiny", {"tasks_in_depth.limits": {"sciq": 9}})


def test_a_folder_is_loaded_when_its_turn_comes(tmp_path, asked, tokenizer):
    save_model(pruned_model(), tokenizer, tmp_path / "pruned")
    models = {"dense": small_model(), "pruned": tmp_path / "pruned"}
    rows = report_card.read_tasks(open_notebook(tmp_path, tasks=["piqa"]), models, tokenizer)
    assert rows["pruned"]["right"].tolist() == PRUNED["right"].tolist()


def test_the_table_by_hand():
    table = report_card.task_table({"dense": DENSE, "pruned": PRUNED}).set_index(["model", "task"])
    dense, pruned = table.loc["dense"], table.loc["pruned"]
    assert dense.loc["piqa", ["accuracy", "chance", "nats"]].tolist() == [87.5, 50, 0.875 / 4 - 1]
    assert dense.loc["piqa", "error"] == pytest.approx(100 * math.sqrt(7 / 64 / 7))  # √(p (1 − p) / (n − 1))
    assert pruned.loc["arc_easy", "difference"] == -25
    assert pruned.loc["arc_easy", "difference_error"] == pytest.approx(100 * math.sqrt((2 - 0.5) / 7 / 8))
    assert pruned.loc["mean", "difference"] == pytest.approx(-(12.5 + 25 + 25) / 3)
    assert dense["difference"].isna().all() and dense.loc["mean", "kept"] == 100
    wide = report_card.side_by_side(table.reset_index())
    assert wide.index.tolist() == ["piqa", "arc_easy", "winogrande", "mean"]
    assert wide.loc["piqa"].tolist() == [50.0, "87.5 ± 12.5", "75.0 ± 16.4"]
    assert report_card.side_by_side(table.reset_index(), "difference").columns.tolist() == ["pruned"]


def test_the_share_above_chance_by_hand():
    """PIQA keeps 0.25 of 0.375, ARC 0.25 of 0.5; WinoGrande, at chance, has nothing to keep."""
    share, error, names = report_card.above_chance_kept(PRUNED, DENSE)
    assert names == ["piqa", "arc_easy"] and share == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    piqa = np.array([0.5 - 1 / 3] * 4 + [-0.5 - 1 / 3] + [0.5 - 1 / 3] * 2 + [-0.5 + 1 / 3])
    arc = np.array([3 / 8, -5 / 8, -5 / 8, -1 / 8] + [3 / 8] * 3 + [-1 / 8])
    errors = [x.std(ddof=1) / math.sqrt(8) / above for x, above in ((piqa, 0.375), (arc, 0.5))]
    assert error == pytest.approx(100 * math.sqrt(errors[0] ** 2 + errors[1] ** 2) / 2)
    assert report_card.above_chance_kept(DENSE, DENSE)[:2] == (100, 0)
    guesses = DENSE[DENSE["task"] == "winogrande"]
    assert math.isnan(report_card.above_chance_kept(guesses, guesses)[0])


def test_the_error_of_the_share_is_that_of_repeated_drawing():
    """The delta method against the bootstrap, on as many examples as a preset reads."""
    rng = np.random.default_rng(0)
    right = (rng.random(300) < 0.7).astype(int)
    dense, pruned = examples(piqa=right), examples(piqa=np.where(rng.random(300) < 0.8, right, 1 - right))
    error = report_card.above_chance_kept(pruned, dense)[1]
    drawn = []
    for rows in rng.integers(0, 300, (2000, 300)):
        own, reference = (frame["right"].to_numpy()[rows].mean() - 0.5 for frame in (pruned, dense))
        drawn.append(100 * own / reference)
    assert error == pytest.approx(np.std(drawn), rel=0.1)


def test_the_verdict_names_what_is_beyond_two_errors():
    broken = examples(piqa=[0] * 8, arc_easy=[0] * 8, winogrande=[1, 0, 1, 0, 1, 0, 1, 0])
    lines = report_card.verdict({"dense": DENSE, "pruned": PRUNED, "broken": broken})
    assert lines[0] == "dense: above chance by more than 2 errors on piqa, arc_easy, mean"
    assert lines[1] == "pruned: below dense on mean; above it on nothing"
    assert lines[2].startswith("    keeps 58 ± ") and "on 2 of 3 tasks; right answers there: -0.047 ± " in lines[2]
    assert lines[3] == "broken: below dense on piqa, arc_easy, mean; above it on nothing"
    least = [report_card.SURE * tasks.summary(rows, DENSE)["difference_error"] for rows in (PRUNED, broken)]
    assert lines[5].startswith("two standard errors of a difference: up to ")
    assert f"up to {max(each[:3].max() for each in least):.1f} points on a single task" in lines[5]
    assert len(report_card.verdict({"dense": DENSE})) == 1


def test_right_answers_count_where_the_dense_model_knows_more_than_guessing():
    """By hand; winogrande, where it guesses, is left out, and so are answers that have no log-likelihood."""
    change, error = report_card.nats_change(PRUNED, DENSE, ["piqa", "arc_easy"])
    assert change == pytest.approx(-(1 / 8 + 2 / 8) / 2 / 4) and error > 0
    written = DENSE.assign(nats=np.nan)
    assert all(map(math.isnan, report_card.nats_change(written, written, ["piqa"])))
    guesses = DENSE[DENSE["task"] == "winogrande"]
    lines = report_card.verdict({"dense": guesses, "pruned": guesses})
    assert lines[2] == "    there is nothing above chance to keep"


def test_dots_of_models_that_share_a_role_differ():
    rows = {"dense": DENSE, "v2 + LoRA": PRUNED, "v3 + LoRA": DENSE, "refitted-25": PRUNED}
    rows |= {"distilled-50": DENSE, "long-50": PRUNED}
    fig, ax = plt.subplots()
    figures.task_dots(ax, report_card.task_table(rows))
    labels = ax.get_legend_handles_labels()[1]
    assert set(labels) == {*rows, "chance"} and [text.get_text() for text in ax.get_yticklabels()][-1] == "mean"
    dots = {name: bars[0] for name, bars in zip(rows, ax.containers, strict=True)}
    faces = {name: (dot.get_markerfacecolor(), dot.get_marker()) for name, dot in dots.items()}
    assert faces["v2 + LoRA"] == (figures.COLORS["recovered"], "^") and faces["v3 + LoRA"] == ("white", "^")
    assert faces["refitted-25"] == (figures.COLORS["refit"], "P") and len(set(faces.values())) == len(rows)
    plt.close(fig)


# ---------------------------------------------------------------- another text


def test_another_text_at_both_windows_named_without_its_path(tmp_path, tokenizer, capsys):
    folder = tmp_path / "a text"
    folder.mkdir()
    (folder / "test.txt").write_text(" ".join(f"w{2 + i * i % 59}" for i in range(400)))  # no other split is needed
    nb, models = (
        open_notebook(tmp_path, other_text=f"folder:{folder}"),
        {"dense": small_model(), "other": small_model(1)},
    )
    table = report_card.other_text(nb, models, tokenizer, {"other": "dense"})
    ratio, error = table.loc[1, ["ratio", "ratio_error"]]
    said = f"other against dense, windows of 16: {ratio:.3f} ± {error:.3f} times its perplexity, "
    assert said + report_card.told_apart(ratio, error) in capsys.readouterr().out.splitlines()
    assert table[["text", "window", "model"]].to_numpy().tolist() == [
        ["a text", length, name] for length in (16, 64) for name in models
    ]
    assert (table["ratio"][::2] == 1).all() and (table["ratio_error"][1::2] > 0).all()
    windows = evaluation_windows(f"folder:{folder}", "test", tokenizer, 16, 128)
    assert table["perplexity"][1] == pytest.approx(
        window_losses(models["other"], windows).mean().exp().item(), abs=1e-3
    )
    assert str(tmp_path) not in str(nb.tables)


@pytest.mark.parametrize(("ratio", "word"), [(0.9, "better"), (0.97, "not told apart"), (1.1, "worse")])
def test_told_apart_from_two_errors_on(ratio, word):
    assert report_card.told_apart(ratio, 0.02) == word


@pytest.mark.parametrize(
    ("error", "words"), [(0.3, "better worse"), (0.4, "not told apart"), (math.nan, "not told apart")]
)
def test_either_model_may_come_first(error, words):
    """The same difference, once as half and once as twice; of a single window, whose error is NaN, nothing is shown."""
    found = [report_card.told_apart(ratio, ratio * error) for ratio in (0.5, 2.0)]
    assert " ".join(dict.fromkeys(found)) == words


@pytest.mark.parametrize("error", [0.3, math.nan])
def test_a_model_that_broke_is_worse(error):
    assert report_card.told_apart(math.inf, error) == "worse"
    assert report_card.told_apart(0.0, error) == "better" and report_card.told_apart(math.nan, error) == "not told apart"
