"""Wanda-sp: weights times activations, layer by layer on the model pruned so far."""

import torch
from torch import nn

from gqalib.peers.common import MeanVariance, feed, peer
from gqalib.prune.plans import uniform_plan
from gqalib.prune.scores import largest
from gqalib.prune.sublayers import sublayers
from gqalib.stream import advance


@peer
def wanda_sp(model: nn.Module, windows: torch.Tensor, fraction: float, multiple: int = 1) -> None:
    """Wanda-sp (An et al., AAAI 2024, from Sun et al., ICLR 2024): |W_ij| · ‖X_j‖ of o_proj and down_proj, summed
    over a unit.

    The same rate in every layer, front to back: a layer reads what the layers before it, already pruned, give.

    Choices: no calibration text of its own; units are ranked within a layer, as in FLAP's code.
    """
    plan, stream = uniform_plan(model, fraction, multiple=multiple), None
    for index in range(len(plan.groups)):
        parts, seen = sublayers(model, index), (MeanVariance(), MeanVariance())
        feed(parts, [sums.see for sums in seen], stream, windows)
        for part, sums, removed in zip(parts, seen, (plan.groups[index], plan.channels[index]), strict=True):
            scores = wanda_scores(part.output.weight, sums.squares).view(part.num_units, -1).sum(1)
            part.keep(largest(scores, part.num_units - removed))
        stream = advance(model, stream, windows, index, index + 1)


def wanda_scores(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Σ_i |W_ij| · ‖X_j‖ of each column j, float64; `squares`: Σ X_j² over the tokens."""
    return weight.detach().double().abs().sum(0) * squares.sqrt().to(weight.device)
