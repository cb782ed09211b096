"""Perplexity, token by token in float64.

Protocol: non-overlapping windows; in each window the first token is given and every other one is predicted from what
stands before it; perplexity = exp(total negative log-likelihood / number of predicted tokens). A perplexity without
corpus, split, window and number of tokens is not a result: records carry all four.

A model in float32 is run with its own products, or with products in bf16 (`evaluate_in`): twice as fast on a processor
that has instructions for them, and nearer to float32 than weights in bf16 (LOG.md).
"""

import math
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from gqalib.device import in_bf16
from gqalib.model.names import NO_LABEL
from gqalib.stream import advance, batches, is_streamed, layers_between, tokens_at_once

SURE = 2  # standard errors from which on a difference counts as shown
_products = "float32"


def evaluate_in(dtype: str) -> None:
    """From here on this process evaluates models that are in float32 with products in `dtype`: float32, bfloat16, or
    auto, which is bfloat16 where that is fast."""
    global _products
    _products = dtype


def in_products(model: nn.Module) -> torch.autocast:
    """Inside, products are those of an evaluation: for whoever hands over a stream that an evaluation goes on from."""
    enabled = model.dtype == torch.float32 and in_bf16(_products, model.device)
    return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled)


def perplexity(
    model: nn.Module, windows: torch.Tensor, hidden_states: torch.Tensor | None = None, first_layer: int = 0,
    exact: bool = False,
) -> float:  # fmt: skip
    """Perplexity of windows of token ids [count, length]; infinity for a model so broken that the exponential
    overflows. The rest as for `window_losses`."""
    return exponential(window_losses(model, windows, hidden_states, first_layer, exact).mean().item())


def exponential(mean: float) -> float:
    """Perplexity of a mean loss in nats; infinity where a float ends."""
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def window_losses(
    model: nn.Module, windows: torch.Tensor, hidden_states: torch.Tensor | None = None, first_layer: int = 0,
    exact: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Mean −log p of the predicted tokens of each window, in nats, float64 [count] on the CPU, summed in float64.

    With `hidden_states` [count, length, hidden], the stream before layer `first_layer`, only the layers from there on
    are run. `exact`: products in the model's own dtype, for what is decided by a loss: with `evaluate_in`'s, another
    processor prunes another model.
    """
    losses, products = [], nullcontext() if exact else in_products(model)
    with products:
        if is_streamed(model):  # each layer is fetched once, not once per batch
            last = len(model.get_decoder().layers)
            hidden_states, first_layer = advance(model, hidden_states, windows, first_layer, last), last
    with layers_between(model, first_layer), products:
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

    From `window_losses` of both, [count]. The error is that of the paired differences: what makes a window hard is hard
    for both and cancels. It says how much other windows of the same text would change the ratio, not how much another
    text would. A single window gives no error: NaN.
    """
    difference = losses - reference
    ratio, scatter = difference.mean().exp().item(), difference.std().item() if len(difference) > 1 else math.nan
    return ratio, ratio * scatter / len(difference) ** 0.5


def told_apart(ratio: float, error: float) -> str:
    """What a ratio of perplexities and its standard error show of the first model: by the difference in nats, so that
    either model may come first; nothing where there is no error or no number. One that broke has an infinite loss."""
    broke = ratio in (0, math.inf)  # this model or the other one
    if not broke and not abs(math.log(ratio)) > SURE * error / ratio:
        return "not told apart"
    return "better" if ratio < 1 else "worse"


def token_losses(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """−log p of each token but the first of a window, float32 [count × (length − 1)]."""
    labels = pad(input_ids[:, 1:], (0, 1), value=NO_LABEL).to(
        logits.device
    )  # logits without their last row would be a copy of them
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


def kl_of_tokens(dense: nn.Module, logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """KL(dense || ·) of some windows' `logits` [count, length, vocabulary], in nats, [count, length − 1]."""
    with torch.no_grad():
        target = dense(input_ids=input_ids.to(dense.device), use_cache=False).logits[:, :-1].float()
    return kl_divergence(logits[:, :-1].float(), target.to(logits.device))
