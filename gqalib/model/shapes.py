"""The shapes of a model's layers, and how many parameters stand where, read from the weights."""

import pandas as pd
from torch import nn

from gqalib.errors import InputError
from gqalib.model.modeling_gqa_llama import Skipped


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, plain or wrapped by peft."""
    return model.get_decoder().layers


def has_attention(layer: nn.Module) -> bool:
    """Whether a decoder layer has attention; `surgery.drop_attention` takes it."""
    return not isinstance(layer.self_attn, Skipped)


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention of a decoder layer.

    Raises:
        InputError: it has none.
    """
    if not has_attention(layer):
        raise InputError("a layer of this model has no attention whose groups could be pruned: give the dense model")
    return layer.self_attn


def layer_shape(layer: nn.Module) -> dict[str, int]:
    """Head counts (0 without attention) and MLP width of a decoder layer, read from its weights."""
    heads = kv_heads = 0
    if has_attention(layer):
        head_dim, queries, keys = layer.self_attn.head_dim, layer.self_attn.q_proj, layer.self_attn.k_proj
        heads, kv_heads = queries.weight.shape[0] // head_dim, keys.weight.shape[0] // head_dim
    width = layer.mlp.gate_proj.weight.shape[0]
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": width}


def layer_shapes(model: nn.Module) -> pd.DataFrame:
    """One row per layer: `num_attention_heads`, `num_key_value_heads`, `intermediate_size`."""
    return pd.DataFrame([layer_shape(layer) for layer in decoder_layers(model)]).rename_axis("layer")


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Number of parameters by part; tied weights count once.

    Returns:
        `attention`, `mlp`, `backbone` (their sum), `norms`, `embeddings` (embedding table and lm_head), `total`.
    """
    counts = dict.fromkeys(("attention", "mlp", "norms", "embeddings"), 0)
    for name, parameter in model.named_parameters():
        part = next(
            (p for p, key in (("attention", ".self_attn."), ("mlp", ".mlp."), ("norms", "norm")) if key in name), None
        )
        counts[part or "embeddings"] += parameter.numel()
    backbone = counts["attention"] + counts["mlp"]
    return {**counts, "backbone": backbone, "total": sum(counts.values())}


def size_of(model: nn.Module, dense: dict[str, int]) -> dict[str, float]:
    """How much is left, in percent: of all parameters kept, and of the backbone removed. `dense`: the dense model's
    counts."""
    counts = count_parameters(model)
    return {
        "parameters_kept_percent": 100 * counts["total"] / dense["total"],
        "backbone_removed_percent": 100 * (1 - counts["backbone"] / dense["backbone"]),
    }
