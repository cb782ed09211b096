"""Every method at every size, on one model, one text and one budget.

    method(model, windows, fraction, multiple=1)

is as in `peers`; those in `NO_MULTIPLE` have no `multiple`. What a method has to find out first, it finds out within
the call. What of that is the same for every fraction is in `PREPARATIONS`: `frontier` does it once and counts it in
every row, so that seconds are always those of one call alone. Where a peer has a second way that may do better (FLAP by
head, LLM-Pruner without protection), both are here.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from torch import nn

from gqalib.errors import InputError
from gqalib.measure.cost import Used, measured, old_objects_left_alone
from gqalib.measure.memory import places
from gqalib.measure.perplexity import ratio_with_error, told_apart, window_losses
from gqalib.model.shapes import count_parameters, decoder_layers, size_of
from gqalib.peers import controls, depth, flap, llm_pruner, osscar, torch_pruning, two_ssp, wanda_sp
from gqalib.prune import allocate, founding, plans, refit, scores, search
from gqalib.run.presets import DEPTH, NO_MULTIPLE, PEERS, Pruning  # noqa: F401 notebooks read PEERS here
from gqalib.run.resume import NOT_KEPT, Progress


def founding_taylor(
    model: nn.Module, windows: torch.Tensor, fraction: float, removal: torch.Tensor | None = None, *,
    sequential: bool = True, multiple: int = 1,
) -> None:  # fmt: skip
    """The founding document's recipe: Σ |W ⊙ G|, on the model pruned so far or all at once; rates inverse to
    `removal_importance`."""
    removal = founding.removal_importance(model, windows) if removal is None else removal
    settings = Pruning(0.25, "inverse", alpha=1.0, min_rate=0.15, max_rate=0.5, channel_multiple=multiple)
    plan = founding.make_plan(model, removal, settings, mean_rate=fraction)
    founding.prune(model, plan, windows, sequential=sequential)


def refit_uniform(
    model: nn.Module, windows: torch.Tensor, fraction: float, covariances: allocate.Covariances | None = None, *,
    multiple: int = 1,
) -> None:  # fmt: skip
    """The sweep at the same rate in every layer."""
    refit.sweep(model, plans.uniform_plan(model, fraction, multiple=multiple), windows, covariances=covariances)


def refit_allocated(
    model: nn.Module, windows: torch.Tensor, fraction: float, prepared: tuple | None = None, multiple: int = 1
) -> None:
    """The sweep by the cheapest plan of the cost table; `prepared`: by `covariances_and_table`."""
    covariances, table = prepared or covariances_and_table(model, windows, multiple)
    refit.sweep(model, table.plan(fraction), windows, covariances=covariances)


def refit_in_context(
    model: nn.Module, windows: torch.Tensor, fraction: float, prepared: tuple | None = None, multiple: int = 1
) -> None:
    """The sweep by a plan that `search.in_context` finds with that table; every fourth window judges its candidates,
    which are fitted to the others; covariances and table are of all windows, so the judges are not wholly unseen.

    Raises:
        InputError: fewer than four windows.
    """
    if len(windows) < 4:
        raise InputError(f"{len(windows)} calibration windows are too few to keep every fourth apart: give at least 4")
    covariances, table = prepared or covariances_and_table(model, windows, multiple)
    judges = torch.arange(len(windows)) % 4 == 3
    trial = search.Trial(model, windows[~judges], covariances)
    found = search.in_context(trial, table, fraction, windows[judges], CANDIDATES)
    refit.sweep(model, found.plan, windows, covariances=covariances)


def covariances_and_table(
    model: nn.Module, windows: torch.Tensor, multiple: int = 1, progress: Progress = NOT_KEPT
) -> tuple[allocate.Covariances, allocate.CostTable]:
    """The gradients' covariances, and the cost table made of them."""
    covariances = progress.run(scores.gradient_covariances, model, windows)
    return covariances, progress.run(allocate.cost_table, model, windows, covariances, multiple=multiple)


OWN, IN_CONTEXT = "refit, allocated", "refit, in context"
CANDIDATES = 5  # of the search in context: about as many sweeps
METHODS: dict[str, Callable[..., object]] = {
    "random": controls.random,
    "magnitude": controls.magnitude,
    "Wanda-sp": wanda_sp.wanda_sp,
    "torch-pruning, GQA": torch_pruning.torch_pruning_gqa,
    "LLM-Pruner": partial(llm_pruner.llm_pruner, protect=True),
    "LLM-Pruner, all layers": partial(llm_pruner.llm_pruner, protect=False),
    "FLAP": partial(flap.flap, by_column=True),
    "FLAP, by head": partial(flap.flap, by_column=False),
    "ShortGPT": depth.shortgpt,
    "layer removal": depth.layer_removal,
    "OSSCAR": osscar.osscar,
    "2SSP": two_ssp.two_ssp,
    "founding Taylor": founding_taylor,
    "founding Taylor, one shot": partial(founding_taylor, sequential=False),
    "refit, uniform": refit_uniform,
    OWN: refit_allocated,
    IN_CONTEXT: refit_in_context,
}
PREPARATIONS: dict[str, Callable[[nn.Module, torch.Tensor], object]] = {  # the fourth argument
    "layer removal": founding.removal_importance,
    "founding Taylor": founding.removal_importance,
    "founding Taylor, one shot": founding.removal_importance,
    "refit, uniform": scores.gradient_covariances,
    OWN: covariances_and_table,
    IN_CONTEXT: covariances_and_table,
}
STAGES = "all gradients", "gradient covariances", "sweep", "context"  # of `memory`: what the methods need most for
MEASURED = "seconds peak_mib parameters_kept_percent backbone_removed_percent perplexity ratio error".split()
IMPOSSIBLE = (InputError, torch.OutOfMemoryError)
CLOSE = 1.5  # percentage points of the backbone: what is nearer than this to the fraction asked counts as met


@dataclass(frozen=True)
class Prepared:
    """What a preparation found, and what it took."""

    found: object
    used: Used


def prepare(name: str, dense: nn.Module, windows: torch.Tensor, multiple: int = 1) -> Prepared | None:
    """The part of a method that is the same for every fraction, on a copy; None if there is none, or if it fails."""
    if name not in PREPARATIONS:
        return None
    model = copy.deepcopy(dense)
    try:
        with measured(*places(dense)) as used:
            options = {"multiple": multiple} if PREPARATIONS[name] is covariances_and_table else {}
            found = PREPARATIONS[name](model, windows, **options)
    except IMPOSSIBLE:  # the method will run into it again, and its row will say so
        return None
    return Prepared(found, used)


def try_method(
    name: str, dense: nn.Module, windows: torch.Tensor, fraction: float, test: torch.Tensor, reference: torch.Tensor,
    prepared: Prepared | None = None, multiple: int = 1,
) -> dict[str, object]:  # fmt: skip
    """One method at one size, on a copy of the dense model.

    Args:
        windows, test: token ids [count, length]. reference: the dense model's `window_losses` on `test`.
        multiple: of which the channels that stay are a whole number, for all but `NO_MULTIPLE`.

    Returns:
        What was asked and what was removed, perplexity, its ratio to the dense model's with the paired standard error,
        seconds and peak memory of the pruning, the `losses` of each test window in nats. Where the method cannot do it:
        NaN and a `note`.
    """
    model, known = copy.deepcopy(dense), prepared.used if prepared else Used()
    options = {"multiple": multiple} if multiple > 1 and name not in NO_MULTIPLE else {}
    row = {"method": name, "fraction": fraction, "note": ""}
    try:
        with measured(*places(dense)) as used:
            METHODS[name](model, windows, fraction, *([prepared.found] if prepared else []), **options)
        if name not in DEPTH:
            check_budget(model, dense, fraction, **options)
    except IMPOSSIBLE as error:
        return row | dict.fromkeys(MEASURED, math.nan) | {"note": str(error), "losses": None}
    peak = max(known.peak_bytes, known.held_bytes + used.peak_bytes)
    row |= {"seconds": known.seconds + used.seconds, "peak_mib": peak / 2**20}
    return row | describe(model, dense, test, reference)


def describe(model: nn.Module, dense: nn.Module, test: torch.Tensor, reference: torch.Tensor) -> dict[str, object]:
    """How large a pruned model is and how well it reads the test text; arguments as in `try_method`."""
    losses = window_losses(model, test)
    ratio, error = ratio_with_error(losses, reference)
    quality = {"perplexity": losses.mean().exp().item(), "ratio": ratio, "error": error, "losses": losses.tolist()}
    return size_of(model, count_parameters(dense)) | quality


def check_budget(model: nn.Module, dense: nn.Module, fraction: float, multiple: int = 1) -> None:
    """Raises InputError if the backbone is off the fraction by more than one step: unequal sizes are no comparison."""
    backbone = count_parameters(dense)["backbone"]
    removed = backbone - count_parameters(model)["backbone"]
    channel = max(plans.unit_costs(layer)[1] for layer in decoder_layers(dense))
    if abs(removed - fraction * backbone) > multiple * channel:
        went = f"{removed / backbone:.2%} of the backbone went where {fraction:.2%} was asked"
        raise InputError(f"{went}: lower the fraction")


def frontier(
    dense: nn.Module, samples: Sequence[torch.Tensor], test: torch.Tensor, fractions: Sequence[float],
    methods: Sequence[str] = tuple(METHODS), progress: Progress = NOT_KEPT, multiple: int = 1,
) -> pd.DataFrame:  # fmt: skip
    """One row of `try_method` per method, calibration sample and fraction. `progress` keeps the rows."""
    reference, known = window_losses(dense, test), {}
    progress = progress.of("frontier", dense, list(samples), test, multiple)

    def try_it(name: str, sample: int, fraction: float) -> dict[str, object]:
        preparation = PREPARATIONS.get(name), sample
        if preparation not in known:
            known[preparation] = prepare(name, dense, samples[sample], multiple)
        row = try_method(name, dense, samples[sample], fraction, test, reference, known[preparation], multiple)
        return {"sample": sample} | row

    cells = itertools.product(methods, range(len(samples)), fractions)
    with old_objects_left_alone():
        return pd.DataFrame([progress.once("{}-{}-{}".format(*cell), partial(try_it, *cell)) for cell in cells])


# ---------------------------------------------------------------- reading it


def as_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Perplexity / dense in readable numbers, methods down and fractions across: the mean over samples and, of
    several, their range.

    – where a method cannot do it, ∞ where nothing is left of the model; `at` what was removed where that is not what
    was asked.

    Args:
        rows: of `frontier`, or of a record's table.
    """
    cells = {key: _cell(group) for key, group in rows.groupby(["method", "fraction"])}
    names, fractions = rows["method"].unique(), sorted(rows["fraction"].unique())
    table = {f"{100 * fraction:g} %": [cells.get((name, fraction), "–") for name in names] for fraction in fractions}
    return pd.DataFrame(table, index=pd.Index(names, name="method"))


def _cell(rows: pd.DataFrame) -> str:
    done = rows[rows["note"] == ""]
    if done.empty:
        return "–"
    ratios = done["ratio"].astype(float).fillna(math.inf)  # a record has null for infinity
    least, most = _short(ratios.min()), _short(ratios.max())
    spread = f" ({least}–{most})" if least != most else ""  # of what reads no text there is none
    removed, asked = done["backbone_removed_percent"].mean(), 100 * done["fraction"].iloc[0]
    return _short(ratios.mean()) + spread + (f" at {removed:.0f} %" if abs(removed - asked) > CLOSE else "")


def _short(ratio: float) -> str:
    return f"{ratio:,.{2 if ratio < 10 else 1 if ratio < 100 else 0}f}".replace("inf", "∞")


def against_peers(rows: pd.DataFrame, own: str = OWN, peers: Sequence[str] = tuple(PEERS)) -> pd.DataFrame:
    """The own method beside the best peer, one row per fraction; a peer that removed less than was asked does not
    count.

    Returns:
        Ratio to dense of both, `own` and `best` (geometric mean over the samples that both were tried on), the name of
        that `peer`, `times` = own / best with its paired standard error over the test windows, and a `verdict`: ahead
        or behind by more than two errors, or not told apart.
    """
    enough = rows["backbone_removed_percent"] > 100 * rows["fraction"] - CLOSE
    done = rows[(rows["note"] == "") & enough]
    done = done.assign(ratio=done["ratio"].astype(float).fillna(math.inf))  # a record has null for an infinite one
    fractions = sorted(rows["fraction"].unique())
    return pd.DataFrame([_against(done[done["fraction"] == f], own, peers) | {"fraction": f} for f in fractions])


def _against(done: pd.DataFrame, own: str, peers: Sequence[str]) -> dict[str, object]:
    ratios = {name: math.exp(group["ratio"].map(math.log).mean()) for name, group in done.groupby("method")}
    best = min((name for name in peers if name in ratios), key=ratios.get, default=None)
    if own not in ratios or best is None:
        found = {"own": ratios.get(own, math.nan), "peer": best, "best": ratios.get(best, math.nan)}
        return found | {"times": math.nan, "error": math.nan, "verdict": "no comparison"}
    both = [done[done["method"] == name].set_index("sample") for name in (own, best)]
    shared = both[0].index.intersection(both[1].index)  # calibration samples that both were tried on
    first, second = (math.exp(rows["ratio"].loc[shared].map(math.log).mean()) for rows in both)
    losses = (torch.tensor(rows["losses"].loc[shared].tolist(), dtype=torch.float64).mean(0) for rows in both)
    times, error = ratio_with_error(*losses)
    verdict = told_apart(times, error)
    verdict = {"better": "ahead", "worse": "behind"}.get(verdict, verdict)
    return {"own": first, "peer": best, "best": second, "times": times, "error": error, "verdict": verdict}
