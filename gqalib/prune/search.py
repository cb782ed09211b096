"""Plans that are tried out: an evolution strategy on the cost table, and a search for the largest cut within a target.

The cost table adds its estimates up; errors in different layers act together. An evolution strategy, (1 + 1) with
Rechenberg's rule for the width of its steps, multiplies the table's rows by factors that differ smoothly from layer to
layer. Every candidate is the cheapest plan for its factors, so all are in the budget, and is tried out: pruned by the
whole sweep, and scored by KL to the dense logits on text that the sweep has not seen.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import nn

from gqalib.errors import InputError, OutOfReach
from gqalib.measure.perplexity import kl_to
from gqalib.measure.perplexity import perplexity as perplexity_of
from gqalib.model.shapes import count_parameters
from gqalib.model.surgery import take_layers
from gqalib.prune import refit
from gqalib.prune.allocate import CostTable, Covariances
from gqalib.prune.founding import Plan, uniform_plan
from gqalib.run.resume import NOT_KEPT, Progress

# ---------------------------------------------------------------- trying plans out


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    plan: Plan
    factors: np.ndarray  # on the table's rows, [2, layers], of the best plan that was found with the table
    history: pd.DataFrame  # per candidate: what it was, `kl` in nats per token, `best` so far


@dataclass(frozen=True)
class Trial:
    """How a plan is tried out: on a copy of the model, by the whole sweep."""

    model: nn.Module
    windows: torch.Tensor  # calibration text
    covariances: Covariances
    ingredients: refit.Ingredients = refit.RECIPE

    def __call__(self, plan: Plan, progress: Progress = NOT_KEPT) -> nn.Module:
        """The model that the sweep makes of a copy."""
        pruned = copy.deepcopy(self.model)
        refit.sweep(pruned, plan, self.windows, self.ingredients, covariances=self.covariances, progress=progress)
        return pruned


def evolve(
    trial: Trial,
    table: CostTable,
    fraction: float,
    scoring: torch.Tensor,
    candidates: int = 24,
    seed: int = 0,
    progress: Progress = NOT_KEPT,
) -> Found:
    """Search the factors of the table's rows for the plan whose model is nearest to the dense one.

    The first candidates are the uniform plan and the cheapest one; a step that helps makes the next 1.5 times as wide,
    one that does not makes it narrower, so that one in five helps.

    Args:
        scoring: windows [count, length] apart from the calibration text. candidates: sweeps in all, at least two.
        progress: keeps each candidate's score. All else, random numbers included, follows from scores and seed, and is
            made again; so a run with more candidates goes on as well.

    Raises:
        InputError: a fraction that no plan reaches.
    """
    progress = progress.of("evolve", trial, table, fraction, scoring, seed)

    def score_of(name: str) -> float:
        return progress.once(name, lambda: kl_to(trial.model, trial(plans[name]), scoring))

    generator, width, factors = np.random.default_rng(seed), 0.4, np.ones((2, len(table.steps)))
    uniform = uniform_plan(trial.model, fraction, multiple=table.multiple)
    plans = {"uniform": uniform, "cheapest": table.plan(fraction)}
    scores = {name: score_of(name) for name in plans}
    centre = scores["cheapest"]
    for number in range(1, candidates - 1):
        tried = factors * np.exp(width * smooth_noise(generator, factors.shape[1]))
        plans[f"step {number}"] = table.plan(fraction, tried)
        score = scores[f"step {number}"] = score_of(f"step {number}")
        width *= 1.5 if score < centre else 1.5**-0.25
        if score < centre:
            centre, factors = score, tried
    history = pd.DataFrame({"candidate": scores.keys(), "kl": scores.values()})
    best = history["candidate"][history["kl"].idxmin()]
    return Found(plans[best], factors, history.assign(best=history["kl"].cummin()))


def smooth_noise(generator: np.random.Generator, num_layers: int) -> np.ndarray:
    """Noise [2, layers] of variance about 1.5 that changes over an eighth of the depth, and moves attention and MLP
    as a whole."""
    length = max(1, num_layers // 8)
    kernel = np.full(length, length**-0.5)
    rows = [np.convolve(generator.standard_normal(num_layers + length - 1), kernel, "valid") for _ in range(2)]
    return np.stack(rows) + generator.standard_normal((2, 1)) * 0.7


def prune_to(
    trial: Trial,
    table: CostTable,
    scoring: torch.Tensor,
    *,
    kept: float | None = None,
    perplexity: float | None = None,
    trials: int = 7,
    progress: Progress = NOT_KEPT,
) -> pd.DataFrame:
    """Prune `trial.model` in place as far as a target allows, by the cheapest plan and the whole sweep.

    Args:
        scoring: windows [count, length] for the perplexities, apart from the calibration text.
        kept: the fraction of all parameters that is to stay; met within one unit, by one sweep.
        perplexity: the most it may become; the fraction that goes is narrowed down in `trials` sweeps.
        progress: keeps the perplexity of each sweep, and the layers of the one that is `kept`'s.

    Returns:
        One row per sweep: `fraction` of the backbone removed, `perplexity`, infinite where it is more than can go. The
        model is that of the largest fraction within the target, made by one more sweep; as it was where none is.

    Raises:
        InputError: not one target but none or two, one not above the dense perplexity, one that no plan reaches, or as
            `refit.sweep`; the model is as before.
    """
    if (perplexity is None) == (kept is None):
        raise InputError("prune_to needs one target: give either kept or perplexity")
    if kept is not None:
        counts = count_parameters(trial.model)
        fraction = (1 - kept) * counts["total"] / counts["backbone"]
        pruned = trial(table.plan(fraction), progress)
        rows = [{"fraction": fraction, "perplexity": perplexity_of(pruned, scoring)}]
    else:
        progress = progress.of("prune_to", trial, table, scoring, perplexity)
        pruned, rows = _narrow_down(trial, table, scoring, perplexity, trials, progress)
    take_layers(trial.model, pruned)
    return pd.DataFrame(rows)


def _narrow_down(
    trial: Trial, table: CostTable, scoring: torch.Tensor, limit: float, trials: int, progress: Progress
) -> tuple[nn.Module, list[dict]]:
    """The model of the largest fraction within the limit, and a row per sweep."""
    dense = perplexity_of(trial.model, scoring)
    if limit <= dense:
        raise InputError(
            f"a perplexity of {limit:.4g} is not above the dense model's {dense:.4g}: give a higher target"
        )
    low, high, rows = (0.0, dense), (1.0, math.inf), []
    for number in range(trials):
        fraction = _between(low, high, dense, limit)
        reached = progress.once(f"trial-{number}", partial(_reached, trial, table, fraction, scoring))
        rows.append({"fraction": fraction, "perplexity": reached})
        low, high = ((fraction, reached), high) if reached <= limit else (low, (fraction, reached))
    # made again, because to keep the best one meanwhile takes the memory of another model
    return trial(table.plan(low[0])) if low[0] else trial.model, rows


def _reached(trial: Trial, table: CostTable, fraction: float, scoring: torch.Tensor) -> float:
    """The perplexity with this fraction removed; infinity if the layers cannot lose as much."""
    try:
        plan = table.plan(fraction)
    except OutOfReach:
        return math.inf
    return perplexity_of(trial(plan), scoring)


def _between(low: tuple[float, float], high: tuple[float, float], dense: float, limit: float) -> float:
    """The next fraction to try, given fractions and their perplexities on both sides of the limit.

    The logarithm of the damage in nats grows about linearly with the fraction, so it is interpolated, a tenth of the
    way off the ends at least; half-way where an end has no damage or an infinite one.
    """
    damages = [math.log(value / dense) for value in (low[1], limit, high[1])]
    if damages[0] <= 0 or damages[2] == math.inf:
        return (low[0] + high[0]) / 2
    first, wanted, last = map(math.log, damages)
    return low[0] + (high[0] - low[0]) * min(max((wanted - first) / (last - first), 0.1), 0.9)
