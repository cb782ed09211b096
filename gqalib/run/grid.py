"""Sweeps: a grid of presets × overrides × seeds, checked before anything starts, and what came of it in one table and one figure.

Every run has a folder of its own under the sweep's, as `python -m gqalib run` would have written it, so that a sweep that is started
again keeps what is finished. `tasks` runs them.
"""

import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure

from gqalib.errors import InputError, read_text
from gqalib.figures import readable_log_axis
from gqalib.run import tasks
from gqalib.run.notebook import NOTEBOOKS, default_run_dir, numbered_notebooks, read_record, write_atomically
from gqalib.run.presets import check_name, dotted_names, number_or_text
from gqalib.run.resume import replacing
from gqalib.run.series import Series, locked, reads

KEYS = ["preset", "presets", "notebooks", "seeds", "overrides", "num_cpus", "num_gpus", "max_retries"]
OF_THE_RUN = ["run", "preset", "seed", "seconds", "attempts", "error"]  # columns beside overrides and metrics
SHOWN = re.compile(
    r"perplexity_|ratio_|.*kept_percent$"
)  # metrics of the printed table where there are such; the file has all
DRAWN = re.compile(r"perplexity_|ratio_")


@dataclass(frozen=True)
class Grid:
    """What a grid file may say. Every combination of preset, overrides and seed is one run."""

    presets: list[str] = field(default_factory=lambda: ["tiny"])
    notebooks: list[str] | None = None  # numbers; None: the whole series
    seeds: list[int] = field(default_factory=lambda: [0])
    overrides: dict[str, list[Any]] = field(default_factory=dict)  # dotted name → the values to try
    num_cpus: int = 1  # of one run: cores reserved, and torch's threads
    num_gpus: float = 0  # of one run; below 1 several share a card, with 0 the cards are hidden
    max_retries: int = 2  # of a run whose worker died


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys; here they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"the grid has {key} twice: write its values into one list")
        return super().construct_mapping(node, deep)


def read_grid(path: Path) -> Grid:
    """A grid file, every key and list of it checked.

    Raises:
        InputError: it is missing, unreadable or empty, a key is unknown, a list is none, empty or names something twice, or a number cannot be.
    """
    data = _read(path)
    for key in data:
        check_name(key, KEYS, "key of a grid")
    if {"preset", "presets"} <= data.keys():
        raise InputError("the grid has both preset and presets: keep one")
    if "preset" in data:
        data["presets"] = [data.pop("preset")]
    overrides = data.get("overrides", {})
    if not isinstance(overrides, dict):
        raise InputError(
            f"overrides = {overrides!r} are no names with values: write for example pruning.mean_rate: [0.2, 0.3] under it"
        )
    for name in overrides:
        check_name(name, dotted_names())
    data["overrides"] = {
        name: _values(name, [number_or_text(value) for value in _values(name, values)])
        for name, values in overrides.items()
    }
    for key in data.keys() & {"presets", "notebooks", "seeds"}:
        data[key] = _values(key, data[key])
    if "notebooks" in data:  # YAML reads 01 as 1
        data["notebooks"] = _values(
            "notebooks", [f"{n:02d}" if type(n) is int else str(n)[:2] for n in data["notebooks"]]
        )
    grid = Grid(**data)
    _check_numbers(grid)
    return grid


def _read(path: Path) -> dict[str, Any]:
    text = read_text(path, "grid")
    try:
        data = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise InputError(f"grid {path} is no YAML: {' '.join(str(error).split())}") from error
    if not data:
        raise InputError(f"grid {path} is empty: write for example seeds: [0, 1]")
    if not isinstance(data, dict):
        raise InputError(f"grid {path} has no keys: write for example seeds: [0, 1]")
    return data


def _values(name: str, values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise InputError(f"{name} = {values!r} is no list: write {name}: [{values}]")
    if not values:
        raise InputError(f"{name} is an empty list: give it a value, or leave it out")
    for value in values:
        if values.count(value) > 1:
            raise InputError(f"{name} has {value!r} twice: once is enough, seeds make repetitions")
    return values


def _check_numbers(grid: Grid) -> None:
    whole = {"num_cpus": 1, "max_retries": 0}
    numbers = [(name, getattr(grid, name), least) for name, least in whole.items()] + [
        ("seeds", seed, 0) for seed in grid.seeds
    ]
    for name, value, least in numbers:
        if type(value) is not int or not least <= value < 2**32:
            raise InputError(f"{name} = {value!r} cannot be: give a whole number from {least}")
    gpus = grid.num_gpus
    if type(gpus) not in (int, float) or not 0 <= gpus < math.inf or (gpus > 1 and gpus != int(gpus)):
        raise InputError(
            f"num_gpus = {gpus!r} cannot be: give 0, a part of a card such as 0.5, or a whole number of cards"
        )


def expand(grid: Grid, folder: Path, notebooks: Path = NOTEBOOKS) -> list[Series]:
    """One series for each run, in a folder of its own, with everything checked that can be checked before it starts.

    Raises:
        InputError: a preset, a value, a model, a corpus or a notebook cannot be, or a notebook reads another that is not in the grid.
    """
    _check_notebooks(grid, notebooks)
    only = None if grid.notebooks is None else ",".join(grid.notebooks)
    jobs = []
    for preset, *values, seed in itertools.product(grid.presets, *grid.overrides.values(), grid.seeds):
        overrides = dict(zip(grid.overrides, values, strict=True))
        place = folder / run_name(str(preset), overrides, seed)
        jobs.append(Series(preset, overrides, place, seed, only=only, notebooks=notebooks))
    return jobs


def run_name(preset: str, overrides: dict[str, Any], seed: int) -> str:
    """A folder's name that says what the run is; what a folder cannot be called is shortened, with a hash of it."""
    name = ",".join([preset, *(f"{key}={value}" for key, value in overrides.items()), f"seed={seed}"])
    plain = re.sub(r"[^\w.,=+-]", "_", name)
    return (
        name if plain == name and len(name) <= 120 else f"{plain[:100]},{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    )


def _check_notebooks(grid: Grid, notebooks: Path) -> None:
    series = {path.name[:2]: path for path in numbered_notebooks(notebooks)}
    for number in grid.notebooks or ():
        check_name(number, list(series), "notebook")
    chosen = [path for number, path in series.items() if grid.notebooks is None or number in grid.notebooks]
    for path in chosen:
        for name in reads(path):
            if name not in {other.stem for other in chosen}:
                raise InputError(f'notebook {path.stem} reads {name}: add "{name[:2]}" to the notebooks of the grid')


def sweep(
    path: Path, folder: Path | None = None, force: bool = False, address: str | None = None, notebooks: Path = NOTEBOOKS
) -> int:
    """Run what of a grid is not finished, a line each; then write `sweep.csv` and `sweep.png` and print the means over seeds.

    Returns the number of runs that failed.

    Raises:
        InputError: the grid or something that it names cannot be, or another sweep is working in the folder.
    """
    grid = read_grid(path)
    folder = Path(folder).absolute() if folder else default_run_dir(f"sweep-{Path(path).stem}")
    jobs = expand(grid, folder, notebooks)
    with locked(folder):
        for job in jobs if force else ():
            shutil.rmtree(job.run_dir, ignore_errors=True)
        left = [job for job in jobs if not is_complete(job)]
        print(f"{len(jobs)} runs, {len(jobs) - len(left)} finished before", flush=True)
        errors = _run(left, grid, address)
        table = gather(jobs, errors)
        write_atomically(folder / "sweep.csv", table.to_csv(index=False))
        draw(table, folder / "sweep.png")
        print(report(table, jobs, folder))
    return len(errors)


def is_complete(job: Series) -> bool:
    """Whether every notebook of a run is finished, as `python -m gqalib run` would judge."""
    return all(job.is_finished(path) for path in job.paths)


def _run(jobs: list[Series], grid: Grid, address: str | None) -> dict[Path, str]:
    """Returns what went wrong, by run folder."""
    errors = {}
    ended = tasks.run_all(jobs, grid.num_cpus, grid.num_gpus, grid.max_retries, address) if jobs else ()
    for i, (job, error) in enumerate(ended, 1):
        if not error and not is_complete(job):
            error = "model, corpus or code changed while it ran: start the sweep again"
        if error:
            errors[job.run_dir] = error
        print(f"[{i}/{len(jobs)}] {job.run_dir.name:40s} {'failed: ' + error if error else 'finished'}", flush=True)
    return errors


def gather(jobs: list[Series], errors: dict[Path, str] | None = None) -> pd.DataFrame:
    """One row per run: what it is, seconds, attempts, error, and every metric of its finished notebooks."""
    rows = []
    for job in jobs:
        records = [read_record(job.run_dir / f"{path.stem}.json") for path in job.paths if job.is_finished(path)]
        values = {
            name: json.dumps(value) if isinstance(value, list) else value for name, value in job.overrides.items()
        }
        seconds, attempts = sum(record["seconds"] for record in records), len(tasks.read_attempts(job.run_dir))
        of_the_run = [job.run_dir.name, job.preset, job.seed, seconds, attempts, (errors or {}).get(job.run_dir)]
        rows.append(dict(zip(OF_THE_RUN, of_the_run, strict=True)) | values | _metrics(records))
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
    """Mean, standard deviation (of one seed: none) and count of each metric, one row per setting that the grid varies."""
    return table.groupby(_settings(table), sort=False, dropna=False)[metrics].agg(["mean", "std", "count"])


def _settings(table: pd.DataFrame) -> list[str]:
    """Preset and overrides that have more than one value, at least the preset."""
    names = ["preset", *(name for name in table if name in dotted_names())]
    return [name for name in names if table[name].nunique(dropna=False) > 1] or ["preset"]


def _pick(table: pd.DataFrame, pattern: re.Pattern) -> list[str]:
    """Metrics that a researcher looks at first; all, where none is of that name."""
    metrics = [name for name in table if name not in {*OF_THE_RUN, *dotted_names()}]
    return [name for name in metrics if pattern.match(name)] or metrics


def report(table: pd.DataFrame, jobs: list[Series], folder: Path) -> str:
    """Means over seeds, which runs were retried and why, which failed, and where everything lies."""
    means = over_seeds(table, [*_pick(table, SHOWN), "seconds"])
    shown = pd.DataFrame(
        {name: [_plus_minus(*row) for row in means[name].to_numpy()] for name in means.columns.unique(0)}, means.index
    )
    lines = ["", shown.to_string(sparsify=False, line_width=140), ""]
    for job in jobs:
        attempts = tasks.read_attempts(job.run_dir)
        if len(attempts) > 1:
            why = ", ".join(
                f"attempt {i} on {a['host']}: {a['ended'] or tasks.WORKER_DIED}" for i, a in enumerate(attempts[:-1], 1)
            )
            lines.append(f"retried   {job.run_dir.name} ({why})")
    failed = table[table["error"].notna()]
    lines += [f"failed    {name}: {error}" for name, error in zip(failed["run"], failed["error"], strict=True)]
    complete = f"{len(table) - len(failed)} of {len(table)} runs complete"
    return "\n".join(
        [
            *lines,
            f"runs      {folder} ({complete})",
            f"table     {folder / 'sweep.csv'}",
            f"figure    {folder / 'sweep.png'}",
        ]
    )


def _plus_minus(mean: float, std: float, count: float) -> str:
    """Four digits, and the deviation to the same place."""
    if not count:
        return "–"
    digits = max(0, 3 - math.floor(math.log10(abs(mean)))) if mean else 0
    return f"{mean:,.{digits}f}" + (f" ± {std:,.{digits}f}" if count > 1 else "")


def draw(table: pd.DataFrame, path: Path) -> None:
    """A panel per perplexity: over the numeric override with most values, a line for each setting of the others."""
    metrics = [name for name in _pick(table, DRAWN) if table[name].notna().any()]
    metrics = [name for name in metrics if table[name].nunique() > 1] or metrics  # what nothing moves says nothing
    if not metrics:
        return path.unlink(missing_ok=True)
    means = over_seeds(table, metrics)
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    fig = Figure(figsize=(3.6 * columns + 0.8, 3.0 * rows + 0.6), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for ax, metric in itertools.zip_longest(axes, metrics):
        _panel(ax, means[metric].reset_index(), _settings(table), metric) if metric else ax.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        fig.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), fontsize=9, frameon=False)
    if table["seed"].nunique() > 1:
        fig.suptitle(f"mean and standard deviation over {table['seed'].nunique()} seeds", fontsize=9)
    with replacing(path) as temporary:
        fig.savefig(temporary, format="png", dpi=150)


def _panel(ax: plt.Axes, means: pd.DataFrame, settings: list[str], metric: str) -> None:
    """One metric: `means` has a column for each setting, and mean and std."""
    numeric = [name for name in settings if pd.api.types.is_numeric_dtype(means[name]) and means[name].nunique() > 1]
    x = max(numeric, key=lambda name: means[name].nunique(), default=None)
    others = [name for name in settings if name != x]
    if x is None:
        means = means.assign(**{"": range(len(means))})
        ax.set_xticks(means[""], [_label(row, others) for _, row in means.iterrows()], rotation=20, ha="right")
    groups = list(means.groupby(others, sort=False, dropna=False)) if others and x else [("", means)]
    for i, (_, group) in enumerate(groups):
        colour = plt.cm.viridis(0.85 * i / max(1, len(groups) - 1))
        ax.errorbar(
            group[x or ""], group["mean"], group["std"].fillna(0), label=_label(group.iloc[0], others), color=colour,
            marker="os^DvXP*"[i % 8], linestyle="-" if x else "", capsize=3,
        )  # fmt: skip
    _scales(ax, means, x)
    ax.set(xlabel=x or "", ylabel=metric.replace("_", " "))


def _label(row: pd.Series, names: list[str]) -> str:
    return ", ".join(str(row[name]) if name == "preset" else f"{name.split('.')[-1]} {row[name]}" for name in names)


def _scales(ax: plt.Axes, means: pd.DataFrame, x: str | None) -> None:
    """Logarithmic where values are more than twenty times apart; ticks at the values that were run."""
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.ticklabel_format(axis="y", useOffset=False)
    if means["mean"].min() > 0 and means["mean"].max() > 20 * means["mean"].min():
        ax.set_yscale("log")
        readable_log_axis(ax.yaxis)
    if x:
        if means[x].min() > 0 and means[x].max() > 20 * means[x].min():
            ax.set_xscale("log")
        values = np.unique(means[x])
        ax.set_xticks(values, [f"{value:,.10g}" for value in values], minor=False)
        ax.minorticks_off()
