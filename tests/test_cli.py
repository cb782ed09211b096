"""The command line: help and refusals come at once; any Llama is pruned and evaluated from folder to folder."""

import errno
import json
import os
import random
import subprocess
import sys

import pytest
from conftest import small_model

import gqalib
from gqalib.measure import frontier
from gqalib.model import load, shapes
from gqalib.model.load import REPOSITORY, load_model, save_model
from gqalib.run import front, presets
from gqalib.run.cli import main
from gqalib.run.corpora import END_OF_DOCUMENT

GRID = "grid: "  # what follows is written into a file, and its name given

ANSWERS = [
    (["--help"], 0, "distill"),
    (["run", "--preset", "huge"], 2, "error: unknown preset 'huge': use one of"),
    (["run", "--set", "pruning.mean_rat=0.3"], 2, "error: unknown parameter 'pruning.mean_rat': did you mean"),
    (["run", "--set", "model=" + 300 * "x"], 2, "xxx: give a shorter name"),
    (["evaluate", "--model", 300 * "x" + ".gguf"], 2, ".gguf: give a shorter name"),
    (["run", "--set", "model=/nowhere"], 2, "error: model folder /nowhere does not exist: give"),
    (["run", "--set", "pruning.mean_rate=1.5"], 2, "error: pruning.mean_rate = 1.5"),
    (["run", "--set", "corpus=novel"], 2, "error: unknown corpus 'novel': use"),
    (["run", "--set", "corpus=file:/no/such.txt"], 2, "error: corpus file /no/such.txt does not exist"),
    (["run", "--set", "frontier.other_corpus=novel"], 2, "error: unknown corpus 'novel': use"),
    (["run", "--set", "instructions=novel"], 2, "error: unknown instructions 'novel': use python-docs, alpaca-cleaned"),
    (["prune", "--model", "x/y", "--out", "x", "--remove", "["], 2, "error: [ cannot be read"),
    (["prune", "--model", "x/y", "--out", "x", "--remove", "1.5"], 2, "error: remove = 1.5 cannot be: it should be"),
    (["prune", "--model", "x/y", "--out", "x", "--method", "flap"], 2, "error: unknown method 'flap': did you mean"),
    (
        ["export", "--model", "x/y", "--out", "x.gguf", "--type", "q6"],
        2,
        "error: unknown type 'q6': use one of f32, f16",
    ),
    (["export", "--model", "x/y", "--out", "x"], 2, "x is no .gguf file: give --out a name that ends in .gguf"),
    (["export", "--model", "x/y", "--out", "/nowhere/x.gguf"], 2, "error: folder /nowhere does not exist: make it"),
    (["export", "--model", "/nowhere", "--out", "x.gguf"], 2, "error: model folder /nowhere does not exist: give"),
    (["recover", "--model", "/nowhere", "--out", "x"], 2, "error: model folder /nowhere does not exist: give"),
    (["grid", "nowhere.yaml"], 2, "error: grid nowhere.yaml cannot be read (No such file or directory): give"),
    (["grid", GRID + "seeds: 1"], 2, "error: seeds = 1 cannot be: it should be a list"),
    (["grid", GRID + "preset: huge"], 2, "error: unknown preset 'huge': use one of"),
    (["grid", GRID + "overrides: {pruning.alpha: [-1]}"], 2, "error: pruning.alpha = -1 cannot be: it should be"),
    (["grid", GRID + "notebooks: [7]"], 2, "error: notebook 07_cost_analysis reads 01_baseline: add"),
    (["run", "--only", "42"], 2, "error: --only 42 names no notebook: use one of 01, 02"),
    (["run", "--only", "00"], 2, "error: --only 00 names no notebook"),
    (["run", "--from", "42"], 2, "error: --from 42 names no notebook: use one of 01, 02"),
    (["run", "--seed", "-1"], 2, "error: seed = -1 cannot be: give one from 0 to 4294967295"),
    (["recover", "--model", "x/y", "--out", "x", "--seed", "-1"], 2, "error: seed = -1 cannot be: give one from 0"),
    (["at-size", "--out", "x", "--steps", "speed,sped"], 2, "error: unknown step 'sped': did you mean speed"),
    (["at-size", "--out", "x", "--layers", "0"], 2, "error: layers = 0 cannot be: give a positive number"),
    (["evaluate", "--model", "x/y", "--tokens", "0"], 2, "error: tokens = 0 cannot be: give a positive number"),
    (["evaluate", "--model", "x/y", "--limit", "0"], 2, "error: limit = 0 cannot be: give a positive number"),
]
IN_A_CHILD = """
import contextlib, io, json, runpy, sys, time
before = 0
for arguments in json.loads(sys.stdin.read()):
    said, sys.argv = io.StringIO(), ["gqalib", *arguments]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_module("gqalib", run_name="__main__")
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, said.getvalue(), time.process_time() - before]))
    before = time.process_time()
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Of `python -m gqalib`, one after the other in one process: status, what is said, seconds (of the first with the
    imports); and what is written."""
    place, grids = tmp_path_factory.mktemp("nowhere"), tmp_path_factory.mktemp("grids")
    asked = json.dumps([[_given(argument, grids) for argument in arguments] for arguments, *_ in ANSWERS])
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "GQALIB_RUNS": str(place)}
    how = {"cwd": place, "env": env, "capture_output": True, "text": True}
    child = subprocess.run([sys.executable, "-c", IN_A_CHILD], input=asked, check=True, **how)
    return [json.loads(line) for line in child.stdout.splitlines()], list(place.iterdir())


def _given(argument, folder):
    if not argument.startswith(GRID):
        return argument
    (path := folder / f"{len(list(folder.iterdir()))}.yaml").write_text(argument.removeprefix(GRID))
    return str(path)


@pytest.mark.parametrize("number", range(len(ANSWERS)), ids=[" ".join(arguments) for arguments, *_ in ANSWERS])
def test_answers_that_need_no_torch_come_at_once(number, answers):
    """In processor time, which others on the machine do not change: torch alone takes as long as the limit."""
    (status, said, seconds), written = answers[0][number], answers[1]
    assert [status, ANSWERS[number][2] in said] == [ANSWERS[number][1], True]
    assert "Traceback" not in said and not written and seconds < 2
    assert status == 0 or said.count("\n") == 1


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A small random model, and in `text.txt` something to read."""
    save_model(small_model(), tokenizer, tmp_path / "dense")
    draw = random.Random(0)
    documents = [" ".join(f"w{draw.randrange(2, 60)}" for _ in range(40)) for _ in range(300)]
    (tmp_path / "text.txt").write_text(END_OF_DOCUMENT.join(documents))
    return tmp_path


def command(name, folder, *options):
    where = ["--model", str(folder / "dense"), "--corpus", f"file:{folder / 'text.txt'}", "--device", "cpu"]
    return main([name, *where, *options])


def test_the_methods_are_the_frontiers():
    assert presets.PEERS == tuple(list(frontier.METHODS)[:12])
    assert front.NAMES.keys() == {"refit", "context", "founding", *presets.PEERS}
    assert set(front.NAMES.values()) <= frontier.METHODS.keys()


SMALL = ["--examples", "8", "--length", "32"]


@pytest.mark.parametrize(
    "options",
    [
        ["--remove", "0.3"],
        ["--remove", "0.3", "--method", "founding"],
        ["--remove", "0.3", "--method", "context"],
        ["--remove", "0.3", "--method", "FLAP", "--seed", "1"],
        ["--remove", "0.3", "--multiple", "4"],
        ["--kept", "0.8"],
        ["--perplexity", "1.2"],
    ],
    ids=" ".join,
)
def test_prune_and_evaluate_from_folder_to_folder(options, folder, capsys):
    (folder / "out").mkdir()  # an empty one will do
    assert command("prune", folder, "--out", str(folder / "out"), *SMALL, *options) == 0
    said = capsys.readouterr().out
    assert command("evaluate", folder, "--against", str(folder / "out"), "--tokens", "640") == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    dense, pruned = (load_model(str(folder / name), device="cpu") for name in ("dense", "out"))
    counts, left = (shapes.count_parameters(model) for model in (dense, pruned))
    assert shown["parameters"] == f"{counts['total']:,}" and shown["backbone"] == f"{counts['backbone']:,}"
    assert {
        "bytes",
        "perplexity_64",
        "ratio_64",
        "error_64",
    } <= shown.keys()  # both windows are longer than the model's
    if options[0] == "--remove":
        assert 1 - left["backbone"] / counts["backbone"] == pytest.approx(0.3, abs=0.08)
    if options[0] == "--kept":
        assert left["total"] == pytest.approx(0.8 * counts["total"], rel=0.02)
    assert (
        left["total"] < counts["total"] and f"{100 * left['total'] / counts['total']:.1f} % of the parameters" in said
    )
    assert {path.name for path in folder.iterdir()} == {"dense", "out", "text.txt"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "one target: give either"),
        (["--remove", "0.3", "--kept", "0.8"], "one target: give either"),
        (["--remove", "1.5"], "remove = 1.5 cannot be: it should be less than 1"),
        (["--remove", "0.999"], "parameters cannot go"),
        (["--perplexity", "0.9"], "perplexity = 0.9 cannot be: it should be greater than 1"),
        (["--perplexity", "1.1", "--method", "FLAP"], "FLAP cannot look for a perplexity of 1.1: give method refit"),
        (["--remove", "0.3", "--method", "flap"], "unknown method 'flap': did you mean"),
        (["--remove", "0.3", "--method", "ShortGPT", "--multiple", "4"], "ShortGPT cannot keep a multiple of 4"),
        (["--remove", "0.3", "--length", "0"], "length = 0 cannot be: it should be greater than 1"),
        (["--remove", "0.3", "--seed", "-1"], "seed = -1 cannot be"),
        (["--remove", "0.3", "--corpus", "novel"], "unknown corpus 'novel'"),
    ],
)
def test_refusals_leave_nothing(options, says, folder, capsys):
    assert command("prune", folder, "--out", str(folder / "out"), *SMALL, *options) == 2
    assert says in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"dense", "text.txt"}


def test_a_full_disk_is_a_sentence_and_another_fault_is_none(monkeypatch, capsys):
    def fail(number):
        def failing(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("gqalib.run.cli.check_corpus", failing)
        return main(["evaluate", "--model", "data/reference_model"])

    assert fail(errno.ENOSPC) == 2
    assert "error: No space left on device: what was to be written: make room" in capsys.readouterr().err
    with pytest.raises(OSError, match="Input/output error"):
        fail(errno.EIO)


def test_what_is_there_stays(folder, capsys):
    before = (folder / "dense" / "config.json").read_bytes()
    assert command("prune", folder, "--out", str(folder / "dense"), "--remove", "0.3") == 2
    assert "exists: give another --out" in capsys.readouterr().err
    assert (folder / "dense" / "config.json").read_bytes() == before


def test_a_save_that_fails_leaves_nothing(folder, monkeypatch):
    def fail(model, tokenizer, place):
        place.mkdir()
        (place / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "save_model", fail)
    assert command("prune", folder, "--out", str(folder / "out"), *SMALL, "--remove", "0.3") == 130
    assert {path.name for path in folder.iterdir()} == {"dense", "text.txt"}


def test_other_vocabularies_are_not_compared(folder, tokenizer, capsys):
    save_model(small_model(vocab_size=70), tokenizer, folder / "other")
    assert command("evaluate", folder, "--against", str(folder / "other")) == 2
    assert "vocabularies of 61 and 70 tokens" in capsys.readouterr().err


def test_three_lines_of_python(folder, tokenizer):
    """Three lines do the main job; the room `gqalib.prune` stays a room."""
    model, text = gqalib.load_model(str(folder / "dense"), device="cpu"), f"file:{folder / 'text.txt'}"
    gqalib.prune_model(model, tokenizer, remove=0.3, corpus=text, examples=8, length=32)
    gqalib.save_model(model, tokenizer, folder / "smaller")
    found = gqalib.evaluate(model, tokenizer, against=model, corpus=text, tokens=640)
    assert (found["ratio_64"], found["error_64"]) == (1, 0)
    with pytest.raises(gqalib.InputError, match="unknown parameter 'removed': did you mean remove"):
        gqalib.prune_model(model, tokenizer, removed=0.3)
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        gqalib.prunes


@pytest.mark.parametrize(("method", "needs"), [
    ("refit", {"gradient covariances", "cost table", "sweep"}), ("founding", {"layer removal", "sequential Taylor"}),
    ("context", {"gradient covariances", "cost table", "sweep", "context"}),
    ("LLM-Pruner", {"all gradients", "gradient covariances", "cost table", "sweep"}),
])  # fmt: skip
def test_pruning_asks_for_the_memory_of_its_method(method, needs, tokenizer, folder, monkeypatch):
    asked, expected = [], front.memory.expected
    monkeypatch.setattr(front.memory, "expected", lambda names, *of: asked.extend(names) or expected(names, *of))
    stage, terms = front.memory.stage, []
    monkeypatch.setattr(front.memory, "stage", lambda name, of, *more: terms.append(of) or stage(name, of, *more))
    model, text = gqalib.load_model(str(folder / "dense"), device="cpu"), f"file:{folder / 'text.txt'}"
    gqalib.prune_model(model, tokenizer, remove=0.3, corpus=text, examples=8, length=32, method=method)
    assert {*asked} == needs and ("copies" in terms[0]) is (method == "context")


def test_a_terminated_command_leaves_nothing_half_written(tmp_path):
    script = f"""
import pathlib, runpy
from gqalib.run import cli, resume

def main():
    with resume.replacing(pathlib.Path({str(tmp_path / "out")!r})) as file:
        file.write_text("half")
        print(flush=True)
        input()

cli.main = main
runpy.run_module("gqalib", run_name="__main__")"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes, cwd=REPOSITORY) as command:
        command.stdout.readline()
        assert len(list(tmp_path.iterdir())) == 1
        command.terminate()
        assert command.wait(10) == 143 and not list(tmp_path.iterdir())
