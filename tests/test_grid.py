"""A grid is checked before anything starts; its runs survive a killed worker; one that fails does not stop the
others."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import threading
import time

import pandas as pd
import pytest
import yaml
from conftest import is_running
from test_series import write_notebook, write_series

from gqalib import InputError
from gqalib.run import grid as run_grid
from gqalib.run.checks import NOTEBOOKS, Grid, check_grid, numbered_notebooks, read_grid, reads
from gqalib.run.cli import main, overrides, parser
from gqalib.run.grid import _metrics, draw, expand, gather, over_seeds, run_name
from gqalib.run.notebook import Notebook
from gqalib.run.series import locked

GRID = """
preset: tiny
notebooks: ["01"]
seeds: [0, 1]
overrides:
  model: [{model}]
  pruning.mean_rate: [0.2, 0.25, 0.3]
"""
STAND_IN = """
# instead of `python -m gqalib run`, which takes ten seconds to load: the same arguments, files and exit status
import json, os, pathlib, shutil, sys, time
place, ready = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1]), pathlib.Path(sys.argv[0]).parent / "ready"
(place / "environment.json").write_text(json.dumps(os.environ | {"nice": os.nice(0)}))
if place.name == slow and not (place / "begun").exists():  # the first attempt at this one is killed
    (place / "begun").write_text(str(os.getpid()))
    time.sleep(600)
if place.name == failing:
    sys.exit("failed: 01_first, cell 2: 1 / 0\\nZeroDivisionError: division by zero\\nthe notebook up to there: x")
if place.name == dying:
    os.kill(os.getpid(), 9)
shutil.copytree(ready / place.name, place, dirs_exist_ok=True)
"""


@pytest.fixture
def notebooks(tmp_path):
    return write_series(tmp_path / "notebooks")


@pytest.fixture
def grid(tmp_path, model_folder):
    def write(text=GRID):
        path = tmp_path / "grid.yaml"
        path.write_text(text.format(model=model_folder))
        return path

    return write


@pytest.fixture
def jobs(grid, tmp_path, notebooks):
    return expand(read_grid(grid()), tmp_path / "grid", notebooks)


@pytest.fixture
def command(grid, tmp_path, notebooks):
    return ["grid", str(grid()), "--run-dir", str(tmp_path / "grid"), "--notebooks-dir", str(notebooks)]


def finish(job, folder, **metrics):
    """What a run of notebook 01 leaves behind, without the run."""
    with contextlib.chdir(job.notebooks):  # where a notebook is run
        nb = Notebook("01_first", job.preset, job.overrides, folder, job.seed)
        for name, value in metrics.items():
            nb.metric(name, value, "perplexity")
        nb.finish()
    shutil.copy(job.paths[0], folder)


def perplexity(job):
    return 10 + 100 * job.overrides["pruning.mean_rate"] + job.seed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: [0]", "unknown parameter 'seed': did you mean seeds"),
        ("nonsense: 1", "did you mean presets, notebooks"),
        (
            "overrides: {{pruning.mean_rat: [0.3]}}",
            "unknown parameter 'pruning.mean_rat': did you mean pruning.mean_rate",
        ),
        ("overrides: {{pruning: {{mean_rate: [0.3]}}}}", r"overrides.pruning = .* should be a list"),
        (
            "overrides: {{pruning.mean_rate: 0.3}}",
            "pruning.mean_rate = 0.3 cannot be: it should be a list",
        ),
        ("overrides: {{pruning.mean_rate: []}}", r"pruning.mean_rate = \[\] cannot be: it should have at least 1 item"),
        (
            "overrides: {{pruning.mean_rate: [0.3, 0.2, 0.3]}}",
            "pruning.mean_rate = .* cannot be: it should have 0.3 once: seeds make repetitions",
        ),
        (
            "overrides: {{recovery.learning_rate: [1e-4, 1.0e-4]}}",
            "recovery.learning_rate = .* should have 0.0001 once",
        ),
        ("overrides: {{pruning.mean_rate: [0.3, 1.5]}}", "pruning.mean_rate = 1.5 cannot be"),
        ("overrides: {{pruning.mean_rate: [much]}}", "pruning.mean_rate = 'much' cannot be"),
        ("overrides: [pruning.mean_rate]", r"overrides = .* cannot be: it should be names with values"),
        ("overrides: {{model: [/no/such/folder]}}", "model folder /no/such/folder does not exist"),
        ("overrides: {{corpus: ['file:/no/such.txt']}}", "corpus file /no/such.txt does not exist"),
        ("overrides:\n  pruning.alpha: [1]\n  pruning.alpha: [2]", "the grid has pruning.alpha twice"),
        ("preset: huge", "unknown preset 'huge'"),
        ("preset: tiny\npresets: [full]", "both preset and presets"),
        ("presets: tiny", "presets = 'tiny' cannot be: it should be a list"),
        ("seeds: [0, 0]", r"seeds = \[0, 0\] cannot be: it should have 0 once"),
        ("seeds: [-1]", "seeds.0 = -1 cannot be: it should be greater than or equal to 0"),
        ("seeds: [one]", "seeds.0 = 'one' cannot be: it should be a valid integer"),
        ("notebooks: [01, 42]", "unknown notebook '42'"),
        ('notebooks: ["02"]', 'notebook 02_second reads 01_first: add "01" to the notebooks of the grid'),
        ('notebooks: [1, "01"]', "notebooks = .* should have '01' once"),
        ("num_cpus: 0", "num_cpus = 0 cannot be"),
        ("num_gpus: 1.5", "num_gpus = 1.5 cannot be: it should be 0, a part of a card such as 0.5, or a whole number"),
        ("max_retries: yes", "max_retries = True cannot be"),
        ("", "is empty"),
        ("{{}}", "is empty"),
        ("[1, 2]", "has no keys"),
        ("seeds: [0", "is no YAML"),
    ],
)
def test_bad_grid_is_one_sentence_status_2_and_nothing_written(tmp_path, grid, command, capsys, text, says):
    grid(text)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert re.search(says, error) and error.count("\n") == 1
    assert not (tmp_path / "grid").exists()


def test_the_grid_knows_what_the_workbooks_notebooks_read():
    before_08 = [path.stem for path in numbered_notebooks()][:7]
    assert reads(NOTEBOOKS / "08_claims.ipynb") == before_08
    assert reads(NOTEBOOKS / "07_cost_analysis.ipynb") == [before_08[k] for k in (0, 1, 4, 5)]
    with pytest.raises(InputError, match='07_cost_analysis reads 02_v2_failure: add "02" to the notebooks'):
        check_grid(Grid(notebooks=["01", "07"]), NOTEBOOKS)


@pytest.mark.parametrize("name", ["path.stem", 'f"{number}_first"', "str(name)", '"01_first" if x else "02_second"'])
def test_computed_names_are_refused(name, tmp_path):
    write_notebook(tmp_path, "02_second", f"nb.upstream({name})")
    with pytest.raises(InputError, match="02_second computes a name, nb.upstream.*: write it, as nb"):
        reads(tmp_path / "02_second.ipynb")


def test_missing_grid(tmp_path, capsys):
    assert main(["grid", str(tmp_path / "none.yaml")]) == 2
    says = r"error: grid .*none.yaml cannot be read \(No such file or directory\): give a text file in UTF-8\n"
    assert re.fullmatch(says, capsys.readouterr().err)
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9")
    assert main(["grid", str(tmp_path / "latin.yaml")]) == 2
    assert re.fullmatch(r"error: grid .*latin.yaml cannot be read \(.*\): give a text .*\n", capsys.readouterr().err)


def test_every_combination_is_one_run(jobs):
    assert len(jobs) == len({job.run_dir for job in jobs}) == 6
    assert {(job.overrides["pruning.mean_rate"], job.seed) for job in jobs} == {
        (r, s) for r in (0.2, 0.25, 0.3) for s in (0, 1)
    }
    assert jobs[0].parameters["pruning"]["mean_rate"] == 0.2 and [path.stem for path in jobs[0].paths] == ["01_first"]


def test_names_of_folders():
    assert run_name("tiny", {"pruning.alpha": 0.5}, 3) == "tiny+pruning.alpha=0.5+seed=3"
    places = [run_name("tiny", {"corpus": f"file:a{c}b"}, 0) for c in "/ :"]
    assert len(set(places)) == 3 and not any("/" in place or ":" in place for place in places)
    assert len(run_name("tiny", {"corpus": "x" * 500}, 0)) < 120


def test_presets_and_text_that_is_a_number(grid):
    read = read_grid(
        grid("presets: [tiny, full]\nnotebooks: [01, 10_x]\noverrides: {{recovery.learning_rate: [1e-4, 5e-5]}}")
    )
    assert read == Grid(["tiny", "full"], ["01", "10"], [0], {"recovery.learning_rate": [1e-4, 5e-5]})


def test_the_command_line_understands_what_a_task_asks_for(jobs, notebooks):
    job = dataclasses.replace(
        jobs[3],
        overrides={
            "pruning.alpha": 1e-5,
            "corpus": "python-docs",
            "recovery.num_examples": None,
            "cost.batch_sizes": [1],
        },
    )
    options = parser().parse_args(run_grid.arguments(job))
    asked = (
        options.command,
        options.preset,
        options.seed,
        options.run_dir,
        options.notebooks_dir,
        options.only,
        overrides(options.overrides),
    )
    assert asked == ("run", "tiny", 1, job.run_dir, notebooks, "01", job.overrides)


def test_gather_means_and_figure(jobs, tmp_path):
    for job in jobs[:5]:
        finish(job, job.run_dir, perplexity_v3=perplexity(job), perplexity_dense=7.0, other=1.0)
    jobs[5].run_dir.mkdir()
    (jobs[5].run_dir / "log.txt").write_text(
        "\nattempt on a, pid 1: python\n\nattempt on b, pid 2: python\nerror: no luck\n\nexit status 2\n"
    )
    table = gather(jobs)
    assert len(table) == 6 and table["error"].dropna().to_dict() == {5: "no luck"} and table["attempts"][5] == 2
    assert (
        table["perplexity_v3"].tolist()[:5] == [perplexity(job) for job in jobs[:5]]
        and table["perplexity_v3"].isna()[5]
    )
    means = over_seeds(table, ["perplexity_v3"])["perplexity_v3"]
    assert means.index.tolist() == [0.2, 0.25, 0.3] and means.index.name == "pruning.mean_rate"
    assert (
        means["mean"].tolist() == [30.5, 35.5, 40.0]
        and means["std"].iloc[0] == pytest.approx(0.5**0.5)
        and means["count"].tolist() == [2, 2, 1]
    )
    report = run_grid.summary(table, jobs, tmp_path)
    assert "30.50 ± 0.71" in report and "perplexity_dense" in report and "other" not in report
    assert f"retried   {jobs[5].run_dir.name} (attempt 1 on a: its worker died)" in report
    assert f"failed    {jobs[5].run_dir.name}: no luck" in report and "5 of 6 runs complete" in report
    draw(table, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG" and not (tmp_path / ".grid.png").exists()


def test_settings_that_are_lists_or_names_with_values(grid, tmp_path, notebooks):
    varied = {"tasks_in_depth.limits": [{}, {"piqa": 3}], "cost.contexts": [[8], [8, 16]]}
    text = yaml.safe_dump({"preset": "tiny", "notebooks": ["01"], "seeds": [0], "overrides": varied})
    jobs = expand(read_grid(grid(text.replace("{", "{{").replace("}", "}}"))), tmp_path / "grid", notebooks)
    for job in jobs:
        finish(job, job.run_dir, perplexity_v3=1.0)
    assert len(over_seeds(gather(jobs), ["perplexity_v3"])) == 4
    draw(gather(jobs), tmp_path / "grid.png")


def test_figure_of_any_grid(tmp_path):
    """Words instead of numbers, several settings, one run, far apart values, nothing finished."""
    base = {"run": "r", "seed": 0, "seconds": 1.0, "attempts": 1, "error": None}
    grids = [
        [
            {"preset": p, "pruning.strategy": s, "perplexity_v3": 9.0}
            for p in ("tiny", "full")
            for s in ("inverse", "uniform")
        ],
        [
            {"preset": "tiny", "pruning.alpha": a, "pruning.max_rate": m, "ratio_50": 10**a}
            for a in (0, 1, 30)
            for m in (0.4, 0.5)
        ],
        [{"preset": "tiny", "recovery.num_examples": n, "x": float(n or 9)} for n in (10, None, 1000)],
        [{"preset": p, "x": 1.0, "across": 2.0, "lines": 3.0} for p in ("tiny", "full")],
        [{"preset": "tiny", "perplexity_v3": None}],
    ]
    for rows in grids:
        draw(pd.DataFrame([base | row for row in rows]), tmp_path / "grid.png")
        assert (tmp_path / "grid.png").exists() == (rows is not grids[-1])


def test_force_starts_from_nothing(jobs, command, monkeypatch):
    started = []

    def tune_all(jobs, *_):
        for job in jobs:
            there = [path.name for path in job.run_dir.glob("**/*")]  # an empty folder, so that nothing is unpacked
            started.append((job.run_dir.name, there))
            finish(job, job.run_dir, perplexity_v3=perplexity(job))

    monkeypatch.setattr(run_grid, "tune_all", tune_all)
    for arguments, count in (([], 6), ([], 6), (["--force"], 12)):
        assert main([*command, *arguments]) == 0 and len(started) == count
    assert started == [(job.run_dir.name, there) for there in ([], ["progress"]) for job in jobs]


def test_what_changed_while_it_ran_does_not_count(jobs, command, monkeypatch, capsys):
    def tune_all(jobs, *_):  # all end well, and leave nothing
        for job in jobs:
            job.run_dir.mkdir()
            (job.run_dir / "log.txt").write_text("attempt on a, pid 1: python\n\nexit status 0\n")

    monkeypatch.setattr(run_grid, "tune_all", tune_all)
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "0 of 6 runs complete" in out and out.count("changed while it ran: start the grid again") == 6


def test_names_that_two_notebooks_use():
    records = [{"notebook": f"0{n}_x", "metrics": {"same": {"value": 1}, "differs": {"value": n}}} for n in (1, 2)]
    assert _metrics(records) == {"same": 1, "differs": 1, "02.differs": 2}


def test_a_start_that_takes_too_long_is_tried_again():
    class Ray:
        def __init__(self, fails):
            self.starts, self.fails, self.shutdown = 0, fails, lambda: None

        def init(self, *_, **__):
            self.starts += 1
            if self.starts <= self.fails:
                raise RuntimeError("The current node timed out during startup.")

    run_grid.start_ray(twice := Ray(2), None, "")
    assert twice.starts == 3
    with pytest.raises(RuntimeError, match="timed out"):
        run_grid.start_ray(Ray(3), None, "")


def test_no_cluster_at_the_address(jobs):
    with pytest.raises(InputError, match="no Ray cluster answers at nowhere"):
        run_grid.tune_all(jobs, Grid(), address="nowhere")


@pytest.mark.parametrize(
    ("log", "end"),
    [
        ("a warning\nerror: no such thing: give another\n\nexit status 2", "no such thing: give another"),
        ("failed: 01_x, cell 3: y\nKeyError: 'y'\nup to there: z\nexit status 1", "01_x, cell 3: y: KeyError: 'y'"),
        ("Traceback (most recent call last):\n  File\nOSError: disk full\nexit status 1", "OSError: disk full"),
        ("exit status 1", "it said nothing"),
        ("failed: its process was killed\nexit status 3", "its process was killed"),
        ("half a line\nexit status -9", "its process was killed"),
        ("[1/1] 01_first", "its worker died"),
        ("", "its worker died"),
        ("[1/1] 01_first 3 s\n\nexit status 0", "finished"),
    ],
)
def test_how_an_attempt_ended(jobs, log, end):
    jobs[0].run_dir.mkdir(parents=True)
    earlier = "attempt on a, pid 1: python -m gqalib run\n\nexit status -9\n\n"
    (jobs[0].run_dir / "log.txt").write_text(f"{earlier}attempt on b, pid 2: python -m gqalib run\n{log}\n")
    assert run_grid.attempts(jobs[0]) == [("a", "its process was killed"), ("b", end)]


def test_an_attempt_waits_for_what_the_last_one_left(jobs, monkeypatch):
    monkeypatch.setattr(run_grid, "PROGRAM", ("-c", ""))
    attempt = run_grid.trainable(jobs, Grid())
    with locked(jobs[0].run_dir):
        thread = threading.Thread(target=attempt, args=({"run": jobs[0].run_dir.name},))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not run_grid.attempts(jobs[0])
        (jobs[0].run_dir / "result").touch()
    thread.join(30)
    assert [end for _, end in run_grid.attempts(jobs[0])] == ["finished"]


def test_more_than_any_machine_has():
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 1.0, "GPU": 2.0}},
        {"Alive": False, "Resources": {"CPU": 99.0}},
    ]
    for cpus, gpus in ((4, 0), (1, 2), (1, 0.5)):
        run_grid.check_resources(nodes, Grid(num_cpus=cpus, num_gpus=gpus))
    says = r"no machine has num_cpus = 4 and num_gpus = 1 for a run \(there are 4 and 0; 1 and 2\): lower them"
    with pytest.raises(InputError, match=says):
        run_grid.check_resources(nodes, Grid(num_cpus=4, num_gpus=1))


@pytest.fixture
def ray(tmp_path, monkeypatch):
    """Started once for all that a test runs: it takes longer than they do.

    Most of it, in each of its processes, is a grammar that jsonschema compiles if it is there, and that nothing here
    needs.
    """
    (tmp_path / "rfc3987_syntax.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with run_grid._ray(None) as started:
        monkeypatch.setattr(run_grid, "_ray", lambda address: contextlib.nullcontext(started))
        yield


@pytest.fixture
def stand_in(jobs, tmp_path, monkeypatch):
    """Makes runs light: `finish` has prepared what each leaves behind; the named ones hang at first, fail, or are
    killed each time."""
    for job in jobs:
        finish(job, tmp_path / "ready" / job.run_dir.name, perplexity_v3=perplexity(job))

    def make(**special):
        names = "".join(f"{name} = {special.get(name)!r}\n" for name in ("slow", "failing", "dying"))
        (tmp_path / "stand_in.py").write_text(names + STAND_IN)
        monkeypatch.setattr(run_grid, "PROGRAM", (str(tmp_path / "stand_in.py"),))

    return make


def kill_worker(run_dir, killed):
    """SIGKILL to the Ray worker whose run has begun."""
    begun = run_dir / "begun"
    while not (begun.exists() and begun.read_text()):
        time.sleep(0.05)
    killed += [int(re.search(r"pid (\d+)", (run_dir / "log.txt").read_text())[1]), int(begun.read_text())]
    os.kill(killed[0], signal.SIGKILL)


def here(jobs, grid, address):
    """What workers do, without them."""
    for job in jobs:
        run_grid.trainable(jobs, grid)({"run": job.run_dir.name})


def test_six_runs_with_a_worker_killed(jobs, grid, command, stand_in, tmp_path, ray, monkeypatch, capsys):
    """The worker of one is killed, one fails by itself, one's process is killed every time; a second start does what
    is left."""
    grid("max_retries: 1" + GRID)
    failing, dying, slow = (job.run_dir.name for job in jobs[:3])
    stand_in(failing=failing, dying=dying, slow=slow)
    killed = []
    threading.Thread(target=kill_worker, args=(jobs[2].run_dir, killed), daemon=True).start()
    assert main(command) == 1
    assert len(killed) == 2 and not any(is_running(pid) for pid in killed)
    table, out = pd.read_csv(tmp_path / "grid" / "grid.csv"), capsys.readouterr().out
    assert f"failed    {failing}: 01_first, cell 2: 1 / 0: ZeroDivisionError: division by zero\n" in out
    assert re.search(rf"failed    {re.escape(dying)}: its process was killed at attempt 2: see \S+log.txt\n", out)
    assert re.findall(r"retried   (\S+) \(attempt 1 on \S+: (.*)\)", out) == [
        (dying, "its process was killed"),
        (slow, "its worker died"),
    ]
    assert (
        table["attempts"].tolist() == [1, 2, 2, 1, 1, 1] and table["error"].isna().tolist() == [False] * 2 + [True] * 4
    )
    assert "[6/6]" in out and "4 of 6 runs complete" in out and "raylet" not in out and "Trial" not in out
    environment = json.loads((jobs[3].run_dir / "environment.json").read_text())
    assert (environment["OMP_NUM_THREADS"], environment["CUDA_VISIBLE_DEVICES"]) == ("1", "")
    assert environment["nice"] == os.nice(0)

    stand_in()
    monkeypatch.setattr(run_grid, "tune_all", here)
    assert main(command) == 0
    table, out = pd.read_csv(tmp_path / "grid" / "grid.csv"), capsys.readouterr().out
    assert "6 runs, 4 finished before" in out and "6 of 6 runs complete" in out
    assert table["perplexity_v3"].tolist() == [perplexity(job) for job in jobs] and table["error"].isna().all()
    assert table["attempts"].tolist() == [2, 3, 2, 1, 1, 1]
    monkeypatch.setattr(run_grid, "PROGRAM", ("/never",))
    assert main(command) == 0 and "6 runs, 6 finished before" in capsys.readouterr().out
    assert not list((tmp_path / "grid").glob(".tune*"))
