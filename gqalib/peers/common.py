"""What the peers share: a check of what is asked, and statistics of the features that pruning removes."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial, wraps

import torch
from torch import Tensor, nn

from gqalib.errors import InputError
from gqalib.model.surgery import restored_on_error
from gqalib.prune.sublayers import Sublayer
from gqalib.stream import advance


def peer(function: Callable[..., None]) -> Callable[..., None]:
    """A method as a peer: the fraction is checked first, and the model is as it was if it raises."""

    @wraps(function)
    def checked(model: nn.Module, windows: Tensor, fraction: float, *more, **options) -> None:
        if not 0 < fraction < 1:
            raise InputError(f"fraction {fraction} of the backbone is outside (0, 1): give a fraction such as 0.25")
        try:
            with restored_on_error(model):
                function(model, windows, fraction, *more, **options)
        finally:
            model.requires_grad_(True)
            model.zero_grad(set_to_none=True)

    return checked


@torch.no_grad()
def feed(
    parts: Sequence[Sublayer], see: Sequence[Callable[[Tensor], object]], stream: Tensor | None, windows: Tensor
) -> Tensor:
    """Carry the residual stream (None: the embeddings) through the layer of these sublayers, and show what enters
    their output projections on the way: to `see`, [tokens, features] of one batch, in float64."""

    def show(look: Callable[[Tensor], object], _: nn.Linear, inputs: tuple[Tensor]) -> None:
        look(inputs[0].flatten(0, -2).double())

    with ExitStack() as hooks:
        for part, look in zip(parts, see, strict=True):
            hooks.enter_context(part.output.register_forward_pre_hook(partial(show, look)))
        return advance(parts[0].model, stream, windows, parts[0].index, parts[0].index + 1)


class MeanVariance:
    """Sums over all tokens of features and of their squares, float64 [width], and what follows from them."""

    count, sum, squares = 0, 0.0, 0.0

    def see(self, features: Tensor) -> None:
        self.count += len(features)
        self.sum = self.sum + features.sum(0)
        self.squares = self.squares + features.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def variance(self) -> Tensor:
        return (self.squares / self.count - self.mean.square()).clamp(min=0)
