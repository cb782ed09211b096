"""FLAP."""

import torch
from torch import nn

from gqalib.errors import InputError, OutOfReach
from gqalib.model.shapes import count_parameters, decoder_layers, layer_shape
from gqalib.model.surgery import add_output_bias, keep_channels, keep_groups
from gqalib.peers.common import Moments, columns, feed, output_projections, peer
from gqalib.prune.founding import unit_costs


@peer
def flap(model: nn.Module, windows: torch.Tensor, fraction: float, by_column: bool = True) -> None:
    """FLAP (An et al., AAAI 2024), metric WIFV, structure AL-AM: one threshold over all layers and modules, and a bias correction.

    A feature's score is the variance of the input times the squared norm of its column, Var(X_j) · ‖W_:,j‖², on the dense
    model; a head's is the mean of its features'. Scores are standardised within each module, and units are removed from
    the lowest score up, each at its price in parameters. What the removed features gave on average, W · mean(X), becomes a
    bias of o_proj or down_proj. Every layer gets both biases, as in FLAP's code, and they count: the budget pays for them.

    Choices: as FLAP's code does, the scores of attention are squared, columns are standardised, and then a head's are averaged;
    without `by_column` heads are averaged first, which the paper leaves open: much worse on the reference model, where it cuts into
    the first layer, and at some sizes better on stories260K. A module keeps at least its best unit; a unit that no longer fits the budget is passed
    over for the next.
    """
    stream, statistics = None, []
    for index, layer in enumerate(decoder_layers(model)):
        moments = {name: Moments() for name in output_projections(layer)}
        stream = feed(model, stream, windows, index, {name: m.see for name, m in moments.items()})
        statistics.append(moments)
    kept = _flap_selection(model, statistics, fraction, by_column)
    for index, layer in enumerate(decoder_layers(model)):
        biases = {
            name: removed_mean(linear.weight, statistics[index][name].mean, columns(layer, name, kept[index][name]))
            for name, linear in output_projections(layer).items()
        }
        keep_groups(model, index, kept[index]["o_proj"])
        keep_channels(model, index, kept[index]["down_proj"])
        for name, bias in biases.items():
            add_output_bias(model, index, name, bias)


def flap_scores(weight: torch.Tensor, variance: torch.Tensor, num_units: int, by_column: bool = False) -> torch.Tensor:
    """Mean of Var(X_j) · ‖W_:,j‖² over the columns of each unit, standardised over the module; float64 [num_units]."""
    scores = variance * weight.detach().double().square().sum(0)
    if by_column:
        scores = standardise(scores.square() if num_units < len(scores) else scores)
        return scores.view(num_units, -1).mean(1)
    return standardise(scores.view(num_units, -1).mean(1))


def standardise(scores: torch.Tensor) -> torch.Tensor:
    """Mean 0 and standard deviation 1; zeros if all are equal or there is only one."""
    spread = scores.std(correction=0)
    return (scores - scores.mean()) / spread if spread > 0 else scores - scores.mean()


def removed_mean(weight: torch.Tensor, mean: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """What the columns that are not kept give on average, W_removed · mean(X_removed), float64 [hidden]."""
    gone = torch.ones_like(mean)
    gone[kept] = 0
    return weight.detach().double() @ (mean * gone)


def _flap_selection(model: nn.Module, statistics: list, fraction: float, by_column: bool) -> list[dict[str, list[int]]]:
    """The units that stay, for each layer and projection."""
    scores, costs, modules, added = [], [], [], 0
    for index, layer in enumerate(decoder_layers(model)):
        for (name, linear), cost in zip(output_projections(layer).items(), unit_costs(layer), strict=True):
            num_units = layer_shape(layer)["num_key_value_heads" if name == "o_proj" else "intermediate_size"]
            score = flap_scores(linear.weight, statistics[index][name].variance, num_units, by_column)
            scores.append(score.cpu())
            costs.append(torch.full((len(score),), cost))
            modules += [(index, name, unit) for unit in range(len(score))]
            added += linear.out_features if linear.bias is None else 0
    best = torch.cat([torch.arange(len(score)) == score.argmax() for score in scores])
    target = fraction * count_parameters(model)["backbone"] + added
    removed = cheapest_units(torch.cat(scores), torch.cat(costs), best, target)
    kept = [{name: [] for name in output_projections(layer)} for layer in decoder_layers(model)]
    for unit, gone in zip(modules, removed.tolist(), strict=True):
        if not gone:
            kept[unit[0]][unit[1]].append(unit[2])
    return kept


def cheapest_units(scores: torch.Tensor, costs: torch.Tensor, protected: torch.Tensor, target: float) -> torch.Tensor:
    """Which units go, from the lowest score up, so that their costs come to `target` within half the cheapest unit; bool [units].

    Raises:
        InputError: the scores are not finite. OutOfReach: all unprotected units together do not reach the target.
    """
    if not torch.isfinite(scores).all():
        raise InputError("the scores of some units are not finite: use dtype float32 or another calibration text")
    least = int(costs.min())
    if int(costs[~protected].sum()) < target - least / 2:
        most = f"{int(costs[~protected].sum()):,} at most: every module keeps a unit"
        raise OutOfReach(f"{int(target):,} parameters cannot go, {most}; lower the fraction")
    removed, total = torch.zeros_like(protected), 0
    for unit in torch.argsort(scores, stable=True).tolist():
        if not protected[unit] and total + int(costs[unit]) <= target + least / 2:
            removed[unit] = True
            total += int(costs[unit])
    return removed
