"""Wanda-sp."""

import torch
from torch import nn

from gqalib.model.shapes import decoder_layers
from gqalib.model.surgery import keep_channels, keep_groups
from gqalib.peers.common import Moments, by_group, feed, output_projections, peer
from gqalib.prune.founding import uniform_plan
from gqalib.prune.scores import largest
from gqalib.stream import advance


@peer
def wanda_sp(model: nn.Module, windows: torch.Tensor, fraction: float, multiple: int = 1) -> None:
    """Wanda-sp (An et al., AAAI 2024, from Sun et al., ICLR 2024): |W_ij| · ‖X_j‖ of o_proj and down_proj, summed over a unit.

    The same rate in every layer, front to back: a layer reads what the layers before it, already pruned, give.

    Choices: no calibration text of its own; units are ranked within a layer, as in FLAP's code.
    """
    plan, stream = uniform_plan(model, fraction, multiple=multiple), None
    for index, layer in enumerate(decoder_layers(model)):
        moments = {name: Moments() for name in output_projections(layer)}
        feed(model, stream, windows, index, {name: m.see for name, m in moments.items()})
        scores = {
            name: wanda_scores(linear.weight, moments[name].squares)
            for name, linear in output_projections(layer).items()
        }
        groups, channels = by_group(scores["o_proj"], layer).sum(1), scores["down_proj"]
        keep_groups(model, index, largest(groups, len(groups) - plan.groups[index]))
        keep_channels(model, index, largest(channels, len(channels) - plan.channels[index]))
        stream = advance(model, stream, windows, index, index + 1)


def wanda_scores(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Σ_i |W_ij| · ‖X_j‖ of each column j, float64; `squares`: Σ X_j² over the tokens."""
    return weight.detach().double().abs().sum(0) * squares.sqrt()
