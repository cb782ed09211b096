"""Which module pays for a budget: a table of estimated costs, and the cheapest plan for it.

The estimate. Let e be the error that a pruned and refitted sublayer makes in its output at a token, and g the gradient
of the loss there. To second order, with the covariance of g in the place of the Hessian (Gauss–Newton; Martens & Grosse
2015), the loss rises by ½ E[(gᵀe)²] = ½ E[eᵀ G e]. That is what the weighted choice in `refit` lowers unit by unit, so
one elimination of a module from whole to nothing gives its cost at every level: a table of 2 × layers rows for one pass
over the text. That whole layers may go is one more level: their cost is measured (`founding.removal_importance`).

The plan. `cheapest` picks one level for each layer, exactly, so that the parameters that go reach the budget at the
least total cost; the costs are added up, as if each error stood alone.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from gqalib.errors import OutOfReach
from gqalib.model.shapes import decoder_layers
from gqalib.prune import refit
from gqalib.prune.least_squares import removal_order
from gqalib.prune.plans import Plan, beyond_multiples, layer_sizes, units
from gqalib.prune.sublayers import Sublayer, sublayers
from gqalib.steps import in_steps
from gqalib.stream import at_work

MOST_UNITS = 2**20  # of a sum of sizes: the dynamic programme has an entry for each
Covariances = Sequence[tuple[Tensor, Tensor]]


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

    def with_layers(self, removal: Tensor, dense: float) -> "CostTable":
        """The same table with each whole layer as one more level; what helps costs nothing.

        `removal`: from `founding.removal_importance`, [layers], rises of the dense model's perplexity, `dense`, on the
        same text.
        """
        return dataclasses.replace(self, layers=(1 + removal / dense).log().clamp(min=0).numpy())

    def cost(self, plan: Plan) -> float:
        """What the table says of a plan without whole layers: the costs of its modules, added up, in nats per token."""
        lost = zip(plan.groups, plan.channels, strict=True)
        return float(sum(np.interp(*row) for i, counts in enumerate(lost) for row in zip(counts, *self.rows(i))))

    def rows(self, layer: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Removed units of a layer's attention and of its MLP, and what their removal costs."""
        groups, channels = self.groups[layer], self.channels[layer]
        removed = np.minimum(np.arange(len(channels)) * self.steps[layer], self.widths[layer][1] - 1)
        return [np.arange(len(groups)), removed], [groups, channels]

    def plan(self, fraction: float) -> Plan:
        """The cheapest plan that removes `fraction` of the backbone, met within one unit (or one multiple of channels).

        Raises:
            OutOfReach: a fraction outside (0, 1), or more than the layers can lose.
        """
        if not 0 < fraction < 1:
            raise OutOfReach(f"fraction {fraction} of the backbone is outside (0, 1): give a fraction such as 0.25")
        options = [self._options(layer) for layer in range(len(self.steps))]
        costs, sizes, levels = zip(*options, strict=True)
        target, prices, widths = round(fraction * self.backbone), np.array(self.prices), np.array(self.widths)
        coarsest = max(prices[:, 0].max(), (self.steps * prices[:, 1]).max())
        chosen = list(enumerate(cheapest(costs, sizes, target, int(coarsest))))
        removed = np.array([levels[layer][choice] for layer, choice in chosen])
        if (removed == widths).all():
            raise OutOfReach(f"no layer would be left without {fraction:.1%} of the backbone: give another fraction")
        self._give_back(removed, sum(int(sizes[layer][choice]) for layer, choice in chosen) - target)
        rates = (removed * prices).sum(1) / (widths * prices).sum(1)
        return Plan(rates.tolist(), *removed.T.tolist())

    def _options(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Costs and sizes [options] and removed units [options, 2] of every pair of levels, and of the whole layer."""
        groups, most = self.groups[layer], self.widths[layer][1] - self.multiple
        gone = np.append(np.arange(self._first[layer], most, self.steps[layer]), most)
        mlp_costs = np.interp(gone, *(both[1] for both in self.rows(layer)))
        costs = (groups[:, None] + mlp_costs).ravel()
        levels = np.stack(np.broadcast_arrays(np.arange(len(groups))[:, None], gone), -1).reshape(-1, 2)
        sizes = (levels * self.prices[layer]).sum(1)
        if self.layers is not None:
            costs = np.append(costs, self.layers[layer])
            levels, sizes = np.vstack([levels, self.widths[layer]]), np.append(sizes, self.sizes[layer])
        return costs, sizes, levels

    @property
    def _first(self) -> np.ndarray:
        """Channels of each layer that go in any case, so that a multiple is left."""
        return beyond_multiples(np.array(self.widths)[:, 1], self.multiple)

    def _give_back(self, removed: np.ndarray, excess: int) -> None:
        """Levels are coarse: channels that went beyond the target come back, where the last ones cost most."""
        for layer in sorted(range(len(removed)), key=lambda i: self._last_cost(i, removed[i, 1]), reverse=True):
            whole = tuple(removed[layer]) == self.widths[layer]
            price, spare = self.multiple * self.prices[layer][1], removed[layer, 1] - self._first[layer]
            count = 0 if whole else min(spare // self.multiple, excess // price)
            removed[layer, 1] -= count * self.multiple
            excess -= count * price

    def _last_cost(self, layer: int, channels: int) -> float:
        """Cost per parameter of the last level of channels that went."""
        (_, removed), (_, costs) = self.rows(layer)
        level = min(int(np.searchsorted(removed, channels)), len(costs) - 1)
        size = (removed[level] - removed[level - 1]) * self.prices[layer][1]
        return float(costs[level] - costs[level - 1]) / size if level else 0.0


@in_steps()
def cost_table(
    model: nn.Module, windows: Tensor, covariances: Covariances, ingredients: refit.Ingredients = refit.RECIPE, *,
    multiple: int = 1,
) -> CostTable:  # fmt: skip
    """The estimates for a model, which stays as it is; a step for each module.

    Args:
        windows: calibration text, token ids [count, length]. covariances: from `scores.gradient_covariances` on it.
        multiple: of which the channels that stay in a layer are a whole number.

    Raises:
        InputError: too little text, a singular or non-finite Gram matrix, fewer channels than `multiple`.
    """
    refit.check_tokens(model, windows)
    kv_heads, channels, prices = units(model)
    beyond_multiples(channels, multiple)
    steps = [multiple * max(1, round(count / ingredients.cuts / multiple)) for count in channels.tolist()]
    stream, rows = refit.embedded(model, windows), []
    for index, layer in enumerate(decoder_layers(model)):
        with torch.no_grad(), at_work(layer), refit.in_tf32(True):
            for half, part in enumerate(sublayers(model, index)):
                after, how = part.after(stream, windows), (covariances[index][half], steps[index] if half else 1)
                costs = yield f"layer-{index}-{half}", partial(_costs, part, windows, stream, *how, ingredients)
                rows.append(np.array(costs) / (2 * windows.numel()))
                stream = after
    widths, sizes = zip(kv_heads.tolist(), channels.tolist(), strict=True), layer_sizes(model).long().tolist()
    return CostTable(rows[::2], rows[1::2], steps, multiple, list(map(tuple, prices.tolist())), list(widths), sizes)


def cheapest(costs: Sequence[np.ndarray], sizes: Sequence[np.ndarray], target: int, slack: int) -> list[int]:
    """One option for each item, so that the sizes add up to `target` … `target + slack` and the costs to as little as
    possible; exact, where the sizes have a common divisor of some size. Where biases leave them none, sizes are rounded
    down to a millionth of the target, and the sum may be that much more for each item.

    Dynamic programme over the sum of sizes, in units of their greatest common divisor: best(s) = the least cost of the
    items so far whose sizes add up to s. `costs` and `sizes` have an array [options] for each item. OutOfReach: nothing
    comes to the target.
    """
    unit = max(1, math.gcd(*(int(size) for item in sizes for size in item)), (target + slack) // MOST_UNITS)
    best, chosen = np.full((target + slack) // unit + 1, np.inf), []
    best[0] = 0.0
    for cost, size in zip(costs, sizes, strict=True):
        total, option = np.full_like(best, np.inf), np.zeros(len(best), dtype=np.int32)
        for index, (price, shift) in enumerate(zip(cost, size // unit, strict=True)):
            candidate = best[: max(0, len(best) - shift)] + price
            better = candidate < total[shift:]
            total[shift:][better], option[shift:][better] = candidate[better], index
        best = total
        chosen.append(option)
    least = -(-target // unit)
    if not np.isfinite(best[least:].min(initial=np.inf)):
        most = sum(int(size.max()) for size in sizes)
        raise OutOfReach(f"{target:,} parameters cannot go, {most:,} at most and in whole units: give another fraction")
    left, options = least + int(best[least:].argmin()), []
    for option, size in zip(reversed(chosen), reversed(sizes), strict=True):
        options.append(int(option[left]))
        left -= int(size[options[-1]]) // unit
    return options[::-1]


def _costs(
    sublayer: Sublayer, windows: Tensor, before: Tensor, covariance: Tensor, step: int, ingredients: refit.Ingredients
) -> list[float]:
    """Σ eᵀ G e over the tokens when 0, 1, … steps of units have gone; at least one unit stays."""
    moments, _ = refit.output_moments(sublayer, sublayer.calls(before, windows), before)  # any target: only XᵀX counts
    output = refit.metric(covariance.to(moments.gram.device), ingredients.output_damping)
    how = sublayer.unit, output, ingredients.part(sublayer.widest, moments.tokens), step
    _, rises = removal_order(sublayer.output.weight, moments.gram, sublayer.num_units - 1, *how)
    return [0.0, *rises.tolist()]
