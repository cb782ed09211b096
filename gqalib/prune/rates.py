"""How much of each layer goes: from layer importances to rates, from rates to whole groups and channels."""

import numpy as np
import torch

from gqalib.errors import InputError

STRATEGIES = ("inverse", "proportional", "uniform")


def layer_weights(importance: torch.Tensor, strategy: str = "inverse", alpha: float = 1.0) -> torch.Tensor:
    """What the rates are proportional to, float64 [layers].

    inverse: (importance + ε)^−α, the founding document's; proportional: importance^α; uniform: 1. ε is a thousandth of
    the mean importance. A negative importance (removing the layer helps) counts as zero: the layer is as expendable as
    one that does nothing, and the clip bounds then say how much of it goes.

    Raises:
        InputError: unknown strategy, or an importance that is not finite.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"unknown strategy {strategy!r}: use one of {', '.join(STRATEGIES)}")
    if not torch.isfinite(importance).all():
        raise InputError(f"layer importances {importance.tolist()} are not all finite: use a longer sample or float32")
    importance = importance.double().clamp(min=0)
    if strategy == "uniform" or importance.sum() == 0:
        return torch.ones_like(importance)
    epsilon = importance.mean() * 1e-3
    return (importance + epsilon) ** (-alpha if strategy == "inverse" else alpha)


def layer_rates(
    weights: torch.Tensor, sizes: torch.Tensor, mean_rate: float = 0.25, min_rate: float = 0.15, max_rate: float = 0.5
) -> torch.Tensor:
    """Rates in proportion to `weights`, clipped to the bounds, whose size-weighted mean is exactly `mean_rate`;
    float64 [layers].

    Water-filling: rate_l(c) = clip(c · w_l, min, max) grows with c, piecewise linearly, so the c that meets the mean is
    found between two breakpoints min/w_l, max/w_l.

    Args:
        sizes: parameters of each layer, [layers].

    Raises:
        InputError: a rate outside (0, 1), or a mean outside the bounds.
    """
    if not 0 < mean_rate < 1:
        raise InputError(f"mean rate {mean_rate} is outside (0, 1): give a fraction such as 0.25")
    if not min_rate <= mean_rate <= max_rate:
        raise InputError(
            f"mean rate {mean_rate} is out of reach between min_rate {min_rate} and max_rate {max_rate}: move a bound"
        )
    weights, sizes = weights.double(), sizes.double()

    def mean_at(level: torch.Tensor) -> torch.Tensor:
        return ((level * weights).clamp(min_rate, max_rate) * sizes).sum() / sizes.sum()

    levels = torch.cat([min_rate / weights, max_rate / weights]).sort().values
    means = torch.stack([mean_at(level) for level in levels])
    upper = int(torch.searchsorted(means, torch.tensor(mean_rate, dtype=torch.float64)).clamp(1, len(levels) - 1))
    span = means[upper] - means[upper - 1]
    share = (mean_rate - means[upper - 1]) / span if span > 0 else torch.tensor(1.0, dtype=torch.float64)
    level = levels[upper - 1] + share.clamp(0, 1) * (levels[upper] - levels[upper - 1])
    return (level * weights).clamp(min_rate, max_rate)


def whole_units(rates: torch.Tensor, counts: torch.Tensor, multiple: int = 1) -> list[int]:
    """How many units (groups or channels) each layer loses: whole numbers whose sum is the nearest to Σ rate × count.

    Largest remainders round up; every layer keeps at least one unit. With `multiple` > 1 each layer whose rate is not 0
    keeps a multiple of it (hardware likes widths that are), and the sum is met within one, if none has to lose more.
    """
    first, most = beyond_multiples(counts, multiple) * (rates > 0), counts // multiple - 1
    ideal = torch.minimum(((rates.double() * counts - first) / multiple).clamp(min=0), most.double())
    removed = ideal.floor().long()
    spare = int((ideal.sum() - removed.sum()).round())
    for layer in torch.argsort(ideal - removed, descending=True, stable=True).tolist():
        if spare > 0 and removed[layer] < most[layer]:
            removed[layer] += 1
            spare -= 1
    return (first + removed * multiple).tolist()


def some_units(count: int, rate: float) -> int:
    """How many of `count` units a rate is: at least one, but one stays, so none of a single one."""
    return min(count - 1, max(1, round(rate * count)))


def beyond_multiples(counts: torch.Tensor | np.ndarray, multiple: int) -> torch.Tensor | np.ndarray:
    """How many units of each layer have to go before a multiple of them is left.

    Raises:
        InputError: a layer has fewer than that.
    """
    if (counts < multiple).any():
        few = f"a layer of {int(counts.min())} channels"
        raise InputError(f"{few} cannot keep a multiple of {multiple}: lower pruning.channel_multiple")
    return counts % multiple
