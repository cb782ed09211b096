"""v2, the pipeline whose failure this workbook starts from, as faithfully as it can be run.

It is torch-pruning's dependency graph rooted at each layer's `k_proj`, as LLM-Pruner calls it, followed by a
truncation:

    32 query / 8 KV heads  --graph-->  30 / 6  --first 24 query heads-->  24 / 6

The graph maps the channels of `k_proj` one to one onto `q_proj`, so removing KV heads {a, b} also removes *query heads*
{a, b} — not the query heads that read them. The numbers are right at the end (24 = 4 × 6); the pairing is not.
"""

from collections.abc import Sequence
from unittest.mock import patch

import torch
from torch import nn
from transformers.models.llama import modeling_llama

from gqalib.errors import InputError
from gqalib.model.shapes import attention_of, decoder_layers, layer_shape
from gqalib.model.surgery import keep_channels, record_shapes, rows_of_heads
from gqalib.peers.llm_pruner import misaligned_group_scores
from gqalib.prune.scores import channel_scores, largest


def kv_heads_to_remove(layer: nn.Module, count: int) -> list[int]:
    """The KV heads that the founding document's Taylor score, by LLM-Pruner's misaligned fold, ranks lowest."""
    return largest(-misaligned_group_scores(layer), count)


def prune_with_dependency_graph(model: nn.Module, kv_heads: dict[int, Sequence[int]], example: torch.Tensor) -> None:
    """Remove KV heads {layer: heads} by torch-pruning's dependency groups rooted at `k_proj`, in place.

    Args:
        example: token ids [count, length] for tracing the graph.
    """
    import torch_pruning as tp

    model.requires_grad_(True)  # the graph is traced through autograd
    with traced_without_rotation():
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=traced_inputs(model, example))
    for index, heads in kv_heads.items():
        attention = attention_of(decoder_layers(model)[index])
        channels = rows_of_heads(heads, attention.head_dim).tolist()
        graph.get_pruning_group(attention.k_proj, tp.prune_linear_out_channels, idxs=channels).prune()
    model.zero_grad(set_to_none=True)


def traced_inputs(model: nn.Module, windows: torch.Tensor) -> dict[str, object]:
    """What a graph is traced with: it runs with all gradients on and looks at no values, so 32 tokens are enough."""
    return {"input_ids": windows[:1, :32].to(model.device), "use_cache": False}


def traced_without_rotation():
    """Inside, Llama runs without `rotate_half`, which only moves features inside a head: for tracing a dependency
    graph.

    With two query heads per KV head torch-pruning 1.6.1 takes its concatenation for one of whole projections and then
    follows the graph without end. Where the unaltered trace ends, the groups are the same (tested).
    """
    return patch.object(modeling_llama, "rotate_half", lambda x: x)


def truncate_query_heads(model: nn.Module, group_size: Sequence[int]) -> None:
    """v2's repair: keep the *first* `group_size` × (KV heads left) query heads of each layer, in place."""
    import torch_pruning as tp

    for layer, size in zip(decoder_layers(model), group_size, strict=True):
        attention = attention_of(layer)
        kept = size * layer_shape(layer)["num_key_value_heads"] * attention.head_dim
        if gone := list(range(kept, attention.q_proj.out_features)):
            tp.prune_linear_out_channels(attention.q_proj, gone)
            tp.prune_linear_in_channels(attention.o_proj, gone)
    record_shapes(model)


def prune_mlp(model: nn.Module, channels: Sequence[int], statistic: str) -> None:
    """Remove the lowest-scoring MLP channels, so many per layer, in place."""
    for index, layer in enumerate(decoder_layers(model)):
        scores = channel_scores(layer, statistic)
        keep_channels(model, index, largest(scores, len(scores) - channels[index]))


@torch.no_grad()
def shuffle_kv_heads(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give the KV heads of every layer to other query heads (a cyclic shift, so each moves), in place: a control.

    Nothing is removed and no weight changes its value; only the pairing is broken.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in decoder_layers(model):
        attention, count = attention_of(layer), layer_shape(layer)["num_key_value_heads"]
        shift = int(torch.randint(1, count, (1,), generator=generator)) if count > 1 else 0
        rows = rows_of_heads([(head + shift) % count for head in range(count)], attention.head_dim)
        for parameter in (*attention.k_proj.parameters(), *attention.v_proj.parameters()):
            parameter.copy_(parameter[rows])
    return model


def heads_left(num_attention_heads: int, kv_heads_removed: Sequence[int]) -> list[int]:
    """The query heads that v2's graph leaves: all but those with the *numbers* of the removed KV heads."""
    return [head for head in range(num_attention_heads) if head not in set(kv_heads_removed)]


def pairing(
    kept_query_heads: Sequence[int], kept_kv_heads: Sequence[int], group_size: int
) -> list[tuple[int, int, int]]:
    """(query head, KV head that it reads, KV head that is its own) for every surviving query head, by original numbers.

    What attention does after a cut: the heads that are left are renumbered, and KV head j serves the next len(query) /
    len(kv) of them.

    Raises:
        InputError: the counts do not divide; attention cannot run then, so nobody reads anything.
    """
    served, rest = divmod(len(kept_query_heads), len(kept_kv_heads))
    if rest:
        raise InputError(
            f"{len(kept_query_heads)} query heads do not divide by {len(kept_kv_heads)} KV heads: remove other heads"
        )
    return [
        (head, kept_kv_heads[position // served], head // group_size) for position, head in enumerate(kept_query_heads)
    ]


def num_misread(pairs: Sequence[tuple[int, int, int]]) -> int:
    """How many query heads read a KV head that is not theirs."""
    return sum(read != own for _, read, own in pairs)
