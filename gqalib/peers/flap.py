"""FLAP: what fluctuates least goes first, anywhere in the model, and its mean becomes a bias."""

import torch
from torch import nn

from gqalib.errors import OutOfReach
from gqalib.model.shapes import count_parameters, decoder_layers
from gqalib.model.surgery import add_output_bias
from gqalib.peers.common import MeanVariance, feed, peer
from gqalib.prune.gradients import finite
from gqalib.prune.plans import unit_costs
from gqalib.prune.sublayers import sublayers


@peer
def flap(model: nn.Module, windows: torch.Tensor, fraction: float, by_column: bool = True) -> None:
    """FLAP (An et al., AAAI 2024), metric WIFV, structure AL-AM: one threshold over all layers and modules, and a
    bias correction.

    A feature's score is the variance of the input times the squared norm of its column, Var(X_j) · ‖W_:,j‖², on the
    dense model; a head's is the mean of its features'. Scores are standardised within each module, and units are
    removed from the lowest score up, each at its price in parameters. What the removed features gave on average, W ·
    mean(X), becomes a bias of o_proj or down_proj. Every layer gets both biases, as in FLAP's code, and they count: the
    budget pays for them.

    Choices: as in FLAP's code, the scores of attention are squared, columns are standardised, then a head's are
    averaged; without `by_column` heads are averaged first, which the paper leaves open: much worse on the reference
    model, where it cuts into the first layer, and at some sizes better on stories260K. A module keeps at least its best
    unit; a unit that no longer fits the budget is passed over for the next.
    """
    stream, parts, seen, scores, costs = None, [], [], [], []
    for index, layer in enumerate(decoder_layers(model)):
        parts += sublayers(model, index)
        seen += MeanVariance(), MeanVariance()
        stream = feed(parts[-2:], [sums.see for sums in seen[-2:]], stream, windows)
        for part, sums, cost in zip(parts[-2:], seen[-2:], unit_costs(layer), strict=True):
            scores.append(flap_scores(part.output.weight, sums.variance, part.num_units, by_column).cpu())
            costs.append(torch.full((part.num_units,), cost))
    best = torch.cat([torch.arange(len(score)) == score.argmax() for score in scores])
    biases = sum(part.output.out_features for part in parts if part.output.bias is None)
    target = fraction * count_parameters(model)["backbone"] + biases
    stays = ~cheapest_units(torch.cat(scores), torch.cat(costs), best, target)
    for part, sums, units in zip(parts, seen, stays.split([len(score) for score in scores]), strict=True):
        weight, gone = part.output.weight.detach().double(), (~units).repeat_interleave(part.unit)
        bias = weight @ (sums.mean.cpu() * gone).to(weight.device)  # what goes gave on average
        part.keep(units.nonzero().flatten().tolist())
        add_output_bias(model, part.index, ("o_proj", "down_proj")[part.half], bias)


def flap_scores(weight: torch.Tensor, variance: torch.Tensor, num_units: int, by_column: bool = False) -> torch.Tensor:
    """Mean of Var(X_j) · ‖W_:,j‖² over the columns of each unit, standardised over the module; float64 [num_units]."""
    scores = variance.to(weight.device) * weight.detach().double().square().sum(0)
    if by_column:
        scores = standardise(scores.square() if num_units < len(scores) else scores)
        return scores.view(num_units, -1).mean(1)
    return standardise(scores.view(num_units, -1).mean(1))


def standardise(scores: torch.Tensor) -> torch.Tensor:
    """Mean 0 and standard deviation 1; zeros if all are equal or there is only one."""
    spread = scores.std(correction=0)
    return (scores - scores.mean()) / spread if spread > 0 else scores - scores.mean()


def cheapest_units(scores: torch.Tensor, costs: torch.Tensor, protected: torch.Tensor, target: float) -> torch.Tensor:
    """Which units go, from the lowest score up, so that their costs come to `target` within half the cheapest unit,
    or less where no unit that is left fits; bool [units].

    Raises:
        InputError: the scores are not finite. OutOfReach: all unprotected units together do not reach the target.
    """
    finite(scores, "a unit's score")
    least, most = int(costs.min()), int(costs[~protected].sum())
    if most < target - least / 2:
        raise OutOfReach(
            f"{int(target):,} parameters cannot go, {most:,} at most: every module keeps a unit; lower the fraction"
        )
    removed, total = torch.zeros_like(protected), 0
    for unit in torch.argsort(scores, stable=True).tolist():
        if not protected[unit] and total + int(costs[unit]) <= target + least / 2:
            removed[unit] = True
            total += int(costs[unit])
    return removed
