"""Plans that are tried out: improved where they stand, and the largest cut within a perplexity.

The cost table adds its estimates up, each of them an error in an otherwise dense model; in truth errors in different
layers act together. So the search looks at a plan in its own context: it carries the plan out by a sweep that keeps the
model's shape (zeros where units went), fits every module at its other levels as well, and takes the gradient of the KL
to the dense logits, on text that the sweep is not fitted to. To first order ⟨∂KL/∂W, W(level) − W⟩ is what another
level of a module adds or saves there; the cheapest plan for these costs is tried next.
"""

import copy
import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gqalib.errors import InputError, OutOfReach
from gqalib.measure.perplexity import kl_of_tokens, perplexity
from gqalib.model.surgery import replace_weight, rows_of_heads, take_layers
from gqalib.prune import refit
from gqalib.prune.allocate import CostTable, Covariances
from gqalib.prune.plans import Plan, uniform_plan
from gqalib.prune.scores import output_gradients
from gqalib.prune.sublayers import Sublayer
from gqalib.steps import in_steps


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    plan: Plan
    history: pd.DataFrame  # per candidate: what it was, `expected` and measured `kl` in nats per token, `best` so far


@dataclass(frozen=True)
class Trial:
    """How a plan is tried out: on a copy of the model, by the whole sweep."""

    model: nn.Module
    windows: Tensor  # calibration text
    covariances: Covariances
    ingredients: refit.Ingredients = refit.RECIPE

    def __call__(self, plan: Plan, **options) -> nn.Module:
        """The model that the sweep makes of a copy; `options`: of the sweep."""
        pruned = copy.deepcopy(self.model)
        refit.sweep(pruned, plan, self.windows, self.ingredients, covariances=self.covariances, **options)
        return pruned


# ---------------------------------------------------------------- a plan in its own context


Changes = Sequence[tuple[int, float]]  # of a module: removed units, ascending, and nats per token


@dataclass(frozen=True)
class Seen:
    """A plan that was carried out: KL to the dense model in nats per token, and what other levels would change."""

    kl: float
    changes: Sequence[tuple[Changes, Changes]]  # of each layer's attention and MLP, to first order


@in_steps("candidates")
def in_context(trial: Trial, table: CostTable, fraction: float, scoring: Tensor, candidates: int = 8) -> Found:
    """Improve a plan until its model is as near to the dense one as `candidates` sweeps bring it; a step for each, so
    that a run with more of them goes on.

    The first two are the uniform plan and the table's; each step begins from the best so far. One that does not help
    makes the next 2.5 times as cautious (`as_seen`), one that keeps more than half of its promise half as cautious.
    Where they lead to no new plan, the search ends. Sweeps are without Gauss–Newton.

    Args:
        scoring: windows [count, length] apart from the calibration text. candidates: sweeps in all, at least two.

    Raises:
        OutOfReach: a fraction that no plan reaches.
    """
    table = dataclasses.replace(table, layers=None)  # the shape is kept
    plans = {"uniform": uniform_plan(trial.model, fraction, multiple=table.multiple), "cheapest": table.plan(fraction)}
    seen, expected, caution = {}, dict.fromkeys(plans, math.nan), 1.0
    for name in plans:
        seen[name] = Seen(*(yield name, partial(look, trial, table, plans[name], scoring)))
    for number in range(1, candidates - 1):
        centre = min(seen, key=lambda name: seen[name].kl)
        step = _step(table, fraction, plans[centre], seen[centre], caution, plans.values())
        if step is None:
            break
        name, (plan, promised, caution) = f"step {number}", step
        plans[name], expected[name] = plan, promised
        seen[name] = Seen(*(yield name, partial(look, trial, table, plan, scoring)))
        saved, hoped = (seen[centre].kl - after for after in (seen[name].kl, promised))
        caution *= 2.5 if saved <= 0 else 0.5 if saved > hoped / 2 else 1
    history = pd.DataFrame({"expected": expected, "kl": {name: found.kl for name, found in seen.items()}})
    best = plans[history["kl"].idxmin()]
    return Found(best, history.assign(best=history["kl"].cummin()).reset_index(names="candidate"))


def _step(
    table: CostTable, fraction: float, plan: Plan, seen: Seen, caution: float, tried: Collection[Plan]
) -> tuple[Plan, float, float] | None:
    """The cheapest plan as seen from another one, the KL that it promises, and the caution that made it: more, where
    less promises what no model has, a KL below zero; less, where this much leads to no new plan. None if none does."""
    for power in (*range(7), -1, -2):
        there = as_seen(table, plan, seen, 2.5**power * caution)
        towards = there.plan(fraction)
        if 0 <= (promised := seen.kl + there.cost(towards)) < seen.kl and towards not in tried:
            return towards, promised, 2.5**power * caution
    return None


def as_seen(table: CostTable, plan: Plan, seen: Seen, caution: float) -> CostTable:
    """A table of what it adds to a plan's model, or saves, that a module goes from the plan's level to another:
    first order, and `caution` times what the table has between the two, because far away first order says little."""
    rows = []
    for layer, lost in enumerate(zip(plan.groups, plan.channels, strict=True)):
        for removed, changes, units, costs in zip(lost, seen.changes[layer], *table.rows(layer), strict=True):
            distance = np.abs(costs - np.interp(removed, units, costs))
            rows.append(np.interp(units, *np.transpose(changes)) + caution * distance)
    return dataclasses.replace(table, groups=rows[::2], channels=rows[1::2])


Level = tuple[int, Tensor, Tensor]  # removed units, columns that are left, and the output weight on them


def look(trial: Trial, table: CostTable, plan: Plan, scoring: Tensor) -> tuple[float, list]:
    """Carry a plan out in the dense model's shape; `Seen`, as JSON can say it."""
    weights, values, changes = {}, [], [[[], []] for _ in plan.groups]
    model = trial(plan, mending=partial(_at_levels, weights, table))

    def divergence(logits: Tensor, input_ids: Tensor) -> Tensor:
        found = kl_of_tokens(trial.model, logits, input_ids)
        values.append(found.detach().double().flatten())
        return found

    def take(layer: int, half: int, gradient: Tensor) -> None:
        levels = weights.pop((layer, half))
        sums = [(gradient[:, columns].cpu() * weight).sum(dtype=torch.float64).item() for _, columns, weight in levels]
        removed = [count for count, *_ in levels]
        here = sums[removed.index((plan.groups, plan.channels)[half][layer])]
        changes[layer][half] = [[count, value - here] for count, value in zip(removed, sums, strict=True)]

    output_gradients(model, scoring, divergence, take)
    return torch.cat(values).mean().item(), changes


def _at_levels(
    weights: dict[tuple[int, int], list[Level]], table: CostTable, sublayer: Sublayer, num_removed: int,
    windows: Tensor, wanted: Tensor, current: Tensor, goal: Tensor, *how: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """`refit.mend` without surgery: the output projection is zero where units went; `weights` notes what it would be at
    other levels."""
    index, half, output = sublayer.index, sublayer.half, sublayer.output
    now, target = refit.ready(sublayer, windows, wanted, current, goal, how[0])
    moments, _ = refit.output_moments(sublayer, now, target)
    counts = _levels(table.widths[index][half] - (table.multiple if half else 1), num_removed)
    noted = weights[index, half] = []
    for count, (kept, weight) in zip(counts, refit.cuts(sublayer, moments, counts, *how), strict=True):
        noted.append((count, rows_of_heads(kept, sublayer.unit), weight.to(sublayer.model.dtype).cpu()))
    _, columns, weight = noted[counts.index(num_removed)]
    whole = torch.zeros_like(output.weight)
    whole[:, columns] = weight.to(whole)
    replace_weight(output, whole)
    return sublayer.module.state_dict()


def _levels(most: int, own: int, parts: int = 8) -> list[int]:
    """Removed units at which a module is looked at: in eighths of what may go, and as the plan has it."""
    return sorted({own, *np.linspace(0, most, parts + 1).round().astype(int).tolist()})


# ---------------------------------------------------------------- the largest cut within a perplexity


@in_steps("limit", "trials")
def prune_to(trial: Trial, table: CostTable, scoring: Tensor, limit: float, trials: int = 7) -> pd.DataFrame:
    """Prune `trial.model` in place as far as a perplexity allows, by the cheapest plan and the whole sweep; a step for
    each of the `trials` that narrow the fraction down, which other limits may share. The first is where the table
    expects the limit.

    Args:
        scoring: windows [count, length] for the perplexities, apart from the calibration text. limit: of them.

    Returns:
        One row per trial: `fraction` of the backbone removed, `perplexity`, infinite where it is more than can go. The
        model is that of the largest fraction within the limit, made by one more sweep; as it was where none is.

    Raises:
        InputError: a limit not above the dense perplexity, or as `refit.sweep`; the model is as before.
    """
    dense = perplexity(trial.model, scoring, exact=True)
    if limit <= dense:
        raise InputError(
            f"a perplexity of {limit:.4g} is not above the dense model's {dense:.4g}: give a higher target"
        )
    low, high, rows = (0.0, dense), (1.0, math.inf), []
    for _ in range(trials):
        fraction = _between(table, low, high, dense, limit)
        reached = yield f"without-{fraction}", partial(_reached, trial, table, fraction, scoring)
        rows.append({"fraction": fraction, "perplexity": reached})
        low, high = ((fraction, reached), high) if reached <= limit else (low, (fraction, reached))
    if low[0]:  # made again, because to keep the best one meanwhile takes the memory of another model
        take_layers(trial.model, trial(table.plan(low[0])))
    return pd.DataFrame(rows)


def _reached(trial: Trial, table: CostTable, fraction: float, scoring: Tensor) -> float:
    """The perplexity with this fraction removed; infinity if the layers cannot lose as much."""
    try:
        plan = table.plan(fraction)
    except OutOfReach:
        return math.inf
    return perplexity(trial(plan), scoring, exact=True)


def _between(
    table: CostTable, low: tuple[float, float], high: tuple[float, float], dense: float, limit: float
) -> float:
    """The next fraction to try, given fractions and their perplexities on both sides of the limit.

    The logarithm of the damage in nats grows about linearly with the fraction, so it is interpolated, a tenth of the
    way off the ends at least. Where an end has no damage or an infinite one, the table says how the damage grows, and
    the other end, if it has one, how many times the table's estimate it is.
    """
    damages = [math.log(value / dense) for value in (low[1], limit, high[1])]
    if damages[0] > 0 and damages[2] < math.inf:
        first, wanted, last = map(math.log, damages)
        return low[0] + (high[0] - low[0]) * min(max((wanted - first) / (last - first), 0.1), 0.9)
    times = 1.0
    for (fraction, _), damage in ((low, damages[0]), (high, damages[2])):
        if 0 < damage < math.inf and (promised := _promised(table, fraction)) > 0:
            times = damage / promised
    return _where(table, low[0], high[0], damages[1] / times)


def _where(table: CostTable, low: float, high: float, damage: float) -> float:
    """The fraction between two others whose cheapest plan costs so many nats per token by the table."""
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if _promised(table, middle) < damage else (low, middle)
    return (low + high) / 2


def _promised(table: CostTable, fraction: float) -> float:
    try:
        return table.cost(table.plan(fraction))
    except OutOfReach:
        return math.inf
