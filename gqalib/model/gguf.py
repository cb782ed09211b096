"""Llamas in a .gguf file, which becomes a folder of safetensors once: plain ones dequantised by transformers, uneven
ones by `deci`."""

import hashlib
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.integrations.gguf import reader

from gqalib.errors import InputError, one_sentence
from gqalib.model import deci
from gqalib.model.names import REPOSITORY, check_config

MODELS = REPOSITORY / "models"  # ignored by git
CONVERSION = b"3"  # another one makes another folder
SLICE = 2**16  # bytes of each tensor: a row of most models, in which each channel that was kept has its part


def gguf_folder(file: Path) -> Path:
    """The float32 safetensors folder of a .gguf file, under `models/`; made at the first call, which says so.

    Raises:
        InputError: the file is no Llama, has what would be lost on the way, is of a quantisation that transformers
        cannot read, or broken.
    """
    unreadable = f"{file} cannot be read", "give a Llama as .gguf in Q4_0 to Q8_0, a K-quant, F16 or F32"
    with one_sentence(*unreadable):
        folder = MODELS / f"{file.stem}-{_mark(file)}"
    if folder.is_dir():
        return folder
    print(f"making a folder of safetensors of {file.name}: {folder.relative_to(REPOSITORY)}", flush=True)
    MODELS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODELS) as scratch:
        whole = Path(scratch) / "whole"
        with one_sentence(*unreadable):
            _convert(file, whole)
        if not folder.is_dir():
            whole.rename(folder)
    return folder


def _mark(file: Path) -> str:
    """A hash of a file's metadata, the beginning of each of its tensors, and its size; all of it takes too long.

    By transformers' reader, which steps over a vocabulary in milliseconds: gguf's takes seconds, at every load.
    """
    data = reader._mapped(file)
    _, count, table = reader._read_metadata(data, file)
    tensors, end = reader._read_tensor_table(data, count, table)
    seen = hashlib.sha256(CONVERSION + str(data.size).encode())
    seen.update(data[:end])
    for *_, offset in tensors:  # from `end` but for a few bytes of padding
        seen.update(data[end + offset : end + offset + SLICE])
    return seen.hexdigest()[:12]


def _convert(file: Path, folder: Path) -> None:
    fields, names = reader.read_gguf_metadata(file)
    if fields["general.architecture"] != deci.ARCHITECTURE:
        return _convert_plain(file, folder, fields, set(names))
    deci.read_model(file).save_pretrained(folder)
    deci.read_tokenizer(file).save_pretrained(folder)


def _convert_plain(file: Path, folder: Path, fields: dict, names: set[str]) -> None:
    """transformers' model keeps a quantizer that refuses to save it, so its weights go into a plain one."""
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**where)
    check_config(file, {"model_type": config.model_type})
    with torch.device("meta"):
        plain = LlamaForCausalLM(config)
    _check_plain(file, fields, names, set(deci.tensor_names(plain).values()))
    tokenizer = deci.read_tokenizer(file) if _names_rule(fields) else AutoTokenizer.from_pretrained(**where)
    tokenizer.save_pretrained(folder)  # first, for it may be refused
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.save_pretrained(folder)


def _names_rule(fields: dict) -> bool:
    """Whether a file names what cuts a text into words: transformers would take GPT-2's rule for one unknown to it."""
    pre = fields.get("tokenizer.ggml.pre") or "default"
    return fields.get("tokenizer.ggml.model") == "gpt2" and pre != "default"


def _check_plain(file: Path, fields: dict, names: set[str], asked: set[str]) -> None:
    """Raises InputError for what transformers drops of a plain file, or makes up, without a word."""
    fix = "give the folder of safetensors or the hub id that it was made from"
    if scaling := _scaling(fields, names):
        raise InputError(f"{file} has a scaled rope ({scaling}), which would be read as a plain one: {fix}")
    if odd := names ^ asked:
        raise InputError(f"{file} has other tensors than its layers ask for ({min(odd)}): {fix}")


def _scaling(fields: dict, names: set[str]) -> str:
    """What a plain file scales its rope by, "" for nothing. To llama.cpp, a factor without a type is a linear one."""
    if deci.FREQUENCIES in names:
        return deci.FREQUENCIES
    kind = fields.get("llama.rope.scaling.type", "linear")
    factor = fields.get("llama.rope.scaling.factor", fields.get("llama.rope.scale_linear", 0))  # of older files
    return "" if kind == "none" or (kind == "linear" and factor in (0, 1)) else f"{kind}, factor {factor:g}"
