"""Instructions: rows of `prompt` and `completion` to learn from, and the tokens that they become."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from gqalib.errors import InputError
from gqalib.model.names import NO_LABEL
from gqalib.run.corpora import corpus_path, encode, hub_rows, json_rows, part, read_corpus
from gqalib.run.python_docs import described


def check_instructions(name: str) -> None:
    """Raises InputError if there are no such instructions, or a file of them cannot be read; downloads nothing."""
    if name.startswith("file:"):
        json_rows(corpus_path(name), {"instruction", "output"})
    elif name not in ("python-docs", "alpaca-cleaned", "corpus"):
        raise InputError(f"unknown instructions {name!r}: use python-docs, alpaca-cleaned, corpus or file:PATH")


def read_instructions(name: str, split: str, corpus: str, num_rows: int | None = None) -> list[dict[str, str]]:
    """Rows of `prompt` and `completion` to learn from.

    `python-docs`: "Describe `package.module.name`." and its docstring; `alpaca-cleaned`; `file:PATH`: JSON or JSONL
    rows of instruction, input, output; `corpus`: documents of the preset's own corpus, each to be continued from its
    first sentence.

    Raises:
        InputError: there are none of this name, or they cannot be read.
    """
    check_instructions(name)
    if name == "python-docs":
        rows = described(split)
    elif name == "corpus":
        rows = _continued(read_corpus(corpus, split))
    elif name == "alpaca-cleaned":
        loaded = list(hub_rows("instructions", "yahma/alpaca-cleaned", split="train"))
        rows = map(_alpaca_row, part(loaded, split))
    else:
        rows = map(_alpaca_row, part(json_rows(corpus_path(name), {"instruction", "output"}), split))
    return list(itertools.islice(rows, num_rows))


def examples(rows: list[dict[str, str]], tokenizer, max_length: int) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of `prompt` / `completion` rows, labels on the completion and one end of text alone.

    Raises:
        InputError: no row has a prompt of less than `max_length` tokens.
    """
    found = [_example(row, tokenizer, max_length) for row in rows]
    found = [example for example in found if set(example["labels"][1:]) - {NO_LABEL}]
    if not found:
        said = f"no row has a token of its completion within max_length = {max_length}"
        raise InputError(f"{said}: give shorter prompts or more tokens")
    return found


def _example(row: dict[str, str], tokenizer, max_length: int) -> dict[str, list[int]]:
    """Encoded in one piece; the completion begins where the prompt alone, perhaps with an end mark, differs."""
    prompt, ids = (encode(tokenizer, text, True) for text in (row["prompt"], row["prompt"] + row["completion"]))
    begin = next((i for i, (one, other) in enumerate(zip(prompt, ids, strict=False)) if one != other), len(prompt))
    ids += [tokenizer.eos_token_id] * (ids[-1:] != [tokenizer.eos_token_id])
    return {"input_ids": ids[:max_length], "labels": ([NO_LABEL] * begin + ids[begin:])[:max_length]}


def _continued(documents: Iterator[str]) -> Iterator[dict[str, str]]:
    for document in documents:
        first, *after = re.split(r"(?<=[.!?])(\s)", document, maxsplit=1)
        if after and after[1].strip():
            yield {"prompt": first + after[0], "completion": after[1].strip()}


def _alpaca_row(row: dict) -> dict[str, str]:
    """Alpaca's prompt template (Taori et al. 2023)."""
    given = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
    return {"prompt": f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n", "completion": row["output"]}
