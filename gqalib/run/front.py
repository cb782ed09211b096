"""Prune a model, and say what it is worth, in one call each and without a preset: what `import gqalib` offers."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gqalib.errors import InputError
from gqalib.measure import memory
from gqalib.measure.cost import weight_bytes
from gqalib.measure.frontier import IN_CONTEXT, METHODS, OWN, covariances_and_table
from gqalib.measure.perplexity import perplexity as perplexity_of
from gqalib.measure.perplexity import ratio_with_error, window_losses
from gqalib.model.shapes import count_parameters, size_of
from gqalib.prune import search
from gqalib.run.checks import check_positive
from gqalib.run.corpora import evaluation_windows
from gqalib.run.presets import PEERS, Cut, check_cut

NAMES = {"refit": OWN, "context": IN_CONTEXT, "founding": "founding Taylor"} | {name: name for name in PEERS}
REFIT = "gradient covariances", "cost table", "sweep"  # of `memory`, as all of these
STAGES = {"refit": REFIT, "context": (*REFIT, "context"), "founding": ("layer removal", "sequential Taylor")}
PEERS_STAGES = "all gradients", *REFIT  # what they need most for
PROTOCOLS = (128, 2048)  # tokens of a window: the founding document's and the literature's


def _windows(cut: Cut, model: nn.Module, tokenizer: PreTrainedTokenizerBase, other: int = 0) -> torch.Tensor:
    """Calibration text, token ids [examples, length]; an`other` sample has nothing of it."""
    length = min(cut.length, model.config.max_position_embeddings)
    return evaluation_windows(cut.corpus, "train", tokenizer, length, cut.examples * length, cut.seed + other)


def prune_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, **how) -> dict[str, float]:
    """Prune a model in place, `prune_model(model, tokenizer, remove=0.25)`; `how` are the fields of `Cut`.

    Returns:
        `parameters_kept_percent` and `backbone_removed_percent`.

    Raises:
        InputError: as `check_cut`, a target that cannot be reached, too little text or memory.
    """
    cut, counts = check_cut(**how), count_parameters(model)
    windows = _windows(cut, model, tokenizer)
    terms = memory.expected(STAGES.get(cut.method, PEERS_STAGES), model, *windows.shape)
    if cut.perplexity or cut.method == "context":
        terms["copies"] = weight_bytes(model)  # of which a plan is tried
    with memory.stage("pruning", terms, model):
        if cut.perplexity:
            _prune_to(model, windows, _windows(cut, model, tokenizer, other=1), cut)
        else:
            fraction = cut.remove or (1 - cut.kept) * counts["total"] / counts["backbone"]
            options = {"multiple": cut.multiple} if cut.multiple > 1 else {}
            METHODS[NAMES[cut.method]](model, windows, fraction, **options)
    return size_of(model, counts)


def _prune_to(model: nn.Module, windows: torch.Tensor, scoring: torch.Tensor, cut: Cut) -> None:
    covariances, table = covariances_and_table(model, windows, cut.multiple)
    limit = cut.perplexity * perplexity_of(model, scoring, exact=True)
    trials = search.prune_to(search.Trial(model, windows, covariances), table, scoring, limit)
    if not (trials["perplexity"] <= limit).any():
        most = f"perplexity more than {cut.perplexity} times the dense"
        raise InputError(f"every cut that was tried makes {most}: give more")


def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, against: nn.Module | None = None,
    corpus: str = "python-docs", tokens: int = 16_384,
) -> dict[str, float]:  # fmt: skip
    """Size and perplexity of a model.

    Args:
        against: another model of the same vocabulary, on the same windows. tokens: of the corpus' test text.

    Returns:
        `parameters`, `backbone`, `bytes`; for windows of 128 and of 2048 tokens, or of as many as the models take,
        `perplexity_128` and so on; with `against` also their `ratio_128` and its paired standard error `error_128`.

    Raises:
        InputError: another vocabulary, or too little text.
    """
    models = [model] if against is None else [model, against]
    if len({each.config.vocab_size for each in models}) > 1:
        words = " and ".join(str(each.config.vocab_size) for each in models)
        raise InputError(f"the two models have vocabularies of {words} tokens: compare models of one vocabulary")
    check_positive(tokens=tokens)
    counts, longest = count_parameters(model), min(each.config.max_position_embeddings for each in models)
    found = {"parameters": counts["total"], "backbone": counts["backbone"], "bytes": weight_bytes(model)}
    for length in sorted({min(length, longest) for length in PROTOCOLS}):
        windows = evaluation_windows(corpus, "test", tokenizer, length, tokens)
        losses = [window_losses(each, windows) for each in models]
        found[f"perplexity_{length}"] = losses[0].mean().exp().item()
        if against is not None:
            found[f"ratio_{length}"], found[f"error_{length}"] = ratio_with_error(*losses)
    return found
