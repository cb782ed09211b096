"""What the peers share: the door that checks what is asked, and a look at the features that pruning removes."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import nn

from gqalib.errors import InputError
from gqalib.model.surgery import restored_on_error
from gqalib.stream import advance


def peer(function: Callable[..., None]) -> Callable[..., None]:
    """A method as a peer: the fraction is checked first, and the model is as it was if it raises."""

    @functools.wraps(function)
    def checked(model: nn.Module, windows: torch.Tensor, fraction: float, *more, **options) -> None:
        if not 0 < fraction < 1:
            raise InputError(f"fraction {fraction} of the backbone is outside (0, 1): give a fraction such as 0.25")
        with restored_on_error(model):
            function(model, windows, fraction, *more, **options)
        model.requires_grad_(True)
        model.zero_grad(set_to_none=True)

    return checked


@torch.no_grad()
def feed(
    model: nn.Module,
    stream: torch.Tensor | None,
    windows: torch.Tensor,
    index: int,
    see: Mapping[nn.Linear, Callable[[torch.Tensor], object]],
) -> torch.Tensor:
    """Carry the residual stream (None: the embeddings) through one layer, and show the inputs of its projections on
    the way.

    `see`: {projection: function of its inputs [tokens, features] of one batch, in float64}.
    """

    def show(linear: nn.Linear, args: tuple[torch.Tensor]) -> None:
        see[linear](args[0].flatten(0, -2).double())

    hooks = [linear.register_forward_pre_hook(show) for linear in see]
    try:
        return advance(model, stream, windows, index, index + 1)
    finally:
        for hook in hooks:
            hook.remove()


class MeanVariance:
    """Sums over all tokens of features and of their squares, float64 [width], and what follows from them."""

    count, sum, squares = 0, 0.0, 0.0

    def see(self, features: torch.Tensor) -> None:
        self.count += len(features)
        self.sum = self.sum + features.sum(0)
        self.squares = self.squares + features.square().sum(0)

    @property
    def mean(self) -> torch.Tensor:
        return self.sum / self.count

    @property
    def variance(self) -> torch.Tensor:
        return (self.squares / self.count - self.mean.square()).clamp(min=0)
