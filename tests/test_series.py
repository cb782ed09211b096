"""The runner on small notebooks of its own: progress, resume, kill, torn records, bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from functools import partial
from unittest import mock

import nbformat
import pytest
from conftest import without_kernels

from gqalib import InputError
from gqalib.prune import refit
from gqalib.run import publish, resume, series
from gqalib.run.checks import waits_for
from gqalib.run.cli import main
from gqalib.run.notebook import (
    HELD, Notebook, default_run_dir, fitting_record, locked, machine, progress_dir, read_record,
)  # fmt: skip
from gqalib.run.presets import load_preset
from gqalib.run.resume import NOT_KEPT

PARAMETERS = 'preset = "tiny"\noverrides = {}\nrun_dir = ""\nseed = 0'


def write_notebook(folder, name, *code, records=True):
    """A notebook that keeps a record, or (without `records`) has these cells alone."""
    start = f"from gqalib.run.notebook import Notebook\nnb = Notebook({name!r}, preset, overrides, run_dir, seed)"
    sources = [PARAMETERS, *((start, *code, "nb.finish()") if records else code)]
    empty = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    cells = [{**empty, "source": source} for source in sources]
    cells[0]["metadata"] = {"tags": ["parameters"]}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    whole = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 4}
    (folder / f"{name}.ipynb").write_text(json.dumps(whole))


def write_series(folder):
    folder.mkdir()
    write_notebook(folder, "00_never", "raise SystemError")
    write_notebook(folder, "01_first", 'nb.metric("x", 1.5, "u")')
    write_notebook(
        folder, "02_second", 'y = nb.upstream("01_first")["metrics"]["x"]["value"] * 2', 'nb.metric("y", y, "u")'
    )
    return folder


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, model_folder):
    """Run once, the first notebook in a kernel."""
    folder = tmp_path_factory.mktemp("finished")
    how = {"overrides": {"model": model_folder}, "run_dir": folder / "run"}
    how["notebooks"] = write_series(folder / "notebooks")
    series.Series(**how, only="01").run()
    with without_kernels():
        series.Series(**how).run()
    return folder / "run"


@pytest.fixture
def notebooks(tmp_path):
    return write_series(tmp_path / "notebooks")


@pytest.fixture
def job(tmp_path, notebooks, model_folder):
    def make(**changes):
        return series.Series(
            **{"overrides": {"model": model_folder}, "run_dir": tmp_path / "run", "notebooks": notebooks, **changes}
        )

    return make


@pytest.fixture
def finished(job, finished_run):
    """A job whose notebooks have all been run."""
    shutil.copytree(finished_run, job().run_dir)
    return job


def states(job):
    return [job.is_finished(path) for path in job.paths]


def test_runs_resumes_and_reruns_what_changed(finished, notebooks, capsys):
    assert read_record(finished().run_dir / "02_second.json")["metrics"]["y"] == {"value": 3.0, "unit": "u"}
    assert [p.name for p in finished().paths] == ["01_first.ipynb", "02_second.ipynb"]
    assert states(finished()) == [True, True]
    finished().run()
    assert capsys.readouterr().out.count("finished before") == 2
    write_notebook(notebooks, "02_second", 'nb.upstream("01_first")', 'nb.metric("y", 7, "u")')
    assert states(finished()) == [True, False]
    assert states(finished(seed=1)) == [False, False]
    model = finished().parameters["model"]
    assert states(finished(overrides={"model": model, "pruning.mean_rate": 0.3})) == [True, False]  # neither reads it


def test_a_record_depends_on_what_its_notebook_reads(tmp_path, model_folder):
    def notebook(**changes):
        overrides = {"model": model_folder, **changes}
        return Notebook("01_first", "tiny", overrides, tmp_path, reads=("recovery",))

    notebook().finish()
    path = tmp_path / "01_first.json"
    fitting_record(path, asdict(load_preset("tiny", {"model": model_folder, "pruning.alpha": 2.0})), 0)
    other = asdict(load_preset("tiny", {"model": model_folder, "recovery.lora_r": 16}))
    with pytest.raises(InputError, match="01_first was made with another recovery: run 01_first again"):
        fitting_record(path, other, 0)
    with pytest.raises(AttributeError, match="does not say that it reads 'pruning': add it to `reads`"):
        notebook().preset.pruning  # noqa: B018


@pytest.mark.usefixtures("in_this_process")
def test_notebooks_know_who_holds_the_lock_and_nobody_does_later(job, notebooks):
    write_notebook(notebooks, "01_first", "import os", f"nb.text('held', os.environ[{HELD!r}])")
    job(only="01").run()
    assert read_record(job().run_dir / "01_first.json")["texts"]["held"] == str(job().run_dir)
    assert HELD not in os.environ


def test_a_notebook_waits_for_records_and_models(notebooks):
    write_notebook(notebooks, "03_third", 'nb.upstream("01_first")', 'places = {"a": nb.made(name, "02_second")}')
    assert waits_for(notebooks / "03_third.ipynb") == ["01_first", "02_second"]


@pytest.mark.usefixtures("in_this_process")
def test_of_notebooks_that_wait_in_a_circle_the_first_says_what_it_lacks(job, notebooks):
    write_notebook(notebooks, "01_first", 'nb.upstream("02_second")')
    with pytest.raises(InputError, match="run 02_second first"):
        job().run()


def test_notebooks_beside_each_other_wait_for_what_they_read(job, notebooks, monkeypatch):
    write_notebook(notebooks, "03_third", 'nb.metric("z", 1, "u")')
    met, ended, seen = threading.Barrier(2, timeout=10), [], {}

    def execute(self, path):
        if path.stem != "02_second" and len(ended) < 2:  # 01 and 03 wait for each other
            met.wait()
        seen[path.stem] = list(ended), os.environ["OMP_NUM_THREADS"], machine("cpu")
        ended.append(path.stem)

    monkeypatch.setattr(series.Series, "execute", execute)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    job().run(at_once=2)
    assert "01_first" in seen["02_second"][0] and seen["03_third"][1] == "4" and os.environ["OMP_NUM_THREADS"] == "7"
    assert all(said.endswith(", 2 notebooks at a time") for _, _, said in seen.values())
    job().run()
    assert ended[3:] == ["01_first", "02_second", "03_third"] and seen["02_second"][1] == "7"


def test_that_on_which_most_work_waits_begins_first(job, notebooks, monkeypatch):
    """01 ← 02 ← 04 and, alone, 03: in seconds 5 + 10 + 1, 12."""
    write_notebook(notebooks, "03_third", 'nb.metric("z", 1, "u")')
    write_notebook(notebooks, "04_fourth", 'nb.upstream("02_second")')
    known = {"01_first": 5.0, "02_second": 10.0, "03_third": 12.0, "04_fourth": 1.0}
    monkeypatch.setattr(series, "committed_seconds", lambda name, preset: known[name])
    order = [path.stem for path in job()._most_urgent_first()]
    assert order == ["01_first", "03_third", "02_second", "04_fourth"]
    assert job()._expected_s(job().paths, 2) == "about 0:14 left" and job()._expected_s([], 2) == "done"


def test_a_failure_stops_what_runs_beside_it(job, notebooks, monkeypatch):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # stands for the other's kernel
    write_notebook(notebooks, "03_third", 'nb.metric("z", 1, "u")')

    def execute(self, path):
        if path.stem == "01_first":
            raise InputError("broken")
        assert sleeper.wait(20) != 0

    monkeypatch.setattr(series.Series, "execute", execute)
    with pytest.raises(InputError, match="broken"):
        job().run(at_once=2)
    assert sleeper.poll() is not None


def test_other_parameters_have_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("GQALIB_RUNS", str(tmp_path))
    assert series.Series(overrides={"recovery.lora_r": 16}).run_dir == tmp_path / "tiny+recovery.lora_r=16"
    long = [default_run_dir("tiny", {"model": "/m" * 100 + end}) for end in "ab"]
    assert long[0] != long[1] and all(len(folder.name) < 130 and folder.parent == tmp_path for folder in long)
    nb = Notebook("06_lora_recovery", "tiny", {"recovery.lora_r": 16}, seed=1)
    assert nb.run_dir == tmp_path / "tiny+recovery.lora_r=16+seed=1"


def test_a_notebook_opened_alone_takes_committed_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GQALIB_RUNS", str(tmp_path))
    nb = Notebook("06_lora_recovery", "tiny", {"recovery.lora_r": 16})
    assert nb.upstream("01_baseline")["metrics"]["perplexity_short"]["value"] > 1
    assert "01_baseline: taken from data/results/tiny" in capsys.readouterr().out
    with pytest.raises(InputError, match="another evaluation: run 01_baseline again"):
        Notebook("06_lora_recovery", "tiny", {"evaluation.num_tokens": 64}).upstream("01_baseline")


@pytest.mark.usefixtures("in_this_process")
def test_a_missing_model_is_made(finished, notebooks, tmp_path, monkeypatch, capsys):
    model = "import pathlib; folder = nb.artefact('v'); folder.mkdir(parents=True); (folder / 'x').write_text('x')"
    write_notebook(notebooks, "01_first", model)
    monkeypatch.setattr(series, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(series, "Series", partial(series.Series, notebooks=notebooks))
    nb = Notebook("02_second", "tiny", finished().overrides, tmp_path / "other")
    assert (nb.made("v", "01_first") / "x").read_text() == "x"
    assert "models/v is missing: 01_first makes it" in capsys.readouterr().out
    assert nb.made("v", "01_first") == tmp_path / "other" / "models" / "v"
    assert HELD not in os.environ  # else widgets would think that nobody looks
    assert "missing" not in capsys.readouterr().out


def test_an_open_notebook_and_a_runner_respect_each_other(job):
    nb = Notebook("01_first", "tiny", job().overrides, job().run_dir)
    Notebook("02_second", "tiny", job().overrides, job().run_dir).finish()  # two notebooks may be open
    with pytest.raises(InputError, match="a notebook that is open, is working in"):
        job().run()
    nb.finish()
    with locked(job().run_dir), pytest.raises(InputError, match="is working in"):
        Notebook("01_first", "tiny", job().overrides, job().run_dir)


def test_words_change_no_code(tmp_path):
    source = "from gqalib.prune.plans import whole_units"
    assert resume.code_hash(source) == resume.code_hash("import torch\n" + source)
    assert resume.code_hash(source) != resume.code_hash("from gqalib.prune import search")
    frame = "from gqalib.run.notebook import Notebook\n"
    numbers = source + "\nfrom gqalib import figures\nfrom gqalib.run.play import play"
    assert resume.code_hash(frame + numbers, resume.FRAME) == resume.code_hash(source, resume.FRAME)
    assert resume.code_hash(frame + numbers) != resume.code_hash(source)
    assert all((resume.PACKAGE / f"{name.replace('.', '/')}.py").is_file() for name in resume.FRAME)
    plain, spoken = "def f():\n    return 1", 'def f():\n    """Says one."""\n    return 1  # one'
    assert resume._bare(plain) == resume._bare(spoken) != resume._bare(plain.replace("1", "2"))


def test_a_new_upstream_record_makes_the_rest_stale(finished):
    path = finished().run_dir / "01_first.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"seconds": 1e9}))
    assert states(finished()) == [True, False]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    "torn", ["", '{"schema": 1, "notebook": "01_fi', "[]", '{"schema": 0, "notebook": "01_first"}']
)
def test_torn_upstream_record(finished, torn):
    (finished().run_dir / "01_first.json").write_text(torn)
    assert states(finished()) == [False, False]
    with pytest.raises(InputError, match=r"01_first(.json)? .*(02_second)"):
        finished(only="02").run()
    assert not (finished().run_dir / "02_second.json").exists()


@pytest.mark.usefixtures("in_this_process")
def test_missing_upstream_record(job):
    with pytest.raises(InputError, match="run 01_first first: .*01_first.json is missing"):
        job(only="02").run()


@pytest.mark.usefixtures("in_this_process")
def test_upstream_of_other_parameters(finished):
    with pytest.raises(InputError, match="01_first was made with another seed: run 01_first again"):
        finished(only="02", seed=1).run()


@pytest.mark.usefixtures("in_this_process")
def test_failure_names_notebook_cell_and_error(job, notebooks):
    write_notebook(notebooks, "02_second", "z = 1 / 0  # here")
    with pytest.raises(series.NotebookFailed, match=r"(?s)02_second, cell \d+: z = 1 / 0  # here.*ZeroDivisionError"):
        job().run()
    assert states(job()) == [True, False]
    assert (job().run_dir / "02_second.failed.ipynb").exists() and not (job().run_dir / "02_second.ipynb").exists()
    write_notebook(notebooks, "02_second", "z = 1")
    job().run()
    assert states(job()) == [True, True] and not (job().run_dir / "02_second.failed.ipynb").exists()


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("kind", ["InputError", "OutOfReach"])
def test_a_refusal_in_a_cell_is_a_sentence_with_its_notebook(kind, job, notebooks):
    write_notebook(notebooks, "02_second", f"from gqalib.errors import {kind}", f"raise {kind}('too much: give less')")
    with pytest.raises(InputError, match=r"^too much: give less \(02_second\)$"):
        job().run()
    assert not list(job().run_dir.glob("02_second*"))


def test_a_killed_kernel_is_said_and_nothing_is_left(tmp_path, notebooks, model_folder, capsys):
    """For memory, as a rule: exit status 3, which a grid tries again."""
    write_notebook(notebooks, "01_first", "import os; os.kill(os.getpid(), 9)", records=False)
    where = ["--run-dir", str(tmp_path / "run"), "--notebooks-dir", str(notebooks)]
    assert main(["run", "--set", f"model={model_folder}", *where]) == series.KERNEL_DIED == 3
    assert "failed: 01_first: its process was killed from outside" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_several_notebooks_and_none(job, tmp_path):
    assert [p.stem for p in job(only="02,01").paths] == ["01_first", "02_second"]
    with pytest.raises(InputError, match="--only 42 names no notebook"):
        job(only="01,42")
    with pytest.raises(InputError, match="holds no notebook"):
        job(notebooks=tmp_path / "nowhere")


SLOW = """
import os, pathlib, time, torch
from gqalib.measure.perplexity import perplexity
from gqalib.model import load
from gqalib.prune import plans, refit


def after_layer(layer):
    if layer == 1 and not (begun := pathlib.Path(run_dir, "begun")).exists():
        begun.write_text(str(os.getpid()))
        time.sleep(600)


nb.upstream("01_first")
model, text = load.load_model(nb.preset.model, device="cpu"), torch.arange(1, 61).repeat(3).view(9, 20)
quick, plan = refit.Ingredients(newton_rounds=1, newton_steps=1), plans.Plan([0.3] * 3, [1, 2, 1], [5, 0, 9])
nb.progress("sweep").run(refit.sweep, model, plan, text, quick, after_layer=after_layer)
nb.metric("swept", perplexity(model, text), "perplexity")
"""


def test_kill_in_the_middle_and_resume(finished, notebooks, monkeypatch):
    """SIGKILL to runner and kernel while a sweep is at its third layer: the first notebook stays finished, nothing
    half-written counts, and the same command goes on with that layer, to the same result bit for bit."""
    write_notebook(notebooks, "02_second", SLOW)
    job, run_dir = finished(), finished().run_dir
    record, executed, begun = (run_dir / name for name in ("02_second.json", "02_second.ipynb", "begun"))
    record.unlink(), executed.unlink()
    how = {"overrides": job.overrides, "run_dir": run_dir, "notebooks": notebooks}
    code = f"from pathlib import PosixPath; from gqalib.run import series; series.Series(**{how!r}).run()"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    runner, deadline = subprocess.Popen([sys.executable, "-c", code], **quiet), time.monotonic() + 300
    while not begun.exists() or not begun.read_text():
        assert time.monotonic() < deadline and runner.poll() is None
        time.sleep(0.1)
    with pytest.raises(InputError, match="is working in"):
        job.run()
    for process in (runner.pid, int(begun.read_text())):
        os.kill(process, signal.SIGKILL)
    runner.wait()
    assert states(job) == [True, False] and not record.exists() and not executed.exists()
    assert progress_dir(run_dir, "02_second").exists()

    first, mend, mended = (run_dir / "01_first.json").stat().st_mtime, refit.mend, []
    monkeypatch.setattr(refit, "mend", lambda *args, **how: mended.append(args) or mend(*args, **how))
    never_killed = mock.MagicMock()
    never_killed.configure_mock(**{"preset.model": job.parameters["model"], "progress": lambda _: NOT_KEPT})
    exec(SLOW, {"nb": never_killed, "run_dir": str(run_dir)})
    whole = len(mended)
    with without_kernels():
        job.run()
    assert states(job) == [True, True] and len(mended) - whole == whole / 3
    assert (run_dir / "01_first.json").stat().st_mtime == first
    assert read_record(record)["metrics"]["swept"]["value"] == never_killed.metric.call_args.args[1]
    assert progress_dir(run_dir, "02_second").exists()  # for a run of which only words have changed


def test_notebook_without_a_parameter(job, notebooks):
    path = notebooks / "01_first.ipynb"
    path.write_text(path.read_text().replace(json.dumps(PARAMETERS), json.dumps('preset = "tiny"')))
    with pytest.raises(InputError, match="no parameter overrides, run_dir, seed"):
        job().run()


def test_a_metric_with_an_error_has_ends(tmp_path):
    nb = Notebook("01_baseline", "tiny", {}, tmp_path)
    nb.metric("x", 3.0, "u", 0.5), nb.metric("y", 2.0, "u", math.nan)  # a single window has no error
    assert {name: found["value"] for name, found in nb.metrics.items()} == {"x": 3, "x_low": 2, "x_high": 4, "y": 2}


def test_the_headline_of_a_record():
    row = {"task": "piqa", "examples": 100, "accuracy": 55.55, "error": 1.04, "published": 54.8, "difference": 0.75}
    for rows, said in (([row], [["piqa", 100, "55.5", "1.0", "54.8", "0.8"]]), ([], [])):  # `tiny` scores no tasks
        assert publish.headline_table({"tables": {"headline": rows}}).to_numpy().tolist() == said


def test_tables_of_a_served_model():
    """The front alone, and a column for each step of the A/B test."""
    file = {"model": "dense", "type": "q8_0", "bytes": 2_060_000, "times dense": 1.0004, "± standard error": 0.0006}
    step = {"what": "time per token", "ratio": 0.8, "ratio_low": 0.789, "ratio_high": 0.811}
    ratios = {"quantised": 0.8, "pruned": 0.6, "both": 0.5}
    steps = [step | {"step": name, "ratio": ratio} for name, ratio in ratios.items()]
    record = {"tables": {"files": [file | {"front": front} for front in (True, False)], "ab_steps": steps}}
    assert publish.files_table(record).to_numpy().tolist() == [["dense", "q8_0", "2.1", "1.000", "0.001"]]
    (row,) = publish.served_table(record).to_dict("records")
    said = {name: f"{ratio}0 (0.79–0.81)" for name, ratio in ratios.items()}
    assert row == {"times what it was before": "time per token"} | said


def test_metrics_must_be_finite(tmp_path):
    nb = Notebook("01_first", "tiny", {}, tmp_path)
    for value in (float("nan"), float("inf"), True):
        with pytest.raises(InputError, match="not finite"):
            nb.metric("x", value, "u")


def test_published_notebooks_are_clean(finished, tmp_path):
    """Outputs are the run's, words are the repository's."""
    job = finished()
    source, executed = (nbformat.read(path, as_version=4) for path in (job.paths[1], job.run_dir / job.paths[1].name))
    source.cells.insert(0, nbformat.v4.new_markdown_cell("words that came later"))
    executed.cells[-1].outputs = [nbformat.v4.new_output("stream", text="said by the run")]
    notebook = publish._page(source, executed)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert code[-1].outputs == executed.cells[-1].outputs and not code[0].outputs
    assert str(tmp_path) not in nbformat.writes(notebook) and notebook.cells[0].source == "words that came later"
    assert code[0].source == PARAMETERS
    code[-1].source += "  # changed"
    with pytest.raises(InputError, match="the code of 'words that came later' has changed since this run: run it"):
        publish._page(notebook, executed)


@pytest.mark.parametrize("change", [{"overrides": {"dtype": "bfloat16"}}, {"preset": "smollm2"}, {"seed": 1}])
def test_only_a_plain_run_is_published(change):
    plain = {"notebook": "01_first", "preset": "tiny", "overrides": {}, "seed": 0}
    publish._check_plain("tiny", [plain])
    with pytest.raises(InputError, match="01_first was made with .*: publish a run of plain tiny"):
        publish._check_plain("tiny", [plain, plain | change])


def test_a_page_shows_the_real_model_once_it_has_run(tmp_path, monkeypatch):
    """`tiny`, then `smollm2`, then `tiny` again: its record is replaced, the page stays."""
    monkeypatch.setattr(publish, "update_readme", lambda *_: None)
    page, run_dir = tmp_path / "notebooks" / "01_made_up.ipynb", tmp_path / "run"
    page.parent.mkdir()
    run_dir.mkdir()
    cells = [nbformat.v4.new_markdown_cell("# 01\n| **Reads** | nothing |\n"), nbformat.v4.new_code_cell("1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), page)
    shown = []
    for preset, said in (("tiny", "first"), ("smollm2", "second"), ("tiny", "third")):
        executed = nbformat.read(page, as_version=4)
        executed.cells[1].outputs = [nbformat.v4.new_output("stream", text=said)]
        nbformat.write(executed, run_dir / page.name)
        parameters = {"model": "mine", "corpus": "mine"}
        record = {"schema": 1, "notebook": page.stem, "preset": preset, "overrides": {}, "parameters": parameters}
        record |= {"seed": 0, "git_commit": "0123456789", "artefacts": [], "said": said}
        record |= {"seconds": 90.0, "machine": "a laptop"}
        (run_dir / f"{page.stem}.json").write_text(json.dumps(record))
        publish.publish(run_dir, preset, page.parent, tmp_path)
        heading, code = nbformat.read(page, as_version=4).cells
        shown.append(code.outputs[0].text)
        assert heading.source.count("**Outputs**") == 1
        assert heading.source.count("| **Time** | 1.5 minutes for these outputs (a laptop)") == 1
    assert shown == ["first", "second", "second"] and "of preset `smollm2` (mine" in heading.source
    kept = {path.parent.name: json.loads(path.read_text())["said"] for path in tmp_path.glob("data/results/*/*.json")}
    assert kept == {"tiny": "third", "smollm2": "second"}
