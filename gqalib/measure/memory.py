"""How much memory a stage needs: on paper before it starts, refused if it does not fit, measured when it is done.

    with memory.stage("sweep", memory.expected("sweep", model, 128, 2048), model) as used:
        refit.sweep(model, plan, windows)

Symbols: s bytes per weight; L layers; d hidden size; h query heads; q, k query and KV width, f MLP width of the widest
layer; V vocabulary; n = num_examples · length calibration tokens; B tokens of a batch (`stream.batches`). Bytes, GB =
1e9. A term is what is there at the stage's peak; what never is there together is not added up.

Llama-3-8B in bf16 on a GPU, in GB, by these formulas. Measured on an H200 (data/results/llama3-8b-shape): layer removal
24.36 of 24.37 at that card's larger batches, sequential Taylor 23.84 of 23.82; streamed covariances 5.98 of 5.69, cost
table 9.79 of 9.75, sweep 11.24 of 10.62:

    stage                    tokens        resident                                                     layers streamed
    layer removal            50 × 128      18.8 = weights 16.1, logits of 2,048 tokens 2.6               5.2
    one-shot Taylor          10 × 128      25.9 = weights, activations 7.9, gradients 2.0
    one-shot Taylor         128 × 2048     23.5 = weights, stream and its gradient 4.3, logits 3.2       5.7, 33 × 2.1 in host
    all gradients            10 × 128      40.0 = weights, activations 7.9, gradients 14.0, logits 2.0
    sequential Taylor        10 × 128      23.8 = weights, activations 5.8, gradients 2.0
    gradient covariances    128 × 2048     23.5 = as the Taylor scores                                   5.7, likewise
    cost table              128 × 2048     36.2 = weights, three streams 12.9, statistics 6.8, …         9.8
    sweep                   128 × 2048     45.7 = weights, five streams 21.5, statistics 6.8, …         10.6
    LoRA, r 8                16 × 256      85.6 = weights, activations 50.5, logits 18.9;  33.6 with a batch of 4
    distillation              1 × 2048    156.9 = float32 weights 32.1, gradients 32.1, optimisers 36.3, teacher 16.1, …

Forward passes take larger batches where there is room (`stream.tokens_at_once`): then the peak is higher and the need
is not.

The formulas say what is in use. A process' resident set, the measured peak on a CPU, also has what the C library keeps
of what was freed: up to half as much again in a notebook. `MALLOC_MMAP_THRESHOLD_=65536` gives it back at once, for
more time; the tests measure like that.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gqalib import stream
from gqalib.errors import InputError
from gqalib.measure.cost import Used, free_bytes, measured, weight_bytes
from gqalib.model import attention
from gqalib.model.shapes import decoder_layers, layer_shapes
from gqalib.device import bf16_is_fast
from gqalib.run.presets import Distillation, Recovery
from gqalib.stream import is_streamed

Terms = dict[str, int]  # bytes by what they are for; `weights` are there before the stage begins


@dataclass(frozen=True)
class Shape:
    """What the formulas read off a model."""

    s: int
    L: int
    d: int
    h: int
    q: int
    k: int
    f: int
    V: int
    weights: int  # bytes, all of them
    layer: int  # parameters of the widest layer

    @classmethod
    def of(cls, model: nn.Module) -> "Shape":
        shapes, layers, config = layer_shapes(model), decoder_layers(model), model.config
        heads, kv_heads, width = (
            int(shapes[name].max()) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        )
        layer = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
        s = next(layers.parameters()).element_size()
        hidden, head_dim = config.hidden_size, config.head_dim
        return cls(
            s,
            len(layers),
            hidden,
            heads,
            heads * head_dim,
            kv_heads * head_dim,
            width,
            config.vocab_size,
            weight_bytes(model),
            layer,
        )

    @property
    def not_streamed(self) -> int:
        """Bytes of embedding, lm_head and norm (and, roughly, of layers narrower than the widest)."""
        return max(0, self.weights - self.L * self.layer * self.s)

    def saved(self, trained: bool) -> int:
        """Bytes per token that a layer keeps for the backward pass.

        8d (the streams at both norms, in float32) + s·(2q + 2k) (attention) + 3sf (MLP); and if its weights have
        gradients s·(2d + q + f), what the projections read.
        """
        fixed = 8 * self.d + self.s * (2 * self.q + 2 * self.k + 3 * self.f)
        return fixed + trained * self.s * (2 * self.d + self.q + self.f)

    @property
    def forward(self) -> int:
        """Bytes per token of a layer at work without a backward pass: s·3f of the MLP, s·2d + 8d of stream and norm."""
        return self.s * (3 * self.f + 2 * self.d) + 8 * self.d

    def logits(self, backward: bool) -> int:
        """Bytes per token of the logits: themselves and up to twice in float32, V·(4 + s or 8); 12·V with a backward
        pass."""
        return self.V * (12 if backward else 8 if self.s == 4 else self.s + 8)

    def gradients(self, size: int) -> int:
        """3·df of `size` bytes, the MLP's weights' gradients, and 17·df to 20·df while one of them is scored."""
        return self.d * self.f * (3 * size + 16 + size)


def expected(
    stage: str | Sequence[str],
    model: nn.Module,
    num_examples: int,
    length: int,
    *,
    device: str | torch.device | None = None,
    streams: bool | None = None,
    settings: Recovery | Distillation | None = None,
) -> Terms:
    """Bytes that a stage needs at its peak, by term; one formula per stage, in its function in `STAGES`.

    Args:
        stage: `layer removal`, `one-shot Taylor`, `all gradients`, `sequential Taylor` (and surgery), `gradient
            covariances`, `cost table`, `sweep`, `scoring` (against a dense model), `LoRA` or `distillation`; or several
            that come one after the
            other: the largest.
        model: any Llama; one on the meta device will do.
        num_examples, length: of the calibration text; for LoRA and distillation what goes through the model at once.
        device: what it will run on (default: where it is). On a CPU, what waits in host memory counts too.
        streams: whether the layers are streamed (default: whether they are now).
        settings: of LoRA or distillation, where a teacher comes on top.

    Raises:
        InputError: an unknown stage.
    """
    stages = [stage] if isinstance(stage, str) else stage
    for unknown in (name for name in stages if name not in STAGES):
        raise InputError(f"unknown stage {unknown!r}: use one of {', '.join(STAGES)}")
    streams = is_streamed(model) if streams is None else streams
    at_once = stream.tokens_at_once(model)
    on = torch.device(device or model.device).type
    case = _Case(Shape.of(model), num_examples, length, on, streams, at_once, settings)
    terms = max((STAGES[name](case) for name in stages), key=lambda terms: sum(terms.values()))
    return {name: int(size) for name, size in terms.items() if size}


@dataclass(frozen=True)
class _Case:
    shape: Shape
    num_examples: int
    length: int
    device: str
    streams: bool
    at_once: int  # tokens of a batch that goes forward only; on a GPU more than the least, where there is room
    settings: Recovery | Distillation | None

    @property
    def n(self) -> int:
        return self.num_examples * self.length

    @property
    def batch(self) -> int:
        return self.tokens(stream.BATCH_TOKENS)

    @property
    def gradient(self) -> int:
        """Bytes of one gradient: float32 where batches are summed."""
        return 4 if self.n > self.batch else self.shape.s

    def tokens(self, at_once: int) -> int:
        """Of a batch: whole windows."""
        return min(self.n, max(1, at_once // self.length) * self.length)

    @property
    def in_host(self) -> int:
        """1 if what waits in host memory counts: on a CPU."""
        return int(self.device == "cpu")

    @property
    def by_layer(self) -> bool:
        return self.streams or not self.in_host

    def buffers(self, count: float, itemsize: int = 0) -> float:
        """Streams of n·d·s bytes (or itemsize instead of s); of a streamed model they are in host memory."""
        return 0 if self.streams and not self.in_host else count * self.n * self.shape.d * (itemsize or self.shape.s)

    def weights(self) -> Terms:
        """All weights; of a streamed model embedding, norm and lm_head, and one layer."""
        m = self.shape
        if self.streams and not self.in_host:
            return {"weights": m.not_streamed, "layer at work": m.layer * m.s}
        return {"weights": m.weights}


def _layer_removal(case: _Case) -> Terms:
    """Two streams of n·d·s; the larger of logits, B·V·(s + 8), and a layer at work."""
    m = case.shape
    return {
        **case.weights(),
        "streams": case.buffers(2),
        "batch": case.tokens(case.at_once) * max(m.logits(False), m.forward),
    }


def _taylor_one_shot(case: _Case) -> Terms:
    """One batch: what all L layers save for it, logits 12·B·V, and the gradients of one layer's MLP while they are
    scored.

    More than one batch: layer by layer; a stream and its gradient, 2n·d·s, the larger of logits and of one layer's
    activations with its gradients; and in host memory (L + 1) streams.
    """
    m = case.shape
    if case.batch == case.n and not case.streams:
        return _whole_pass(case, case.batch * m.L * m.saved(trained=True), gradients=m.gradients(m.s))
    return _by_layer(case, case.batch * m.saved(trained=True), m.gradients(case.gradient))


def _all_gradients(case: _Case) -> Terms:
    """One batch at a time, and the gradients of all weights: how LLM-Pruner and torch-pruning score. Layers are not
    streamed."""
    m = case.shape
    passed = _whole_pass(case, case.batch * m.L * m.saved(trained=True), 0)
    return {**passed, "gradients": m.L * m.layer * case.gradient}


def _taylor_sequential(case: _Case) -> Terms:
    """As one batch of the one-shot scores, but only the layer in work saves what its weights' gradients need; two
    streams more."""
    m = case.shape
    saved = case.batch * (m.saved(trained=True) + (m.L - 1) * m.saved(trained=False))
    gradients = m.gradients(case.gradient) + m.layer * case.gradient
    return {**_whole_pass(case, saved, gradients), "streams": case.buffers(2)}


def _gradient_covariances(case: _Case) -> Terms:
    """On a CPU one pass per batch: what all layers save, logits, and 2L covariances of 8d²; on a GPU (or streamed)
    layer by layer."""
    m = case.shape
    if not case.by_layer:
        return {**_whole_pass(case, case.batch * m.L * m.saved(trained=False), 0), "covariances": _covariances(case)}
    return {**_by_layer(case, case.batch * m.saved(trained=False), 3 * 8 * m.d**2), "covariances": _covariances(case)}


def _covariances(case: _Case) -> int:
    return case.in_host * 2 * case.shape.L * 8 * case.shape.d**2


def _whole_pass(case: _Case, saved: float, gradients: float) -> Terms:
    """Logits are gone before the first gradients of weights come."""
    m = case.shape
    return {**case.weights(), "activations": saved, "logits or gradients": max(case.batch * m.logits(True), gradients)}


def _by_layer(case: _Case, saved: float, gradients: float) -> Terms:
    m = case.shape
    work = max(case.batch * m.logits(True), saved + gradients)
    kept = case.in_host * (m.L + 1) * case.n * m.d * m.s
    return {**case.weights(), "streams": case.buffers(2), "streams kept in host memory": kept, "batch": work}


def _statistics(case: _Case) -> float:
    """3·8f² of `down_proj`'s XᵀX, its factor and its inverse (or the matrix of a solve), and 4·8df of YᵀX, weights
    and solutions."""
    m = case.shape
    return 8 * (3 * m.f**2 + 4 * m.d * m.f)


def _cost_table(case: _Case) -> Terms:
    """Three streams in float32; `_statistics` of one sublayer; a batch of `down_proj`'s inputs, B·f·(4s + 4)."""
    m = case.shape
    batch = case.batch * m.f * (4 * m.s + 4)
    return {
        **case.weights(),
        "streams": case.buffers(3, 4),
        "statistics": max(_statistics(case), 8 * 2 * m.f**2 + batch),
        **_held(case),
    }


def _held(case: _Case) -> Terms:
    return {"covariance at work": 3 * 8 * case.shape.d**2}


def _sweep(case: _Case) -> Terms:
    """Five streams in float32; the layer in float32; the larger of `_statistics` and Gauss–Newton's five vectors like
    gate and up in float64, 5 · 16df, with two in float32, 2 · 8df, and a batch's activations in float32, B·(4 · 4f);
    on a CPU the weights as they were, for an error."""
    m = case.shape
    newton = m.d * m.f * (5 * 16 + 2 * 8) + case.batch * 4 * 4 * m.f
    return {
        **case.weights(),
        "layer in float32": 4 * m.layer if m.s != 4 else 0,
        "streams": case.buffers(5, 4),
        "statistics or Gauss-Newton": max(_statistics(case), newton),
        "weights before the cut": case.in_host * m.L * m.layer * m.s,
        **_held(case),
    }


def _scoring(case: _Case) -> Terms:
    """Logits of two models, and eight times a batch of them in float32: two log-softmaxes, two exponentials, and what
    KL makes of them."""
    m = case.shape
    return {**case.weights(), "logits": case.tokens(case.at_once) * m.V * (2 * m.s + 8 * 4)}


def _lora(case: _Case) -> Terms:
    """r·(inputs + outputs) of all projections, with gradient and AdamW's two moments 4s each; what all layers save
    for a batch; logits in float32, nine times (loss, entropy and accuracy, as trl takes them)."""
    m, settings = case.shape, case.settings
    saved = case.n * m.L * m.saved(trained=True) * (1 + (settings.lora_dropout > 0))
    return {**case.weights(), **_adapter(m, settings.lora_r), "activations": saved, "logits": 36 * case.n * m.V}


def _adapter(m: Shape, r: int) -> Terms:
    return {"adapter": 4 * m.s * r * m.L * (2 * (m.d + m.q) + 2 * (m.d + m.k) + 3 * (m.d + m.f))}


def _distillation(case: _Case) -> Terms:
    """Gradients; Muon's momentum s per weight of the layers, AdamW's two moments for the rest; or LoRA's adapter;
    what all layers save for a batch; student's and teacher's logits. Where products are in bf16, so are the
    activations, and there are copies of the weights, 2 bytes each. On a CPU also the probabilities of
    `attention.blocked`: per layer and token h times half of the keys, in float32."""
    m, settings = case.shape, case.settings or Distillation()
    in_bf16 = settings.dtype == "bfloat16" or settings.dtype == "auto" and bf16_is_fast(torch.device(case.device))
    saved = 8 * m.d + 2 * (2 * m.d + 3 * m.q + 2 * m.k + 4 * m.f)
    keys = min(case.length, (case.length + attention.BLOCK) / 2)
    probabilities = case.in_host * m.h * keys * (4 + 2 * in_bf16)  # and in bf16
    by_muon = m.L * m.layer * m.s if settings.muon_lr else 0
    learning = {"gradients": m.weights, "optimisers": by_muon + 2 * (m.weights - by_muon)}
    return {
        **case.weights(),
        **(_adapter(m, settings.lora_r) if settings.lora_r else learning),
        "weights in bf16": m.weights / 2 if in_bf16 and m.s == 4 else 0,
        "activations": case.n * m.L * ((saved if in_bf16 else m.saved(trained=True)) + probabilities),
        "logits": 2 * (2 if in_bf16 else 4) * case.n * m.V,
    }


STAGES: dict[str, Callable[[_Case], Terms]] = {
    "layer removal": _layer_removal,
    "one-shot Taylor": _taylor_one_shot,
    "all gradients": _all_gradients,
    "sequential Taylor": _taylor_sequential,
    "gradient covariances": _gradient_covariances,
    "cost table": _cost_table,
    "sweep": _sweep,
    "scoring": _scoring,
    "LoRA": _lora,
    "distillation": _distillation,
}


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
def measured_on(model: nn.Module) -> Iterator[Used]:
    """`cost.measured` on all of a model's `places`; bytes are their sums."""
    used = Used()
    try:
        with contextlib.ExitStack() as stack:
            parts = [stack.enter_context(measured(device)) for device in places(model)]
            yield used
    finally:
        used.seconds = parts[0].seconds
        used.peak_bytes = sum(part.peak_bytes for part in parts)
        used.held_bytes = sum(part.held_bytes for part in parts)


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
    used = Used()
    try:
        with measured_on(model) as used:
            yield peak
    finally:
        peak.peak_gb, peak.seconds = (before + used.peak_bytes) / 1e9, used.seconds
    say(f"{name}: {peak.peak_gb:.2f} GB at its peak, {peak.seconds:.0f} s")
