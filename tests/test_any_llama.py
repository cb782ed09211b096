"""The whole series on a model that nobody in this project made (2:1 groups, 5 layers): one command, seven notebooks."""

from pathlib import Path

import pytest

from gqalib.model.load import REPOSITORY
from gqalib.run.cli import main
from gqalib.run.notebook import read_record

SHARED = REPOSITORY.parent / "shared" / "data"


@pytest.mark.slow  # ten notebooks; the committed ones are run at a small scale by nbval
@pytest.mark.skipif(not (SHARED / "stories260K").exists(), reason="development data is not part of the product")
def test_series_on_stories260k(tmp_path: Path, capsys):
    corpus = SHARED / "text" / "tinystories-train.txt"
    settings = [
        "recovery.num_examples=64",
        "cost.min_run_s=0.05",
        "evaluation.num_tokens=8192",
        "distillation.num_tokens=8192",
    ]
    settings += ["budgets.compare=2048", "budgets.curve=[2048, 4096]", "search.tokens=4096", "search.candidates=4"]
    arguments = [
        x for pair in [f"model={SHARED / 'stories260K'}", f"corpus=file:{corpus}", *settings] for x in ("--set", pair)
    ]
    status = main(["run", "--run-dir", str(tmp_path), *arguments])
    assert status == 0, capsys.readouterr()
    record = read_record(tmp_path / "07_cost_analysis.json")
    perplexity = {row["model"]: row["perplexity"] for row in record["tables"]["results"]}
    assert 3 < perplexity["dense"] < 6  # 4.9 on 65,536 tokens in windows of 128
    assert perplexity["dense"] < perplexity["v3"] < perplexity["v2"]
    assert "07_cost_analysis" in capsys.readouterr().out


@pytest.mark.skipif(not (SHARED / "stories260K").exists(), reason="development data is not part of the product")
def test_a_corpus_too_short_for_one_window(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("Once upon a time.\n\n" * 10)
    arguments = ["--set", f"model={SHARED / 'stories260K'}", "--set", f"corpus=file:{tmp_path / 'short.txt'}"]
    assert main(["run", "--run-dir", str(tmp_path / "run"), *arguments]) == 2
    assert "tokens, too few for one window of 128: give a longer text" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
