"""Two controls that read no text: units at random, and units of small weights."""

import torch
from torch import nn

from gqalib.peers.common import peer
from gqalib.prune.founding import prune
from gqalib.prune.plans import uniform_plan


@peer
def random(model: nn.Module, windows: torch.Tensor, fraction: float, multiple: int = 1) -> None:
    """Groups and channels at random, the same rate in every layer."""
    how = {"group_statistic": "random", "channel_statistic": "random", "sequential": False}
    prune(model, uniform_plan(model, fraction, multiple=multiple), windows, **how)


@peer
def magnitude(model: nn.Module, windows: torch.Tensor, fraction: float, multiple: int = 1) -> None:
    """The least Σ W² over all weights of a unit, o_proj included, the same rate in every layer."""
    how = {"group_statistic": "magnitude", "channel_statistic": "magnitude", "sequential": False}
    prune(model, uniform_plan(model, fraction, multiple=multiple), windows, include_o_proj=True, **how)
