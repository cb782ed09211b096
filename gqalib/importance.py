"""How much a group, a channel or a layer matters.

A *unit* is what surgery removes: a GQA group (a KV head with its query heads) or an MLP channel. Scores are float64
tensors with one entry per unit, the larger the more important. With W a weight and G the gradient of the calibration
loss, summed over the calibration text:

    taylor      Σ |W ⊙ G|   first-order estimate of the change of the loss (Molchanov et al. 2019; LLM-Pruner's element-wise form)
    magnitude   Σ W²        no data at all
    fisher      mean over windows of (Σ_t a ⊙ ∂L/∂a)²   a: the unit's activations; needs no gradient of any weight

Nothing here reads or writes files, and nothing here removes anything.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from gqalib.errors import InputError
from gqalib.models import decoder_layers, layer_shape
from gqalib.perplexity import advance, batches, layers_between, only_layers, perplexity, token_losses
from gqalib.progress import NOT_KEPT, Progress

STATISTICS = ("taylor", "magnitude", "random")


# ---------------------------------------------------------------- gradients


def backward(
    model: nn.Module,
    windows: torch.Tensor,
    layers: Iterable[int] | None = None,
    hidden_states: torch.Tensor | None = None,
    first_layer: int = 0,
) -> float:
    """Leave the gradient of the mean calibration loss in `.grad` of the projections of `layers` (default: all), and only there.

    With `hidden_states` [count, length, hidden], the stream before `first_layer`, the layers below it are not run.

    Returns:
        The calibration loss in nats per token.

    Raises:
        InputError: the loss or a gradient is not finite.
    """
    all_layers = decoder_layers(model)
    wanted = [all_layers[i] for i in (range(len(all_layers)) if layers is None else layers)]
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    for layer in wanted:
        layer.self_attn.requires_grad_(True)
        layer.mlp.requires_grad_(True)
    loss = _accumulate(model, windows, hidden_states, first_layer)
    for index, layer in enumerate(wanted):
        if not all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None):
            raise InputError(f"a gradient of layer {index} is not finite: use dtype float32 or another calibration text")
    return loss


def _accumulate(model: nn.Module, windows: torch.Tensor, hidden_states: torch.Tensor | None, first_layer: int) -> float:
    num_predicted, total = windows.shape[0] * (windows.shape[1] - 1), 0.0
    with layers_between(model, first_layer):
        for rows in batches(windows):
            stream = None if hidden_states is None else hidden_states[rows]
            loss = _summed_loss(model, windows[rows], stream) / num_predicted
            loss.backward()
            total += loss.item()
    return total


def _summed_loss(model: nn.Module, input_ids: torch.Tensor, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
    """−log p summed over the predicted tokens of some windows, in nats, with its graph."""
    input_ids = input_ids.to(model.device)
    inputs = {"input_ids": input_ids} if hidden_states is None else {"inputs_embeds": hidden_states}
    loss = token_losses(model(**inputs, use_cache=False).logits, input_ids).sum()
    if not torch.isfinite(loss):
        raise InputError(f"the calibration loss is {loss.item()}: use dtype float32 or another calibration text")
    return loss


# ---------------------------------------------------------------- gradients of activations; no weight gets one


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient; afterwards those that did ask again."""
    asking = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def fisher_scores(
    model: nn.Module,
    windows: torch.Tensor,
    layers: Iterable[int] | None = None,
    hidden_states: torch.Tensor | None = None,
    first_layer: int = 0,
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Mask-gradient scores of `layers` (default: all): {layer: (groups [num_key_value_heads], channels [intermediate_size])}.

    A mask of ones multiplies each group at `o_proj`'s input and each channel at `down_proj`'s; the score is the mean over
    windows of (∂ window's mean loss / ∂ mask)²: the diagonal Fisher information of the mask (Kwon et al. 2022). Other
    arguments as in `backward`. Activations and their gradients only: the weights' `.grad` is neither made nor touched.

    Raises:
        InputError: the loss or a score is not finite.
    """
    layers, decoder = list(range(len(decoder_layers(model))) if layers is None else layers), decoder_layers(model)
    scores = [[0.0, 0.0] for _ in layers]
    with _frozen(model), layers_between(model, first_layer):
        for rows in batches(windows):
            with _masks([decoder[index] for index in layers], len(windows[rows])) as masks:
                stream = None if hidden_states is None else hidden_states[rows]
                _summed_loss(model, windows[rows], stream).backward()
            for place, mask in enumerate(masks):
                gradient = mask.grad.double().flatten(1) / (windows.shape[1] - 1)  # [windows, units]
                scores[place // 2][place % 2] += gradient.square().sum(0) / len(windows)
    if not all(torch.isfinite(score).all() for pair in scores for score in pair):
        raise InputError("a mask gradient is not finite: use dtype float32 or another calibration text")
    return {index: tuple(pair) for index, pair in zip(layers, scores, strict=True)}


@contextmanager
def _masks(layers: list[nn.Module], num_windows: int) -> Iterator[list[torch.Tensor]]:
    """Masks of ones [windows, 1, units, 1] at work inside the layers: groups, channels of the first, groups of the second, …"""
    masks = []
    with ExitStack() as hooks:
        for layer in layers:
            shape = layer_shape(layer)
            for linear, num_units in (
                (layer.self_attn.o_proj, shape["num_key_value_heads"]),
                (layer.mlp.down_proj, shape["intermediate_size"]),
            ):
                masks.append(torch.ones(num_windows, 1, num_units, 1, device=linear.weight.device, requires_grad=True))
                hooks.callback(linear.register_forward_pre_hook(partial(_apply_mask, masks[-1])).remove)
        yield masks


def _apply_mask(mask: torch.Tensor, module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    units = inputs[0].unflatten(-1, (mask.shape[2], -1))  # [windows, length, features] → [windows, length, units, features of one]
    return (units * mask).flatten(-2).to(inputs[0].dtype)


def gradient_covariances(model: nn.Module, windows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer, the covariances of the gradient at the outputs of `o_proj` and of `down_proj`, each float64 [hidden, hidden].

    G = mean over tokens of g gᵀ, g = ∂(summed loss) / ∂(output at that token): K-FAC's output factor (Martens & Grosse
    2015), in nats² per squared unit of the residual stream. One backward pass in which no weight has a gradient.

    Raises:
        InputError: the loss or a covariance is not finite.
    """
    sums: dict[nn.Module, torch.Tensor] = {}

    def add(module: nn.Module, gradient: torch.Tensor) -> None:
        gradient = gradient.flatten(0, -2).double()
        sums[module] = sums.get(module, 0.0) + gradient.T @ gradient

    def watch(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        output.register_hook(partial(add, module))

    modules = [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in decoder_layers(model)]
    with _frozen(model), ExitStack() as hooks:
        for module in (module for pair in modules for module in pair):
            hooks.callback(module.register_forward_hook(watch).remove)
        for rows in batches(windows):
            embeddings = model.get_input_embeddings()(windows[rows].to(model.device)).requires_grad_()
            _summed_loss(model, windows[rows], embeddings).backward()
    if not all(torch.isfinite(total).all() for total in sums.values()):
        raise InputError("a gradient covariance is not finite: use dtype float32 or another calibration text")
    return [tuple(sums[module] / windows.numel() for module in pair) for pair in modules]


# ---------------------------------------------------------------- units of one layer


def element_scores(weight: nn.Parameter, statistic: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """The statistic of every element of a weight, in float64 on the weight's device, same shape."""
    if statistic not in STATISTICS:
        raise InputError(f"unknown statistic {statistic!r}: use one of {', '.join(STATISTICS)} (or fisher, by unit_scores)")
    if statistic == "random":
        return torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    if statistic == "magnitude":
        return weight.detach().double().square()
    if weight.grad is None:
        raise InputError("a weight has no gradient: call importance.backward on this layer before taylor scores")
    return (weight.detach() * weight.grad).double().abs()


def head_scores(layer: nn.Module, statistic: str = "taylor") -> dict[str, torch.Tensor]:
    """Scores by head: `q_proj` and `o_proj` [num_attention_heads], `k_proj` and `v_proj` [num_key_value_heads]."""
    attention = layer.self_attn
    rows = {name: element_scores(getattr(attention, name).weight, statistic).sum(1) for name in ("q_proj", "k_proj", "v_proj")}
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
    """Score of each GQA group of a layer, [num_key_value_heads]: query heads + key head + value head, as the seed sums them.

    `include_o_proj` adds the columns of `o_proj` that the group feeds, which the seed leaves out.
    """
    if statistic == "random":
        return torch.rand(layer_shape(layer)["num_key_value_heads"], generator=generator, dtype=torch.float64)
    parts = group_scores_by_part(layer, statistic)
    return sum(score for name, score in parts.items() if include_o_proj or name != "o_proj")


def misaligned_group_scores(layer: nn.Module, statistic: str = "taylor") -> torch.Tensor:
    """LLM-Pruner's fold, for comparison: `view(size, groups).sum(0)` credits KV head k with query heads k, k+groups, …

    `repeat_kv` pairs *consecutive* query heads with a KV head, so for a 4:1 layer three of the four belong elsewhere.
    """
    heads = head_scores(layer, statistic)
    return heads["q_proj"].view(-1, len(heads["k_proj"])).sum(0) + heads["k_proj"] + heads["v_proj"]


def channel_scores(layer: nn.Module, statistic: str = "taylor", generator: torch.Generator | None = None) -> torch.Tensor:
    """Score of each MLP channel, [intermediate_size]: its rows of gate_proj and up_proj and its column of down_proj."""
    if statistic == "random":
        return torch.rand(layer_shape(layer)["intermediate_size"], generator=generator, dtype=torch.float64)
    mlp = layer.mlp
    scores = [element_scores(linear.weight, statistic) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    return scores[0].sum(1) + scores[1].sum(1) + scores[2].sum(0)


def unit_scores(
    model: nn.Module,
    windows: torch.Tensor,
    statistics: tuple[str, str] = ("taylor", "taylor"),
    layers: Iterable[int] | None = None,
    hidden_states: torch.Tensor | None = None,
    first_layer: int = 0,
    include_o_proj: bool = False,
    generator: torch.Generator | None = None,
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Scores of groups and of channels of `layers` (default: all) by two statistics, with whatever pass these need.

    Arguments as in `backward` and `group_scores`; no gradient is left behind.
    """
    layers = list(range(len(decoder_layers(model))) if layers is None else layers)
    text = (model, windows, layers, hidden_states, first_layer)
    fisher = fisher_scores(*text) if "fisher" in statistics else None
    if "taylor" in statistics:
        backward(*text)
    scores = {}
    for index in layers:
        layer, (groups, channels) = decoder_layers(model)[index], statistics
        scores[index] = (
            fisher[index][0] if groups == "fisher" else group_scores(layer, groups, include_o_proj, generator),
            fisher[index][1] if channels == "fisher" else channel_scores(layer, channels, generator),
        )
    model.zero_grad(set_to_none=True)
    return scores


def largest(scores: torch.Tensor, count: int) -> list[int]:
    """The `count` best units, ascending; of equal scores the lower index stays."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:count].tolist())


# ---------------------------------------------------------------- layers


def removal_importance(model: nn.Module, windows: torch.Tensor, cached_prefix: bool = True, progress: Progress = NOT_KEPT) -> torch.Tensor:
    """Rise of the perplexity when a layer is replaced by the identity, float64 [layers]. It can be negative.

    With `cached_prefix` the stream before each layer is kept, so that only the layers above it are run again. `progress` keeps
    the layers' perplexities.
    """
    progress, num_layers = progress.of("removal_importance", model, windows, cached_prefix), len(decoder_layers(model))
    baseline, rises, hidden_states = progress.once("baseline", partial(perplexity, model, windows)), [], None
    for layer in range(num_layers):
        if cached_prefix:
            hidden_states = advance(model, hidden_states, windows, max(0, layer - 1), layer)
        without = progress.once(f"layer-{layer}", partial(_perplexity_without, model, windows, layer, hidden_states))
        rises.append(without - baseline)
    return torch.tensor(rises, dtype=torch.float64)


def _perplexity_without(model: nn.Module, windows: torch.Tensor, layer: int, hidden_states: torch.Tensor | None) -> float:
    if hidden_states is not None:
        return perplexity(model, windows, hidden_states, first_layer=layer + 1)
    with only_layers(model, [i for i in range(len(decoder_layers(model))) if i != layer]):
        return perplexity(model, windows)


def activation_importance(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """1 − mean cosine similarity of a layer's input and output, float64 [layers] (ShortGPT's block influence)."""
    influence, before = [], advance(model, None, windows, 0, 0)
    for layer in range(len(decoder_layers(model))):
        after = advance(model, before, windows, layer, layer + 1)
        influence.append(1 - torch.cosine_similarity(before.double(), after.double(), dim=-1).mean().item())
        before = after
    return torch.tensor(influence, dtype=torch.float64)
