"""torch-pruning's own mode for grouped queries: query heads and channels go, KV heads stay."""

import torch
from torch import nn

from gqalib.model.attention import attention_implementation
from gqalib.model.shapes import count_parameters, decoder_layers, layer_shape, layer_shapes
from gqalib.model.surgery import record_shapes
from gqalib.peers.common import peer
from gqalib.peers.v2 import traced_inputs, traced_without_rotation
from gqalib.prune.plans import size, spread_channels, units, whole_units
from gqalib.prune.scores import backward


@peer
def torch_pruning_gqa(model: nn.Module, windows: torch.Tensor, fraction: float, multiple: int = 1) -> None:
    """torch-pruning's pruner in its GQA mode (Fang et al., CVPR 2023; `MetaPruner` with `num_heads`,
    `prune_num_heads=True`).

    Inside each group the same number of query heads goes and all KV heads stay, so only q_proj and o_proj shrink, and
    two query heads of each group must stay (with one, version 1.6.1 takes the layer for MHA, asks for the KV heads as
    well, and then prunes nothing): the rest of the budget comes from the MLP, on a 2:1 model all of it. On MHA whole
    heads go. What is left has a smaller `num_key_value_groups` and is an uneven model like any other.

    Choices: the library's `GroupTaylorImportance`, better than the magnitude of its Llama example; the hidden width
    stays, which that example cuts as well; the heads that go are spread over the layers to come as near to the fraction
    as they can.
    """
    import torch_pruning as tp

    heads, channels = _query_heads_and_channels(model, fraction, multiple)
    backward(model, windows)
    model.requires_grad_(True)  # the graph is traced through autograd
    layers = decoder_layers(model)
    outputs = [linear for layer in layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    # eager: keys and values are repeated by an `expand`, which torch-pruning knows as GQA; it cannot see into fused
    # kernels
    with traced_without_rotation(), attention_implementation("eager", model):
        pruner = tp.pruner.MetaPruner(
            model,
            traced_inputs(model, windows),
            importance=tp.importance.GroupTaylorImportance(bias=True),
            pruning_ratio=0.0,
            ignored_layers=[model.get_input_embeddings(), model.get_output_embeddings(), *outputs],
            prune_num_heads=True,
            prune_head_dims=False,
            **_what_goes(layers, heads, channels),
            in_channel_groups={},  # the defaults are dicts that every pruner of the process would share
            out_channel_groups={},
            channel_groups={},
        )
    pruner.step()
    for layer in layers:
        shape = layer_shape(layer)
        layer.self_attn.num_key_value_groups = shape["num_attention_heads"] // shape["num_key_value_heads"]
    record_shapes(model)


def _what_goes(layers: nn.ModuleList, heads: list[int], channels: list[int]) -> dict[str, dict[nn.Linear, float]]:
    """The library's arguments for it. Ratios are half a unit less than whole, so that its floor and ceil of a float
    cannot slip."""
    ratios, head_ratios, num_heads = {}, {}, {}
    for layer, gone, width in zip(layers, heads, channels, strict=True):
        attention, shape = layer.self_attn, layer_shape(layer)
        if width:
            ratios[layer.mlp.gate_proj] = (width - 0.5) / shape["intermediate_size"]
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            queries = projection is attention.q_proj
            num_heads[projection] = shape["num_attention_heads" if queries else "num_key_value_heads"]
            if gone:
                head_ratios[projection] = (gone - 0.5) / shape["num_attention_heads"]
                ratios[projection] = 0.5  # any: head_dim is not pruned, but a ratio of 0 would skip the heads as well
    return {"pruning_ratio_dict": ratios, "head_pruning_ratio_dict": head_ratios, "num_heads": num_heads}


def _query_heads_and_channels(model: nn.Module, fraction: float, multiple: int) -> tuple[list[int], list[int]]:
    """Query heads and channels that each layer loses.

    A step takes one query head from every group of a layer; on MHA it is one head with its key and value.
    """
    kv_heads, widths, costs = units(model)
    queries, (groups, channels) = torch.tensor(layer_shapes(model)["num_attention_heads"]), costs.double().T
    own = [size(x.self_attn.q_proj) + size(x.self_attn.o_proj, rows=False) for x in decoder_layers(model)]
    mha, per_group = queries == kv_heads, queries // kv_heads
    step_costs = torch.where(mha, groups, torch.tensor(own, dtype=torch.float64) / per_group)
    steps = torch.where(mha, kv_heads, per_group - 1)  # whole_units leaves one, so two query heads of a group stay
    taken = torch.tensor(whole_units(fraction * kv_heads * groups / step_costs / steps, steps, alike=True))
    left = fraction * count_parameters(model)["backbone"] - (taken * step_costs).sum()
    heads = taken * torch.where(mha, 1, kv_heads)
    return heads.tolist(), spread_channels(left, widths, channels, torch.ones_like(channels), multiple)
