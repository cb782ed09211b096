"""How much a group, a channel or a layer matters.

A *unit* is what surgery removes: a GQA group (a KV head with its query heads) or an MLP channel. Scores are float64
tensors with one entry per unit, the larger the more important. With W a weight and G the gradient of the calibration
loss, summed over the calibration text:

    taylor      Σ |W ⊙ G|   first-order estimate of the change of the loss (Molchanov et al. 2019;
                            LLM-Pruner's element-wise form)
    magnitude   Σ W²        no data at all
    fisher      mean over windows of (Σ_t a ⊙ ∂L/∂a)²   a: the unit's activations; needs no gradient of any weight

Nothing here reads or writes files, and nothing here removes anything.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from gqalib.errors import InputError
from gqalib.measure.perplexity import perplexity, token_losses
from gqalib.model.shapes import decoder_layers, layer_shape
from gqalib.steps import in_steps
from gqalib.stream import advance, batches, is_streamed, layers_between, stream_through

STATISTICS = ("taylor", "magnitude", "random")


# ---------------------------------------------------------------- gradients


def backward(
    model: nn.Module,
    windows: torch.Tensor,
    layers: Iterable[int] | None = None,
    hidden_states: torch.Tensor | None = None,
    first_layer: int = 0,
) -> float:
    """Leave the gradient of the mean calibration loss in `.grad` of the projections of `layers` (default: all), and
    only there.

    With `hidden_states` [count, length, hidden], the stream before `first_layer`, the layers below it are not run.

    Returns:
        The calibration loss in nats per token.

    Raises:
        InputError: the loss or a gradient is not finite.
    """
    decoder = decoder_layers(model)
    layers = list(range(len(decoder)) if layers is None else layers)
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    asked = [part.requires_grad_(True) for index in layers for part in _halves(decoder[index])]
    losses, num_predicted = [], windows.shape[0] * (windows.shape[1] - 1)
    where = {"hidden_states": hidden_states, "first_layer": first_layer, "divisor": num_predicted}
    with _summed_in_float32(asked, windows):
        differentiate(model, windows, lambda step: losses.append(step.backward()), **where)
    for index in layers:
        for parameter in (p for p in decoder[index].parameters() if p.grad is not None):
            _finite(parameter.grad, index)
    return sum(losses)


def _summed_loss(model: nn.Module, input_ids: torch.Tensor, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
    """−log p summed over the predicted tokens of some windows, in nats, with its graph."""
    input_ids = input_ids.to(model.device)
    inputs = {"input_ids": input_ids} if hidden_states is None else {"inputs_embeds": hidden_states}
    loss = token_losses(model(**inputs, use_cache=False).logits, input_ids).sum()
    if not torch.isfinite(loss):
        raise InputError(f"the calibration loss is {loss.item()}: use dtype float32 or another calibration text")
    return loss


@contextmanager
def _asking(model: nn.Module, modules: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Inside, the parameters of these modules ask for a gradient and no others; afterwards those that did ask again."""
    asked = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, before in asked.items():
            parameter.requires_grad_(before)


@contextmanager
def _summed_in_float32(modules: Iterable[nn.Module], windows: torch.Tensor) -> Iterator[None]:
    """Inside, gradients of half-precision weights of several batches add up in float32; what is left is rounded."""
    several = len(list(batches(windows))) > 1
    short = [p for module in modules for p in module.parameters() if several and p.dtype.itemsize < 4]
    for parameter in short:
        parameter.grad_dtype = torch.float32
    try:
        yield
    finally:
        for parameter in short:
            total, parameter.grad = parameter.grad, None
            parameter.grad_dtype = parameter.dtype
            parameter.grad = None if total is None else total.to(parameter.dtype)


# ---------------------------------------------------------------- passes forward and backward


@dataclass(frozen=True)
class Step:
    """A piece of the calibration: some layers, on some windows."""

    layers: range  # those that are run
    rows: slice  # of the windows
    backward: Callable[[], float]  # forward and backward through them; returns the loss where they end in it


def differentiate(
    model: nn.Module,
    windows: torch.Tensor,
    each: Callable[[Step], object],
    hidden_states: torch.Tensor | None = None,
    first_layer: int = 0,
    lowest: int = 0,
    by_layer: bool = False,
    divisor: float = 1.0,
) -> None:
    """The gradient of the calibration loss (summed over tokens, over `divisor`), in steps: `each` is called with
    every one and runs it.

    All layers at once, batch by batch: the activations of all layers are kept, of one batch. `by_layer`: the last layer
    on all batches, then the one below it, down to `lowest`. Only one layer's activations and gradients are kept at a
    time, beside the streams before each layer, [layers, count, length, hidden], in host memory; each layer runs forward
    twice. The gradients are the same.
    """
    if by_layer:
        _differentiate_by_layer(model, windows, each, hidden_states, first_layer, lowest, divisor)
        return
    layers = range(first_layer, len(decoder_layers(model)))
    with layers_between(model, first_layer), torch.enable_grad():
        for rows in batches(windows):
            stream = None if hidden_states is None else hidden_states[rows]
            each(Step(layers, rows, partial(_backward_loss, model, windows[rows], stream, divisor)))


@torch.enable_grad()
def _differentiate_by_layer(model, windows, each, hidden_states, first_layer, lowest, divisor) -> None:
    count, stream = len(decoder_layers(model)), advance(model, hidden_states, windows, first_layer, lowest)
    streams = [stream.cpu()]
    for index in range(lowest, count):
        stream = advance(model, stream, windows, index, index + 1)
        streams.append(stream.cpu())
    gradient, stream = torch.empty_like(stream), None
    with layers_between(model, count):  # the final norm and lm_head alone
        for rows in batches(windows):
            inputs = streams[-1][rows].to(model.device).requires_grad_()
            _backward_loss(model, windows[rows], inputs, divisor)
            gradient[rows] = inputs.grad
    for index in reversed(range(lowest, count)):
        streams.pop()
        with stream_through(model, index, index + 1) as run:
            for rows in batches(windows):
                backward = partial(_backward_layer, partial(run, windows[rows]), streams[-1][rows], gradient[rows])
                each(Step(range(index, index + 1), rows, backward))


def _backward_loss(
    model: nn.Module, input_ids: torch.Tensor, hidden_states: torch.Tensor | None, divisor: float
) -> float:
    loss = _summed_loss(model, input_ids, hidden_states) / divisor
    loss.backward()
    return loss.item()


def _backward_layer(run: Callable[[torch.Tensor], torch.Tensor], stream: torch.Tensor, gradient: torch.Tensor) -> float:
    """One layer forward and backward; the gradient at its output is overwritten by that at its input."""
    inputs = stream.to(gradient.device).requires_grad_()
    outputs = run(inputs)
    outputs.backward(gradient.to(outputs.device))
    gradient.copy_(inputs.grad)
    return 0.0


def _one_layer_at_a_time(model: nn.Module, by_layer: bool | None) -> bool:
    """`by_layer`, or what suits the model: layer by layer where memory is scarcer than time, on a GPU or with
    streamed layers."""
    return (model.device.type != "cpu" or is_streamed(model)) if by_layer is None else by_layer


# ---------------------------------------------------------------- scores that are taken as gradients appear


def taylor_scores(
    model: nn.Module,
    windows: torch.Tensor,
    layers: Iterable[int] | None = None,
    hidden_states: torch.Tensor | None = None,
    first_layer: int = 0,
    include_o_proj: bool = False,
    by_layer: bool | None = None,
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Σ |W ⊙ G| of groups and channels of `layers` (default: all), without the model's gradients ever being there
    together.

    As soon as the last gradient of a layer's attention or MLP has come, hooks take its scores and drop it. The gradient
    is summed over the text before its magnitude is taken, so with more than one batch (and layer) the text goes through
    layer by layer, see `differentiate`; `by_layer` True or False decides otherwise. Arguments as in `backward` and
    `group_scores`; no `.grad` is left behind, and the scores are those of `backward` with `group_scores` and
    `channel_scores`.

    Raises:
        InputError: the loss or a gradient is not finite.
    """
    decoder, found = decoder_layers(model), {}
    layers = list(range(len(decoder)) if layers is None else layers)
    num_batches = len(list(batches(windows)))
    by_layer = min(num_batches, len(layers)) > 1 if by_layer is None else by_layer
    scores_of = partial(group_scores, include_o_proj=include_o_proj), channel_scores
    model.zero_grad(set_to_none=True)
    asked = [part for i in layers for part in _halves(decoder[i])]
    with _asking(model, asked), _summed_in_float32(asked, windows), ExitStack() as hooks:
        for index in layers:
            for half, part in enumerate(_halves(decoder[index])):
                take = partial(_take, found, (index, half), scores_of[half], decoder[index], part)
                _when_complete(part, num_batches, take, hooks)
        num_predicted = windows.shape[0] * (windows.shape[1] - 1)
        lowest = min(layers, default=0)
        differentiate(
            model, windows, lambda step: step.backward(), hidden_states, first_layer, lowest, by_layer, num_predicted
        )
    return {index: (_finite(found[index, 0], index), _finite(found[index, 1], index)) for index in layers}


def _halves(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    return layer.self_attn, layer.mlp


def _when_complete(part: nn.Module, num_batches: int, then: Callable[[], None], hooks: ExitStack) -> None:
    """Call `then` when each parameter of a module has got its gradient from the last batch."""
    parameters = list(part.parameters())
    outstanding = iter(reversed(range(num_batches * len(parameters))))

    def arrived(_: nn.Parameter) -> None:
        if next(outstanding) == 0:
            then()

    for parameter in parameters:
        hooks.callback(parameter.register_post_accumulate_grad_hook(arrived).remove)


def _take(found: dict, key: tuple[int, int], scores_of: Callable, layer: nn.Module, part: nn.Module) -> None:
    found[key] = scores_of(layer)
    part.zero_grad(set_to_none=True)


def _finite(values: torch.Tensor, index: int) -> torch.Tensor:
    """Gradients of a layer, or scores that were taken of them."""
    if not torch.isfinite(values).all():
        raise InputError(f"a gradient of layer {index} is not finite: use dtype float32 or another calibration text")
    return values


# ---------------------------------------------------------------- gradients of activations; no weight gets one


def fisher_scores(
    model: nn.Module,
    windows: torch.Tensor,
    layers: Iterable[int] | None = None,
    hidden_states: torch.Tensor | None = None,
    first_layer: int = 0,
    by_layer: bool | None = None,
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Mask-gradient scores of `layers` (default: all): {layer: (groups [num_key_value_heads], channels
    [intermediate_size])}.

    A mask of ones multiplies each group at `o_proj`'s input and each channel at `down_proj`'s; the score is the mean
    over windows of (∂ window's mean loss / ∂ mask)²: the diagonal Fisher information of the mask (Kwon et al. 2022).
    Other arguments as in `backward` and `differentiate` (`by_layer` None: on a GPU). Activations and their gradients
    only: the weights' `.grad` is neither made nor touched.

    Raises:
        InputError: the loss or a score is not finite.
    """
    layers, decoder = list(range(len(decoder_layers(model))) if layers is None else layers), decoder_layers(model)
    scores, count = {index: [0.0, 0.0] for index in layers}, len(windows)
    by_layer = _one_layer_at_a_time(model, by_layer)

    def add(step: Step) -> None:
        here = [index for index in layers if index in step.layers]
        with _masks([decoder[index] for index in here], len(windows[step.rows])) as masks:
            step.backward()
        for place, mask in enumerate(masks):
            gradient = mask.grad.double().flatten(1) / (windows.shape[1] - 1)  # [windows, units]
            scores[here[place // 2]][place % 2] += gradient.square().sum(0) / count

    with _asking(model):
        differentiate(model, windows, add, hidden_states, first_layer, min(layers, default=0), by_layer)
    if not all(torch.isfinite(score).all() for pair in scores.values() for score in pair):
        raise InputError("a mask gradient is not finite: use dtype float32 or another calibration text")
    return {index: tuple(pair) for index, pair in scores.items()}


@contextmanager
def _masks(layers: list[nn.Module], num_windows: int) -> Iterator[list[torch.Tensor]]:
    """Masks of ones [windows, 1, units, 1] at work inside the layers: groups, channels of the first, groups of the
    second, …"""
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
    units = inputs[0].unflatten(
        -1, (mask.shape[2], -1)
    )  # [windows, length, features] → [windows, length, units, features of one]
    return (units * mask).flatten(-2).to(inputs[0].dtype)


@in_steps()
def gradient_covariances(
    model: nn.Module, windows: torch.Tensor, by_layer: bool | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer, the covariances of the gradient at the outputs of `o_proj` and of `down_proj`, each float64 [hidden,
    hidden].

    G = mean over tokens of g gᵀ, g = ∂(summed loss) / ∂(output at that token): K-FAC's output factor (Martens & Grosse
    2015), in nats² per squared unit of the residual stream. No weight has a gradient. `by_layer` (default: on a GPU) as
    in `differentiate`; then the covariances wait in host memory. One step.

    Raises:
        InputError: the loss or a covariance is not finite.
    """
    parts = yield "covariances", partial(_covariances, model, windows, by_layer)
    return [(parts[f"o_proj.{layer}"], parts[f"down_proj.{layer}"]) for layer in range(len(decoder_layers(model)))]


def _covariances(model: nn.Module, windows: torch.Tensor, by_layer: bool | None) -> dict[str, torch.Tensor]:
    sums: dict[nn.Module, torch.Tensor] = {}

    def add(module: nn.Module, gradient: torch.Tensor) -> None:
        gradient = gradient.flatten(0, -2).double()
        sums[module] = sums.get(module, 0.0) + gradient.T @ gradient

    def watch(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(add, module))

    def each(step: Step) -> None:
        step.backward()
        if by_layer and step.rows.stop >= len(windows):  # this layer is done
            sums.update({module: sums[module].cpu() for module in modules[step.layers[0]]})

    modules = [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in decoder_layers(model)]
    by_layer = _one_layer_at_a_time(model, by_layer)
    with _asking(model), ExitStack() as hooks:
        for module in (module for pair in modules for module in pair):
            hooks.callback(module.register_forward_hook(watch).remove)
        hooks.callback(
            model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_()).remove
        )
        differentiate(model, windows, each, by_layer=by_layer)
    if not all(torch.isfinite(total).all() for total in sums.values()):
        raise InputError("a gradient covariance is not finite: use dtype float32 or another calibration text")
    names = ("o_proj", "down_proj")
    return {
        f"{name}.{i}": sums[module] / windows.numel()
        for i, pair in enumerate(modules)
        for name, module in zip(names, pair, strict=True)
    }


# ---------------------------------------------------------------- units of one layer


def element_scores(weight: nn.Parameter, statistic: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """The statistic of every element of a weight, in float64 on the weight's device, same shape."""
    if statistic not in STATISTICS:
        raise InputError(
            f"unknown statistic {statistic!r}: use one of {', '.join(STATISTICS)} (or fisher, by unit_scores)"
        )
    if statistic == "random":
        return torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    if statistic == "magnitude":
        return weight.detach().double().square()
    if weight.grad is None:
        raise InputError("a weight has no gradient: call importance.backward on this layer before taylor scores")
    return (weight.detach() * weight.grad).double().abs()


def row_scores(linear: nn.Linear, statistic: str) -> torch.Tensor:
    """Scores by row of a projection, [out_features]: the weights and the bias, which surgery removes together."""
    return sum(element_scores(p, statistic).view(len(p), -1).sum(1) for p in linear.parameters())


def head_scores(layer: nn.Module, statistic: str = "taylor") -> dict[str, torch.Tensor]:
    """Scores by head: `q_proj` and `o_proj` [num_attention_heads], `k_proj` and `v_proj` [num_key_value_heads]."""
    attention = layer.self_attn
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


def misaligned_group_scores(layer: nn.Module, statistic: str = "taylor") -> torch.Tensor:
    """LLM-Pruner's fold, for comparison: `view(size, groups).sum(0)` credits KV head k with query heads k, k+groups, …

    `repeat_kv` pairs *consecutive* query heads with a KV head, so for a 4:1 layer three of the four belong elsewhere.
    """
    heads = head_scores(layer, statistic)
    return heads["q_proj"].view(-1, len(heads["k_proj"])).sum(0) + heads["k_proj"] + heads["v_proj"]


def channel_scores(
    layer: nn.Module, statistic: str = "taylor", generator: torch.Generator | None = None
) -> torch.Tensor:
    """Score of each MLP channel, [intermediate_size]: its rows of gate_proj and up_proj and its column of down_proj."""
    if statistic == "random":
        return torch.rand(layer_shape(layer)["intermediate_size"], generator=generator, dtype=torch.float64)
    rows = row_scores(layer.mlp.gate_proj, statistic) + row_scores(layer.mlp.up_proj, statistic)
    return rows + element_scores(layer.mlp.down_proj.weight, statistic).sum(0)


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
    taken = {"fisher": fisher_scores(*text)} if "fisher" in statistics else {}
    if "taylor" in statistics:
        taken["taylor"] = taylor_scores(*text, include_o_proj)
    scores = {}
    for index in layers:
        layer, (groups, channels) = decoder_layers(model)[index], statistics
        scores[index] = (
            taken[groups][index][0] if groups in taken else group_scores(layer, groups, include_o_proj, generator),
            taken[channels][index][1] if channels in taken else channel_scores(layer, channels, generator),
        )
    return scores


def largest(scores: torch.Tensor, count: int) -> list[int]:
    """The `count` best units, ascending; of equal scores the lower index stays."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:count].tolist())


# ---------------------------------------------------------------- layers


@in_steps()
def removal_importance(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Rise of the perplexity when a layer is replaced by the identity, float64 [layers]; a step for each. It can be
    negative.

    The stream before each layer is at hand, so that only the layers above it are run again.
    """
    perplexities, stream = [], None
    for layer in range(len(decoder_layers(model)) + 1):  # the last one is the model itself, nothing left out
        stream = advance(model, stream, windows, max(0, layer - 1), layer)
        perplexities.append((yield f"layer-{layer}", partial(perplexity, model, windows, stream, layer + 1)))
    return torch.tensor(perplexities[:-1], dtype=torch.float64) - perplexities[-1]


def activation_importance(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """1 − mean cosine similarity of a layer's input and output, float64 [layers] (ShortGPT's block influence)."""
    influence, before = [], advance(model, None, windows, 0, 0)
    for layer in range(len(decoder_layers(model))):
        after = advance(model, before, windows, layer, layer + 1)
        influence.append(1 - torch.cosine_similarity(before.double(), after.double(), dim=-1).mean().item())
        before = after
    return torch.tensor(influence, dtype=torch.float64)
