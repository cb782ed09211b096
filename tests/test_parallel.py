"""Two processes with half the text each find what one finds with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_model

from gqalib import InputError, scoring
from gqalib.__main__ import main
from gqalib.models import REPOSITORY, save_model

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TEXT = " ".join(f"w{2 + (i * i + 7 * i) % 59}" for i in range(6000))


@pytest.fixture
def arguments(tokenizer, tmp_path):
    """`gqalib scores` for a small model and text in a folder."""
    save_model(small_model(), tokenizer, tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT[i : i + 400] for i in range(0, len(TEXT), 400)))
    values = {
        "model": tmp_path / "model", "corpus": f"file:{tmp_path / 'text.txt'}", "device": "cpu",
        "calibration": None, "removal": None,
    }  # fmt: skip
    pairs = [f"{name}={value}" for name, value in values.items() if value is not None]
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
    return subprocess.run(command, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, timeout=300)


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


def test_too_few_windows_for_the_processes(arguments, tmp_path):
    out = tmp_path / "scores.safetensors"
    finished = under_torchrun([*arguments, "--set", "removal.num_examples=1", "--out", str(out)], tmp_path)
    assert finished.returncode != 0 and "1 windows are too few for 2 processes: start at most 1" in finished.stderr
    assert not out.exists()


def test_scores_that_cannot_be(arguments, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "missing" / "scores.safetensors")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "other.safetensors").write_text("nothing")
    with pytest.raises(InputError, match="holds no scores"):
        scoring.read(tmp_path / "other.safetensors")


def test_scores_are_what_a_sweep_takes(arguments, tmp_path, windows, clone):
    from gqalib import importance, pruning, refit

    assert main([*arguments, "--out", str(tmp_path / "scores.safetensors")]) == 0
    found, model = scoring.read(tmp_path / "scores.safetensors"), small_model()
    assert torch.equal(found.removal, found.removal.double()) and len(found.taylor) == len(found.covariances) == 3
    before = clone(model)
    refit.sweep(model, pruning.uniform_plan(model, 0.3), windows, covariances=found.covariances)
    refit.sweep(before, pruning.uniform_plan(before, 0.3), windows, scores=found.taylor)
    assert importance.largest(found.taylor[0][1], 3) == sorted(found.taylor[0][1].topk(3).indices.tolist())
