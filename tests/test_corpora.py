import itertools
import json

import pytest
import torch

from gqalib import InputError
from gqalib.model import load
from gqalib.run import corpora, instructions, python_docs


class Words:
    """A tokenizer of one token per word, the word's length; `begin` is the mark that it puts before a text."""

    eos_token_id = 0

    def __init__(self, *begin):
        self.begin = list(begin)

    def __call__(self, text, add_special_tokens, **kwargs):
        return {"input_ids": self.begin * add_special_tokens + [1 + len(word) for word in text.split()]}


def test_docstrings_with_their_signatures():
    source = (
        '"""Top."""\nclass A:\n    """About A."""\n    def f(self, x, *, y=1):\n        """Do f.\n\n        More.\n'
        '        """\ndef g(): pass\n'
    )
    assert list(python_docs.docstrings(source)) == [
        ("", "Top."),
        ("class A", "About A."),
        ("A.f(self, x, y)", "Do f.\n\nMore."),
    ]


def test_splits_are_fixed_disjoint_and_cover_everything():
    names = [name for name, _ in python_docs.source_files()]
    assert len(names) > 2000 and len(set(names)) == len(names)
    splits = {split: {n for n in names if python_docs.split_of(n) == split} for split in corpora.SPLITS}
    assert sum(map(len, splits.values())) == len(names)
    assert 0.02 < len(splits["test"]) / len(names) < 0.06
    known = [python_docs.split_of(f"python/{name}.py") for name in ("ast", "calendar", "token")]
    assert known == ["train", "validation", "test"]  # for good


def test_no_test_paragraph_is_in_the_training_text(monkeypatch):
    files = python_docs.source_files()
    held = [f for f in files if python_docs.split_of(f[0]) != "train"][:60]
    trained = [f for f in files if python_docs.split_of(f[0]) == "train"][:400]
    monkeypatch.setattr(python_docs, "source_files", lambda: tuple(held + trained))
    test = {p.strip() for d in python_docs.python_docs("test") for p in d.split("\n\n") if len(p) > 60}
    train = [p.strip() for d in python_docs.python_docs("train") for p in d.split("\n\n")]
    taught = [p.strip() for row in python_docs.described("train") for p in row["completion"].split("\n\n")]
    assert len(test) > 50 and len(train) > 500 and len(taught) > 500
    assert not test.intersection(train) and not test.intersection(taught)
    docstrings = [
        p
        for d in python_docs.python_docs("train")
        if d not in set(python_docs.language_reference())
        for p in d.split("\n\n")
    ]
    assert len([p for p in docstrings if len(p) > 200]) == len({p for p in docstrings if len(p) > 200})


def test_windows_do_not_overlap_and_drop_the_tail():
    assert corpora.windows(torch.arange(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(InputError, match="the text has 3 tokens, too few for one window of 4"):
        corpora.windows(torch.arange(3), 4)


def test_samples_are_spread():
    rows = torch.arange(20).view(10, 2)
    assert corpora.spread(rows, 6)[:, 0].tolist() == [0, 6, 12]
    assert torch.equal(corpora.spread(rows, 999), rows) and corpora.spread(rows, 1).tolist() == [[0, 1]]


def test_as_many_samples_as_a_cut_may_ask_for_differ():
    rows = torch.arange(2 * 32 * 4).view(-1, 2)
    samples = [tuple(corpora.spread(rows, 8, sample)[:, 0].tolist()) for sample in range(22)]
    assert len(set(samples)) == 22


def test_evaluation_windows_come_from_all_over_the_text(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>".join("x" * (i + 1) for i in range(400)))
    windows = corpora.evaluation_windows(f"file:{path}", "train", Words(99), 4, 40)
    lengths = windows[:, 1]  # a story is its mark and one word, as long as the story's number
    assert windows.shape == (10, 4) and lengths[0] == 2 and (lengths.diff() > 20).all() and lengths[-1] > 250


def test_token_ids_join_documents_and_stop():
    assert corpora.token_ids(iter(["a bb", "ccc"]), Words()).tolist() == [2, 3, 0, 4, 0]
    assert corpora.token_ids(iter(["a bb"] * 9), Words(), 4).tolist() == [2, 3, 0, 2]


def test_documents_carry_the_tokenizers_own_marks():
    assert corpora.token_ids(iter(["a bb", "ccc"]), Words(99)).tolist() == [99, 2, 3, 99, 4]


def test_running_text_is_encoded_in_one_piece(tmp_path):
    assert corpora.running_text_ids(iter(["a bb", "ccc"]), Words(99), 10).tolist() == [99, 2, 3, 4]
    assert corpora.running_text_ids(iter(["a bb"] * 99), Words(99), 4).tolist() == [99, 2, 3, 2]
    paragraphs, stories = tmp_path / "a.txt", tmp_path / "b.txt"
    paragraphs.write_text("one\n\ntwo")
    stories.write_text("one<|endoftext|>two")
    names = ("wikitext2", f"file:{paragraphs}", f"file:{stories}", "python-docs", "c4")
    assert [corpora.is_running_text(name, "test") for name in names] == [True, True, False, False, False]


@pytest.mark.parametrize(("word", "most"), [("four", 6), ("a word of many letters".replace(" ", ""), 24)])
def test_no_more_of_a_running_text_is_encoded_than_its_tokens_need(word, most, monkeypatch):
    encoded, encode = [], corpora.encode
    monkeypatch.setattr(corpora, "encode", lambda _, text, **how: encoded.append(len(text)) or encode(_, text, **how))
    ids = corpora.running_text_ids(iter([f"{word} {word}"] * 9999), Words(99), 1000)
    assert ids.tolist() == [99] + [1 + len(word)] * 999 and max(encoded) < 1.3 * most * 1000


def test_documents_of_c4_stand_for_themselves(monkeypatch):
    rows = iter([{"text": f"{'x' * i} end"} for i in range(1, 99)])
    monkeypatch.setattr("datasets.load_dataset", lambda *where, **how: rows)
    assert corpora.training_windows("c4", Words(99), 3, 6).tolist() == [[99, 2, 4], [99, 3, 4]]
    assert next(rows)["text"] == "xxx end"  # no more of them was read


def test_c4_has_no_text_of_the_validation_split_in_the_test_split(monkeypatch):
    rows = [{"text": f"{'x' * i} end"} for i in range(1, 99)]
    monkeypatch.setattr("datasets.load_dataset", lambda *where, **how: iter(rows))
    validation, test = (list(corpora.read_corpus("c4", split)) for split in ("validation", "test"))
    assert not set(validation).intersection(test) and len(validation) + len(test) == len(rows)


def test_file_corpus_splits_in_order(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>".join(f"story {i}" for i in range(10)))
    parts = {split: list(corpora.read_corpus(f"file:{path}", split)) for split in corpora.SPLITS}
    assert parts["train"] == [f"story {i}" for i in range(8)]
    assert parts["validation"] == ["story 8"] and parts["test"] == ["story 9"]


@pytest.mark.parametrize(
    ("suffix", "dump"), [("json", json.dumps), ("jsonl", lambda rows: "\n".join(map(json.dumps, rows)))]
)
def test_json_corpora(tmp_path, suffix, dump):
    path = tmp_path / f"rows.{suffix}"
    path.write_text(dump([{"text": f"t{i}"} for i in range(10)]))
    assert list(corpora.read_corpus(f"file:{path}", "test")) == ["t9"]


def test_alpaca_rows(tmp_path):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([{"instruction": "Add.", "input": "1 1", "output": "2"}] * 10))
    row = instructions.read_instructions(f"file:{path}", "train", "", 1)[0]
    assert row == {"prompt": "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n", "completion": "2"}


def test_instructions_from_the_corpus_itself(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("<|endoftext|>".join(["One day. Tom ran away.", "No end"] * 10))
    rows = instructions.read_instructions("corpus", "train", f"file:{path}")
    assert rows[0] == {"prompt": "One day. ", "completion": "Tom ran away."} and len(rows) == 8


@pytest.mark.parametrize(
    ("corpus", "split", "says"),
    [
        ("nonsense", "test", "unknown corpus"),
        ("python-docs", "tset", "unknown split"),
        ("file:/no/where.txt", "test", "does not exist"),
    ],
)
def test_bad_corpora(corpus, split, says):
    with pytest.raises(InputError, match=says):
        corpora.read_corpus(corpus, split)


def test_bad_files(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n ")
    (tmp_path / "torn.json").write_text('[{"text": ')
    (tmp_path / "other.jsonl").write_text('{"body": "x"}')
    for name, says in (("empty.txt", "no text"), ("torn.json", "cannot be read"), ("other.jsonl", "fields text or")):
        with pytest.raises(InputError, match=says):
            corpora.read_corpus(f"file:{tmp_path / name}", "train")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.txt", "caf\xe9".encode("latin-1"), r"t.txt cannot be read \(.* byte 0xe9 .*\): give a text file in UTF-8"),
        ("t.txt", "word".encode("utf-16"), r"t.txt cannot be read \(.*\): give a text file in UTF-8"),
        ("t.json", '[{"text": "\xe9"}]'.encode("latin-1"), r"t.json cannot be read \(.*\): give a text file in UTF-8"),
        ("t.jsonl", b'{"text": null}', r"t.jsonl must hold rows with text in the fields text or instruction and"),
        ("t.json", b'{"text": "a"}', r"t.json must hold rows"),
        ("t.json", b"[" * 100_000, r"t.json cannot be read as .json rows \(.*recursion.*\): correct it"),
    ],
)
def test_a_text_that_cannot_be_read_is_one_sentence(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    for read in (corpora.check_corpus, lambda corpus: corpora.training_windows(corpus, Words(), 4, 40)):
        with pytest.raises(InputError, match=says) as caught:
            read(f"file:{tmp_path / name}")
        assert "\n" not in str(caught.value)


def test_instructions_need_instructions(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}')
    with pytest.raises(InputError, match="must hold rows with text in the fields instruction and output"):
        instructions.read_instructions(f"file:{tmp_path / 't.jsonl'}", "train", "")


def test_a_missing_text_is_one_sentence():
    with pytest.raises(InputError, match="/no/where.txt .*: give"):
        corpora.training_windows("file:/no/where.txt", Words(), 4, 40)


def test_marks_and_line_ends_of_other_systems(tmp_path):
    (tmp_path / "t.jsonl").write_bytes('\ufeff{"text": "a\u2028b"}\r\n \r\n{"text": "c"}'.encode())
    assert list(corpora.read_corpus(f"file:{tmp_path / 't.jsonl'}", "train")) == ["a\u2028b"]


def test_a_hub_that_breaks_off_is_one_sentence(monkeypatch):
    def rows():
        yield {"text": "a", "instruction": "b", "output": "c"}
        raise RuntimeError("no route\nmore")

    monkeypatch.setattr("datasets.load_dataset", lambda *where, **how: rows())
    says = r" cannot be loaded \(no route\): connect, or give file:PATH$"
    with pytest.raises(InputError, match="corpus allenai/c4" + says):
        list(corpora.read_corpus("c4", "train"))
    with pytest.raises(InputError, match="instructions yahma/alpaca-cleaned" + says):
        instructions.read_instructions("alpaca-cleaned", "train", "")


def test_samples_share_no_row():
    rows = torch.arange(64).view(32, 2)
    samples = [corpora.spread(rows, 6, sample)[:, 0].tolist() for sample in range(5)]
    assert len({row for sample in samples for row in sample}) == 15
    with pytest.raises(InputError, match="too few for sample 5"):
        corpora.spread(rows, 6, 5)


def test_source_is_split_like_its_docstrings():
    first = next(corpora.read_corpus("python-source", "test"))
    assert "import" in first or "def " in first or '"""' in first


def test_random_tokens_are_words_of_every_shape_and_the_same_each_time():
    """Cost-only runs take the same path: words through the tokenizer, windows, instructions."""
    first = list(itertools.islice(corpora.read_corpus("random-tokens", "train"), 40))
    assert first == list(itertools.islice(corpora.read_corpus("random-tokens", "train"), 40))
    assert len(set(first)) == 40 and not set(first) & set(
        itertools.islice(corpora.read_corpus("random-tokens", "test"), 40)
    )
    tokenizer = load.load_tokenizer("shape:tiny")
    windows = corpora.evaluation_windows("random-tokens", "test", tokenizer, 64, 640)
    counts = windows.flatten().bincount(minlength=512)
    assert windows.shape == (10, 64) and windows.max() < 512 and (counts[:2] <= 10).all() and (counts > 0).sum() > 300
    (row,) = instructions.read_instructions("corpus", "train", "random-tokens", 1)
    assert (
        len(tokenizer(row["prompt"])["input_ids"]) == 8
        and row["prompt"].strip().endswith(".")
        and len(row["completion"].split()) == 504
    )
