"""The founding document's method, whole: which layers matter, how much of each goes, and which groups and channels.

importance   rise of the perplexity without the layer
rates        in inverse proportion to it, between two bounds, so that the mean rate is met; `plans` makes them whole
scores       Σ |W ⊙ G| over a group's or a channel's weights W, G the gradient of the calibration loss (`scores`)
pruning      front to back: gradients of a layer on the model whose layers in front of it are cut already
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from gqalib.errors import InputError
from gqalib.measure.perplexity import perplexity
from gqalib.model.shapes import decoder_layers, layer_shapes
from gqalib.model.surgery import keep_channels, keep_groups
from gqalib.prune.plans import Plan, check_plan, layer_sizes
from gqalib.prune.scores import channel_scores, fisher_scores, group_scores, largest, taylor_scores
from gqalib.steps import in_steps
from gqalib.stream import advance

STRATEGIES = ("inverse", "proportional", "uniform")


@in_steps()
def removal_importance(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Rise of the perplexity when a layer is replaced by the identity, float64 [layers]; a step for each. It can be
    negative.

    The stream before each layer is at hand, so that only the layers above it are run again.
    """
    perplexities, stream = [], None
    for layer in range(len(decoder_layers(model)) + 1):  # the last one is the model itself, nothing left out
        stream = advance(model, stream, windows, max(0, layer - 1), layer)
        without = partial(perplexity, model, windows, stream, layer + 1, exact=True)
        perplexities.append((yield f"layer-{layer}", without))
    return torch.tensor(perplexities[:-1], dtype=torch.float64) - perplexities[-1]


# ---------------------------------------------------------------- rates


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
    levels = torch.cat([min_rate / weights, max_rate / weights]).sort().values
    means = torch.stack([((c * weights).clamp(min_rate, max_rate) * sizes).sum() / sizes.sum() for c in levels])
    upper = int(torch.searchsorted(means, torch.tensor(mean_rate, dtype=torch.float64)).clamp(1, len(levels) - 1))
    span = means[upper] - means[upper - 1]
    between = (mean_rate - means[upper - 1]) / span if span > 0 else torch.tensor(1.0, dtype=torch.float64)
    level = levels[upper - 1] + between.clamp(0, 1) * (levels[upper] - levels[upper - 1])
    return (level * weights).clamp(min_rate, max_rate)


def make_plan(model: nn.Module, layer_importance: torch.Tensor, settings: Any, **changes) -> Plan:
    """The plan for a preset's `pruning` section: importance → rates → whole groups and channels.

    `changes` replace single settings, e.g. `strategy="uniform"`. A change of `mean_rate` alone scales the clip bounds
    with it (0.6 × and 2 × the mean, as 0.15 and 0.5 are to 0.25), short of removing a layer whole.
    """
    if "mean_rate" in changes and not {"min_rate", "max_rate"} & changes.keys():
        scale = changes["mean_rate"] / settings.mean_rate
        highest = min(settings.max_rate * scale, (1 + changes["mean_rate"]) / 2)
        changes |= {"min_rate": settings.min_rate * scale, "max_rate": max(highest, changes["mean_rate"])}
    s = dataclasses.replace(settings, **changes)
    weights = layer_weights(layer_importance, s.strategy, s.alpha)
    rates = layer_rates(weights, layer_sizes(model), s.mean_rate, s.min_rate, s.max_rate)
    return Plan.from_rates(model, rates, s.channel_multiple)


# ---------------------------------------------------------------- scores


def unit_scores(
    model: nn.Module, windows: torch.Tensor, statistics: tuple[str, str] = ("taylor", "taylor"),
    layers: Iterable[int] | None = None, hidden_states: torch.Tensor | None = None, first_layer: int = 0,
    include_o_proj: bool = False, generator: torch.Generator | None = None,
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Scores of groups and of channels by two statistics, with whatever pass these need; as `taylor_scores`."""
    layers = list(range(len(decoder_layers(model))) if layers is None else layers)
    passes = {"fisher": fisher_scores, "taylor": partial(taylor_scores, include_o_proj=include_o_proj)}
    text, (of_groups, of_channels), scores = (model, windows, layers, hidden_states, first_layer), statistics, {}
    taken = {name: passes[name](*text) for name in passes if name in statistics}
    for index in layers:
        layer, groups, channels = decoder_layers(model)[index], taken.get(of_groups), taken.get(of_channels)
        scores[index] = (
            groups[index][0] if groups else group_scores(layer, of_groups, include_o_proj, generator),
            channels[index][1] if channels else channel_scores(layer, of_channels, generator),
        )
    return scores


# ---------------------------------------------------------------- pruning


@in_steps("after_layer")
def prune(
    model: nn.Module, plan: Plan, windows: torch.Tensor, *, group_statistic: str = "taylor",
    channel_statistic: str = "taylor", include_o_proj: bool = False, sequential: bool = True, seed: int = 0,
    after_layer: Callable[[int], None] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Prune a model in place, front to back; a step for each layer.

    `sequential`: the gradients of a layer are taken on the model pruned so far, as the founding document does; the
    layers in front of it are frozen, and what they give is kept, so a step costs only the layers from there on.
    Otherwise all scores come from the dense model in one pass, which a killed run begins anew.

    Args:
        windows: calibration text, token ids [count, length].
        group_statistic, channel_statistic: `taylor`, `fisher`, `magnitude` or `random`.
        after_layer: called with the index of each layer when it is done, pruned or not, now or by an earlier run.

    Returns:
        One row per layer: rate asked, units removed, rate reached (by parameters), shape, seconds.
    """
    check_plan(plan, model)
    statistics, before = (group_statistic, channel_statistic), layer_shapes(model)
    before["size"] = layer_sizes(model).numpy()
    options = {"include_o_proj": include_o_proj, "generator": torch.Generator().manual_seed(seed)}
    cut = [index for index in range(len(before)) if plan.groups[index] or plan.channels[index]]
    scores = {} if sequential or not cut else unit_scores(model, windows, statistics, cut, **options)
    stream, seconds = None, []

    def choose() -> dict[str, torch.Tensor]:
        """The units of layer `index` that stay, and where the random numbers go on."""
        text = model, windows, statistics, [index], stream, index
        groups, channels = (unit_scores(*text, **options) if sequential else scores)[index]
        groups = largest(groups, len(groups) - plan.groups[index])
        channels = largest(channels, len(channels) - plan.channels[index])
        kept = {"groups": torch.tensor(groups), "channels": torch.tensor(channels)}
        return kept | {"generator": options["generator"].get_state()}

    for index in range(len(before)):
        start = time.perf_counter()
        if index in cut:
            kept = (yield f"layer-{index}", choose) if sequential else choose()
            options["generator"].set_state(kept["generator"])
            keep_groups(model, index, kept["groups"])
            keep_channels(model, index, kept["channels"])
        if sequential and not {"taylor", "fisher"}.isdisjoint(statistics):
            stream = advance(model, stream, windows, index, index + 1)
        seconds.append((yield f"seconds-{index}", lambda start=start: time.perf_counter() - start))
        if after_layer is not None:
            after_layer(index)
    return _table(model, plan, before, seconds)


def _table(model: nn.Module, plan: Plan, before: pd.DataFrame, seconds: list[float]) -> pd.DataFrame:
    after = layer_shapes(model)
    columns = {
        "rate_asked": plan.rates,
        "groups_removed": before["num_key_value_heads"] - after["num_key_value_heads"],
        "channels_removed": before["intermediate_size"] - after["intermediate_size"],
        "rate_reached": 1 - layer_sizes(model).numpy() / before["size"],
    }
    return pd.DataFrame(columns | after.to_dict("series") | {"seconds": seconds}).rename_axis("layer")
