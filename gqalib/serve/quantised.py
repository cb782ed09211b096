"""Models in several types of a .gguf file: what each file weighs, what its type does to perplexity, and whether pruning
or quantising is the better way to a size."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gqalib.errors import InputError
from gqalib.measure.perplexity import ratio_with_error, told_apart, window_losses
from gqalib.model import deci, surgery
from gqalib.model.load import random_model, to_device
from gqalib.model.modeling_gqa_llama import GqaLlamaConfig, GqaLlamaForCausalLM
from gqalib.prune.plans import uniform_plan
from gqalib.run.resume import Progress, replacing
from gqalib.serve import export
from gqalib.serve.vocabulary import tokenizer_fields

KINDS = ("f16", "q8_0", "q5_0", "q4_0")
CODE = "from gqalib.serve import quantised"  # what rows that are kept depend on
Rows = list[dict[str, Any]]


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a file holds of a tokenizer. Where llama.cpp has no name for it, a token for each byte stands in, and it is
    said: files weigh and score as they should, but llama.cpp reads and writes other tokens than the model knows."""
    try:
        return tokenizer_fields(tokenizer, tokenizer.num_rows)
    except InputError as error:
        print(f"{error}. Here a token for each byte stands in: what these files write means nothing.")
        return tokenizer_fields(_bytes(), tokenizer.num_rows)


def _bytes() -> PreTrainedTokenizerFast:
    tokens, merges = ["<e>", *sorted(ByteLevel.alphabet()), "ĠĠ"], [("Ġ", "Ġ")]  # llama.cpp wants a merge
    words = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    words.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>")


# ---------------------------------------------------------------- files


def rows_of(
    name: str, model: GqaLlamaForCausalLM, fields: dict[str, Any], windows: torch.Tensor, progress: Progress,
    device: str = "cpu",
) -> Rows:  # fmt: skip
    """A row for each of `KINDS`: `model`, `type`, `file`, `bytes`, and the `losses` of `window_losses`, float64
    [count], of the weights as they are read back from the file. Rows and files are kept.

    Args:
        model: on the CPU. fields: of `vocabulary`. device: where the losses are computed.
    """
    export.check_config(model.config)
    rows = []
    for kind in KINDS:
        kept = progress.of(model, kind, fields, windows)
        file = kept.folder / f"{name}-{kind}.gguf"
        if not file.exists():
            with replacing(file) as unfinished:
                export.write_model(unfinished, model, kind, {"name": file.stem} | fields)
        row = kept.once("row", partial(_measured, file, windows, device))
        losses = torch.tensor(row["losses"], dtype=torch.float64)
        rows.append({"model": name, "type": kind, "file": file} | row | {"losses": losses})
    return rows


def _measured(file: Path, windows: torch.Tensor, device: str) -> dict[str, Any]:
    model = to_device(deci.read_model(file), device)
    return {"bytes": file.stat().st_size, "losses": window_losses(model, windows).tolist()}


def table(rows: Rows, dense: torch.Tensor) -> pd.DataFrame:
    """A line for each file: `model`, `type`, `bytes`, `times dense` (perplexity relative to the model whose losses
    `dense` are) with its paired `± standard error`, and `front`: no other file is as small and as good."""
    lines = []
    for row in rows:
        ratio, error = ratio_with_error(row["losses"], dense)
        shown = {name: row[name] for name in ("model", "type", "bytes")}
        lines.append(shown | {"times dense": ratio, "± standard error": error})
    found = pd.DataFrame(lines)
    return found.assign(front=on_front(found["bytes"], found["times dense"]))


def on_front(size: pd.Series, damage: pd.Series) -> list[bool]:
    """Which points no other point beats: none is at most as large and at most as bad, and better in one of the two."""
    points = list(zip(size, damage, strict=True))
    return [not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points) for x, y in points]


def prune_or_quantise(rows: Rows, dense: str = "dense") -> pd.DataFrame:
    """Every file of a pruned model beside the best file of the model `dense` that is no larger.

    Returns:
        A line for each pruned file: `file`, `bytes`, `way` (prune, both), `rival`, `rival bytes`, `times rival` with
        the paired `± error`, and `verdict`: better or worse than the rival, not told apart from it, or no rival.
    """
    rivals = [row for row in rows if row["model"] == dense]
    lines = []
    for row in (row for row in rows if row["model"] != dense):
        line = {"file": f"{row['model']} {row['type']}", "bytes": row["bytes"]}
        line["way"] = "both" if row["type"] in KINDS[1:] else "prune"
        smaller = [rival for rival in rivals if rival["bytes"] <= row["bytes"]]
        lines.append(line | _beside(row, min(smaller, key=lambda rival: rival["losses"].mean(), default=None)))
    return pd.DataFrame(lines)


def _beside(row: dict, rival: dict | None) -> dict[str, Any]:
    if rival is None:
        return {"rival": None, "verdict": "no rival"}
    ratio, error = ratio_with_error(row["losses"], rival["losses"])
    shown = {"rival": f"{rival['model']} {rival['type']}", "rival bytes": rival["bytes"]}
    return shown | {"times rival": ratio, "± error": error, "verdict": told_apart(ratio, error)}


def verdict(beside: pd.DataFrame) -> list[str]:
    """What `prune_or_quantise` comes to, in lines to print."""
    lines = []
    for way, words in (("prune", "pruned only"), ("both", "pruned and quantised")):
        part = beside[beside["way"] == way]
        counts = part["verdict"].value_counts().reindex(["better", "worse", "not told apart", "no rival"], fill_value=0)
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        lines.append(f"{len(part)} files {words}, each beside the best dense file that is no larger: {said}")
    return [*lines, f"for the same file size: {_advice(beside)}"]


def _advice(beside: pd.DataFrame) -> str:
    files = {verdict: rows["file"].tolist() for verdict, rows in beside.groupby("verdict")}
    lost, open_ = files.get("worse", []), files.get("not told apart", [])
    if won := files.get("better"):
        said = f"prune where that wins ({', '.join(won)}), else quantise alone"
    elif lost:
        said = "quantise, do not prune" + (f" ({', '.join(open_)}: not told apart)" if open_ else "")
    else:
        said = "pruning and quantising are not told apart"
    alone = beside.loc[beside["verdict"] == "no rival", "bytes"]
    return said + (f"; only pruning as well makes files of {alone.max() / 1e6:.1f} MB and less" if len(alone) else "")


# ---------------------------------------------------------------- widths


def weight(model: GqaLlamaForCausalLM, kind: str) -> dict[str, int]:
    """The `matrices` of a model, how many are `kept f16` in a file of this type, and the `bytes` of all weights there;
    the model may be on `meta`."""
    tensors = export.stored(model, kind).values()
    matrices = [tensor for tensor in tensors if tensor.values.ndim > 1]
    size = sum(tensor.num_bytes for tensor in tensors)
    return {"matrices": len(matrices), "kept f16": len(export.kept_f16(tensors, kind)), "bytes": size}


def cut_shape(config: GqaLlamaConfig, fraction: float, multiple: int) -> GqaLlamaForCausalLM:
    """A model on `meta` of which the same `fraction` of each layer's attention and MLP is cut; MLP widths become a
    `multiple`. It has shapes and no weights."""
    model = random_model(copy.deepcopy(config), device="meta")  # surgery changes the configuration, too
    plan = uniform_plan(model, fraction, multiple=multiple)
    for index, layer in enumerate(model.model.layers):
        keep = layer.self_attn.k_proj.out_features // config.head_dim - plan.groups[index]
        surgery.keep_groups(model, index, range(keep))
        surgery.keep_channels(model, index, range(layer.mlp.gate_proj.out_features - plan.channels[index]))
    return model
