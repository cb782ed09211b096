"""A model, pruned or not, as one .gguf file that llama.cpp runs unchanged; `model.deci` says what stands where in it.

Types: `f32` and `f16` as they are; `q8_0`, `q5_0` and `q4_0` keep 32 weights of a row under one scale, so a matrix
whose columns are no multiple of 32 stays f16. Embeddings are q8_0 at least. Norms and biases are f32 in every type.
"""

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType

from gqalib.errors import InputError, reason
from gqalib.model import deci
from gqalib.model.load import load_model, load_tokenizer
from gqalib.model.modeling_gqa_llama import GqaLlamaConfig, GqaLlamaForCausalLM
from gqalib.run.resume import replacing
from gqalib.serve import BLOCK, check_export
from gqalib.serve.vocabulary import after_special, check_tokens, tokenizer_fields

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
ROPES = ("default", "llama3", "linear")  # those that scale each frequency once for all lengths
REMEDIES = {
    "down_proj": f"prune with --multiple {BLOCK}",
    "o_proj": f"keep so many query heads that times head_dim they are a multiple of {BLOCK}",
}


@dataclass(frozen=True)
class Stored:
    """A tensor on its way into the file: its name in the model, values, and type there."""

    name: str
    values: torch.Tensor
    kind: GGMLQuantizationType

    @property
    def num_bytes(self) -> int:
        """Bytes that this matrix takes in the file."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.values.numel() // block * size


def export(source: str, out: Path, kind: str = "f16") -> str:
    """Write a model as a .gguf file, which appears whole or not at all.

    Returns:
        How many bytes are in which type; if matrices could not take theirs, which, and what would have been right; if
        llama.cpp reads text after a special token otherwise, that.

    Raises:
        InputError: as `check_export`; the model cannot be had, llama.cpp cannot hold it or its tokenizer, or most of it
            cannot take the type.
    """
    out = check_export(out, kind)
    tokenizer = load_tokenizer(source)
    vocabulary = tokenizer_fields(tokenizer, tokenizer.num_rows)
    model = load_model(source, "auto", "cpu")
    check_config(model.config)
    check_type(stored(model, kind).values(), kind)
    try:
        with replacing(out) as file:
            tensors = write_model(file, model, kind, {"name": out.stem} | vocabulary)
            check_tokens(tokenizer, there := deci.read_tokenizer(file))
    except OSError as error:
        raise InputError(f"{out} cannot be written ({reason(error)}): give a folder with room") from error
    return f"{out}: {summary(list(tensors.values()), kind)}{after_special(tokenizer, there)}"


# ---------------------------------------------------------------- the model


def check_config(config: GqaLlamaConfig) -> None:
    """Raises InputError for what our class can be and llama.cpp's `deci` cannot."""
    rope, first = config.rope_parameters["rope_type"], next(iter(config.per_layer_config))
    if config.hidden_act != "silu":
        raise InputError(f"llama.cpp's Llama has no hidden_act {config.hidden_act!r}: export a model with 'silu'")
    if rope not in ROPES:
        raise InputError(f"rope of type {rope!r} cannot be exported: give a model whose type is {' or '.join(ROPES)}")
    if not first.num_attention_heads:  # whose heads decide whether it turns any
        raise InputError("llama.cpp needs attention in the first layer, which has none: give a model that has it there")


def check_type(tensors: Collection[Stored], kind: str) -> None:
    """Raises InputError where most of a model cannot take the type: the file would have its name and not its size."""
    wide = kept_f16(tensors, kind)
    if 2 * sum(tensor.num_bytes for tensor in wide) > sum(tensor.num_bytes for tensor in tensors):
        columns = " or ".join(str(width) for width in sorted({tensor.values.shape[1] for tensor in wide}))
        why = f"most of its weights are in matrices of {columns} columns, no multiple of {BLOCK}"
        raise InputError(f"the model cannot be had in {kind}: {why}; use --type f16")


def stored(model: GqaLlamaForCausalLM, kind: str) -> dict[str, Stored]:
    """All tensors of the file by their names there."""
    weights = model.state_dict()
    tensors = {
        there: Stored(name, weights[name], storage(name, weights[name], kind))
        for name, there in deci.tensor_names(model).items()
    }
    if model.config.rope_parameters["rope_type"] != "default":
        tensors[deci.FREQUENCIES] = Stored(deci.FREQUENCIES, frequencies(model), GGMLQuantizationType.F32)
    return tensors


def storage(name: str, weight: torch.Tensor, kind: str) -> GGMLQuantizationType:
    """The type of a weight or bias in a file of this type."""
    if weight.ndim == 1:
        return GGMLQuantizationType.F32
    if not kind.startswith("f") and weight.shape[1] % BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType["Q8_0" if name in EMBEDDINGS and not kind.startswith("f") else kind.upper()]


def frequencies(model: GqaLlamaForCausalLM) -> torch.Tensor:
    """What llama.cpp divides the plain frequencies theta^(-2i / head_dim) by, float32 [head_dim / 2]."""
    config, turned = model.config, model.model.rotary_emb.inv_freq
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=turned.device) / config.head_dim
    return 1 / config.rope_parameters["rope_theta"] ** steps / turned.float()


# ---------------------------------------------------------------- the file


def write_model(file: Path, model: GqaLlamaForCausalLM, kind: str, fields: dict[str, Any]) -> dict[str, Stored]:
    """A model in one type, `fields` are name and vocabulary; the tensors as they were stored."""
    tensors = stored(model, kind)
    file_type = LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]
    write(file, tensors, model.config, {"file_type": file_type} | fields)
    return tensors


def write(file: Path, tensors: dict[str, Stored], config: GqaLlamaConfig, fields: dict[str, Any]) -> None:
    """Metadata, then one tensor after the other."""
    writer = GGUFWriter(file, deci.ARCHITECTURE)
    for name, value in (_shape(config) | fields).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_string(deci.ROPE, json.dumps(config.rope_parameters))
    for name, tensor in tensors.items():
        shape, size = tuple(tensor.values.shape), tensor.num_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=tensor.kind)
    try:
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
            step()
        for tensor in tensors.values():
            values = deci.neighbours(tensor.name, tensor.values, config.head_dim)
            writer.write_tensor_data(gguf.quants.quantize(values.float().numpy(), tensor.kind))
    finally:
        writer.close()


def _shape(config: GqaLlamaConfig) -> dict[str, Any]:
    layers = list(config.per_layer_config)
    return {
        "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "block_count": len(layers),
        "head_count": [layer.num_attention_heads for layer in layers],
        "head_count_kv": [layer.num_key_value_heads for layer in layers],
        "feed_forward_length": [layer.intermediate_size for layer in layers],
        "key_length": config.head_dim, "value_length": config.head_dim, "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope_parameters["rope_theta"], "layer_norm_rms_eps": config.rms_norm_eps,
        "quantization_version": gguf.GGML_QUANT_VERSION,
    }  # fmt: skip


# ---------------------------------------------------------------- what it came to


def kept_f16(tensors: Collection[Stored], kind: str) -> list[Stored]:
    """The matrices that could not take a type because of their width."""
    return [tensor for tensor in tensors if not kind.startswith("f") and tensor.kind == GGMLQuantizationType.F16]


def summary(tensors: list[Stored], kind: str) -> str:
    """How many bytes are in which type, and which matrices stayed larger than the type that was asked for."""
    count = Counter()
    for tensor in tensors:
        count[tensor.kind.name.lower()] += tensor.num_bytes
    said = ", ".join(f"{size:,} bytes in {name}" for name, size in count.most_common())
    wide = kept_f16(tensors, kind)
    remedies = Counter(REMEDIES[tensor.name.split(".")[-2]] for tensor in wide)
    which = f"of {sum(tensor.values.ndim > 1 for tensor in tensors)} matrices, whose columns are no multiple of {BLOCK}"
    return "\n".join([said, *(f"kept as f16: {number} {which}; {remedy}" for remedy, number in remedies.items())])
