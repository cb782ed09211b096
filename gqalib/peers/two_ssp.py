"""2SSP: channels with the smallest output norm go from every MLP, then whole attentions, the least important first."""

import torch
from torch import nn

from gqalib.errors import InputError
from gqalib.measure.perplexity import window_losses
from gqalib.model.shapes import count_parameters, decoder_layers, has_attention
from gqalib.model.surgery import drop_attention, keep_channels, without_attention
from gqalib.peers.common import feed, peer
from gqalib.prune.gradients import finite
from gqalib.prune.plans import beyond_multiples, spread_channels, units
from gqalib.prune.scores import largest
from gqalib.prune.sublayers import Sublayer
from gqalib.stream import advance

ALPHA = 1.5  # of the paper: how the cut is shared between attention and MLP
SECOND_STAGE_TOKENS = 2048  # that attentions are tried out on: one sample, as in the authors' code


@peer
def two_ssp(model: nn.Module, windows: torch.Tensor, fraction: float, multiple: int = 1) -> None:
    """2SSP (Sandri et al., TMLR 2025, arXiv 2501.17771): channels go first, in every layer the same part, then whole
    attentions, one after the other.

    A channel's score is the L2 norm over the tokens of a window of what it gives to down_proj, averaged over the
    windows, on the dense model. Then, as often as `split` says, that attention goes without which the perplexity is
    lowest; the first `SECOND_STAGE_TOKENS` of the calibration text are read for it.

    Choices: where the formula asks for more attentions than the budget has, or for all, as many go as fit, and one
    stays. The authors' code stops there: on their models an MLP is larger than an attention. The norm in front of an
    attention goes with it; it is no part of the backbone.

    Raises:
        InputError: attentions of different size, which the formula does not know, or a loss that is not finite.
    """
    count, channels = split(model, fraction, multiple)
    for index, norms in enumerate(channel_norms(model, windows)):
        keep_channels(model, index, largest(norms, len(norms) - channels[index]))
    sample = windows[: max(1, SECOND_STAGE_TOKENS // windows.shape[1])]
    for _ in range(count):
        drop_attention(model, least_missed(model, sample))


def split(model: nn.Module, fraction: float, multiple: int = 1) -> tuple[int, list[int]]:
    """How many attentions go, and how many channels of each layer, so that together they are `fraction` of the
    backbone."""
    _, widths, costs = units(model)
    sizes = {sum(p.numel() for p in layer.self_attn.parameters()) for layer in decoder_layers(model)}
    if len(sizes) > 1:
        between = f"between {min(sizes):,} and {max(sizes):,} parameters"
        raise InputError(f"attentions have {between}, and 2SSP shares a cut among equal ones: give the dense model")
    size, costs, backbone = sizes.pop(), costs[:, 1].double(), count_parameters(model)["backbone"]
    count = round(len(widths) * fraction ** ((backbone / len(widths) / size - 1) / ALPHA))  # equation 5 of the paper
    room = fraction * backbone - (beyond_multiples(widths, multiple) * costs).sum()
    count = max(0, min(count, int(room // size), len(widths) - 1))
    left = torch.tensor(fraction * backbone - count * size, dtype=torch.float64)
    return count, spread_channels(left, widths, costs, torch.ones_like(costs), multiple)


def channel_norms(model: nn.Module, windows: torch.Tensor) -> list[torch.Tensor]:
    """Of each layer the sum over windows of ‖X_j‖ over their tokens, X the input of down_proj; float64 [channels]."""
    stream, norms = None, []
    for index in range(len(decoder_layers(model))):
        seen = []
        see = lambda x, seen=seen: seen.append(x.unflatten(0, (-1, windows.shape[1])).norm(dim=1).sum(0))  # noqa: E731
        stream = feed([Sublayer(model, index, 1)], [see], stream, windows)
        norms.append(sum(seen))
    return norms


@torch.no_grad()
def least_missed(model: nn.Module, windows: torch.Tensor) -> int:
    """The layer without whose attention the loss on these windows is lowest. Layers in front of it are run once for
    all that come after."""
    stream, losses = None, {}
    for index, layer in enumerate(decoder_layers(model)):
        if has_attention(layer):
            with without_attention(layer):
                loss = window_losses(model, windows, stream, index, exact=True).mean()
            losses[index] = finite(loss, "the loss without an attention")
        stream = advance(model, stream, windows, index, index + 1)
    return min(losses, key=losses.get)
