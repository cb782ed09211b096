"""Records: one JSON file per executed notebook, from which README, figures and the report are made.

A notebook holds one `Notebook`: it reads the preset, finds upstream records, collects metrics, tables and figures, and
writes everything at the very end, atomically. A notebook that was killed leaves no record, but it does leave its
progress, from which the next run goes on.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import quote

import datasets
import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers
from IPython.display import Markdown, display
from torch import nn

from gqalib import figures
from gqalib.errors import InputError, one_sentence
from gqalib.measure import memory
from gqalib.measure.cost import weight_bytes
from gqalib.measure.perplexity import evaluate_in
from gqalib.model.load import resolve_device
from gqalib.model.names import REPOSITORY, check_model
from gqalib.run.checks import NOTEBOOKS, code_of
from gqalib.run.corpora import BY_PATH, corpus_path
from gqalib.run.presets import Preset, load_preset
from gqalib.run.resume import FRAME, PACKAGE, Part, Progress, alone_in, code_hash, lock, replacing, spent, unpack

SCHEMA = 1
COMMITTED = REPOSITORY / "data" / "results"
BASE = ("model", "corpus", "dtype", "evaluation_dtype", "device")  # what every notebook depends on
ASKED = ("answers", "budgets", "cost", "long_run")  # which sizes, trainings and questions: each part names its own
SHARED = "shared"  # the progress that belongs to no one notebook
HELD = "GQALIB_LOCKED"  # in the environment of the notebooks that a runner starts: the folder that it has locked
AT_ONCE = "GQALIB_AT_ONCE"  # how many notebooks the runner has running beside each other
COMMIT = "git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"  # says what is checked out
OTHER_TEXTS = {"frontier": "other_corpus", "answers": "other_text"}  # by their sections
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "torch-pruning")


def run_name(preset: str, overrides: dict[str, Any], seed: int) -> str:
    """A folder's name that says what a run is, `tiny+recovery.lora_r=16+seed=1`; a long one ends in a hash of it."""
    changes = sorted(overrides.items()) + [("seed", seed)] * bool(seed)
    name = quote("+".join([preset, *(f"{key}={value}" for key, value in changes)]), safe=" ,+=[]")  # one folder
    return name if len(name) <= 120 else f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def default_run_dir(preset: str, overrides: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """`run_name` in the repository's `runs`, or under `$GQALIB_RUNS`."""
    runs = Path(os.environ.get("GQALIB_RUNS", REPOSITORY / "runs"))
    return runs.expanduser().absolute() / run_name(preset, overrides or {}, seed)


def read_record(path: Path) -> dict[str, Any]:
    """A record, whole and of this schema.

    Raises:
        InputError: it is missing, torn or of another schema.
    """
    name = path.stem
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"run {name} first: {path} is missing") from error
    except ValueError as error:
        raise InputError(f"{path} is torn: delete it and run {name} again") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or record.get("notebook") != name:
        raise InputError(f"{path} is no record of {name} in schema {SCHEMA}: delete it and run {name} again")
    return record


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def progress_dir(run_dir: Path, name: str = "") -> Path:
    """Where a notebook keeps what its long stages found, under what that depends on; `--force` forgets it. Without a
    name that of all notebooks, which stands packed beside a preset's committed records, too."""
    return run_dir / "progress" / name


def fingerprints(parameters: dict[str, Any]) -> dict[str, str]:
    """What tells that a local model, or a text that these parameters name, has been replaced: names, sizes and times of
    its files, hashed."""
    texts = {name: parameters.get(name) for name in ("corpus", "instructions")}
    texts |= {name: parameters.get(of, {}).get(name) for of, name in OTHER_TEXTS.items()}
    places = {name: corpus_path(text) for name, text in texts.items() if text and text.startswith(BY_PATH)}
    places["model"] = Path(check_model(parameters["model"]))
    return {name: _fingerprint(place) for name, place in places.items() if place.exists()}


def _fingerprint(place: Path) -> str:
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def find_record(name: str, run_dir: Path, parameters: dict[str, Any], seed: int) -> Path:
    """The record of a notebook for these parameters: in the run's folder, the preset's plain one or the repository's.

    Raises:
        InputError: there is none, or all that are there are torn or were made with other parameters.
    """
    preset, problems = parameters["name"], []
    paths = [folder / f"{name}.json" for folder in (run_dir, default_run_dir(preset), COMMITTED / preset)]
    for path in [path for path in paths if path.exists()] or paths[:1]:
        try:
            fitting_record(path, parameters, seed)
            return path
        except InputError as error:
            problems.append(error)
    raise problems[0]


def fitting_record(path: Path, parameters: dict[str, Any], seed: int) -> dict[str, Any]:
    """A record that was made with these values of the sections that its notebook reads, and, unless it was committed,
    with the files that they name.

    Raises:
        InputError: as `read_record`, or it was made with others.
    """
    record, now = read_record(path), json.loads(json.dumps(parameters))
    changed = [name for name, value in record["parameters"].items() if now.get(name) != value]
    if not changed and COMMITTED not in path.parents:
        read = fingerprints({name: now[name] for name in record["parameters"]})
        changed = [f"file of {name}" for name in sorted(dict(read.items() ^ record["inputs"].items()))]
    if changed or record["seed"] != seed:
        what = f"{path.stem} was made with another {', '.join(changed) or 'seed'}"
        raise InputError(f"{what}: run {path.stem} again with these parameters")
    return record


def committed_seconds(name: str, preset: str, results: Path = COMMITTED) -> float:
    """How long a notebook took in the committed run of a preset; 0 where there is none."""
    with contextlib.suppress(InputError):
        return read_record(results / preset / f"{name}.json")["seconds"]
    return 0.0


def code_used(path: Path, without: tuple[str, ...] = ()) -> str:
    """`code_hash` of a notebook in the working folder or the repository; of the whole library if it is in neither."""
    place = next((p for p in (path, NOTEBOOKS / path.name) if p.is_file()), None)
    modules = (module.relative_to(PACKAGE.parent) for module in PACKAGE.rglob("*.py"))
    sources = code_of(place) if place else [f"from {'.'.join(m.parts[:-1])} import {m.stem}" for m in modules]
    return code_hash("\n".join(sources), without)


@contextlib.contextmanager
def locked(run_dir: Path, shared: bool = False) -> Iterator[None]:
    """One runner at a time in a folder, or several open notebooks (`shared`); however a process ends, its lock goes."""
    with one_sentence(f"run folder {run_dir} cannot be written", "give another --run-dir"):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    with file:
        others = "another run" if shared else "another run, or a notebook that is open,"
        lock(file, f"{others} is working in {run_dir}: wait for it, or give another --run-dir", shared)
        try:
            yield
        finally:
            if [path.name for path in run_dir.glob("*")] == [".lock"]:  # nothing came of it; a folder may be gone
                shutil.rmtree(run_dir)


class Sections:
    """The sections of a preset that a notebook says it reads."""

    def __init__(self, preset: Preset, names: Sequence[str]):
        vars(self).update({name: getattr(preset, name) for name in names})

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the notebook does not say that it reads {name!r}: add it to `reads`, in Notebook(…)")


class Notebook:
    """The handle of one executed notebook. Creating it seeds Python, numpy and torch.

    Args:
        reads: the sections of the preset that the notebook's results depend on, beside `BASE`; it is given no others.
        run_dir: where it reads and writes (default: the preset's, or that of these overrides).

    `$GQALIB_PRESET` overrules `preset`: the tests run the committed notebooks at a small scale with it.
    """

    def __init__(
        self, name: str, preset: str, overrides: dict[str, Any], run_dir: str | Path = "", seed: int = 0,
        reads: Sequence[str] = (),
    ):  # fmt: skip
        preset = os.environ.get("GQALIB_PRESET", preset)
        self.name, self.seed, self.overrides = name, seed, overrides
        whole = load_preset(preset, overrides)
        self.parameters, self.preset = asdict(whole), Sections(whole, (*BASE, *reads))
        self.run_dir = Path(run_dir).absolute() if run_dir else default_run_dir(preset, overrides, seed)
        self._lock = contextlib.ExitStack()
        if os.environ.get(HELD) != str(self.run_dir):  # else the runner that started this notebook has it
            self._lock.enter_context(locked(self.run_dir, shared=True))
        unpack(sorted(progress_dir(COMMITTED / preset).glob("*.tar.gz")), progress_dir(self.run_dir))
        self.metrics, self.tables, self.texts, self.captions = {}, {}, {}, {}
        self.artefacts, self.stages, self.read = [], [], {}
        self._started = spent()
        transformers.set_seed(seed)
        evaluate_in(whole.evaluation_dtype)
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        figures.use_style()

    def upstream(self, name: str) -> dict[str, Any]:
        """The record of an earlier notebook: of this run, of the preset's plain run, or the committed one.

        Raises:
            InputError: it is missing, torn, or was made with other parameters.
        """
        path = find_record(name, self.run_dir, self.parameters, self.seed)
        if path.parent != self.run_dir:
            print(f"{name}: taken from {os.path.relpath(path.parent, REPOSITORY)}")
        self.read[name] = sha256(path)
        return read_record(path)

    def made(self, model: str, notebook: str) -> Path:
        """The folder of a model that an earlier notebook made, in this run or the preset's plain one; if it is
        missing, that is made up for, by one of those who ask at the same time."""
        with alone_in(progress_dir(self.run_dir, notebook) / "made"):
            for folder in dict.fromkeys((self.run_dir, default_run_dir(self.parameters["name"]))):
                with contextlib.suppress(InputError):
                    fitting_record(folder / f"{notebook}.json", self.parameters, self.seed)
                    if (folder / "models" / model).is_dir():
                        return folder / "models" / model
            self._make(model, notebook)
        return self.run_dir / "models" / model

    def _make(self, model: str, notebook: str) -> None:
        from gqalib.run.series import KERNEL_ENVIRONMENT, Series

        seconds = committed_seconds(notebook, self.parameters["name"])
        takes = f", in about {seconds:.0f} s" if seconds else ""
        print(f"models/{model} is missing: {notebook} makes it{takes}", flush=True)
        job = Series(self.parameters["name"], self.overrides, self.run_dir, self.seed, only=notebook[:2])
        with patch.dict(os.environ, KERNEL_ENVIRONMENT | {HELD: str(self.run_dir)}):
            job.execute(job.paths[0])

    @contextlib.contextmanager
    def stage(
        self, name: str, model: nn.Module, shape: tuple[int, int], knob: str, copies: int = 0,
        of: Sequence[str] = (), **options: Any,
    ) -> Iterator[memory.Peak]:  # fmt: skip
        """A long step: states what memory it needs, or refuses; then states what it took, and lists it in the record.

        Args:
            name: as in `memory.expected`, or anything if it consists of several: `of`.
            shape: (windows, length) that go through it. knob: the parameter that lowers the need.
            copies: of the model that it makes. options: as in `memory.expected`.
        """
        terms = memory.expected(of or name, model, *shape, **options)
        terms |= {"copies": copies * weight_bytes(model)} if copies else {}
        before = Progress.spared
        with memory.stage(name, terms, model, f"lower {knob}") as peak:
            yield peak
        if earlier := Progress.spared - before:
            print(f"{name}: {earlier:.0f} s more in an earlier run, whose peak is not known")
            peak.peak_gb = math.nan
        self.stages.append({"stage": name, **asdict(peak), "seconds": peak.seconds + earlier})

    def metric(self, name: str, value: float, unit: str, error: float = math.nan) -> None:
        """A finite number for the record; with a standard `error`, also `name_low` and `name_high`, two errors away."""
        if isinstance(value, bool) or not math.isfinite(value):
            raise InputError(f"metric {name} = {value} is not finite: see the cell that computes it")
        self.metrics[name] = {"value": value if isinstance(value, int) else float(value), "unit": unit}
        if not math.isnan(error):
            self.metric(f"{name}_low", value - 2 * error, unit)
            self.metric(f"{name}_high", value + 2 * error, unit)

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """A table for the record, as a list of rows; what is not finite becomes null."""
        self.tables[name] = json.loads(frame.to_json(orient="records", double_precision=6))

    def text(self, name: str, value: str) -> None:
        self.texts[name] = value

    def progress(self, name: str) -> Progress:
        """Where a long computation keeps what it has done so far; calls with other arguments may share one.

        A run with another parameter, seed, model or corpus file, device or version of anything finds nothing in it; one
        that asks for more (`ASKED`), or where only the frame around the computation has changed, finds everything.
        """
        reasons = self._reasons() | {"library": code_used(Path(f"{self.name}.ipynb"), FRAME)}
        parameters = {section: value for section, value in reasons["parameters"].items() if section not in ASKED}
        return Progress(progress_dir(self.run_dir, self.name) / name, reasons | {"parameters": parameters}, self.name)

    def shared_progress(self, name: str, code: str) -> Progress:
        """`progress` that all notebooks of the run share, for what depends on its arguments, the run's model and
        machine, and what this `code` imports of the library, and on nothing else."""
        base = [self.parameters[key] for key in BASE]
        reasons = self._reasons() | {"parameters": base, "library": code_hash(code, FRAME)}
        return Progress(progress_dir(self.run_dir, SHARED) / name, reasons, self.name)

    def trained(self, name: str, train: Callable[[Path], Part], *of: Any, model: Path | None = None) -> Part:
        """What `train(folder)` comes to, kept as progress of these inputs (see `Progress.of`); the folder, where a
        killed training goes on, goes then. Where the `model` that it saves is gone, or another training has saved its
        own there since, it trains again."""
        every = self.progress("training")
        progress = every.of(*of) if of else every
        folder, saved = progress.folder / name, f"{progress.folder.name} {name}"
        if model and (progress.load(name) is None or not model.is_dir() or every.load(model.name) not in (None, saved)):
            progress.keep(name, None)  # trained anew
            every.keep(model.name, "")  # should this one be killed after it has saved
        result = progress.once(name, lambda: train(folder))
        if model:
            every.keep(model.name, saved)
        shutil.rmtree(folder, ignore_errors=True)
        return result

    def _reasons(self) -> dict[str, Any]:
        """What the results depend on, as far as it is not an argument of what computes them."""
        return {
            "parameters": {name: self.parameters[name] for name in vars(self.preset)},
            "seed": self.seed,
            "inputs": fingerprints({name: self.parameters[name] for name in ("model", "corpus")}),
            "library": code_used(Path(f"{self.name}.ipynb")),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "device": resolve_device(self.preset.device),
        }

    def artefact(self, name: str) -> Path:
        """A folder for a model, listed in the record."""
        self.artefacts.append(f"models/{name}")
        return self.run_dir / "models" / name

    def figure(self, fig: plt.Figure, name: str, caption: str) -> None:
        """Save a figure as PNG and SVG, listed in the record, and as PDF; show it with a caption, also its alt text."""
        folder = self.run_dir / "figures"
        folder.mkdir(exist_ok=True)
        for suffix in ("png", "svg"):
            file = f"{self.name[:2]}_{name}.{suffix}"
            fig.savefig(folder / file)
            self.artefacts.append(f"figures/{file}")
        figures.save_for_paper(fig, folder / f"{self.name[:2]}_{name}.pdf")  # the repository has no use for it
        self.captions[name] = caption
        plt.close(fig)  # else it would be shown once more, below its caption
        display(fig, metadata={"image/png": {"alt": caption}})
        display(Markdown(f"**Figure {int(self.name[:2])}.{len(self.captions)}.** {caption}"))

    def finish(self) -> None:
        """Write the record. What was kept on the way stays, for a run of which only words or figures have changed."""
        record = self.save()
        self._lock.close()
        found = f"{len(self.metrics)} metrics and {len(self.tables)} tables"
        print(f"{self.name}: {found} recorded after {record['seconds']:.0f} s")

    def save(self) -> dict[str, Any]:
        """Write the record of what there is so far, the stages as a table of it."""
        if self.stages:
            self.table("stages", pd.DataFrame(self.stages))
        reasons = self._reasons()
        record = {
            "schema": SCHEMA, "notebook": self.name, "preset": self.parameters["name"], **reasons,
            "inputs": fingerprints(reasons["parameters"]),  # of all texts: who asks is told whether to run again
            "overrides": self.overrides, "git_commit": _said_by(*COMMIT) or None,
            "machine": machine(self.preset.device), "upstream": self.read, "metrics": self.metrics,
            "tables": self.tables, "texts": self.texts, "captions": self.captions, "artefacts": self.artefacts,
            "seconds": round(spent() - self._started, 1),
        }  # fmt: skip
        write_atomically(self.run_dir / f"{self.name}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        return record


def machine(device: str) -> str:
    """What the figures were measured on: system and processor; where a card is used, the card, its driver and CUDA."""
    cpu = torch.backends.cpu.get_cpu_capability()
    words = [f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} cores", cpu]
    if (at_once := os.environ.get(AT_ONCE, "1")) != "1":
        words.append(f"{at_once} notebooks at a time")
    if resolve_device(device).startswith("cuda"):
        driver = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        words += [torch.cuda.get_device_name(), f"driver {driver}", f"CUDA {torch.version.cuda}"]
    return ", ".join(words)


def _said_by(*command: str) -> str:
    """What a command prints; nothing if it fails or is not there."""
    with contextlib.suppress(OSError):
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()
    return ""
