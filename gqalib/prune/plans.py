"""How much each layer loses: from rates to whole groups and channels that meet a budget.

A *unit* is what surgery removes: a GQA group (a KV head with its query heads) or an MLP channel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from gqalib.errors import InputError, OutOfReach
from gqalib.model.shapes import attention_of, count_parameters, decoder_layers, layer_shape, layer_shapes


@dataclass(frozen=True)
class Plan:
    """How much each layer loses; lists with one entry per layer. A layer that loses all groups and all channels goes
    whole."""

    rates: list[float] = field(compare=False)  # the rate asked, of groups and channels alike
    groups: list[int]  # whole groups to remove
    channels: list[int]  # channels to remove

    def whole_layers(self, model: nn.Module) -> list[int]:
        """The layers of the model that go whole."""
        kv_heads, widths, _ = units(model)
        lost = torch.tensor([self.groups, self.channels])
        return (lost == torch.stack([kv_heads, widths])).all(0).nonzero().flatten().tolist()

    @classmethod
    def from_rates(cls, model: nn.Module, rates: torch.Tensor, channel_multiple: int = 1) -> "Plan":
        """Whole groups and channels for these rates (fractions of each layer's parameters).

        Groups are coarse, so what their rounding leaves of the total is spread over the channels of all layers: the
        parameters removed meet Σ rate × size within one channel (or `channel_multiple`), as far as one unit per layer
        stays. Output biases count in `layer_sizes` but never go; channels go for them.
        """
        kv_heads, widths, costs = units(model)
        attention, mlp = kv_heads * costs[:, 0], widths * costs[:, 1]

        def rates_of_channels(groups: torch.Tensor) -> torch.Tensor:
            return rates + (rates * (layer_sizes(model) - mlp) - groups / kv_heads * attention).sum() / mlp.sum()

        def channels_suffice(groups: torch.Tensor) -> bool:
            asked = rates_of_channels(groups)
            return bool(((asked >= 0) & (asked <= 1 - channel_multiple / widths)).all())

        groups = whole_groups(rates, kv_heads, channels_suffice)
        channels = whole_units(rates_of_channels(groups).clamp(0, 1), widths, channel_multiple)
        return cls(rates.tolist(), groups.tolist(), channels)


def uniform_plan(model: nn.Module, fraction: float, protected: Sequence[int] = (), multiple: int = 1) -> Plan:
    """The same rate for every layer that is not protected, so that `fraction` of the backbone goes.

    Equal layers lose equally many groups, as near to the rate as whole groups can; what that leaves is spread over
    their channels, so the budget is met within one channel. With a `multiple` each of these layers keeps a multiple.

    Raises:
        OutOfReach: more would go than layers that keep one group and one channel (or `multiple`) each can lose.
    """
    kv_heads, widths, costs = units(model)
    groups_cost, channels_cost = costs.double().T
    target, free = fraction * count_parameters(model)["backbone"], torch.ones(len(costs), dtype=torch.float64)
    free[list(protected)] = 0
    rates = free * target / (free * (kv_heads * groups_cost + widths * channels_cost)).sum()
    most = (free * channels_cost * (widths - multiple)).sum()
    groups = whole_groups(rates, kv_heads, lambda g: 0 <= target - (g * groups_cost).sum() <= most)
    left = target - (groups * groups_cost).sum()
    return Plan(rates.tolist(), groups.tolist(), spread_channels(left, widths, channels_cost, free, multiple))


def spread_channels(
    parameters: torch.Tensor, widths: torch.Tensor, costs: torch.Tensor, free: torch.Tensor, multiple: int = 1
) -> list[int]:
    """Channels to remove so that `parameters` go, the same part of each free layer's width; tensors are [layers].

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


def check_plan(plan: Plan, model: nn.Module, whole_layers: bool = False) -> None:
    """Raises InputError if the plan does not fit the model's layers, or leaves nothing of one (but for layers that may
    go whole)."""
    kv_heads, widths, _ = units(model)
    if not len(plan.groups) == len(plan.channels) == len(widths):
        raise InputError(
            f"the plan names {len(plan.groups)} layers, the model has {len(widths)}: make the plan for this model"
        )
    dropped = plan.whole_layers(model) if whole_layers else []
    for index in sorted(set(range(len(widths))) - set(dropped)):
        for lost, counts, kind in ((plan.groups, kv_heads, "groups"), (plan.channels, widths, "channels")):
            if not 0 <= lost[index] < counts[index]:
                lose = f"{lost[index]} of its {counts[index]} {kind}"
                raise InputError(f"layer {index} cannot lose {lose}: at least one must stay")


# ---------------------------------------------------------------- what units cost


def units(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups and channels of each layer, [layers], and their parameters, [layers, 2]; all int64."""
    shapes, layers = layer_shapes(model), decoder_layers(model)
    counts = (torch.tensor(shapes[name].to_numpy()) for name in ("num_key_value_heads", "intermediate_size"))
    return *counts, torch.tensor([unit_costs(layer) for layer in layers])


def unit_costs(layer: nn.Module) -> tuple[int, int]:
    """Parameters that a group and a channel of this layer stand for, biases of their rows included.

    Raises:
        InputError: the layer has no attention.
    """
    x, mlp, shape = attention_of(layer), layer.mlp, layer_shape(layer)
    group = size(x.o_proj, rows=False) + size(x.q_proj) + size(x.k_proj) + size(x.v_proj)
    channel = size(mlp.down_proj, rows=False) + size(mlp.gate_proj) + size(mlp.up_proj)
    return group // shape["num_key_value_heads"], channel // shape["intermediate_size"]


def size(linear: nn.Linear, rows: bool = True) -> int:
    """Parameters of a projection that go with its rows (weights and biases) or with its columns (weights)."""
    return linear.weight.numel() + (linear.bias.numel() if rows and linear.bias is not None else 0)


def layer_sizes(model: nn.Module) -> torch.Tensor:
    """Parameters of the projections of each layer, all biases included, float64 [layers]."""
    sizes = [sum(p.numel() for m in (x.self_attn, x.mlp) for p in m.parameters()) for x in decoder_layers(model)]
    return torch.tensor(sizes, dtype=torch.float64)


# ---------------------------------------------------------------- whole numbers


def whole_groups(
    rates: torch.Tensor, counts: torch.Tensor, channels_suffice: Callable[[torch.Tensor], bool]
) -> torch.Tensor:
    """How many groups each layer loses, int64 [layers]: equally many where layers are equal, unless channels cannot
    make up for what that leaves."""
    groups = torch.tensor(whole_units(rates, counts, alike=True))
    return groups if channels_suffice(groups) else torch.tensor(whole_units(rates, counts))


def whole_units(rates: torch.Tensor, counts: torch.Tensor, multiple: int = 1, alike: bool = False) -> list[int]:
    """How many units (groups or channels) each layer loses: whole numbers whose sum is the nearest to Σ rate × count.

    Largest remainders round up, of equal ones some at even distances over the depth; or, `alike`, all or none: with
    few groups in a layer, it alone can decide how good the model is which layers pay for the others' rounding. Every
    layer keeps at least one unit. With `multiple` > 1 each layer whose rate is not 0 keeps a multiple of it (hardware
    likes widths that are), and the sum is met within one, if none has to lose more.
    """
    first, most = beyond_multiples(counts, multiple) * (rates > 0), counts // multiple - 1
    ideal = torch.minimum(((rates.double() * counts - first) / multiple).clamp(min=0), most.double())
    removed = ideal.floor().long()
    remainders = (ideal - removed).round(decimals=9)
    if spare := int(remainders.sum().round()):
        least = remainders.sort(descending=True).values[spare - 1]
        larger, equal = remainders > least, (remainders == least).nonzero().flatten()
        count = spare - int(larger.sum())
        if alike:
            count = len(equal) if remainders.sum() - larger.sum() > len(equal) / 2 else 0
        removed += larger
        removed[equal[((torch.arange(count) + 0.5) * len(equal) / count).long()]] += 1
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
