"""Perplexity, token by token in float64, and running a model from any layer on.

Protocol: non-overlapping windows; in each window the first token is given and every other one is predicted from what
stands before it; perplexity = exp(total negative log-likelihood / number of predicted tokens). A perplexity without
corpus, split, window and number of tokens is not a result: records carry all four.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import cross_entropy

BATCH_TOKENS = 2048  # tokens per forward pass: what two cores like; a GPU takes far more


def perplexity(model: nn.Module, windows: torch.Tensor, hidden_states: torch.Tensor | None = None, first_layer: int = 0) -> float:
    """Perplexity of windows of token ids [count, length].

    With `hidden_states` [count, length, hidden], the stream before layer `first_layer`, only the layers from there on
    are run. A model so broken that the exponential overflows has perplexity infinity.
    """
    mean = window_losses(model, windows, hidden_states, first_layer).mean().item()
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def window_losses(model: nn.Module, windows: torch.Tensor, hidden_states: torch.Tensor | None = None, first_layer: int = 0) -> torch.Tensor:
    """Mean −log p of the predicted tokens of each window, in nats, float64 [count] on the CPU, summed in float64."""
    losses = []
    with layers_between(model, first_layer):
        for rows in batches(windows):
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
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none")


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
    for rows in batches(windows):
        logits, target = (m(input_ids=windows[rows].to(m.device), use_cache=False).logits[:, :-1].float() for m in (model, dense))
        total += kl_divergence(logits, target.to(logits.device)).double().sum().item()
    return total / windows[:, 1:].numel()


@torch.no_grad()
def hidden_states_before(model: nn.Module, windows: torch.Tensor, layer: int) -> torch.Tensor:
    """The residual stream that enters a layer, [count, length, hidden]."""
    return advance(model, None, windows, 0, layer)


@torch.no_grad()
def advance(model: nn.Module, hidden_states: torch.Tensor | None, windows: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Carry a residual stream (None: the embeddings) through layers first … last − 1."""
    decoder, states = model.get_decoder(), []
    norm, decoder.norm = decoder.norm, nn.Identity()
    try:
        with layers_between(model, first, last):
            for rows in batches(windows):
                inputs = {"input_ids": windows[rows].to(model.device)}
                if hidden_states is not None:
                    inputs = {"inputs_embeds": hidden_states[rows].to(model.device)}
                states.append(decoder(**inputs, use_cache=False).last_hidden_state)
    finally:
        decoder.norm = norm
    return torch.cat(states)


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


def batches(windows: torch.Tensor) -> Iterator[slice]:
    """Slices of windows [count, length] that hold about `BATCH_TOKENS` tokens each."""
    size = max(1, BATCH_TOKENS // windows.shape[1])
    yield from (slice(i, i + size) for i in range(0, len(windows), size))
