"""Plans that are tried out: an evolution strategy on the cost table, and the largest cut within a perplexity.

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
from gqalib.measure.perplexity import kl_to, perplexity
from gqalib.model.surgery import take_layers
from gqalib.prune import refit
from gqalib.prune.allocate import CostTable, Covariances
from gqalib.prune.plans import Plan, uniform_plan
from gqalib.steps import in_steps


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

    def __call__(self, plan: Plan) -> nn.Module:
        """The model that the sweep makes of a copy."""
        pruned = copy.deepcopy(self.model)
        refit.sweep(pruned, plan, self.windows, self.ingredients, covariances=self.covariances)
        return pruned

    def kl(self, plan: Plan, scoring: torch.Tensor) -> float:
        """KL to the dense model, in nats per token of the windows `scoring`."""
        return kl_to(self.model, self(plan), scoring)


@in_steps("candidates")
def evolve(
    trial: Trial, table: CostTable, fraction: float, scoring: torch.Tensor, candidates: int = 24, seed: int = 0
) -> Found:
    """Search the factors of the table's rows for the plan whose model is nearest to the dense one; a step for each
    candidate, so that a run with more of them goes on.

    The first candidates are the uniform plan and the cheapest one; a change that helps makes the next 1.5 times as
    wide, one that does not makes it narrower, so that one in five helps.

    Args:
        scoring: windows [count, length] apart from the calibration text. candidates: sweeps in all, at least two.

    Raises:
        OutOfReach: a fraction that no plan reaches.
    """
    generator, width, factors = np.random.default_rng(seed), 0.4, np.ones((2, len(table.steps)))
    plans = {"uniform": uniform_plan(trial.model, fraction, multiple=table.multiple), "cheapest": table.plan(fraction)}
    scores = {}
    for name in plans:
        scores[name] = yield name, partial(trial.kl, plans[name], scoring)
    centre = scores["cheapest"]
    for number in range(1, candidates - 1):
        name, tried = f"step {number}", factors * np.exp(width * smooth_noise(generator, factors.shape[1]))
        plans[name] = table.plan(fraction, tried)
        scores[name] = yield name, partial(trial.kl, plans[name], scoring)
        width *= 1.5 if scores[name] < centre else 1.5**-0.25
        if scores[name] < centre:
            centre, factors = scores[name], tried
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


@in_steps("trials")
def prune_to(trial: Trial, table: CostTable, scoring: torch.Tensor, limit: float, trials: int = 7) -> pd.DataFrame:
    """Prune `trial.model` in place as far as a perplexity allows, by the cheapest plan and the whole sweep; a step for
    each of the `trials` that narrow the fraction down.

    Args:
        scoring: windows [count, length] for the perplexities, apart from the calibration text. limit: of them.

    Returns:
        One row per trial: `fraction` of the backbone removed, `perplexity`, infinite where it is more than can go. The
        model is that of the largest fraction within the limit, made by one more sweep; as it was where none is.

    Raises:
        InputError: a limit not above the dense perplexity, or as `refit.sweep`; the model is as before.
    """
    dense = perplexity(trial.model, scoring)
    if limit <= dense:
        raise InputError(
            f"a perplexity of {limit:.4g} is not above the dense model's {dense:.4g}: give a higher target"
        )
    low, high, rows = (0.0, dense), (1.0, math.inf), []
    for number in range(trials):
        fraction = _between(low, high, dense, limit)
        reached = yield f"trial-{number}", partial(_reached, trial, table, fraction, scoring)
        rows.append({"fraction": fraction, "perplexity": reached})
        low, high = ((fraction, reached), high) if reached <= limit else (low, (fraction, reached))
    if low[0]:  # made again, because to keep the best one meanwhile takes the memory of another model
        take_layers(trial.model, trial(table.plan(low[0])))
    return pd.DataFrame(rows)


def _reached(trial: Trial, table: CostTable, fraction: float, scoring: torch.Tensor) -> float:
    """The perplexity with this fraction removed; infinity if the layers cannot lose as much."""
    try:
        plan = table.plan(fraction)
    except OutOfReach:
        return math.inf
    return perplexity(trial(plan), scoring)


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
