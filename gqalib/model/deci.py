"""Uneven Llamas as llama.cpp has them: architecture `deci` of a .gguf file, read. `serve.export` writes it.

    deci.attention.head_count, .head_count_kv, .feed_forward_length      one number per layer; 0 heads: no attention
    blk.3.attn_q.weight, …                                             names of `gguf.get_tensor_name_map`
    tokenizer.ggml.model = gpt2, .pre      byte-level tokens; a name for the rule that cuts a text into words
    tokenizer.ggml.model = llama, .scores  SentencePiece's: not cut; a pair of the highest score is joined first

A layer without attention has no `attn_norm` either, in llama.cpp (`src/models/deci.cpp`) as here. What .gguf has no
place for, Llama-3's `rope_parameters`, stands under `ROPE`; llama.cpp reads its outcome, `FREQUENCIES`.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from gqalib.errors import InputError
from gqalib.model.modeling_gqa_llama import GqaLlamaConfig, GqaLlamaForCausalLM

ARCHITECTURE = "deci"
ROPE, FREQUENCIES = "gqalib.rope_parameters", "rope_freqs.weight"
ADDED = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' names: the file's
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False}
DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS = {  # llama.cpp's names (`src/llama-vocab.cpp`): what tokenizer.json says, and its `ignore_merges`
    "gpt-2": (BYTES, False),
    "smollm": ({"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}, False),
    "llama-bpe": ({"type": "Sequence", "pretokenizers": [SPLIT, BYTES | {"use_regex": False}]}, True),
}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}  # llama.cpp's
SPACE = "▁"  # SentencePiece's
PREFIX = {"type": "Prepend", "prepend": SPACE}
ESCAPED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
UNESCAPED = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
STRIPPED = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def tensor_names(model: nn.Module) -> dict[str, str]:
    """The name in the file of each weight and bias of a model; tied embeddings stand there once."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, model.config.num_hidden_layers)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: names.get_name(name, (".weight", ".bias")) for name in model.state_dict() if name not in tied}


def neighbours(name: str, tensor: torch.Tensor, head_dim: int, back: bool = False) -> torch.Tensor:
    """Rows [heads × head_dim, …] of q_proj and k_proj as llama.cpp has them, or `back`; other weights as they are.

    transformers turns row i of a head with row i + head_dim / 2, llama.cpp row 2i with row 2i + 1.
    """
    if not name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        return tensor
    halves = (head_dim // 2, 2) if back else (2, head_dim // 2)
    return tensor.unflatten(0, (-1, *halves)).transpose(1, 2).reshape(tensor.shape)


def read_fields(file: Path) -> tuple[gguf.GGUFReader, dict]:
    """A .gguf file and its metadata by their names, `deci.` left out."""
    reader = gguf.GGUFReader(file)
    return reader, {name.removeprefix(f"{ARCHITECTURE}."): field.contents() for name, field in reader.fields.items()}


def read_model(file: Path) -> GqaLlamaForCausalLM:
    """The model of a deci file in float32, whatever its weights are stored in.

    Raises:
        InputError: it has what our class has not: linear attention, layers without MLP, another model's tensors.
    """
    reader, fields = read_fields(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(file, fields, stored)
    with torch.device("meta"):
        model = GqaLlamaForCausalLM(config)
    names, weights = tensor_names(model), {}
    if odd := set(names.values()) ^ (stored.keys() - {FREQUENCIES}):
        raise InputError(f"{file} has other tensors than its layers ask for ({min(odd)}): give one written by export")
    for name, there in names.items():
        tensor = stored.pop(there)
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        weights[name] = neighbours(name, values, config.head_dim, back=True)
    return GqaLlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights).eval()


def _config(file: Path, fields: dict, stored: dict) -> GqaLlamaConfig:
    """The configuration that a file's metadata and the names of its tensors stand for."""
    count = fields["block_count"]
    keys = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    columns = [np.broadcast_to(fields[key], count).tolist() for key in keys]
    if ROPE not in fields and FREQUENCIES in stored:
        raise InputError(f"{file} does not say how its rope is scaled ({ROPE}): give one written by export")
    plain = {"rope_type": "default", "rope_theta": fields.get("rope.freq_base", 10_000.0)}
    rope = json.loads(fields[ROPE]) if ROPE in fields else plain
    return GqaLlamaConfig(
        vocab_size=int(stored["token_embd.weight"].shape[1]), hidden_size=fields["embedding_length"],
        num_hidden_layers=count, head_dim=fields["attention.key_length"], rope_parameters=rope,
        max_position_embeddings=fields["context_length"], rms_norm_eps=fields["attention.layer_norm_rms_epsilon"],
        num_attention_heads=max(columns[0]), num_key_value_heads=max(columns[1]), intermediate_size=max(columns[2]),
        tie_word_embeddings="output.weight" not in stored,
        per_layer_config={i: _layer(i, *row, stored) for i, row in enumerate(zip(*columns, strict=True))},
        **{f"{name}_token_id": fields.get(_token_key(name)) for name in ("bos", "eos")},
    )  # fmt: skip


def _layer(index: int, heads: int, kv_heads: int, width: int, stored: dict) -> dict:
    has = {key: f"blk.{index}.{key}.bias" in stored for key in ("attn_q", "attn_output", "ffn_gate", "ffn_down")}
    return {
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": width,
        "attention_bias": has["attn_q"], "o_proj_bias": has["attn_output"],
        "mlp_bias": has["ffn_gate"], "down_proj_bias": has["ffn_down"],
    }  # fmt: skip


def _token_key(name: str) -> str:
    return f"tokenizer.ggml.{NAMED[name]}_token_id"


def read_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a .gguf file holds, made of what llama.cpp reads there.

    Raises:
        InputError: neither SentencePiece's nor one of `PRE_TOKENIZERS`.
    """
    _, fields = read_fields(file)
    rule, tokens = _rule(file, fields), fields["tokenizer.ggml.tokens"]
    kinds = fields.get("tokenizer.ggml.token_type") or [gguf.TokenType.NORMAL] * len(tokens)
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] != gguf.TokenType.UNUSED}
    parts = _byte_level(vocab, fields, rule) if rule else _pieces(vocab, fields, kinds)
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": []} | parts))
    kept = [(tokens[i], kind == gguf.TokenType.CONTROL) for i, kind in enumerate(kinds) if kind in ADDED]
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in kept])
    named = {f"{name}_token": tokens[fields[_token_key(name)]] for name in NAMED if _token_key(name) in fields}
    default = "bos_token" in named and rule in (None, "llama-bpe")  # llama.cpp's, where an older file does not say
    if fields.get("tokenizer.ggml.add_bos_token", default):
        begin = named["bos_token"]
        tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, vocab[begin])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=fields.get("tokenizer.chat_template"), **named
    )


def _rule(file: Path, fields: dict) -> str | None:
    """The name in `PRE_TOKENIZERS` of what cuts a text into words; None for SentencePiece's, which nothing cuts."""
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if model == "llama":
        return None
    rule = ALIASES.get(pre, pre)
    if model != "gpt2" or rule not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise InputError(f"{file} has a tokenizer of another kind ({pre or model}): give one with {known}, "
                         "or the folder of safetensors that it was made from")  # fmt: skip
    return rule


def _byte_level(vocab: dict[str, int], fields: dict, name: str) -> dict:
    rule, whole = PRE_TOKENIZERS[name]
    merges = [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]]
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": whole}
    return {"model": model, "pre_tokenizer": rule, "decoder": BYTES}


def _pieces(vocab: dict[str, int], fields: dict, kinds: list[int]) -> dict:
    """As llama.cpp reads them: a space goes before a text, and before what follows a special token."""
    scores = fields["tokenizer.ggml.scores"]
    made = {token: scores[i] for token, i in vocab.items() if kinds[i] == gguf.TokenType.NORMAL}
    unknown = fields["tokenizer.ggml.tokens"][fields.get(_token_key("unk"), 0)]
    model = {"type": "BPE", "vocab": vocab, "merges": generate_merges(vocab, made), "byte_fallback": True}
    first = fields.get("tokenizer.ggml.add_space_prefix", True)
    decoders = [UNESCAPED, {"type": "ByteFallback"}, {"type": "Fuse"}, *[STRIPPED] * first]
    return {
        "model": model | {"unk_token": unknown, "fuse_unk": True},
        "normalizer": {"type": "Sequence", "normalizers": [*[PREFIX] * first, ESCAPED]},
        "decoder": {"type": "Sequence", "decoders": decoders},
    }
