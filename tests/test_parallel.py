"""Two processes with half the text each find what one finds with all of it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import small_model

from gqalib import InputError, importance, parallel, pruning, refit, scoring
from gqalib.__main__ import main
from gqalib.corpora import evaluation_windows
from gqalib.models import REPOSITORY, load_tokenizer, save_model

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TEXT = " ".join(f"w{2 + (i * i + 7 * i) % 59}" for i in range(6000))


@pytest.fixture
def arguments(tokenizer, tmp_path):
    """`gqalib scores` for a small model and text in a folder."""
    save_model(small_model(), tokenizer, tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT[i : i + 400] for i in range(0, len(TEXT), 400)))
    values = {
        "model": tmp_path / "model", "corpus": f"file:{tmp_path / 'text.txt'}", "device": "cpu",
    }  # fmt: skip
    pairs = [f"{name}={value}" for name, value in values.items()]
    pairs += ["calibration.num_examples=7", "calibration.length=16", "removal.num_examples=5", "removal.length=16"]
    pairs += ["frontier.calibration.num_examples=6", "frontier.calibration.length=32"]
    return ["scores", *(part for pair in pairs for part in ("--set", pair))]


def under_torchrun(arguments, folder, processes=2):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "-m",
        "gqalib",
        *arguments,
    ]
    return subprocess.run(command, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


def test_two_processes_find_the_same(arguments, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert main([*arguments, "--out", str(one)]) == 0
    finished = under_torchrun([*arguments, "--out", str(two)], tmp_path)
    assert finished.returncode == 0, finished.stderr[-2000:]
    expected, found = scoring.read(one).tensors(), scoring.read(two).tensors()
    assert len(expected) == 1 + 4 * 3 and expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name
    assert not [path for path in Path(tmp_path).glob(".*.tmp")]


def test_too_few_windows_for_the_processes(windows, monkeypatch):
    monkeypatch.setattr(parallel, "rank_and_size", lambda: (0, 2))
    with pytest.raises(InputError, match="1 windows are too few for 2 processes: start at most 1"):
        scoring.scores_of(small_model(), windows, windows[:1], windows)
    assert torch.equal(parallel.share(windows), windows[::2])


def test_scores_that_cannot_be(arguments, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "missing" / "scores.safetensors")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder: give a file" in capsys.readouterr().err
    (tmp_path / "other.safetensors").write_text("nothing")
    with pytest.raises(InputError, match="holds no scores"):
        scoring.read(tmp_path / "other.safetensors")


def test_the_file_holds_what_the_library_finds(arguments, tmp_path, windows):
    assert main([*arguments, "--out", str(tmp_path / "scores.safetensors")]) == 0
    found, model = scoring.read(tmp_path / "scores.safetensors"), small_model()
    tokenizer = load_tokenizer(tmp_path / "model")
    text = evaluation_windows(f"file:{tmp_path / 'text.txt'}", "train", tokenizer, 16, 7 * 16, 0)
    expected = importance.taylor_scores(model, text)
    assert len(text) == 7 and all(torch.equal(a, b) for i in range(3) for a, b in zip(found.taylor[i], expected[i], strict=True))
    kept = importance.largest(expected[1][1], 14)
    dense = model.model.layers[1].mlp.up_proj.weight.detach()
    plan = pruning.Plan([0.0, 0.4, 0.0], [0] * 3, [0, 10, 0])
    bare = refit.Ingredients(input_refit=False, newton_rounds=0)
    refit.sweep(model, plan, windows, bare, scores=found.taylor, covariances=found.covariances)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, dense[kept])


def test_what_accelerate_may_be_told(monkeypatch):
    monkeypatch.setattr(parallel, "rank_and_size", lambda: (0, 2))
    told = SimpleNamespace(is_fsdp2=False, distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr(parallel, "Accelerator", lambda **_: told)
    with pytest.raises(InputError, match="accelerate is set to DEEPSPEED: use FSDP with fsdp_version 2, or --multi_gpu"):
        parallel.in_shards(small_model(), [])


def test_more_processes_than_cards(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "99")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: (_ for _ in ()).throw(RuntimeError("no ordinal\nmore")))
    says = r"the process has no card cuda:99 \(no ordinal\): start as many processes as there are cards"
    with pytest.raises(InputError, match=says), parallel.processes("cuda"):
        pass
