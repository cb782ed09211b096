"""Two controls that read no text: units at random, and units of small weights."""

import torch
from torch import nn

from gqalib.peers.common import peer
from gqalib.prune.founding import prune, uniform_plan


@peer
def random(model: nn.Module, windows: torch.Tensor, fraction: float, multiple: int = 1) -> None:
    """Groups and channels at random, the same rate in every layer."""
    _prune_by("random", model, windows, fraction, multiple)


@peer
def magnitude(model: nn.Module, windows: torch.Tensor, fraction: float, multiple: int = 1) -> None:
    """The least Σ W² over all weights of a unit, o_proj included, the same rate in every layer."""
    _prune_by("magnitude", model, windows, fraction, multiple, include_o_proj=True)


def _prune_by(statistic: str, model: nn.Module, windows: torch.Tensor, fraction: float, multiple: int, **more) -> None:
    plan = uniform_plan(model, fraction, multiple=multiple)
    prune(model, plan, windows, group_statistic=statistic, channel_statistic=statistic, sequential=False, **more)
