"""What a model's layers measure, and how many parameters stand where, read from the weights."""

import pandas as pd
from torch import nn


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, plain or wrapped by peft."""
    return model.get_decoder().layers


def layer_shape(layer: nn.Module) -> dict[str, int]:
    """Head counts and MLP width of a decoder layer, read from its weights."""
    attention, head_dim = layer.self_attn, layer.self_attn.head_dim
    return {
        "num_attention_heads": attention.q_proj.weight.shape[0] // head_dim,
        "num_key_value_heads": attention.k_proj.weight.shape[0] // head_dim,
        "intermediate_size": layer.mlp.gate_proj.weight.shape[0],
    }


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
