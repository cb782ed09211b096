"""Which module pays for a budget: a table of estimated costs, the cheapest plan for it, and a search that tries plans out.

The estimate. Let e be the error that a pruned and refitted sublayer makes in its output at a token, and g the gradient of the
loss there. To second order, with the covariance of g in the place of the Hessian (Gauss–Newton; Martens & Grosse 2015), the loss
rises by ½ E[(gᵀe)²] = ½ E[eᵀ G e]. That is what the weighted choice in `refit` lowers unit by unit, so one elimination of a module from
whole to nothing gives its cost at every level: a table of 2 × layers rows for one pass over the text. That whole layers may go is
one more level: their cost is measured (`importance.removal_importance`, `CostTable.with_layers`).

The plan. `allocation.cheapest` picks one level for each layer, exactly, so that the parameters that go reach the budget at the
least total cost; the costs are added up, as if no error met another.

The search. They do meet. An evolution strategy, (1 + 1) with Rechenberg's rule for the width of its steps, multiplies the table's rows
by factors that differ smoothly from layer to layer; every candidate is the cheapest plan for its factors, so all are in the
budget, and is tried out: pruned by the whole sweep, and scored by KL to the dense logits on text that the sweep has not seen.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import nn

from gqalib import refit
from gqalib.allocation import beyond_multiples, cheapest
from gqalib.errors import InputError, OutOfReach
from gqalib.models import count_parameters, decoder_layers, layer_shapes
from gqalib.perplexity import kl_to
from gqalib.perplexity import perplexity as perplexity_of
from gqalib.progress import NOT_KEPT, Progress
from gqalib.pruning import Plan, layer_sizes, uniform_plan, unit_costs
from gqalib.streaming import at_work
from gqalib.surgery import take_layers

Covariances = Sequence[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class CostTable:
    """Estimated rise of the loss, in nats per token, when so much of a module goes; lists with one entry per layer."""

    groups: list[np.ndarray]  # 0, 1, … of its groups removed
    channels: list[np.ndarray]  # 0, 1, … times its step removed, at last all but one
    steps: list[int]  # channels per level
    multiple: int  # channels that stay are a multiple of it
    prices: list[tuple[int, int]]  # parameters of a group and of a channel
    widths: list[tuple[int, int]]  # groups and channels
    sizes: list[int]  # parameters of the layer: all units, and output biases, which go only with it
    layers: np.ndarray | None = None  # measured rise when the whole layer goes; None: none may

    @property
    def backbone(self) -> int:
        """Parameters of all layers."""
        return sum(self.sizes)

    def with_layers(self, removal: torch.Tensor, dense: float) -> "CostTable":
        """The same table with each whole layer as one more level.

        Args:
            removal: from `importance.removal_importance`, [layers], rises of the dense model's perplexity, `dense`, on the same text.
                What helps costs nothing.
        """
        return dataclasses.replace(self, layers=(1 + removal / dense).log().clamp(min=0).numpy())

    def plan(self, fraction: float, factors: np.ndarray | None = None) -> Plan:
        """The cheapest plan that removes `fraction` of the backbone, met within one unit (or one multiple of channels).

        Args:
            factors: of the costs of attention and MLP, [2, layers] (default: 1); a whole layer's is their mean.

        Raises:
            OutOfReach: a fraction outside (0, 1), or more than the layers can lose.
        """
        if not 0 < fraction < 1:
            raise OutOfReach(f"fraction {fraction} of the backbone is outside (0, 1): give a fraction such as 0.25")
        factors = np.ones((2, len(self.steps))) if factors is None else factors
        options = [self._options(layer, *factors[:, layer]) for layer in range(len(self.steps))]
        target = round(fraction * self.backbone)
        coarsest = max(max(group, step * channel) for (group, channel), step in zip(self.prices, self.steps, strict=True))
        chosen = cheapest([costs for costs, _, _ in options], [sizes for _, sizes, _ in options], target, coarsest)
        removed = np.array([units[choice] for (_, _, units), choice in zip(options, chosen, strict=True)])
        if (removed == self.widths).all():
            raise OutOfReach(f"no layer would be left without {fraction:.1%} of the backbone: give another fraction")
        gone = sum(int(sizes[choice]) for (_, sizes, _), choice in zip(options, chosen, strict=True))
        self._give_back(removed, gone - target)
        rates = (removed * self.prices).sum(1) / (np.array(self.widths) * self.prices).sum(1)
        return Plan(rates.tolist(), removed[:, 0].tolist(), removed[:, 1].tolist())

    def _options(self, layer: int, attention: float, mlp: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Costs and sizes [options] and removed units [options, 2] of every pair of levels, and of the whole layer."""
        groups, most = self.groups[layer], self.widths[layer][1] - self.multiple
        gone = np.append(np.arange(self._first[layer], most, self.steps[layer]), most)
        mlp_costs = np.interp(gone, self._removed(layer), self.channels[layer])
        costs = (attention * groups[:, None] + mlp * mlp_costs).ravel()
        levels = np.stack(np.broadcast_arrays(np.arange(len(groups))[:, None], gone), -1).reshape(-1, 2)
        sizes = (levels * self.prices[layer]).sum(1)
        if self.layers is not None:
            costs = np.append(costs, (attention + mlp) / 2 * self.layers[layer])
            levels, sizes = np.vstack([levels, self.widths[layer]]), np.append(sizes, self.sizes[layer])
        return costs, sizes, levels

    @property
    def _first(self) -> np.ndarray:
        """Channels of each layer that go in any case, so that a multiple is left."""
        return beyond_multiples(np.array(self.widths)[:, 1], self.multiple)

    def _removed(self, layer: int) -> np.ndarray:
        """How many channels have gone at each of the layer's costs."""
        return np.minimum(np.arange(len(self.channels[layer])) * self.steps[layer], self.widths[layer][1] - 1)

    def _give_back(self, removed: np.ndarray, excess: int) -> None:
        """Levels are coarse: channels that went beyond the target come back, where the last ones cost most."""
        for layer in sorted(range(len(removed)), key=lambda i: self._last_cost(i, *removed[i]), reverse=True):
            whole = tuple(removed[layer]) == self.widths[layer]
            price = self.multiple * self.prices[layer][1]
            spare = removed[layer, 1] - self._first[layer]
            count = 0 if whole else min(spare // self.multiple, excess // price)
            removed[layer, 1] -= count * self.multiple
            excess -= count * price

    def _last_cost(self, layer: int, groups: int, channels: int) -> float:
        """Cost per parameter of the last level of channels that went."""
        removed, costs = self._removed(layer), self.channels[layer]
        level = min(int(np.searchsorted(removed, channels)), len(costs) - 1)
        size = (removed[level] - removed[level - 1]) * self.prices[layer][1]
        return float(costs[level] - costs[level - 1]) / size if level else 0.0


@torch.no_grad()
def cost_table(
    model: nn.Module,
    windows: torch.Tensor,
    covariances: Covariances,
    ingredients: refit.Ingredients = refit.RECIPE,
    *,
    multiple: int = 1,
    progress: Progress = NOT_KEPT,
) -> CostTable:
    """The estimates for a model, which stays as it is.

    Args:
        windows: calibration text, token ids [count, length]. covariances: from `importance.gradient_covariances` on it.
        multiple: of which the channels that stay in a layer are a whole number.
        progress: keeps each module's row.

    Raises:
        InputError: too little text, a singular or non-finite Gram matrix, fewer channels than `multiple`.
    """
    refit.check_tokens(model, windows)
    beyond_multiples(layer_shapes(model)["intermediate_size"].to_numpy(), multiple)
    progress = progress.of("cost_table", model, windows, covariances, ingredients, multiple)
    stream, rows, steps = refit.embedded(model, windows), [], []
    for index, layer in enumerate(decoder_layers(model)):
        with at_work(layer), refit.in_tf32(True):
            for half, sublayer in enumerate(refit.sublayers(layer)):
                step = multiple * max(1, round(sublayer.num_units / ingredients.cuts / multiple)) if half else 1
                current = refit.calls(model, index, half, stream, windows)
                after = refit.through(stream, sublayer, current)
                target = torch.sub(after, stream, out=refit.empty_like(stream))
                what = (sublayer, current, target, covariances[index][half], step, ingredients)
                rows.append(np.array(progress.once(f"layer-{index}-{half}", partial(_costs, *what))) / (2 * windows.numel()))
                stream = after
        steps.append(step)
    layers = decoder_layers(model)
    return CostTable(
        rows[::2], rows[1::2], steps, multiple, [unit_costs(layer) for layer in layers],
        [tuple(sublayer.num_units for sublayer in refit.sublayers(layer)) for layer in layers],
        layer_sizes(model).long().tolist(),
    )  # fmt: skip


def _costs(
    sublayer: refit.Sublayer, current: Sequence[refit.Call], target: torch.Tensor, covariance, step: int, ingredients: refit.Ingredients
) -> list[float]:
    """Σ eᵀ G e over the tokens when 0, 1, … steps of units have gone; at least one unit stays."""
    moments, _ = refit.output_moments(sublayer, current, target)
    output = refit.damped(covariance.to(moments.gram.device), ingredients.output_damping)
    _, rises = refit.removal_order(
        sublayer.output.weight, moments.gram, sublayer.num_units - 1, sublayer.unit, output, ingredients.damping, step
    )
    return [0.0, *rises.tolist()]


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

    The first candidates are the uniform plan and the cheapest one; a step that helps makes the next 1.5 times as wide, one that
    does not makes it narrower, so that one in five helps.

    Args:
        scoring: windows [count, length] apart from the calibration text. candidates: sweeps in all, at least two.
        progress: keeps each candidate's score. All else, random numbers included, follows from scores and seed, and is made again;
            so a run with more candidates goes on as well.

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
    """Noise [2, layers] of variance about 1.5 that changes over an eighth of the depth, and moves attention and MLP as a whole."""
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
        One row per sweep: `fraction` of the backbone removed, `perplexity`, infinite where it is more than can go.
        The model is that of the largest fraction within the target, made by one more sweep; as it was where none is.

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
        raise InputError(f"a perplexity of {limit:.4g} is not above the dense model's {dense:.4g}: give a higher target")
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

    The logarithm of the damage in nats grows about linearly with the fraction, so it is interpolated, a tenth of the way off
    the ends at least; half-way where an end has no damage or an infinite one.
    """
    damages = [math.log(value / dense) for value in (low[1], limit, high[1])]
    if damages[0] <= 0 or damages[2] == math.inf:
        return (low[0] + high[0]) / 2
    first, wanted, last = map(math.log, damages)
    return low[0] + (high[0] - low[0]) * min(max((wanted - first) / (last - first), 0.1), 0.9)
