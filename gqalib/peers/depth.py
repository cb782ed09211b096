"""Depth pruners: whole layers go, those of least influence."""

import torch
from torch import nn

from gqalib.errors import InputError, OutOfReach
from gqalib.model.surgery import drop_layers
from gqalib.peers.common import peer
from gqalib.prune.founding import removal_importance
from gqalib.prune.plans import layer_sizes
from gqalib.prune.scores import activation_importance


@peer
def shortgpt(model: nn.Module, windows: torch.Tensor, fraction: float) -> None:
    """ShortGPT (Men et al., 2024): drop the layers of least block influence, 1 − cos(input, output), measured once on
    the dense model.

    Choices: as many layers as come nearest to the fraction, at least one.
    """
    _drop_least(model, activation_importance(model, windows), fraction)


@peer
def layer_removal(
    model: nn.Module, windows: torch.Tensor, fraction: float, removal: torch.Tensor | None = None
) -> None:
    """Drop the layers whose removal, one at a time, raises the calibration perplexity least (Kim et al., Shortened
    LLaMA, 2024).

    Choices: measured once on the dense model, as published, by `founding.removal_importance` (`removal`, if it is at
    hand); as many layers as come nearest to the fraction, at least one.
    """
    _drop_least(model, removal_importance(model, windows) if removal is None else removal, fraction)


def _drop_least(model: nn.Module, influence: torch.Tensor, fraction: float) -> None:
    if not torch.isfinite(influence).all():
        raise InputError(f"layer importances {influence.tolist()} are not all finite: use a longer sample or float32")
    order = torch.argsort(influence, stable=True)
    totals = layer_sizes(model)[order].long().cumsum(0)
    count = int((totals - fraction * int(totals[-1])).abs().argmin()) + 1
    if count == len(order):
        raise OutOfReach(f"fraction {fraction} is nearest to all {count} layers: one must stay; lower the fraction")
    drop_layers(model, order[:count].tolist())
