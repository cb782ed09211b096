"""Presets: everything that a run depends on, as data, checked once where it enters.

A preset is a YAML file in `gqalib/presets/`; an override is a dotted name and a value, `{"pruning.mean_rate": 0.5}`.
Unknown names, wrong types and impossible values are errors that name value and fix.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from gqalib.errors import InputError, read_text

FOLDER = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Evaluation:
    """Windows and sizes of the evaluation text; windows are capped by the model's `max_position_embeddings`."""

    short_window: int  # tokens; the founding document's protocol
    long_window: int  # tokens; the literature's
    num_tokens: int  # test tokens behind every reported perplexity
    quick_tokens: int  # test tokens behind each of the many perplexities of a sweep


@dataclass(frozen=True)
class Sample:
    """Windows spread over the training split."""

    num_examples: int
    length: int  # tokens

    @property
    def num_tokens(self) -> int:
        return self.num_examples * self.length


@dataclass(frozen=True)
class Pruning:
    """From layer importance to rates (METHODS: inverse, clipped, water-filled)."""

    mean_rate: float
    strategy: Literal["inverse", "proportional", "uniform"]
    alpha: float
    min_rate: float
    max_rate: float
    channel_multiple: int  # MLP widths that are cut become multiples of it


@dataclass(frozen=True)
class Recovery:
    """LoRA: what peft and trl are given."""

    learning_rate: float
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    num_epochs: float
    num_examples: int | None  # None: all
    batch_size: int
    gradient_accumulation_steps: int
    max_length: int  # tokens
    warmup_ratio: float
    lr_scheduler: str
    report_to: str


@dataclass(frozen=True)
class Frontier:
    """Every method at every size; windows are capped by the model's `max_position_embeddings`."""

    fractions: list[float]  # of the backbone removed
    calibration: Sample  # what every method reads, and the second half's refit
    test: Sample  # behind each perplexity
    seeds: int  # calibration samples drawn, each method runs on each
    other_corpus: str  # another text to calibrate on, as `corpus`


@dataclass(frozen=True)
class Search:
    """From the cost table to rates that were tried out."""

    fraction: float  # of the backbone removed
    candidates: int  # each is one sweep
    scoring: Sample  # training text apart from the calibration text, on which candidates are compared
    trials: int  # sweeps to find the rates for a target perplexity
    steps: int  # cuts of iterative pruning


@dataclass(frozen=True)
class Distillation:
    """Recovery by the dense model's logits: what is learned, on how much text, with which optimisers."""

    num_tokens: int = 1_000_000  # of text to learn from; 0 leaves the student as it is
    batch_tokens: int = 2048  # per optimiser step
    alpha: float = 1.0  # weight of the teacher's logits; 1 - alpha is the weight of the text's (or answer's) own tokens
    temperature: float = 1.0  # divides the logits of both before they are compared
    muon_lr: float = 0.01  # matrices of the layers; 0: AdamW takes them too
    adamw_lr: float = 1e-3  # embedding, norms, lm_head
    weight_decay: float = 0.0  # Muon's, towards zero
    warmup_steps: int = 10  # optimiser steps
    decay: float = 1.0  # the last fraction of the tokens, over which the rates fall linearly to `final_rate`
    final_rate: float = 0.02  # of the full rates
    lora_r: int = 0  # rank of a LoRA adapter; 0: all weights are trained
    lora_alpha: int = 16
    seed: int = 0  # order of the text, and the adapter's start

    @property
    def decay_tokens(self) -> float:
        return self.decay * self.num_tokens


@dataclass(frozen=True)
class Budgets:
    """Tokens of distillation for the runs that compare; `distillation.num_tokens` is for the one that has to be good."""

    compare: int  # each way of recovering, 10
    curve: list[int]  # how many tokens buy back how much, 10
    iterative: int  # one cut against several, 09


@dataclass(frozen=True)
class Prices:
    """What a GPU costs; a price without a date and a source is a rumour."""

    date: str
    gpu: str
    usd_per_gpu_hour: float
    tokens_per_month: float  # decoded; what the saving is counted on
    source: str


@dataclass(frozen=True)
class Cost:
    """How speed is measured and money is counted."""

    batch_sizes: list[int]
    contexts: list[
        int
    ]  # tokens of the prompt that is read, and of the cache that decoding attends to; capped by the model's
    min_run_s: float  # seconds of measurement per model and case
    prices: Prices


@dataclass(frozen=True)
class Preset:
    """One complete set of parameters."""

    name: str
    model: str  # folder, hub id or shape:NAME
    corpus: str  # python-docs | wikitext2 | c4 | random-tokens | file:PATH
    instructions: str  # python-docs | alpaca-cleaned | corpus | file:PATH
    dtype: Literal["float32", "bfloat16"]
    device: str  # auto | cpu | cuda | cuda:1 … | all (the layers spread over all cards)
    evaluation: Evaluation
    calibration: Sample
    removal: Sample
    pruning: Pruning
    recovery: Recovery
    frontier: Frontier
    search: Search
    distillation: Distillation
    budgets: Budgets
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# What the type does not say: dotted name → (test, what is allowed).
POSITIVE = (lambda v: v > 0, "a positive number")
RULES = {
    "pruning.mean_rate": (lambda v: 0 < v < 1, "a fraction between 0 and 1, such as 0.25"),
    "pruning.min_rate": (lambda v: 0 <= v < 1, "a fraction from 0 up to 1"),
    "pruning.max_rate": (lambda v: 0 < v < 1, "a fraction between 0 and 1"),
    "pruning.alpha": (lambda v: v >= 0, "zero or a positive number"),
    "recovery.lora_dropout": (lambda v: 0 <= v < 1, "a fraction from 0 up to 1"),
    "recovery.warmup_ratio": (lambda v: 0 <= v < 1, "a fraction from 0 up to 1"),
    "recovery.num_examples": (lambda v: v is None or v > 0, "a positive number, or null for all"),
    "frontier.fractions": (lambda v: v and all(0 < f < 1 for f in v), "a list of fractions between 0 and 1"),
    "search.fraction": (lambda v: 0 < v < 1, "a fraction between 0 and 1, such as 0.5"),
    "distillation.num_tokens": (lambda v: v >= 0, "zero or a positive number of tokens"),
    "distillation.alpha": (lambda v: 0 <= v <= 1, "a fraction from 0 to 1"),
    "distillation.muon_lr": (lambda v: v >= 0, "zero (AdamW for everything) or a positive number"),
    "distillation.weight_decay": (lambda v: v >= 0, "zero or a positive number"),
    "distillation.decay": (lambda v: 0 < v <= 1, "a fraction above 0, up to 1"),
    "distillation.final_rate": (lambda v: 0 <= v <= 1, "a fraction from 0 to 1"),
    "distillation.lora_r": (lambda v: v >= 0, "zero (all weights) or a rank"),
    "distillation.seed": (lambda v: v >= 0, "zero or a positive number"),
    "budgets.curve": (lambda v: v and min(v) > 0, "a list of positive numbers of tokens"),
    "cost.batch_sizes": (lambda v: v and min(v) > 0, "a list of positive batch sizes"),
    "cost.contexts": (lambda v: v and min(v) > 1, "a list of numbers of tokens, at least 2 each"),
    "evaluation.short_window": (lambda v: v > 1, "at least 2 tokens"),
    "evaluation.long_window": (lambda v: v > 1, "at least 2 tokens"),
}


def preset_names() -> list[str]:
    """The presets that can be asked for."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_preset(name: str, overrides: dict[str, Any] | None = None) -> Preset:
    """A preset with some of its values replaced.

    Raises:
        InputError: unknown preset or name, wrong type, or a value that cannot be.
    """
    if name not in preset_names():
        raise InputError(f"unknown preset {name!r}: use one of {', '.join(preset_names())}")
    data = _read(name)
    for dotted, value in (overrides or {}).items():
        _set(data, dotted, value)
    if {"corpus"} <= (overrides or {}).keys() and "instructions" not in overrides:
        data["instructions"] = "corpus"  # another text brings its own: python-docs rows would be a foreign language
    preset = _build(Preset, {"name": name, **data}, "")
    _check_bounds(preset)
    return preset


def _read(name: str) -> dict[str, Any]:
    """The values of a preset's file on top of those of its `base`, another preset, if it names one."""
    data = yaml.safe_load(read_text(FOLDER / f"{name}.yaml", "preset"))
    base = data.pop("base", None)
    return _merged(_read(base), data) if base else data


def _merged(base: dict, data: dict) -> dict:
    inner = {
        key: _merged(base[key], value)
        for key, value in data.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **data, **inner}


def dotted_names(cls: type = Preset, prefix: str = "") -> list[str]:
    """Every name that an override may have."""
    names = []
    for field in dataclasses.fields(cls):
        inner = dataclasses.is_dataclass(field.type)
        names += dotted_names(field.type, f"{prefix}{field.name}.") if inner else [prefix + field.name]
    return [name for name in names if name != "name"]


def check_name(name: Any, known: list[str], what: str = "parameter") -> None:
    """Raises InputError with the nearest known names if this is none of them."""
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 3, 0.5) or known
        raise InputError(f"unknown {what} {name!r}: did you mean {', '.join(near)}?")


def number_or_text(value: Any) -> Any:
    """YAML reads 1e-4 as text: a number if it can be one, everything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _set(data: dict, dotted: str, value: Any) -> None:
    check_name(dotted, dotted_names())
    *sections, last = dotted.split(".")
    for section in sections:
        data = data[section]
    data[last] = value


def _build(cls: type, data: dict, prefix: str):
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for name in data.keys() - fields.keys():
        raise InputError(f"unknown parameter {prefix + name!r}: use one of {', '.join(fields)}")
    for name in fields.keys() - data.keys():
        raise InputError(f"parameter {prefix + name!r} is missing: add it to the preset")
    return cls(**{name: _value(kind, data[name], prefix + name) for name, kind in fields.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, name + ".")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not _is(kind, value):
        expected = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind).replace("typing.", "")
        raise InputError(f"{name} = {value!r} is a {type(value).__name__}: give {expected}")
    default = POSITIVE if kind in (int, float) else (lambda v: True, "")
    allowed, text = RULES.get(name, default)
    if not allowed(value) or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{name} = {value!r} cannot be: give {text or 'a finite value'}")
    return value


def _is(kind: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin is types.UnionType:
        return any(_is(argument, value) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_is(arguments[0], item) for item in value)
    return isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))


def _check_bounds(preset: Preset) -> None:
    s = preset.pruning
    if not s.min_rate <= s.mean_rate <= s.max_rate:
        raise InputError(
            f"pruning.mean_rate = {s.mean_rate} is out of reach between pruning.min_rate = {s.min_rate} "
            f"and pruning.max_rate = {s.max_rate}: move a bound"
        )
