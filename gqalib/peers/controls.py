"""Two controls."""

import torch
from torch import nn

from gqalib.peers.common import peer
from gqalib.prune.founding import Plan, prune, uniform_plan


@peer
def random(model: nn.Module, windows: torch.Tensor, fraction: float, seed: int = 0, multiple: int = 1) -> None:
    """Groups and channels at random, the same rate in every layer: the control."""
    _prune_at_once(model, windows, uniform_plan(model, fraction, multiple=multiple), "random", seed=seed)


@peer
def magnitude(model: nn.Module, windows: torch.Tensor, fraction: float, multiple: int = 1) -> None:
    """The least Σ W² over all weights of a unit, o_proj included, the same rate in every layer; reads no text."""
    _prune_at_once(model, windows, uniform_plan(model, fraction, multiple=multiple), "magnitude", include_o_proj=True)


def _prune_at_once(model: nn.Module, windows: torch.Tensor, plan: Plan, statistic: str, **options) -> None:
    settings = {"group_statistic": statistic, "channel_statistic": statistic, "sequential": False, **options}
    prune(model, plan, windows, **settings)
