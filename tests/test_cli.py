"""The command line: help and refusals come at once."""

import os
import resource
import subprocess
import sys

import pytest

from gqalib.model.load import REPOSITORY


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--help"], 0, "distill"),
        (["run", "--preset", "huge"], 2, "error: unknown preset 'huge': use one of"),
        (["run", "--set", "pruning.mean_rat=0.3"], 2, "error: unknown parameter 'pruning.mean_rat': did you mean"),
        (["run", "--set", "model=/nowhere"], 2, "error: model folder /nowhere does not exist: give"),
        (["run", "--set", "corpus=novel"], 2, "error: unknown corpus 'novel': use"),
        (["recover", "--model", "/nowhere", "--out", "x"], 2, "error: model folder /nowhere does not exist: give"),
        (["sweep", "nowhere.yaml"], 2, "error: grid nowhere.yaml cannot be read (No such file or directory): give"),
    ],
)
def test_answers_that_need_no_torch_come_at_once(arguments, status, says, tmp_path):
    """In processor time, which others on the machine do not change: torch alone takes as long as the limit."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "gqalib", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert answer.returncode == status and says in answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr and not list(tmp_path.iterdir())
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
