"""Models in several types of a .gguf file: what each file weighs, and the losses of what it holds. `sizes` compares
them."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gqalib.errors import InputError
from gqalib.measure.perplexity import window_losses
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
