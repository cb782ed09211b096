"""How much memory a stage needs: on paper before it starts, refused if it does not fit, measured when it is done.

    with memory.stage("sweep", memory.expected("sweep", model, 128, 2048), model) as used:
        refit.sweep(model, plan, windows)

A need is the sum of a few terms: weights, streams of the calibration text, what a batch holds, statistics, and what a
training remembers; `_terms` is their table. A term is what is there at the stage's peak; what never is there together
is not added up. Bytes; GB = 1e9. What was measured beside it stands in every record (table `stages`) and in README.

Forward passes take larger batches where there is room (`stream.tokens_at_once`): then the peak is higher and the need
is not. A process' resident set, the measured peak on a CPU, also has what the C library keeps of what was freed: with
both it has been up to 2.2 times the need in a notebook. `MALLOC_MMAP_THRESHOLD_=65536` gives it back at once, for
more time; the tests measure like that.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gqalib import stream
from gqalib.device import in_bf16
from gqalib.errors import InputError
from gqalib.measure.cost import Used, free_bytes, measured, weight_bytes
from gqalib.model import attention
from gqalib.model.shapes import decoder_layers, layer_shapes
from gqalib.recover.optimizer import STACK
from gqalib.run.presets import Distillation, Recovery
from gqalib.stream import is_streamed

Terms = dict[str, int]  # bytes by what they are for; `weights` are there before the stage begins


def expected(
    stage: str | Sequence[str], model: nn.Module, num_examples: int, length: int, *,
    device: str | torch.device | None = None, streams: bool | None = None,
    settings: Recovery | Distillation | None = None,
) -> Terms:  # fmt: skip
    """Bytes that a stage needs at its peak, by term.

    Args:
        stage: one of `_terms`' names, or several that come one after the other: the largest.
        model: any Llama; one on the meta device will do.
        num_examples, length: of the calibration text; for LoRA and distillation what goes through the model at once.
        device: what it will run on (default: where it is). On a CPU, what waits in host memory counts too.
        streams: whether the layers are streamed (default: whether they are now).
        settings: of LoRA or distillation, where a teacher comes on top.

    Raises:
        InputError: an unknown stage.
    """
    on, streams = torch.device(device or model.device), is_streamed(model) if streams is None else streams
    table = _terms(_Sizes(model, num_examples, length, on, streams), settings)
    stages = [stage] if isinstance(stage, str) else stage
    for unknown in (name for name in stages if name not in table):
        raise InputError(f"unknown stage {unknown!r}: use one of {', '.join(table)}")
    terms = max((table[name] for name in stages), key=lambda terms: sum(terms.values()))
    return {name: int(size) for name, size in terms.items() if size}


class _Sizes:
    """What the terms are made of. s bytes per weight; L layers; d hidden size; h query heads; q, k query and KV width,
    f MLP width of the widest layer; V vocabulary; n tokens of the text, B of a batch, S of one through a sublayer, F of
    one that only goes forward.
    """

    def __init__(self, model: nn.Module, num_examples: int, length: int, device: torch.device, streams: bool):
        shapes, layers, config = layer_shapes(model), decoder_layers(model), model.config
        names = "num_attention_heads", "num_key_value_heads", "intermediate_size"
        self.h, heads, self.f = (int(shapes[name].max()) for name in names)
        self.L, self.d, self.V = len(layers), config.hidden_size, config.vocab_size
        self.s = next(layers.parameters()).element_size()
        self.q, self.k = self.h * config.head_dim, heads * config.head_dim
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        self.layer, self.layers = max(sizes), sum(sizes)  # parameters of the widest, and of all
        self.all, self.length, self.n = weight_bytes(model), length, num_examples * length
        most = stream.BATCH_TOKENS, stream.sublayer_tokens(device, self.f), stream.tokens_at_once(model)
        self.B, self.S, self.F = map(self.windows, most)
        self.device, self.in_host, self.streams = device, int(device.type == "cpu"), streams
        self.elsewhere = streams and not self.in_host  # layers and streams are in host memory, which does not count

    def windows(self, tokens: int) -> int:
        """Tokens of a batch: whole windows."""
        return min(self.n, max(1, tokens // self.length) * self.length)

    def weights(self) -> Terms:
        """All of them; of a streamed model embedding, norm and lm_head, and one layer."""
        if not self.elsewhere:
            return {"weights": self.all}
        return {"weights": max(0, self.all - self.layers * self.s), "layer at work": self.layer * self.s}

    def buffers(self, count: int, itemsize: int) -> Terms:
        """So many streams [n, d]."""
        return {"streams": 0 if self.elsewhere else count * self.n * self.d * itemsize}

    def kept(self, trained: bool) -> int:
        """What a layer keeps of a token for the backward pass: the streams at both norms in float32, 8d, of attention
        s·(2q + 2k) and of the MLP 3sf; if its weights have gradients what both norms scale and give, 4sd, and what
        down_proj reads, sf."""
        fixed = 8 * self.d + self.s * (2 * self.q + 2 * self.k + 3 * self.f)
        return fixed + trained * self.s * (4 * self.d + self.f)

    def kept_narrow(self) -> int:
        """The same where weights are in float32, all of them trained, and products in bf16: at both norms 16d, then a
        copy for each of the five projections that read a norm's result."""
        return 16 * self.d + 2 * (5 * self.d + 2 * self.q + 2 * self.k + 4 * self.f)


def _terms(c: _Sizes, settings: Recovery | Distillation | None) -> dict[str, Terms]:
    """Each stage's terms."""
    s, d, f, L, V = c.s, c.d, c.f, c.L, c.V
    size = 4 if c.n > c.B else s  # of a gradient: float32 where batches are summed
    scored = d * f * (4 * size + 16)  # gradients of one layer's MLP, and the largest of them while it is scored
    by_layer = c.streams or not c.in_host
    statistics = 8 * (3 * f * f + 4 * d * f)  # of down_proj: XᵀX, its factor, its inverse; YᵀX, weights, solutions
    newton = d * f * (5 * 16 + 2 * 8) + c.S * 16 * f  # five vectors like gate and up in float64, two in float32
    heads = 4 * c.h * c.length * c.S * (not c.in_host)  # a GPU has no fused kernel for grouped heads in float32
    covariance = {"covariance at work": 3 * 8 * d * d}
    forward = max(V * (8 if s == 4 else s + 8), s * (3 * f + 2 * d) + 8 * d)  # of a token: its logits, or a layer

    def backward(by_layer: bool, trained: float, others: float, gradients: float) -> Terms:
        """A pass over a batch, in which so many layers keep what training needs, and so many what it does not; logits
        are gone before the first gradients come. Or one for each layer, between which the streams wait."""
        kept, logits = c.B * (trained * c.kept(True) + others * c.kept(False)), 12 * c.B * V
        if not by_layer:
            return {"activations": kept, "logits or gradients": max(logits, gradients)}
        waiting = {"streams kept in host memory": c.in_host * (L + 1) * c.n * d * s}
        return {**c.buffers(2, s), **waiting, "batch": max(logits, kept / L + gradients)}

    table = {
        "layer removal": {**c.buffers(2, s), "batch": c.F * forward},
        "one-shot Taylor": backward(c.streams or c.B < c.n, L, 0, scored),
        "all gradients": {**backward(False, L, 0, 0), "gradients": c.layers * size},
        "sequential Taylor": {**backward(c.streams, 1, L - 1, scored + c.layer * size), **c.buffers(2, s)},
        "gradient covariances": {
            **backward(by_layer, 0, L, 3 * 8 * d * d if by_layer else 0), "covariances": c.in_host * 2 * L * 8 * d * d,
        },
        "cost table": {
            **c.buffers(2, 4), **covariance, "statistics": max(
                statistics, 16 * f * f + c.S * f * (4 * s + 4), 2 * heads * (s == 4)
            ),
        },
        "sweep": {
            **c.buffers(5, 4), **covariance, "layer in float32": 4 * c.layer * (s != 4),
            "statistics or Gauss-Newton": max(statistics, newton, 4 * heads),
            "weights before the cut": c.in_host * c.layers * s,
        },
        "context": {  # of a plan, after its sweep
            **backward(c.streams or c.B < c.n, L, 0, 0), "divergence": 24 * c.B * V,
            "levels": c.in_host * 5 * s * L * d * (c.q + f),
        },
        "LoRA": {  # logits nine times in float32: loss, entropy and accuracy, as trl takes them
            **_adapter(c, settings), "logits": 36 * c.n * V,
            "activations": c.n * L * c.kept(True) * (1 + (getattr(settings, "lora_dropout", 0) > 0)),
        },
        "distillation": _distillation(c, settings or Distillation()),
    }  # fmt: skip
    return {name: {**c.weights(), **terms} for name, terms in table.items()}


def _adapter(c: _Sizes, settings: Recovery | Distillation | None) -> Terms:
    """r·(inputs + outputs) of all projections, with gradient and AdamW's two moments."""
    widths = 2 * (c.d + c.q) + 2 * (c.d + c.k) + 3 * (c.d + c.f)
    return {"adapter": 4 * c.s * getattr(settings, "lora_r", 0) * c.L * widths}


def _distillation(c: _Sizes, settings: Recovery | Distillation) -> Terms:
    """Muon's momentum, AdamW's two moments, and gradients; or LoRA's adapter. Before most gradients are there: what
    all layers keep, and logits of student and teacher with lm_head's gradient. Where products are in bf16, so are
    activations, and there are copies of the weights. On a CPU also the probabilities of `attention.blocked`: per layer
    and token h times half of the keys, in float32 (and in bf16)."""
    narrow = in_bf16(getattr(settings, "dtype", "auto"), c.device)
    keys = min(c.length, (c.length + attention.BLOCK) / 2)
    probabilities = c.in_host * c.h * keys * (4 + 2 * narrow)
    kept = c.kept_narrow() if narrow else c.kept(True)
    work = c.n * c.L * (kept + probabilities) + 2 * (2 if narrow else 4) * c.n * c.V
    copies = {"weights in bf16": c.all / 2 if narrow and c.s == 4 else 0}
    if getattr(settings, "lora_r", 0):
        return {**_adapter(c, settings), **copies, "activations and logits": work}
    by_muon = c.layers * c.s if getattr(settings, "muon_lr", 0) else 0
    stack = 12 * min(c.layers, max(STACK, c.d * c.f)) if by_muon else 0  # gradients: mixed, stacked, orthogonalised
    work = {"activations, logits, gradients": max(c.all + stack, work + c.d * c.V * c.s)}
    return {"optimisers": by_muon + 2 * (c.all - by_muon), **copies, **work}


# ---------------------------------------------------------------- before and after


@dataclass
class Peak:
    """A stage's memory; `peak_gb` and `seconds` are known when it is done."""

    expected_gb: float
    free_gb: float
    peak_gb: float = 0.0
    seconds: float = 0.0


def places(model: nn.Module) -> list[torch.device]:
    """The cards that a model's layers are spread over (host memory, where some may wait, is none), or its device."""
    cards = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return sorted(cards, key=str) or [model.device]


@contextlib.contextmanager
def stage(
    name: str, terms: Terms, model: nn.Module, knob: str = "give fewer or shorter examples", say: Callable = print
) -> Iterator[Peak]:
    """States the peak that `terms` (see `expected`) come to, runs the block, states the peak that it had.

    Of a model that is spread over cards all count. On a GPU the peak is the allocator's; on a CPU the weights and what
    the process' resident set grew by.

    Args:
        knob: what lowers the need, for the refusal. say: gets each line.

    Raises:
        InputError: more is needed than is free; the block is not begun.
    """
    devices, total, weights = places(model), sum(terms.values()), terms.get("weights", 0)
    free, where = sum(map(free_bytes, devices)), ", ".join(map(str, devices))
    if total - weights > free:
        needed = f"{(total - weights) / 1e9:.1f} GB beside the weights' {weights / 1e9:.1f} GB"
        raise InputError(f"{name} needs {needed}, but {free / 1e9:.1f} GB are free on {where}: {knob}")
    parts = ", ".join(f"{term} {size / 1e9:.2f}" for term, size in sorted(terms.items(), key=lambda item: -item[1]))
    say(f"{name}: {total / 1e9:.2f} GB expected ({parts}), {free / 1e9:.1f} GB free on {where}")
    peak, before = Peak(total / 1e9, free / 1e9), weights
    if devices[0].type == "cuda":
        before = sum(map(torch.cuda.memory_allocated, devices))
    used = Used()  # of a measurement that fails before it begins
    try:
        with measured(*devices) as used:
            yield peak
    finally:
        peak.peak_gb, peak.seconds = (before + used.peak_bytes) / 1e9, used.seconds
    say(f"{name}: {peak.peak_gb:.2f} GB at its peak, {peak.seconds:.0f} s")
