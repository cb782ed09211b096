"""How much a group, a channel or a layer matters; the founding document's own measures are in `founding`.

Scores are float64 tensors with one entry per unit (GQA group or MLP channel), the larger the more important. With W a
weight and G the gradient of the calibration loss, summed over the calibration text:

    taylor      Σ |W ⊙ G|   first-order estimate of the change of the loss (Molchanov et al. 2019;
                            LLM-Pruner's element-wise form)
    magnitude   Σ W²        no data at all
    fisher      mean over windows of (Σ_t a ⊙ ∂L/∂a)²   a: the unit's activations; needs no gradient of any weight

Nothing here reads or writes files, and nothing here removes anything.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from gqalib.errors import InputError
from gqalib.model.shapes import attention_of, decoder_layers, layer_shape
from gqalib.prune.gradients import (
    Loss, Piece, as_they_come, asking, differentiate, finite, one_layer_at_a_time, summed_in_float32,
)  # fmt: skip
from gqalib.steps import in_steps
from gqalib.stream import advance, is_streamed

# ---------------------------------------------------------------- gradients of weights


def backward(
    model: nn.Module, windows: torch.Tensor, layers: Iterable[int] | None = None,
    hidden_states: torch.Tensor | None = None, first_layer: int = 0,
) -> float:  # fmt: skip
    """Leave the gradient of the mean calibration loss in `.grad` of the projections of `layers` (default: all), and
    only there.

    With `hidden_states` [count, length, hidden], the stream before `first_layer`, the layers below it are not run.

    Returns:
        The calibration loss in nats per token.

    Raises:
        InputError: the loss or a gradient is not finite, or the layers are streamed: they would be gone before their
        gradients.
    """
    if is_streamed(model):
        raise InputError("this method needs the gradients of all layers at once: give device cpu, cuda or all")
    decoder, losses = decoder_layers(model), []
    layers = list(range(len(decoder)) if layers is None else layers)
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    asked = [part.requires_grad_(True) for index in layers for part in _halves(decoder[index])]
    where = {"hidden_states": hidden_states, "first_layer": first_layer, "divisor": windows[:, 1:].numel()}
    with summed_in_float32(asked, windows):
        differentiate(model, windows, lambda piece: losses.append(piece.backward()), **where)
    for index in layers:
        for parameter in (p for p in decoder[index].parameters() if p.grad is not None):
            finite(parameter.grad, f"a gradient of layer {index}")
    return sum(losses)


def taylor_scores(
    model: nn.Module, windows: torch.Tensor, layers: Iterable[int] | None = None,
    hidden_states: torch.Tensor | None = None, first_layer: int = 0, include_o_proj: bool = False,
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Σ |W ⊙ G| of groups and channels of `layers` (default: all), {layer: (groups, channels)}: those of `backward`
    with `group_scores` and `channel_scores`, whose arguments it takes.

    A layer's attention or MLP is scored as soon as its last gradient has come; then the gradients go, so that the
    model's are never there together. They are summed over the text first, so with more than one batch (and layer) the
    text goes through layer by layer, see `differentiate`.

    Raises:
        InputError: the loss or a gradient is not finite.
    """
    decoder = decoder_layers(model)
    layers = list(range(len(decoder)) if layers is None else layers)
    found, asked = {index: [None, None] for index in layers}, [p for index in layers for p in _halves(decoder[index])]

    def take(place: int) -> None:
        index, half = layers[place // 2], place % 2
        layer = decoder[index]
        found[index][half] = channel_scores(layer) if half else group_scores(layer, include_o_proj=include_o_proj)

    as_they_come(model, windows, asked, take, hidden_states, first_layer, min(layers, default=0))
    return {index: tuple(finite(s, f"a gradient of layer {index}") for s in pair) for index, pair in found.items()}


def output_gradients(
    model: nn.Module, windows: torch.Tensor, loss: Loss, take: Callable[[int, int, torch.Tensor], None]
) -> None:
    """The gradient of the mean loss by the weights of `o_proj` and `down_proj` of all layers: `take` is called with
    layer, half and each of them, as soon as it is complete; then it goes. Layer by layer as in `taylor_scores`.

    Raises:
        InputError: the loss or a gradient is not finite.
    """
    asked = [linear for layer in decoder_layers(model) for linear in (attention_of(layer).o_proj, layer.mlp.down_proj)]

    def hand_over(place: int) -> None:
        take(*divmod(place, 2), finite(asked[place].weight.grad, f"a gradient of layer {place // 2}"))

    as_they_come(model, windows, asked, hand_over, loss=loss)


def _halves(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    return attention_of(layer), layer.mlp


# ---------------------------------------------------------------- gradients of activations; no weight gets one


def fisher_scores(
    model: nn.Module, windows: torch.Tensor, layers: Iterable[int] | None = None,
    hidden_states: torch.Tensor | None = None, first_layer: int = 0,
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Mask-gradient scores of `layers` (default: all): {layer: (groups [num_key_value_heads], channels
    [intermediate_size])}.

    A mask of ones multiplies each group at `o_proj`'s input and each channel at `down_proj`'s; the score is the mean
    over windows of (∂ window's mean loss / ∂ mask)²: the diagonal Fisher information of the mask (Kwon et al. 2022).
    Other arguments as in `backward`. Activations and their gradients only: the weights' `.grad` is neither made nor
    touched.

    Raises:
        InputError: the loss or a score is not finite.
    """
    layers, decoder = list(range(len(decoder_layers(model))) if layers is None else layers), decoder_layers(model)
    scores, count = {index: [0.0, 0.0] for index in layers}, len(windows)

    def add(piece: Piece) -> None:
        here = [index for index in layers if index in piece.layers]
        with _masks([decoder[index] for index in here], len(windows[piece.rows])) as masks:
            piece.backward()
        for place, mask in enumerate(masks):
            gradient = mask.grad.double().flatten(1) / (windows.shape[1] - 1)  # [windows, units]
            scores[here[place // 2]][place % 2] += gradient.square().sum(0) / count

    with asking(model):
        lowest, by_layer = min(layers, default=0), one_layer_at_a_time(model)
        differentiate(model, windows, add, hidden_states, first_layer, lowest, by_layer)
    return {index: tuple(finite(score, "a mask gradient") for score in pair) for index, pair in scores.items()}


@contextmanager
def _masks(layers: list[nn.Module], num_windows: int) -> Iterator[list[torch.Tensor]]:
    """Masks of ones [windows, 1, units, 1] at work inside the layers: groups, channels of the first, groups of the
    second, …"""
    masks = []
    with ExitStack() as hooks:
        for layer in layers:
            shape = layer_shape(layer)
            for linear, num_units in (
                (attention_of(layer).o_proj, shape["num_key_value_heads"]),
                (layer.mlp.down_proj, shape["intermediate_size"]),
            ):
                masks.append(torch.ones(num_windows, 1, num_units, 1, device=linear.weight.device, requires_grad=True))
                hooks.callback(linear.register_forward_pre_hook(partial(_apply_mask, masks[-1])).remove)
        yield masks


def _apply_mask(mask: torch.Tensor, module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    units = inputs[0].unflatten(-1, (mask.shape[2], -1))  # [windows, length, units, features of one]
    return (units * mask).flatten(-2).to(inputs[0].dtype)


@in_steps()
def gradient_covariances(model: nn.Module, windows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer, the covariances of the gradient at the outputs of `o_proj` and of `down_proj`, each float64 [hidden,
    hidden]; all in one step.

    G = mean over tokens of g gᵀ, g = ∂(summed loss) / ∂(output at that token): K-FAC's output factor (Martens & Grosse
    2015), in nats² per squared unit of the residual stream. No weight has a gradient. On a GPU, or with streamed
    layers, they come layer by layer, see `differentiate`, and wait in host memory.

    Raises:
        InputError: the loss or a covariance is not finite.
    """
    parts = yield "covariances", partial(_covariances, model, windows)
    return [(parts[f"o_proj.{layer}"], parts[f"down_proj.{layer}"]) for layer in range(len(decoder_layers(model)))]


def _covariances(model: nn.Module, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    sums: dict[nn.Module, torch.Tensor] = {}
    outputs = [(attention_of(layer).o_proj, layer.mlp.down_proj) for layer in decoder_layers(model)]
    by_layer = one_layer_at_a_time(model)

    def add(module: nn.Module, gradient: torch.Tensor) -> None:
        gradient = gradient.flatten(0, -2).double()
        sums[module] = sums.get(module, 0.0) + gradient.T @ gradient

    def watch(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(add, module))

    def run(piece: Piece) -> None:
        piece.backward()
        if by_layer and piece.rows.stop >= len(windows):  # this layer is done
            sums.update({module: sums[module].cpu() for module in outputs[piece.layers[0]]})

    with asking(model), ExitStack() as hooks:
        for module in (module for pair in outputs for module in pair):
            hooks.callback(module.register_forward_hook(watch).remove)
        embedding = model.get_input_embeddings()  # where no weight asks, the stream has to
        hooks.callback(embedding.register_forward_hook(lambda *call: call[-1].requires_grad_()).remove)
        differentiate(model, windows, run, by_layer=by_layer)
    means = [[finite(sums[m], "a gradient covariance") / windows.numel() for m in pair] for pair in outputs]
    names = "o_proj", "down_proj"
    return {f"{name}.{i}": mean for i, pair in enumerate(means) for name, mean in zip(names, pair, strict=True)}


# ---------------------------------------------------------------- units of one layer


def element_scores(weight: nn.Parameter, statistic: str) -> torch.Tensor:
    """The statistic of every element of a weight, `taylor` or `magnitude`, in float64 on its device, same shape."""
    if statistic == "magnitude":
        return weight.detach().double().square()
    if statistic != "taylor":
        known = "taylor, magnitude or random (or fisher, by unit_scores)"
        raise InputError(f"unknown statistic {statistic!r}: use {known}")
    if weight.grad is None:
        raise InputError("a weight has no gradient: call scores.backward on this layer before taylor scores")
    return (weight.detach() * weight.grad).double().abs()


def row_scores(linear: nn.Linear, statistic: str) -> torch.Tensor:
    """Scores by row of a projection, [out_features]: the weights and the bias, which surgery removes together."""
    return sum(element_scores(p, statistic).view(len(p), -1).sum(1) for p in linear.parameters())


def head_scores(layer: nn.Module, statistic: str = "taylor") -> dict[str, torch.Tensor]:
    """Scores by head: `q_proj` and `o_proj` [num_attention_heads], `k_proj` and `v_proj` [num_key_value_heads]."""
    attention = attention_of(layer)
    rows = {name: row_scores(getattr(attention, name), statistic) for name in ("q_proj", "k_proj", "v_proj")}
    rows["o_proj"] = element_scores(attention.o_proj.weight, statistic).sum(0)  # its columns belong to the heads
    return {name: score.view(-1, attention.head_dim).sum(1) for name, score in rows.items()}


def group_scores_by_part(layer: nn.Module, statistic: str = "taylor") -> dict[str, torch.Tensor]:
    """Scores by projection, each [num_key_value_heads]: query heads g·size … g·size+size−1 fold into group g."""
    heads = head_scores(layer, statistic)
    num_groups = len(heads["k_proj"])
    return {name: score.view(num_groups, -1).sum(1) for name, score in heads.items()}


def group_scores(
    layer: nn.Module, statistic: str = "taylor", include_o_proj: bool = False, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Score of each GQA group of a layer, [num_key_value_heads]: query heads + key head + value head, as the founding
    document sums them.

    `include_o_proj` adds the columns of `o_proj` that the group feeds, which the founding document leaves out.
    """
    if statistic == "random":
        return torch.rand(layer_shape(layer)["num_key_value_heads"], generator=generator, dtype=torch.float64)
    parts = group_scores_by_part(layer, statistic)
    return sum(score for name, score in parts.items() if include_o_proj or name != "o_proj")


def channel_scores(
    layer: nn.Module, statistic: str = "taylor", generator: torch.Generator | None = None
) -> torch.Tensor:
    """Score of each MLP channel, [intermediate_size]: its rows of gate_proj and up_proj and its column of down_proj."""
    if statistic == "random":
        return torch.rand(layer_shape(layer)["intermediate_size"], generator=generator, dtype=torch.float64)
    rows = row_scores(layer.mlp.gate_proj, statistic) + row_scores(layer.mlp.up_proj, statistic)
    return rows + element_scores(layer.mlp.down_proj.weight, statistic).sum(0)


def largest(scores: torch.Tensor, count: int) -> list[int]:
    """The `count` best units, ascending; of equal scores the lower index stays."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:count].tolist())


def activation_importance(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """1 − mean cosine similarity of a layer's input and output, float64 [layers] (ShortGPT's block influence)."""
    influence, before = [], advance(model, None, windows, 0, 0)
    for layer in range(len(decoder_layers(model))):
        after = advance(model, before, windows, layer, layer + 1)
        influence.append(1 - torch.cosine_similarity(before.double(), after.double(), dim=-1).mean().item())
        before = after
    return torch.tensor(influence, dtype=torch.float64)
