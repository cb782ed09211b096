"""A model walked layer by layer: batches, the residual stream from any layer on, layers that wait in host memory.

`streamed`, device `offload`, is for models that are larger than a card, on forward passes and on the methods that go
layer by layer (`refit.sweep`, `allocate.cost_table`, `gradients`). Device `all` is the other way: more
than one card, every layer stays.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gqalib.measure.cost import free_bytes
from gqalib.model.load import to_device

BATCH_TOKENS = 2048  # per pass: what two cores like, and what a backward pass through all layers of 8B has room for
MOST_TOKENS = 65_536  # per forward pass on a GPU: beyond it nothing gets faster
SUBLAYER_VALUES = 2**25  # tokens × MLP channels at a time in a sublayer on a GPU: fewer, and launching takes the time


def streamed(model: nn.Module, device: torch.device | str) -> nn.Module:
    """The model, whose decoder layers live in host memory from now on and the rest on `device`, where each layer goes
    when it is run. Layers that are put into the model later stay where they are."""
    decoder = model.get_decoder()
    layers, decoder.layers = list(decoder.layers), nn.ModuleList()
    try:
        to_device(model, device)
    finally:
        decoder.layers = nn.ModuleList(layer.to("cpu") for layer in layers)
    for layer in layers:
        layer.streamed_to = torch.device(device)
        layer.register_forward_pre_hook(_arrive)
        layer.register_forward_hook(_leave, always_call=True)
    return model


def is_streamed(model: nn.Module) -> bool:
    """Whether the model's decoder layers come and go."""
    return any(hasattr(layer, "streamed_to") for layer in model.get_decoder().layers)


@contextmanager
def at_work(*layers: nn.Module) -> Iterator[None]:
    """Inside, these layers stay on the device that they are streamed to; layers that are not streamed stay where they
    are.

    What is changed inside comes back changed.
    """
    held = [layer for layer in layers if hasattr(layer, "streamed_to") and not hasattr(layer, "host")]
    for layer in held:
        _arrive(layer)
        layer.held = True
    try:
        yield
    finally:
        for layer in held:
            del layer.held
            _leave(layer)


def _arrive(layer: nn.Module, *_: object) -> None:
    """To the device; the host's copy waits, so that a weight that does not change is not carried back."""
    if not hasattr(layer, "host"):
        layer.host = {parameter: parameter.data for parameter in layer.parameters()}
        layer.to(layer.streamed_to)
        layer.lent = {parameter: _state(parameter) for parameter in layer.parameters()}


def _leave(layer: nn.Module, *_: object) -> None:
    if not hasattr(layer, "held"):
        host, lent = vars(layer).pop("host"), vars(layer).pop("lent")
        for parameter in layer.parameters():
            unchanged = lent.get(parameter) == _state(parameter)
            parameter.data = host[parameter] if unchanged else parameter.data.to("cpu")


def _state(parameter: nn.Parameter) -> tuple[int, int]:
    """Where a weight lies and how often it was written into."""
    return parameter.data_ptr(), parameter._version


@torch.no_grad()
def hidden_states_before(model: nn.Module, windows: torch.Tensor, layer: int) -> torch.Tensor:
    """The residual stream that enters a layer, [count, length, hidden]."""
    return advance(model, None, windows, 0, layer)


@torch.no_grad()
def advance(
    model: nn.Module, hidden_states: torch.Tensor | None, windows: torch.Tensor, first: int, last: int
) -> torch.Tensor:
    """Carry a residual stream (None: the embeddings) through layers first … last − 1.

    It stays on the device that it is on; the embeddings are kept on the model's, or, if its layers are streamed, in
    host memory.
    """
    if is_streamed(model) and last - first > 1:  # layer by layer, so that each is fetched once
        for layer in range(first, last):
            hidden_states = advance(model, hidden_states, windows, layer, layer + 1)
        return hidden_states
    store = hidden_states.device if hidden_states is not None else "cpu" if is_streamed(model) else model.device
    result, at_once = None, tokens_at_once(model)
    with stream_through(model, first, last) as run:
        for rows in batches(windows, at_once):
            states = run(windows[rows], None if hidden_states is None else hidden_states[rows])
            if result is None:  # filled as the batches come: a list of them and its concatenation would be two buffers
                result = torch.empty((len(windows), *states.shape[1:]), dtype=states.dtype, device=store)
            result[rows].copy_(states)
    return result


@contextmanager
def stream_through(
    model: nn.Module, first: int, last: int
) -> Iterator[Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]]:
    """Inside, a function (token ids, stream or None) → the stream after layers first … last − 1, without the final
    norm."""
    decoder = model.get_decoder()
    norm, decoder.norm = decoder.norm, nn.Identity()

    def run(input_ids: torch.Tensor, stream: torch.Tensor | None) -> torch.Tensor:
        name, inputs = ("input_ids", input_ids) if stream is None else ("inputs_embeds", stream)
        return decoder(**{name: inputs.to(model.device)}, use_cache=False).last_hidden_state

    try:
        with layers_between(model, first, last), at_work(*(decoder.layers if last - first == 1 else ())):
            yield run
    finally:
        decoder.norm = norm


@contextmanager
def layers_between(model: nn.Module, first: int = 0, last: int | None = None) -> Iterator[None]:
    """Inside, the model consists of layers first … last − 1 only; afterwards it is as before."""
    decoder = model.get_decoder()
    layers = decoder.layers
    decoder.layers = layers[first:last]
    try:
        yield
    finally:
        decoder.layers = layers


def batches(windows: torch.Tensor, num_tokens: int | None = None) -> Iterator[slice]:
    """Slices of windows [count, length] that hold about `num_tokens` tokens each (default: `BATCH_TOKENS`)."""
    size = max(1, (num_tokens or BATCH_TOKENS) // windows.shape[1])
    yield from (slice(i, i + size) for i in range(0, len(windows), size))


def sublayer_tokens(device: torch.device, intermediate_size: int) -> int:
    """Tokens per pass through one sublayer: `BATCH_TOKENS` on a CPU, on a GPU as many as `SUBLAYER_VALUES` says."""
    return BATCH_TOKENS if device.type != "cuda" else max(BATCH_TOKENS, SUBLAYER_VALUES // intermediate_size)


def tokens_at_once(model: nn.Module) -> int:
    """Tokens per forward pass: `BATCH_TOKENS` on a CPU; on a GPU as many as half of its free memory takes, up to
    `MOST_TOKENS`.

    Per token the logits twice in float32 and once in the model's dtype, and as much again for the layer at work.
    """
    if model.device.type != "cuda":
        return BATCH_TOKENS
    return int(min(max(free_bytes(model.device) / 2 / (20 * model.config.vocab_size), BATCH_TOKENS), MOST_TOKENS))
