"""Loading, saving and counting. Whatever is loaded — a plain Llama or a pruned folder — is a `GqaLlamaForCausalLM`."""

import json
import re
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from gqalib.errors import InputError
from gqalib.modeling_gqa_llama import GqaLlamaConfig, GqaLlamaForCausalLM

REPOSITORY = Path(__file__).parent.parent
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_model(model: str) -> str:
    """The folder or hub id that a model name stands for; a relative folder may stand in the repository.

    Raises:
        InputError: the folder is missing, is no Llama, or holds pickled weights only.
    """
    folder = next((p for p in (Path(model).expanduser(), REPOSITORY / model) if p.is_dir()), None)
    if folder is None:
        if HUB_ID.fullmatch(model):
            return model
        raise InputError(f"model folder {model} does not exist: give a folder with config.json, or a hub id owner/name")
    _check_folder(folder)
    return str(folder)


def _check_folder(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} has no readable config.json: give a folder written by save_pretrained") from error
    if config.get("model_type") not in (LlamaConfig.model_type, GqaLlamaConfig.model_type):
        raise InputError(f"{folder} is a {config.get('model_type')!r} model, no Llama: only Llama models can be pruned here")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no *.safetensors (pickled weights are not read): save it again as safetensors")


def resolve_device(device: str) -> str:
    """`auto` becomes `cuda` where there is one, else `cpu`."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def load_model(model: str, dtype: str = "float32", device: str = "auto", **kwargs) -> GqaLlamaForCausalLM:
    """A Llama, pruned or not, ready to be scored: weights in `dtype` on `device`, evaluation mode.

    Other arguments (`attn_implementation`, `device_map`, …) go to `from_pretrained`.
    """
    source = check_model(str(model))
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:  # a hub id that is absent, gated or out of reach, or a config that cannot be
        reason = str(error).splitlines()[0]
        raise InputError(f"model {model} cannot be loaded ({reason}): log in with `hf auth login`, or give a folder") from error
    if config.model_type == LlamaConfig.model_type:
        config = to_gqa_config(config)
    elif config.model_type != GqaLlamaConfig.model_type:
        raise InputError(f"{model} is a {config.model_type!r} model, no Llama: only Llama models can be pruned here")
    loaded = GqaLlamaForCausalLM.from_pretrained(source, config=config, dtype=getattr(torch, dtype), **kwargs)
    return (loaded if "device_map" in kwargs else loaded.to(resolve_device(device))).eval()


def to_gqa_config(config: LlamaConfig) -> GqaLlamaConfig:
    """The same shape as a `GqaLlamaConfig`."""
    data = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "auto_map")}
    return GqaLlamaConfig(**data)


def empty_llama_3_8b() -> GqaLlamaForCausalLM:
    """Llama-3-8B's shape without weights (meta device): for counting."""
    config = GqaLlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    with torch.device("meta"):
        return GqaLlamaForCausalLM(config)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; a padding token is set where there is none."""
    tokenizer = AutoTokenizer.from_pretrained(check_model(str(model)))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_model(model: GqaLlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights (safetensors), configuration, tokenizer and the model's own code in one folder that loads anywhere."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, plain or wrapped by peft."""
    return model.get_decoder().layers


def layer_shape(layer: nn.Module) -> dict[str, int]:
    """Head counts and MLP width of a decoder layer, read from its weights."""
    attention, head_dim = layer.self_attn, layer.self_attn.head_dim
    return {
        "num_attention_heads": attention.q_proj.weight.shape[0] // head_dim,
        "num_key_value_heads": attention.k_proj.weight.shape[0] // head_dim,
        "intermediate_size": layer.mlp.gate_proj.weight.shape[0],
    }


def layer_shapes(model: nn.Module) -> pd.DataFrame:
    """One row per layer: `num_attention_heads`, `num_key_value_heads`, `intermediate_size`."""
    return pd.DataFrame([layer_shape(layer) for layer in decoder_layers(model)]).rename_axis("layer")


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Number of parameters by part; tied weights count once.

    Returns:
        `attention`, `mlp`, `backbone` (their sum), `norms`, `embeddings` (embedding table and lm_head), `total`.
    """
    counts = dict.fromkeys(("attention", "mlp", "norms", "embeddings"), 0)
    for name, parameter in model.named_parameters():
        part = next((p for p, key in (("attention", ".self_attn."), ("mlp", ".mlp."), ("norms", "norm")) if key in name), None)
        counts[part or "embeddings"] += parameter.numel()
    backbone = counts["attention"] + counts["mlp"]
    return {**counts, "backbone": backbone, "total": sum(counts.values())}


def size_of(model: nn.Module, dense: dict[str, int]) -> dict[str, float]:
    """How much is left, in percent: of all parameters kept, and of the backbone removed. `dense`: the dense model's counts."""
    counts = count_parameters(model)
    return {
        "parameters_kept_percent": 100 * counts["total"] / dense["total"],
        "backbone_removed_percent": 100 * (1 - counts["backbone"] / dense["backbone"]),
    }
