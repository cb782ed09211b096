"""A grid of presets × overrides × seeds, checked before anything starts, run by Ray Tune, told in a table and a figure.

Every run is `python -m gqalib run` in a process and a folder of its own, so that a grid that is started again keeps
what is finished. On a cluster the project, its environment and the grid's folder must lie at the same place on every
machine; `ray start` wants RAY_process_group_cleanup_enabled=1, and a cluster that asks for a token is reached with
RAY_AUTH_MODE=token.
"""

import contextlib
import fcntl
import io
import itertools
import json
import math
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.cm import viridis
from matplotlib.figure import Figure
from tenacity import Retrying, stop_after_attempt

from gqalib.errors import InputError, one_sentence
from gqalib.figures import readable_log_axis
from gqalib.run.checks import NOTEBOOKS, Grid, read_grid, runs_of
from gqalib.run.notebook import default_run_dir, locked, progress_dir, read_record, run_name, write_atomically
from gqalib.run.presets import dotted_names
from gqalib.run.resume import replacing
from gqalib.run.series import KERNEL_DIED, Series

OF_THE_RUN = ["run", "preset", "seed", "seconds", "attempts", "error"]  # columns beside overrides and metrics
SHOWN = re.compile(r"perplexity_|ratio_|.*kept_percent$")  # metrics of the printed table; the file has all
DRAWN = re.compile(r"perplexity_|ratio_")
PROGRAM = ("-m", "gqalib")
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # what a run measures must not wait for others
    "RAY_process_group_cleanup_enabled": "1",  # what a dead worker had started must not run on beside the next attempt
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs have their own records
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the grid, as it ends a run
}


def expand(grid: Grid, folder: Path, notebooks: Path = NOTEBOOKS) -> list[Series]:
    """One series for each run, in a folder of its own."""
    only = None if grid.notebooks is None else ",".join(grid.notebooks)
    return [
        Series(preset, overrides, folder / run_name(preset, overrides, seed), seed, only=only, notebooks=notebooks)
        for preset, overrides, seed in runs_of(grid)
    ]


def run(
    path: Path, folder: Path | None = None, force: bool = False, address: str | None = None, notebooks: Path = NOTEBOOKS
) -> int:
    """Run what of a grid is not finished, a line each; write `grid.csv` and `grid.png`, and print the means over seeds.

    Returns the number of runs that failed.

    Raises:
        InputError: the grid or something that it names cannot be, or another grid is running in the folder.
    """
    grid = read_grid(path)
    folder = Path(folder).absolute() if folder else default_run_dir(f"grid-{Path(path).stem}")
    jobs = expand(grid, folder, notebooks)
    with locked(folder):
        for job in jobs if force else ():
            shutil.rmtree(job.run_dir, ignore_errors=True)
            progress_dir(job.run_dir).mkdir(parents=True)  # so that nothing that was committed is unpacked either
        left = [job for job in jobs if not is_complete(job)]
        print(f"{len(jobs)} runs, {len(jobs) - len(left)} finished before", flush=True)
        if left:
            tune_all(left, grid, address)
        table = gather(jobs)
        write_atomically(folder / "grid.csv", table.to_csv(index=False))
        draw(table, folder / "grid.png")
        print(summary(table, jobs, folder))
    return int(table["error"].count())


def is_complete(job: Series) -> bool:
    """Whether every notebook of a run is finished, as `python -m gqalib run` would judge."""
    return all(job.is_finished(path) for path in job.paths)


def tune_all(jobs: list[Series], grid: Grid, address: str | None = None) -> None:
    """Each job is a trial, as many at a time as there are cores and cards for; a line is printed as each ends.

    Raises:
        InputError: no cluster answers at the address, or no machine has as many cores or cards as one run is to have.
    """
    folder, by_name = jobs[0].run_dir.parent, {job.run_dir.name: job for job in jobs}
    count, out = itertools.count(1), sys.stdout
    with _ray(address) as (tune, nodes), tempfile.TemporaryDirectory(prefix=".tune-", dir=folder) as storage:
        check_resources(nodes, grid)

        class Lines(tune.Callback):
            def on_trial_complete(self, trial, **_) -> None:
                error = what_failed(by_name[name := trial.config["run"]])
                said = f"failed: {error}" if error else "finished"
                print(f"[{next(count)}/{len(jobs)}] {name:40s} {said}", file=out, flush=True)

            on_trial_error = on_trial_complete

            def __reduce__(self):  # Tune writes its callbacks down, for a restoration that nobody asks for
                return object, ()

        retries = tune.FailureConfig(max_failures=grid.max_retries)
        with contextlib.redirect_stdout(io.StringIO()):  # Ray says in paragraphs what we say in lines
            tune.Tuner(
                tune.with_resources(trainable(jobs, grid), {"cpu": grid.num_cpus, "gpu": grid.num_gpus}),
                param_space={"run": tune.grid_search(list(by_name))},
                tune_config=tune.TuneConfig(reuse_actors=True),
                run_config=tune.RunConfig(storage_path=storage, verbose=0, failure_config=retries, callbacks=[Lines()]),
            ).fit()


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """Ray on this machine, in a folder that goes with it, or on a running cluster; yields Tune and the machines."""
    os.environ.update(ENVIRONMENT)
    if not address:  # a password for this grid alone; Ray would leave one in the home folder
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray
    from ray import tune

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        try:
            start_ray(ray, address, folder)
            yield tune, ray.nodes()
        finally:
            ray.shutdown()


def start_ray(ray: Any, address: str | None, folder: str) -> None:
    """Three times if need be: on a busy machine Ray is not up within the half minute that it gives itself."""
    quiet = {"logging_level": "CRITICAL", "log_to_driver": False}
    if address:
        hint = "give the host:port that `ray start --head` printed, and set RAY_AUTH_MODE=token if it asks for one"
        with one_sentence(f"no Ray cluster answers at {address}", hint):
            return ray.init(address, **quiet)
    again = Retrying(stop=stop_after_attempt(3), after=lambda _: ray.shutdown(), reraise=True)
    again(ray.init, "local", include_dashboard=False, object_store_memory=80 * 2**20, _temp_dir=folder, **quiet)


def check_resources(nodes: list[dict[str, Any]], grid: Grid) -> None:
    """Tune would wait for ever for what is not there."""
    machines = [(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"]]
    if not any(cpus >= grid.num_cpus and gpus >= grid.num_gpus for cpus, gpus in machines):
        there = "; ".join(f"{cpus:g} and {gpus:g}" for cpus, gpus in machines)
        wanted = f"num_cpus = {grid.num_cpus} and num_gpus = {grid.num_gpus:g} for a run (there are {there})"
        raise InputError(f"no machine has {wanted}: lower them in the grid")


def trainable(jobs: list[Series], grid: Grid) -> Callable[[dict[str, str]], dict[str, int]]:
    """One attempt at a run, in a worker. It goes there by value and needs the standard library alone: no worker loads
    torch to wait."""
    folder, cwd = jobs[0].run_dir.parent, os.getcwd()
    asked = {job.run_dir.name: arguments(job) for job in jobs}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(grid.num_cpus))
    changed = threads | ({} if grid.num_gpus else {"CUDA_VISIBLE_DEVICES": ""})

    def attempt(config: dict[str, str]) -> dict[str, int]:
        place, command = folder / config["run"], [sys.executable, *PROGRAM, *asked[config["run"]]]
        place.mkdir(parents=True, exist_ok=True)
        with (place / ".lock").open("a") as lock:  # what a dead worker left may take a moment to go, or run to its end
            fcntl.flock(lock, fcntl.LOCK_EX)
        with (place / "log.txt").open("a", encoding="utf-8") as log:
            print(f"\nattempt on {socket.gethostname()}, pid {os.getpid()}: {' '.join(command)}", file=log, flush=True)
            status = subprocess.run(command, cwd=cwd, env=os.environ | changed, stdout=log, stderr=log).returncode
            print(f"\nexit status {status}", file=log)
        if status < 0 or status == KERNEL_DIED:
            raise ChildProcessError("its process was killed")  # Tune tries again
        return {"status": status}

    return attempt


def arguments(job: Series) -> list[str]:
    """What `python -m gqalib` is asked for; values go as JSON, which YAML reads."""
    numbers = ",".join(path.name[:2] for path in job.paths)
    pairs = [part for name, value in job.overrides.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    where = ["--run-dir", str(job.run_dir), "--notebooks-dir", str(Path(job.notebooks).absolute())]
    return ["run", "--preset", job.preset, "--seed", str(job.seed), "--only", numbers, *where, *pairs]


def attempts(job: Series) -> list[tuple[str, str]]:
    """Host of each attempt at a run, oldest first, and how it ended; from `log.txt`, which has all the starts."""
    log = job.run_dir / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    parts = re.split(r"^attempt on (\S+), pid \d+: .*\n", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], map(_end, parts[2::2]), strict=True))


def _end(said: str) -> str:
    """Why an attempt ended: the sentence after `error:` or `failed:`, or the last line of a traceback."""
    if not (exited := re.search(r"^exit status (-?\d+)\s*\Z", said, re.MULTILINE)):
        return "its worker died"
    if (status := int(exited[1])) == 0:
        return "finished"
    if status < 0 or status == KERNEL_DIED:
        return "its process was killed"
    said = said[: exited.start()].rstrip()
    if told := re.search(r"^(?:error|failed): (.*)(?:\n+(.*))?", said, re.MULTILINE):
        return ": ".join(filter(None, told.groups()))
    return said.rpartition("\n")[2].strip() or "it said nothing"


def what_failed(job: Series) -> str | None:
    """Why a run that was tried is not complete."""
    if is_complete(job):
        return None
    tries = attempts(job)
    end = tries[-1][1] if tries else "no worker began it"
    if end == "finished":
        return "model, corpus or code changed while it ran: start the grid again"
    again = end in ("its process was killed", "its worker died")
    return f"{end} at attempt {len(tries)}: see {job.run_dir / 'log.txt'}" if again else end


def gather(jobs: list[Series]) -> pd.DataFrame:
    """One row per run: what it is, seconds, attempts, error, and every metric of its finished notebooks."""
    rows = []
    for job in jobs:
        records = [read_record(job.run_dir / f"{path.stem}.json") for path in job.paths if job.is_finished(path)]
        seconds = sum(record["seconds"] for record in records)
        of_the_run = [job.run_dir.name, job.preset, job.seed, seconds, len(attempts(job)), what_failed(job)]
        settings = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in job.overrides.items()}
        rows.append(dict(zip(OF_THE_RUN, of_the_run, strict=True)) | settings | _metrics(records))
    return pd.DataFrame(rows)


def _metrics(records: list[dict[str, Any]]) -> dict[str, float]:
    """By name; a name that two notebooks use for different values is the later one's with its number before it."""
    metrics = {}
    for record in records:
        for name, metric in record["metrics"].items():
            same = metrics.get(name, metric["value"]) == metric["value"]
            metrics[name if same else f"{record['notebook'][:2]}.{name}"] = metric["value"]
    return metrics


def over_seeds(table: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Mean, standard deviation (of one seed: none) and count of each metric, a row per setting that the grid varies."""
    return table.groupby(_settings(table), sort=False, dropna=False)[metrics].agg(["mean", "std", "count"])


def _settings(table: pd.DataFrame) -> list[str]:
    """Preset and overrides that have more than one value, at least the preset."""
    names = ["preset", *(name for name in table if name in dotted_names())]
    return [name for name in names if table[name].nunique(dropna=False) > 1] or ["preset"]


def _pick(table: pd.DataFrame, pattern: re.Pattern) -> list[str]:
    """Metrics that a researcher looks at first; all, where none is of that name."""
    metrics = [name for name in table if name not in {*OF_THE_RUN, *dotted_names()}]
    return [name for name in metrics if pattern.match(name)] or metrics


def summary(table: pd.DataFrame, jobs: list[Series], folder: Path) -> str:
    """Means over seeds, which runs were retried and why, which failed, and where everything lies."""
    lines = ["", means(table).to_string(sparsify=False, line_width=140), ""]
    for job in jobs:
        why = ", ".join(f"attempt {i} on {host}: {end}" for i, (host, end) in enumerate(attempts(job)[:-1], 1))
        lines += [f"retried   {job.run_dir.name} ({why})"] if why else []
    failed = table[table["error"].notna()]
    lines += [f"failed    {name}: {error}" for name, error in zip(failed["run"], failed["error"], strict=True)]
    lines += [f"runs      {folder} ({len(table) - len(failed)} of {len(table)} runs complete)"]
    return "\n".join([*lines, f"table     {folder / 'grid.csv'}", f"figure    {folder / 'grid.png'}"])


def means(table: pd.DataFrame) -> pd.DataFrame:
    """A row per setting: what a researcher looks at first, as words, mean ± standard deviation over seeds."""
    numbers = [*_pick(table, SHOWN), "seconds"]
    found = over_seeds(table, numbers)
    return pd.DataFrame({name: [_plus_minus(*row) for row in found[name].to_numpy()] for name in numbers}, found.index)


def per_run(table: pd.DataFrame) -> pd.DataFrame:
    """A row per run: what it is, its settings, and what a researcher looks at first, rounded."""
    numbers = [*_pick(table, SHOWN), "seconds"]
    words = {name: [_plus_minus(value, 0, pd.notna(value)) for value in table[name]] for name in numbers}
    kept = {*OF_THE_RUN, *dotted_names(), *numbers}
    return table.assign(**words)[[name for name in table if name in kept and table[name].notna().any()]]


def _plus_minus(mean: float, std: float, count: float) -> str:
    """Four digits, and the deviation to the same place."""
    if not count:
        return "–"
    digits = max(0, 3 - math.floor(math.log10(abs(mean)))) if mean else 0
    return f"{mean:,.{digits}f}" + (f" ± {std:,.{digits}f}" if count > 1 else "")


def draw(table: pd.DataFrame, path: Path) -> None:
    """A panel per perplexity: over the numeric override with most values, a line for each setting of the others;
    logarithmic where values are more than twenty times apart."""
    metrics = [name for name in _pick(table, DRAWN) if table[name].notna().any()]
    metrics = [name for name in metrics if table[name].nunique() > 1] or metrics  # what nothing moves says nothing
    if not metrics:
        return path.unlink(missing_ok=True)
    settings = _settings(table)
    numeric = [name for name in settings if pd.api.types.is_numeric_dtype(table[name])]
    x = max(numeric, key=lambda name: table[name].nunique(), default=settings[0])
    lines, rows, columns = [name for name in settings if name != x], math.ceil(len(metrics) / 3), min(3, len(metrics))
    how = {"capsize": 3, "legend": False, "marker": "o", "linestyle": "-" if numeric else ""}
    fig = Figure(figsize=(3.6 * columns + 0.8, 3.0 * rows + 0.6), layout="constrained")
    fig.suptitle("mean ± std over seeds", fontsize="medium")
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for ax, metric in zip(axes, metrics):
        shown = over_seeds(table, [metric])[metric]
        shown = shown.unstack(lines) if lines else shown
        colours = viridis(np.linspace(0, 0.8, len(shown.columns) // 3))
        ticks = {} if numeric else {"xticks": range(len(shown)), "rot": 20}
        shown["mean"].plot(ax=ax, yerr=shown["std"].fillna(0), color=[*colours], **ticks, **how)
        ax.set(xlabel=x, ylabel=metric.replace("_", " "))
        ax.grid(alpha=0.25)
        for axis, values in {"y": table[metric], **({"x": table[x]} if numeric else {})}.items():
            if values.min() > 0 and values.max() > 20 * values.min():
                ax.set(**{f"{axis}scale": "log"})
                readable_log_axis(getattr(ax, f"{axis}axis"))
    for unused in axes[len(metrics) :]:
        unused.remove()
    if lines:
        fig.legend(*ax.get_legend_handles_labels(), title=", ".join(lines), loc="outside lower center", ncols=3)
    with replacing(path) as temporary:
        fig.savefig(temporary, format="png", dpi=150)
