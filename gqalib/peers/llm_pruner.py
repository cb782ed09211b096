"""LLM-Pruner: first-order Taylor scores of all weights, one shot."""

import torch
from torch import nn

from gqalib.errors import OutOfReach
from gqalib.model.shapes import decoder_layers
from gqalib.model.surgery import keep_channels, keep_groups
from gqalib.peers.common import peer
from gqalib.prune.plans import Plan, uniform_plan
from gqalib.prune.scores import backward, channel_scores, head_scores, largest


@peer
def llm_pruner(
    model: nn.Module, windows: torch.Tensor, fraction: float, protect: bool = True, multiple: int = 1
) -> None:
    """LLM-Pruner (Ma et al., NeurIPS 2023): first-order element-wise Taylor, Σ |W ⊙ G|, one shot.

    Heads are chosen by its own sum over a dependency group: the fold of q_proj (`misaligned_group_scores`), k_proj,
    v_proj, and the *first* columns of o_proj, which its graph maps one to one onto the rows of k_proj
    (`local_norm[idxs]`, hf_llama_pruner.py); channels by gate, up and down. Its script for Llama-7B prunes layers 4 to
    29 of 32: the first eighth and the last sixteenth of the layers stay whole.

    Choices: the chosen KV heads go with the query heads that read them; all of `windows` is used, not ten short
    samples; a budget that the unprotected layers cannot give is taken from all layers, and so is any without `protect`.
    """
    plan = _plan(model, fraction, protect, multiple)
    backward(model, windows)
    for index, layer in enumerate(decoder_layers(model)):
        columns, channels = head_scores(layer)["o_proj"], channel_scores(layer)
        groups = (folded := misaligned_group_scores(layer)) + columns[: len(folded)]
        keep_groups(model, index, largest(groups, len(groups) - plan.groups[index]))
        keep_channels(model, index, largest(channels, len(channels) - plan.channels[index]))


def misaligned_group_scores(layer: nn.Module, statistic: str = "taylor") -> torch.Tensor:
    """The founding document's score of KV heads (q, k and v) by LLM-Pruner's fold: `view(size, groups).sum(0)` credits
    KV head k with query heads k, k + groups, …

    `repeat_kv` pairs *consecutive* query heads with a KV head, so for a 4:1 layer three of the four belong elsewhere.
    """
    heads = head_scores(layer, statistic)
    return heads["q_proj"].view(-1, len(heads["k_proj"])).sum(0) + heads["k_proj"] + heads["v_proj"]


def _plan(model: nn.Module, fraction: float, protect: bool, multiple: int) -> Plan:
    count = len(decoder_layers(model))
    ends = [*range(round(count / 8)), *range(count - round(count / 16), count)] if protect else []
    try:
        return uniform_plan(model, fraction, ends, multiple)
    except OutOfReach:
        return uniform_plan(model, fraction, multiple=multiple)
