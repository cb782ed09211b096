"""From scores and rates to a pruned model: one shot, or layer by layer on the model pruned so far."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from gqalib.errors import InputError, OutOfReach
from gqalib.model.shapes import count_parameters, decoder_layers, layer_shape, layer_shapes
from gqalib.model.surgery import keep_channels, keep_groups
from gqalib.prune.rates import layer_rates, layer_weights, whole_units
from gqalib.prune.scores import largest, unit_scores
from gqalib.run.presets import Pruning
from gqalib.steps import in_steps
from gqalib.stream import advance


@dataclass(frozen=True)
class Plan:
    """How much each layer loses; lists with one entry per layer. A layer that loses all groups and all channels goes
    whole."""

    rates: list[float]  # the rate asked, of groups and channels alike
    groups: list[int]  # whole groups to remove
    channels: list[int]  # channels to remove

    def whole_layers(self, model: nn.Module) -> list[int]:
        """The layers of the model that go whole."""
        shapes = layer_shapes(model)[["num_key_value_heads", "intermediate_size"]].to_numpy().tolist()
        return [
            i for i, removed in enumerate(zip(self.groups, self.channels, strict=True)) if list(removed) == shapes[i]
        ]

    @classmethod
    def from_rates(cls, model: nn.Module, rates: torch.Tensor, channel_multiple: int = 1) -> "Plan":
        """Whole groups and channels for these rates (fractions of each layer's parameters).

        Groups are coarse, so what their rounding leaves of the total is spread over the channels of all layers: the
        parameters removed meet Σ rate × size within one channel (or `channel_multiple`), as far as one unit per layer
        stays. Output biases count in `layer_sizes` but never go; channels go for them.
        """
        shapes = layer_shapes(model)
        kv_heads, widths = (
            torch.tensor(shapes[name].to_numpy()) for name in ("num_key_value_heads", "intermediate_size")
        )
        costs = torch.tensor([unit_costs(layer) for layer in decoder_layers(model)])
        attention, mlp = kv_heads * costs[:, 0], widths * costs[:, 1]
        groups = torch.tensor(whole_units(rates, kv_heads))
        spare = (rates * (layer_sizes(model) - mlp) - groups / kv_heads * attention).sum() / mlp.sum()
        return cls(rates.tolist(), groups.tolist(), whole_units((rates + spare).clamp(0, 1), widths, channel_multiple))


def make_plan(model: nn.Module, layer_importance: torch.Tensor, settings: Pruning, **changes) -> Plan:
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


def unit_costs(layer: nn.Module) -> tuple[int, int]:
    """Parameters that a group and a channel of this layer stand for, biases of their rows included."""
    attention, mlp = layer.self_attn, layer.mlp
    group = size(attention.o_proj, rows=False) + sum(
        size(x) for x in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    channel = size(mlp.down_proj, rows=False) + size(mlp.gate_proj) + size(mlp.up_proj)
    shape = layer_shape(layer)
    return group // shape["num_key_value_heads"], channel // shape["intermediate_size"]


def size(linear: nn.Linear, rows: bool = True) -> int:
    """Parameters of a projection that go with its rows (weights and biases) or with its columns (weights)."""
    return linear.weight.numel() + (linear.bias.numel() if rows and linear.bias is not None else 0)


def uniform_plan(model: nn.Module, fraction: float, protected: Sequence[int] = (), multiple: int = 1) -> Plan:
    """The same rate for every layer that is not protected, so that `fraction` of the backbone goes.

    Whole groups come as near to the rate as they can; what their rounding leaves is spread over the channels of the
    same layers, so the budget is met within one channel. With a `multiple` each of these layers keeps a multiple of it.

    Raises:
        OutOfReach: more would go than layers that keep one group and one channel (or `multiple`) each can lose.
    """
    layers = decoder_layers(model)
    costs = torch.tensor([unit_costs(layer) for layer in layers], dtype=torch.float64)
    shapes = layer_shapes(model)
    kv_heads, widths = (torch.tensor(shapes[name].to_numpy()) for name in ("num_key_value_heads", "intermediate_size"))
    target = fraction * count_parameters(model)["backbone"]
    free = torch.ones(len(layers), dtype=torch.float64)
    free[list(protected)] = 0
    rates = free * target / (free * (kv_heads * costs[:, 0] + widths * costs[:, 1])).sum()
    groups = torch.tensor(whole_units(rates, kv_heads))
    left = target - (groups * costs[:, 0]).sum()
    return Plan(rates.tolist(), groups.tolist(), spread_channels(left, widths, costs[:, 1], free, multiple))


def spread_channels(
    parameters: torch.Tensor, widths: torch.Tensor, costs: torch.Tensor, free: torch.Tensor, multiple: int = 1
) -> list[int]:
    """Channels to remove so that `parameters` go, the same share of each free layer's width; tensors are [layers].

    Raises:
        OutOfReach: the layers cannot lose as much and keep `multiple` channels each.
    """
    room = (free * costs * widths).sum()
    channels = whole_units((free * parameters / room).clamp(0, 1), widths, multiple)
    missing = parameters - (torch.tensor(channels) * costs).sum()
    if missing > costs.max() * multiple:
        most = f"{int((free * costs * (widths - multiple)).sum()):,} at most: every layer keeps {multiple} channel(s)"
        raise OutOfReach(f"{int(parameters):,} MLP parameters cannot go, {most}; lower the fraction")
    return channels


def layer_sizes(model: nn.Module) -> torch.Tensor:
    """Parameters of the projections of each layer, all biases included, float64 [layers]."""
    sizes = [sum(p.numel() for m in (x.self_attn, x.mlp) for p in m.parameters()) for x in decoder_layers(model)]
    return torch.tensor(sizes, dtype=torch.float64)


@in_steps("after_layer")
def prune(
    model: nn.Module,
    plan: Plan,
    windows: torch.Tensor,
    *,
    group_statistic: str = "taylor",
    channel_statistic: str = "taylor",
    include_o_proj: bool = False,
    sequential: bool = True,
    seed: int = 0,
    after_layer: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Prune a model in place, front to back.

    `sequential`: the gradients of a layer are taken on the model pruned so far, as the founding document does; the
    layers in front of it are frozen, and what they give is kept, so a step costs only the layers from there on.
    Otherwise all scores come from the dense model in one pass, which is no step: a killed run begins it anew.

    Args:
        windows: calibration text, token ids [count, length].
        group_statistic, channel_statistic: `taylor`, `fisher`, `magnitude` or `random`.
        after_layer: called with the index of each layer when it is done, pruned or not, now or by an earlier run.

    Returns:
        One row per layer: rate asked, units removed, rate reached (by parameters), shape, seconds.
    """
    check_plan(plan, model)
    dense, before = layer_shapes(model), layer_sizes(model)
    statistics = (group_statistic, channel_statistic)
    needs_text = not {"taylor", "fisher"}.isdisjoint(statistics)
    options = {"include_o_proj": include_o_proj, "generator": torch.Generator().manual_seed(seed)}
    cut = [index for index in range(len(dense)) if plan.groups[index] or plan.channels[index]]
    scores = {} if sequential or not cut else unit_scores(model, windows, statistics, cut, **options)
    hidden_states, seconds = None, []

    def choose() -> dict[str, torch.Tensor]:
        """The units of layer `index` that stay, and where the random numbers go on."""
        text = (model, windows, statistics, [index], hidden_states, index)
        groups, channels = (unit_scores(*text, **options) if sequential else scores)[index]
        groups = largest(groups, len(groups) - plan.groups[index])
        channels = largest(channels, len(channels) - plan.channels[index])
        return {
            "groups": torch.tensor(groups),
            "channels": torch.tensor(channels),
            "generator": options["generator"].get_state(),
        }

    for index in range(len(dense)):
        start = time.perf_counter()
        if index in cut:
            kept = (yield f"layer-{index}", choose) if sequential else choose()
            options["generator"].set_state(kept["generator"])
            keep_groups(model, index, kept["groups"])
            keep_channels(model, index, kept["channels"])
        if needs_text and sequential:
            hidden_states = advance(model, hidden_states, windows, index, index + 1)
        seconds.append((yield f"seconds-{index}", lambda start=start: time.perf_counter() - start))
        if after_layer is not None:
            after_layer(index)
    model.requires_grad_(True)
    return _table(model, plan, dense, before, seconds)


def check_plan(plan: Plan, model: nn.Module, whole_layers: bool = False) -> None:
    """Raises InputError if the plan does not fit the model's layers, or leaves nothing of one (but for layers that
    may go whole)."""
    shapes = layer_shapes(model)
    if len(plan.groups) != len(shapes) or len(plan.channels) != len(shapes):
        raise InputError(
            f"the plan names {len(plan.groups)} layers, the model has {len(shapes)}: make the plan for this model"
        )
    dropped = plan.whole_layers(model) if whole_layers else []
    for index, (groups, channels) in enumerate(zip(plan.groups, plan.channels, strict=True)):
        if index in dropped:
            continue
        for removed, total, kind in (
            (groups, shapes["num_key_value_heads"][index], "groups"),
            (channels, shapes["intermediate_size"][index], "channels"),
        ):
            if not 0 <= removed < total:
                raise InputError(f"layer {index} cannot lose {removed} of its {total} {kind}: at least one must stay")


def _table(
    model: nn.Module, plan: Plan, dense: pd.DataFrame, before: torch.Tensor, seconds: list[float]
) -> pd.DataFrame:
    after = layer_shapes(model)
    return pd.DataFrame(
        {
            "rate_asked": plan.rates,
            "groups_removed": dense["num_key_value_heads"] - after["num_key_value_heads"],
            "channels_removed": dense["intermediate_size"] - after["intermediate_size"],
            "rate_reached": (1 - layer_sizes(model) / before).numpy(),
            **after.to_dict("series"),
            "seconds": seconds,
        }
    ).rename_axis("layer")
