"""Layers that live in host memory: the one in work is on the device, the others are not.

For models that are larger than a card, on forward passes and on the methods that go layer by layer (`refit.sweep`,
`search.cost_table`, `importance` with `by_layer`). `device_map="auto"` is the other way: more than one card, every layer stays.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from gqalib.models import to_device


@contextmanager
def streamed(model: nn.Module, device: torch.device | str) -> Iterator[nn.Module]:
    """Inside, the decoder layers live on the CPU and the rest of the model on `device`, where each layer goes when it is run.

    Afterwards the whole model is on the CPU. Layers that are put into the model meanwhile stay where they are.
    """
    decoder = model.get_decoder()
    with ExitStack() as stack:
        stack.callback(model.to, "cpu")
        layers, decoder.layers = list(decoder.layers), nn.ModuleList()
        try:
            to_device(model, device)
        finally:
            decoder.layers = nn.ModuleList(layer.to("cpu") for layer in layers)
        for layer in layers:
            layer.streamed_to = torch.device(device)
            stack.callback(delattr, layer, "streamed_to")
            stack.callback(layer.register_forward_pre_hook(_arrive).remove)
            stack.callback(layer.register_forward_hook(_leave, always_call=True).remove)
        yield model


def is_streamed(model: nn.Module) -> bool:
    """Whether the model's decoder layers come and go."""
    return any(hasattr(layer, "streamed_to") for layer in model.get_decoder().layers)


@contextmanager
def at_work(*layers: nn.Module) -> Iterator[None]:
    """Inside, these layers stay on the device that they are streamed to; layers that are not streamed stay where they are.

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
