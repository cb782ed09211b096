"""What the peers share."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from gqalib.errors import InputError
from gqalib.model.shapes import decoder_layers, layer_shape
from gqalib.model.surgery import restored_on_error
from gqalib.stream import advance

PEERS: dict[str, Callable[..., None]] = {}


def peer(function: Callable[..., None]) -> Callable[..., None]:
    """Enter a peer into `PEERS`: its arguments are checked first, and the model is as it was if it raises."""

    @functools.wraps(function)
    def checked(model: nn.Module, windows: torch.Tensor, fraction: float, *more, **options) -> None:
        if not 0 < fraction < 1:
            raise InputError(f"fraction {fraction} of the backbone is outside (0, 1): give a fraction such as 0.25")
        with restored_on_error(model):
            function(model, windows, fraction, *more, **options)
        model.requires_grad_(True)
        model.zero_grad(set_to_none=True)

    PEERS[function.__name__] = checked
    return checked


def output_projections(layer: nn.Module) -> dict[str, nn.Linear]:
    """The two projections that write into the residual stream; their inputs are the features that pruning removes."""
    return {"o_proj": layer.self_attn.o_proj, "down_proj": layer.mlp.down_proj}


@torch.no_grad()
def feed(
    model: nn.Module, stream: torch.Tensor | None, windows: torch.Tensor, index: int, see: dict[str, Callable]
) -> torch.Tensor:
    """Carry the residual stream (None: the embeddings) through one layer, and show its features on the way.

    `see`: {"o_proj" or "down_proj": function of the features [tokens, width] of one batch, in float64}.
    """
    projections = output_projections(decoder_layers(model)[index])
    hooks = [
        projections[name].register_forward_pre_hook(lambda _, args, look=look: look(args[0].flatten(0, -2).double()))
        for name, look in see.items()
    ]
    try:
        return advance(model, stream, windows, index, index + 1)
    finally:
        for hook in hooks:
            hook.remove()


class Moments:
    """Mean and variance of features over all tokens, float64 [width]."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0

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


def by_group(columns: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Columns of o_proj [heads × head_dim] → one row per group [num_key_value_heads, size × head_dim]."""
    return columns.view(layer_shape(layer)["num_key_value_heads"], -1)


def columns(layer: nn.Module, name: str, units: Sequence[int]) -> torch.Tensor:
    """Columns of o_proj or down_proj that belong to these groups or channels, int64."""
    linear = output_projections(layer)[name]
    num_units = layer_shape(layer)["num_key_value_heads" if name == "o_proj" else "intermediate_size"]
    return torch.arange(linear.in_features).view(num_units, -1)[list(units)].flatten()
