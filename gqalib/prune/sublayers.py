"""Attention and MLP of a layer in the words that both share, and what flows into and out of them on some text."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gqalib.model.shapes import attention_of, decoder_layers, layer_shape
from gqalib.model.surgery import keep_channels, keep_groups
from gqalib.stream import advance, batches, sublayer_tokens


@dataclass(frozen=True)
class Call:
    """One batch on its way into a sublayer."""

    rows: slice  # of the windows
    stream: Tensor  # before the sublayer's norm, [windows, length, hidden], wherever it is kept
    norm: nn.Module
    others: dict[str, Any]  # position embeddings, mask, …

    @property
    @torch.no_grad()
    def inputs(self) -> Tensor:
        """The normalised stream, where the layer is; made when it is asked for: kept, it would be as long as the
        text."""
        return self.norm(self.stream.to(self.norm.weight, non_blocking=True))

    def of(self, stream: Tensor) -> Tensor:
        """The batch's rows of a stream that may wait in host memory, where the layer is."""
        return stream[self.rows].to(self.norm.weight.device, non_blocking=True)


class Sublayer:
    """Attention (half 0) or MLP (half 1) of a layer, as it stands."""

    def __init__(self, model: nn.Module, index: int, half: int):
        layer, shape = decoder_layers(model)[index], layer_shape(decoder_layers(model)[index])
        self.model, self.index, self.half = model, index, half
        self.module = layer.mlp if half else attention_of(layer)
        self.norm = layer.post_attention_layernorm if half else layer.input_layernorm
        self.input_names = ("gate_proj", "up_proj") if half else ("q_proj", "k_proj", "v_proj")
        self.output = self.module.down_proj if half else self.module.o_proj  # its inputs are the units' activations
        self.num_units = shape["intermediate_size" if half else "num_key_value_heads"]
        self.unit = self.output.in_features // self.num_units  # features of one
        self.widest = max(attention_of(layer).o_proj.in_features, layer.mlp.down_proj.in_features)
        self.at_once = sublayer_tokens(self.norm.weight.device, shape["intermediate_size"])
        self._others: dict[torch.Size, dict[str, Any]] = {}

    @property
    def inputs(self) -> list[nn.Linear]:
        """The projections that read the normalised stream."""
        return [getattr(self.module, name) for name in self.input_names]

    def keep(self, units: Sequence[int]) -> None:
        """Surgery, see `keep_groups` and `keep_channels`."""
        (keep_channels if self.half else keep_groups)(self.model, self.index, units)

    def split(self, weights: Tensor) -> tuple[Tensor, ...]:
        """The weight of each input projection, of a stack of them."""
        return weights.split([linear.out_features for linear in self.inputs])

    def run(self, call: Call, weights: Tensor | None = None) -> Tensor:
        """What the sublayer adds to the stream; `weights`: of its inputs, stacked, instead of their own."""
        parts = () if weights is None else self.split(weights)
        named = {f"{name}.weight": part for name, part in zip(self.input_names, parts, strict=False)}
        outputs = functional_call(self.module, named, (call.inputs,), call.others)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def calls(self, stream: Tensor, windows: Tensor) -> Iterator[Call]:
        """The batches of a residual stream [count, length, hidden] that stands before the sublayer."""
        for rows in batches(windows, self.at_once):
            shape = windows[rows].shape
            if shape not in self._others:  # positions and mask are the same for all batches of one shape
                self._others[shape] = {} if self.half else self._attention_arguments(stream[rows], windows[rows])
            yield Call(rows, stream[rows], self.norm, self._others[shape])

    def after(self, stream: Tensor, windows: Tensor) -> Tensor:
        """The residual stream after the sublayer, given that before it."""
        after = empty_like(stream)
        for call in self.calls(stream, windows):
            after[call.rows].copy_(call.of(stream) + self.run(call))
        return after

    def _attention_arguments(self, stream: Tensor, windows: Tensor) -> dict[str, Any]:
        """What the decoder gives attention besides the hidden states: its own forward pass, stopped at that call."""
        noted: dict[str, Any] = {}

        def stop(module: nn.Module, inputs: tuple, arguments: dict[str, Any]) -> None:
            noted.update(arguments)
            raise _Noted

        with self.module.register_forward_pre_hook(stop, with_kwargs=True), suppress(_Noted):
            advance(self.model, stream.to(self.norm.weight), windows, self.index, self.index + 1)
        return {name: value for name, value in noted.items() if name != "hidden_states"}


class _Noted(Exception):
    pass


def sublayers(model: nn.Module, index: int) -> tuple[Sublayer, Sublayer]:
    """Attention and MLP of a layer, in the order in which they run."""
    return Sublayer(model, index, 0), Sublayer(model, index, 1)


def empty_like(stream: Tensor) -> Tensor:
    """Room for another stream, pinned if this one is: pinned memory is lent again, and is copied without a detour."""
    return torch.empty_like(stream, pin_memory=stream.is_pinned())
