"""Causal attention for many narrow heads on a CPU.

torch's fused CPU kernel is made for head_dim 64 and more; at head_dim 8 it spends most of its time in bookkeeping.
`blocked` computes the same sums with a few batched matrix products per block of queries, reads only the keys that the
block may see, and treats the query heads of one KV head as extra rows, so KV heads are never repeated. Measured ratios
stand in LOG.md. Registered with transformers, so `attn_implementation="blocked"` selects it.
It knows no padding and no KV cache: it is for training and scoring whole windows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BLOCK = 64


def blocked(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Causal attention, query [batch, heads, tokens, head_dim], key and value [batch, KV heads, tokens, head_dim]."""
    batch, num_heads, num_tokens, head_dim = query.shape
    if key.shape[2] != num_tokens:
        raise NotImplementedError("attention 'blocked' has no KV cache: load the model with 'sdpa' to generate")
    dtype = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else query.dtype
    num_groups = batch * key.shape[1]
    query = query.to(dtype).reshape(num_groups, -1, num_tokens, head_dim)
    key, value = (x.to(dtype).reshape(num_groups, num_tokens, head_dim) for x in (key, value))
    blocks = [_attend(query, key, value, i, scaling) for i in range(0, num_tokens, BLOCK)]
    output = torch.cat(blocks, dim=2).view(batch, num_heads, num_tokens, head_dim)
    return output.transpose(1, 2).contiguous(), None


def _attend(query, key, value, start: int, scaling: float) -> torch.Tensor:
    """Queries start … start+BLOCK of every group against the keys they may see."""
    rows = query[:, :, start : start + BLOCK]
    groups, heads, length, head_dim = rows.shape
    end = start + length
    mask = torch.full((length, end), float("-inf"), dtype=rows.dtype, device=rows.device).triu(start + 1)
    scores = torch.baddbmm(
        mask.repeat(heads, 1),
        rows.reshape(groups, heads * length, head_dim),
        key[:, :end].transpose(1, 2),
        alpha=scaling,
    )
    return torch.bmm(scores.softmax(-1), value[:, :end]).view(groups, heads, length, head_dim)


@contextmanager
def attention_implementation(name: str, *models: nn.Module) -> Iterator[None]:
    """Inside, the models' attention is computed by this implementation; afterwards by the one that each had."""
    used = [model.config._attn_implementation for model in models]
    try:
        for model in models:
            model.set_attn_implementation(name)
        yield
    finally:
        for model, implementation in zip(models, used, strict=True):
            model.set_attn_implementation(implementation)


ALL_ATTENTION_FUNCTIONS.register("blocked", blocked)
ALL_MASK_ATTENTION_FUNCTIONS.register("blocked", lambda *args, **kwargs: None)
