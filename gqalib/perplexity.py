"""Perplexity, token by token in float64, and running a model from any layer on.

Protocol: non-overlapping windows; in each window the first token is given and every other one is predicted from what
stands before it; perplexity = exp(total negative log-likelihood / number of predicted tokens). A perplexity without
corpus, split, window and number of tokens is not a result: records carry all four.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from gqalib.streaming import at_work, is_streamed

BATCH_TOKENS = 2048  # tokens per pass: what two cores like, and what a backward pass through all layers of an 8B model has room for
NO_LABEL = -100  # what transformers and torch leave out of a loss
MOST_TOKENS = 65_536  # per forward pass on a GPU: beyond it nothing gets faster


def perplexity(model: nn.Module, windows: torch.Tensor, hidden_states: torch.Tensor | None = None, first_layer: int = 0) -> float:
    """Perplexity of windows of token ids [count, length].

    With `hidden_states` [count, length, hidden], the stream before layer `first_layer`, only the layers from there on
    are run. A model so broken that the exponential overflows has perplexity infinity.
    """
    return exponential(window_losses(model, windows, hidden_states, first_layer).mean().item())


def exponential(mean: float) -> float:
    """Perplexity of a mean loss in nats; infinity where a float ends."""
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def window_losses(model: nn.Module, windows: torch.Tensor, hidden_states: torch.Tensor | None = None, first_layer: int = 0) -> torch.Tensor:
    """Mean −log p of the predicted tokens of each window, in nats, float64 [count] on the CPU, summed in float64."""
    losses = []
    if is_streamed(model):  # each layer is fetched once, not once per batch
        last = len(model.get_decoder().layers)
        hidden_states, first_layer = advance(model, hidden_states, windows, first_layer, last), last
    with layers_between(model, first_layer):
        for rows in batches(windows, tokens_at_once(model)):
            input_ids = windows[rows].to(model.device)
            inputs = {"input_ids": input_ids}
            if hidden_states is not None:
                inputs = {"inputs_embeds": hidden_states[rows].to(model.device)}
            logits = model(**inputs, use_cache=False).logits
            losses.append(token_losses(logits, input_ids).view(len(input_ids), -1).double().mean(1).cpu())
    return torch.cat(losses)


def ratio_with_error(losses: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Perplexity relative to another model's on the same windows, and the standard error of that ratio.

    From `window_losses` of both, [count]. The error is that of the paired differences: what makes a window hard is hard for both
    and cancels. It says how much other windows of the same text would change the ratio, not how much another text would.
    """
    difference = losses - reference
    ratio = difference.mean().exp().item()
    return ratio, ratio * (difference.std() / len(difference) ** 0.5).item()


def token_losses(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """−log p of each token but the first of a window, float32 [count × (length − 1)]."""
    labels = pad(input_ids[:, 1:], (0, 1), value=NO_LABEL).to(logits.device)  # logits without their last row would be a copy of them
    losses = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=NO_LABEL)
    return losses.view_as(labels)[:, :-1].flatten()


def kl_divergence(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """KL(target || logits) of two sets of logits [tokens, vocabulary], in nats [tokens].

    Σ p (log p − log q) − p + q: the last two add up to nothing, but with them no term is negative and the gradient is
    exactly zero where the two agree. Muon and Adam would blow a rounding error up to a whole step.
    """
    log_p, log_q = target.log_softmax(-1), logits.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    return (p * (log_p - log_q) - p + q).sum(-1)


@torch.no_grad()
def kl_to(dense: nn.Module, model: nn.Module, windows: torch.Tensor) -> float:
    """KL(dense || model) of the next token, in nats, mean over the predicted tokens of windows [count, length]."""
    total = 0.0
    for rows in batches(windows, min(tokens_at_once(model), tokens_at_once(dense))):
        logits, target = (m(input_ids=windows[rows].to(m.device), use_cache=False).logits[:, :-1].float() for m in (model, dense))
        total += kl_divergence(logits, target.to(logits.device)).double().sum().item()
    return total / windows[:, 1:].numel()


@torch.no_grad()
def hidden_states_before(model: nn.Module, windows: torch.Tensor, layer: int) -> torch.Tensor:
    """The residual stream that enters a layer, [count, length, hidden]."""
    return advance(model, None, windows, 0, layer)


@torch.no_grad()
def advance(model: nn.Module, hidden_states: torch.Tensor | None, windows: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Carry a residual stream (None: the embeddings) through layers first … last − 1.

    It stays on the device that it is on; the embeddings are kept on the model's, or, if its layers are streamed, in host memory.
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
def stream_through(model: nn.Module, first: int, last: int) -> Iterator[Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]]:
    """Inside, a function (token ids, stream or None) → the stream after layers first … last − 1, without the final norm."""
    decoder = model.get_decoder()
    norm, decoder.norm = decoder.norm, nn.Identity()

    def run(input_ids: torch.Tensor, stream: torch.Tensor | None) -> torch.Tensor:
        inputs = {"input_ids": input_ids.to(model.device)} if stream is None else {"inputs_embeds": stream.to(model.device)}
        return decoder(**inputs, use_cache=False).last_hidden_state

    try:
        with layers_between(model, first, last), at_work(*(decoder.layers if last - first == 1 else ())):
            yield run
    finally:
        decoder.norm = norm


@contextmanager
def layers_between(model: nn.Module, first: int = 0, last: int | None = None) -> Iterator[None]:
    """Inside, the model consists of layers first … last − 1 only."""
    with only_layers(model, range(len(model.get_decoder().layers))[first:last]):
        yield


@contextmanager
def only_layers(model: nn.Module, indices) -> Iterator[None]:
    """Inside, the model consists of these layers only, in this order; afterwards it is as before."""
    decoder = model.get_decoder()
    layers = decoder.layers
    decoder.layers = nn.ModuleList(layers[i] for i in indices)
    try:
        yield
    finally:
        decoder.layers = layers


def batches(windows: torch.Tensor, num_tokens: int | None = None) -> Iterator[slice]:
    """Slices of windows [count, length] that hold about `num_tokens` tokens each (default: `BATCH_TOKENS`)."""
    size = max(1, (num_tokens or BATCH_TOKENS) // windows.shape[1])
    yield from (slice(i, i + size) for i in range(0, len(windows), size))


def tokens_at_once(model: nn.Module) -> int:
    """Tokens per forward pass: `BATCH_TOKENS` on a CPU; on a GPU as many as half of its free memory takes, up to `MOST_TOKENS`.

    Per token the logits twice in float32 and once in the model's dtype, and as much again for the layer at work.
    """
    if model.device.type != "cuda":
        return BATCH_TOKENS
    reusable = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    free = torch.cuda.mem_get_info(model.device)[0] + reusable
    return int(min(max(free / 2 / (20 * model.config.vocab_size), BATCH_TOKENS), MOST_TOKENS))
