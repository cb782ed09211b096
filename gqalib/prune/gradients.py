"""The gradient of a calibration loss, in pieces of which none needs more memory than there is.

`differentiate` goes forward and backward, either batch by batch through all layers or layer by layer through all
batches; what a piece leaves is taken by whoever asked, and goes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from gqalib.errors import InputError
from gqalib.measure.perplexity import token_losses
from gqalib.model.shapes import decoder_layers
from gqalib.stream import advance, batches, is_streamed, layers_between, stream_through

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of logits and token ids, by predicted token


@dataclass(frozen=True)
class Piece:
    """A piece of the calibration: some layers, on some windows."""

    layers: range  # those that are run
    rows: slice  # of the windows
    backward: Callable[[], float]  # forward and backward through them; returns the loss where they end in it


def differentiate(
    model: nn.Module, windows: torch.Tensor, each: Callable[[Piece], object], hidden_states: torch.Tensor | None = None,
    first_layer: int = 0, lowest: int = 0, by_layer: bool = False, divisor: float = 1.0, loss: Loss = token_losses,
) -> None:  # fmt: skip
    """The gradient of the calibration loss (summed over tokens, over `divisor`), in pieces: `each` is called with every
    one and runs it.

    All layers at once, batch by batch: the activations of all layers are kept, of one batch. `by_layer`: the last layer
    on all batches, then the one below it, down to `lowest`. Only one layer's activations and gradients are kept at a
    time, beside the streams before each layer, [layers, count, length, hidden], in host memory; each layer runs forward
    twice. The gradients are the same.
    """
    if by_layer:
        _differentiate_by_layer(model, windows, each, hidden_states, first_layer, lowest, divisor, loss)
        return
    layers = range(first_layer, len(decoder_layers(model)))
    with layers_between(model, first_layer), torch.enable_grad():
        for rows in batches(windows):
            stream = None if hidden_states is None else hidden_states[rows]
            each(Piece(layers, rows, partial(_backward_loss, model, windows[rows], stream, divisor, loss)))


@torch.enable_grad()
def _differentiate_by_layer(model, windows, each, hidden_states, first_layer, lowest, divisor, loss) -> None:
    count, stream = len(decoder_layers(model)), advance(model, hidden_states, windows, first_layer, lowest)
    streams = [stream.cpu()]
    for index in range(lowest, count):
        stream = advance(model, stream, windows, index, index + 1)
        streams.append(stream.cpu())
    gradient, stream = torch.empty_like(stream), None
    with layers_between(model, count):  # the final norm and lm_head alone
        for rows in batches(windows):
            inputs = streams[-1][rows].to(model.device).requires_grad_()
            _backward_loss(model, windows[rows], inputs, divisor, loss)
            gradient[rows] = inputs.grad
    for index in reversed(range(lowest, count)):
        streams.pop()
        with stream_through(model, index, index + 1) as run:
            for rows in batches(windows):
                backward = partial(_backward_layer, partial(run, windows[rows]), streams[-1][rows], gradient[rows])
                each(Piece(range(index, index + 1), rows, backward))


def _backward_loss(
    model: nn.Module, input_ids: torch.Tensor, hidden_states: torch.Tensor | None, divisor: float, of: Loss
) -> float:
    """The loss summed over the predicted tokens of some windows, over `divisor`, in nats."""
    input_ids = input_ids.to(model.device)
    inputs = {"input_ids": input_ids} if hidden_states is None else {"inputs_embeds": hidden_states}
    loss = of(model(**inputs, use_cache=False).logits, input_ids).sum()
    if not torch.isfinite(loss):
        raise InputError(f"the calibration loss is {loss.item()}: use dtype float32 or another calibration text")
    loss = loss / divisor
    loss.backward()
    return loss.item()


def _backward_layer(run: Callable[[torch.Tensor], torch.Tensor], stream: torch.Tensor, gradient: torch.Tensor) -> float:
    """One layer forward and backward; the gradient at its output is overwritten by that at its input."""
    inputs = stream.to(gradient.device).requires_grad_()
    outputs = run(inputs)
    outputs.backward(gradient.to(outputs.device))
    gradient.copy_(inputs.grad)
    return 0.0


def one_layer_at_a_time(model: nn.Module) -> bool:
    """Whether gradients are to come layer by layer: where memory is scarcer than time, on a GPU or with streamed
    layers."""
    return model.device.type != "cpu" or is_streamed(model)


@contextmanager
def asking(model: nn.Module, modules: Iterable[nn.Module] = ()) -> Iterator[None]:
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
def summed_in_float32(modules: Iterable[nn.Module], windows: torch.Tensor) -> Iterator[None]:
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


def as_they_come(
    model: nn.Module, windows: torch.Tensor, asked: list[nn.Module], take: Callable[[int], None],
    hidden_states: torch.Tensor | None = None, first_layer: int = 0, lowest: int = 0, loss: Loss = token_losses,
) -> None:  # fmt: skip
    """Differentiate the mean loss by the parameters of two modules of each layer; `take` is told the place of each
    module whose gradients are complete, and they go."""
    num_batches = len(list(batches(windows)))
    model.zero_grad(set_to_none=True)
    with asking(model, asked), summed_in_float32(asked, windows), ExitStack() as hooks:
        for place, part in enumerate(asked):
            _when_complete(part, num_batches, partial(take, place), hooks)
        by_layer = is_streamed(model) or min(num_batches, len(asked) // 2) > 1  # a layer that left has no backward
        where = hidden_states, first_layer, lowest, by_layer
        differentiate(model, windows, lambda piece: piece.backward(), *where, divisor=windows[:, 1:].numel(), loss=loss)


def _when_complete(part: nn.Module, num_batches: int, take: Callable[[], None], hooks: ExitStack) -> None:
    """Take and drop the gradients of a module when each of its parameters has got that from the last batch."""
    parameters = list(part.parameters())
    outstanding = iter(reversed(range(num_batches * len(parameters))))

    def arrived(_: nn.Parameter) -> None:
        if next(outstanding) == 0:
            take()
            part.zero_grad(set_to_none=True)

    for parameter in parameters:
        hooks.callback(parameter.register_post_accumulate_grad_hook(arrived).remove)


def finite(values: torch.Tensor, what: str) -> torch.Tensor:
    """The values.

    Raises:
        InputError: `what` they are is not finite.
    """
    if not torch.isfinite(values).all():
        raise InputError(f"{what} is not finite: use dtype float32 or another calibration text")
    return values
