"""Llamas in a .gguf file, which becomes a plain folder of safetensors once; transformers dequantises it."""

import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from gqalib.errors import InputError, one_sentence
from gqalib.model.names import REPOSITORY

MODELS = REPOSITORY / "models"  # ignored by git


def gguf_folder(file: Path) -> Path:
    """The float32 safetensors folder of a .gguf file, under `models/`; made at the first call, which says so.

    Raises:
        InputError: the file is no Llama, of a quantisation that transformers cannot read, or broken.
    """
    stat = file.stat()
    folder = MODELS / f"{file.stem}-{stat.st_size:x}-{stat.st_mtime_ns:x}"
    if folder.is_dir():
        return folder
    print(f"making a folder of safetensors of {file.name}: {folder.relative_to(REPOSITORY)}", flush=True)
    MODELS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODELS) as scratch:
        whole = Path(scratch) / "whole"
        with one_sentence(f"{file} cannot be read", "give a Llama as .gguf in Q4_0 to Q8_0, a K-quant, F16 or F32"):
            _convert(file, whole)
        if not folder.is_dir():
            whole.rename(folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """transformers' model keeps a quantizer that refuses to save it, so its weights go into a plain one."""
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    if not isinstance(loaded, LlamaForCausalLM):
        raise InputError(
            f"{file} is a {loaded.config.model_type!r} model, no Llama: only Llama models can be pruned here"
        )
    config = loaded.config
    del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    (folder / "source.json").write_text(json.dumps({"file": file.name, "bytes": file.stat().st_size}))
