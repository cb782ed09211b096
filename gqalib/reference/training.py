"""How the reference model was made: tokenizer, shape, growth in depth, and the recipe as data.

A stage is a training on text alone, which is a distillation without a teacher: `recover.distill` does it, with Muon and
AdamW, and the state in a folder, so that a killed run goes on. The same code runs on a GPU and on a CPU.
"""

import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from gqalib.measure.perplexity import window_losses
from gqalib.recover.distill import distill
from gqalib.run.presets import Distillation
from gqalib.run.python_docs import HELD_OUT_ONE_IN

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Stage:
    """One stretch of training at a fixed depth and window."""

    num_hidden_layers: int
    window: int
    num_tokens: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the text and the seed."""

    stages: tuple[Stage, ...]
    decay_tokens: int  # the last tokens of the last stage, over which the rates fall linearly to `final_rate`
    batch_tokens: int = 4096
    muon_lr: float = 0.02  # every matrix of the backbone
    adamw_lr: float = 3e-3  # embedding and norms
    weight_decay: float = 0.05  # Muon's
    warmup_steps: int = 50  # of each stage
    final_rate: float = 0.02
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(stage.num_tokens for stage in self.stages)

    def settings(self, number: int) -> Distillation:
        """A stage as a training without a teacher."""
        num_tokens, is_last = self.stages[number].num_tokens, number == len(self.stages) - 1
        decay = min(1.0, self.decay_tokens / num_tokens) if is_last else 1e-9
        names = "batch_tokens", "muon_lr", "adamw_lr", "weight_decay", "warmup_steps", "final_rate"
        same = {name: getattr(self, name) for name in names}
        return Distillation(num_tokens=num_tokens, alpha=0.0, decay=decay, seed=self.seed + number, **same)


def train_tokenizer(documents, vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token, trained on an iterator of documents."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    start = {"special_tokens": [END_OF_TEXT], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    bpe.train_from_iterator(documents, trainers.BpeTrainer(vocab_size=vocab_size, **start))
    same = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **same)


def reference_config(num_hidden_layers: int = 32) -> LlamaConfig:
    """Llama-3-8B's topology (32 query and 8 KV heads, SwiGLU at 3.5 x, rope theta 500,000): hidden 128, head_dim 8."""
    return LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=448, num_hidden_layers=num_hidden_layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=8, tie_word_embeddings=True,
        rms_norm_eps=1e-5, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip


def initial_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A fresh model; output projections scaled by 1 / sqrt(2 layers), as GPT-2's, keep the residual stream tame."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(config)
    _scale_outputs(model, 1 / math.sqrt(2 * config.num_hidden_layers))
    return model


@torch.no_grad()
def deepen(model: LlamaForCausalLM, num_hidden_layers: int) -> LlamaForCausalLM:
    """A deeper model that computes nearly the same: each layer becomes k consecutive copies, each adding 1/k of it.

    Growth in depth: Du et al., "Stacking Your Transformers" (NeurIPS 2024); the 1/k reads the residual stream as an
    Euler scheme with k times the steps, so that the loss does not jump.
    """
    old = model.config.num_hidden_layers
    if num_hidden_layers % old:
        raise ValueError(f"{num_hidden_layers} layers are no multiple of the model's {old}")
    config = LlamaConfig.from_dict({**model.config.to_dict(), "num_hidden_layers": num_hidden_layers})
    deeper = LlamaForCausalLM._from_config(config)
    deeper.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    deeper.model.norm.load_state_dict(model.model.norm.state_dict())
    for index, layer in enumerate(deeper.model.layers):
        layer.load_state_dict(model.model.layers[index * old // num_hidden_layers].state_dict())
    _scale_outputs(deeper, old / num_hidden_layers)
    return deeper.to(model.device)


@torch.no_grad()
def _scale_outputs(model: LlamaForCausalLM, factor: float) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)


def train(
    ids: torch.Tensor, validation: torch.Tensor, recipe: Recipe, folder: Path, device: str = "cpu",
    micro_tokens: int | None = None, start_from: Path | None = None,
) -> tuple[LlamaForCausalLM, pd.DataFrame]:  # fmt: skip
    """Train the reference model, stage after stage; state lives in `folder`, so that a killed run goes on.

    Args:
        ids, validation: token ids [tokens] to learn from, and windows [count, window] that are watched on the way.
        micro_tokens: how many tokens go through the model at once: what the caches like, not part of the result.
        start_from: folder of a shipped model, to train it through the last stage of `recipe` (see `one_more_stage`).

    Returns:
        The model, and the log of `distill` with all tokens seen and, now and then, the `validation_loss`.
    """
    first, logs = len(recipe.stages) - 1 if start_from else 0, []
    seen = sum(stage.num_tokens for stage in recipe.stages[:first])
    if start_from:
        model = LlamaForCausalLM.from_pretrained(start_from, dtype=torch.float32).to(device)
    else:
        model = initial_model(reference_config(recipe.stages[0].num_hidden_layers), recipe.seed).to(device)
    for number, stage in list(enumerate(recipe.stages))[first:]:
        if model.config.num_hidden_layers != stage.num_hidden_layers:
            model = deepen(model, stage.num_hidden_layers)
        text, settings = text_from(ids, seen, stage.window, recipe.seed), recipe.settings(number)
        text, watch = text[: stage.num_tokens // stage.window + 1], [_Validation(validation)]
        log = distill(model, None, text, settings, folder / f"stage-{number}", micro_tokens, watch)
        logs.append(log.assign(tokens=log["tokens"] + seen))
        seen += stage.num_tokens
    return model, pd.concat(logs, ignore_index=True)


def text_from(ids: torch.Tensor, seen: int, window: int, seed: int) -> torch.Tensor:
    """Windows [count, window] of the text in an order of their own, those first that come after the tokens seen."""
    windows = ids[: len(ids) // window * window].view(-1, window)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order.roll(-(seen // window))]


class _Validation(TrainerCallback):
    """Takes the loss on other text wherever a checkpoint is due."""

    def __init__(self, windows: torch.Tensor):
        self.windows = windows

    def on_log(self, args, state, control, model=None, **kwargs) -> None:
        if "loss" in state.log_history[-1] and state.global_step % state.save_steps == 0:
            state.log_history[-1]["validation_loss"] = window_losses(model, self.windows).mean().item()


def model_card(recipe: Recipe, num_text_tokens: int, quality: dict[str, float], seconds: float) -> str:
    """README of the shipped model, written from the run itself."""
    stage = "{num_tokens:,} tokens at {num_hidden_layers} layers, windows of {window}"
    rows = {
        "data": "python-docs: docstrings of CPython and of the pinned packages, "
        f"{num_text_tokens:,} tokens after removing repeated paragraphs",
        "split": f"by a hash of the module's name, 1 in {HELD_OUT_ONE_IN} each for validation and test",
        "tokens seen": f"{recipe.num_tokens:,} ({recipe.num_tokens / num_text_tokens:.2f} times the text)",
        "stages": "; ".join(stage.format(**asdict(each)) for each in recipe.stages),
        "optimisers": f"Muon {recipe.muon_lr} (matrices of the layers, weight decay {recipe.weight_decay}), "
        f"AdamW {recipe.adamw_lr} (the rest)",
        "schedule": f"{recipe.batch_tokens:,} tokens a step; constant rates, then linear decay over the last "
        f"{recipe.decay_tokens:,} tokens",
        "precision": "fp32 weights, matrix products in bf16; shipped in bf16",
        **{f"{split} perplexity": f"{ppl:.2f} (256-token windows, 65,536 tokens)" for split, ppl in quality.items()},
        "hardware, time": f"{platform.machine()}, {os.cpu_count()} cores, {seconds / 60:.0f} minutes in training steps",
        "licences of the text": "those of CPython (PSF) and of the packages (BSD, Apache-2.0, MIT); no text is shipped",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# Reference model

Llama-3-8B's topology in miniature (32 layers, 32 query and 8 KV heads, SwiGLU at 3.5 ×, rope θ 500,000): hidden 128,
head_dim 8, MLP 448, byte-level BPE of 4,096 tokens, tied embeddings; 8.66 million parameters in bf16. Made by
`notebooks/00_reference_model.ipynb` to be pruned; it is no assistant.

| | |
|---|---|
{table}
"""


def publish(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, card: str, recipe: Recipe
) -> None:
    """Ship a model as a plain Llama: bf16 safetensors, tokenizer, card, and the recipe for `one_more_stage`."""
    plain = LlamaForCausalLM._from_config(reference_config(model.config.num_hidden_layers))
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n", encoding="utf-8")


def one_more_stage(folder: Path, stage: Stage) -> Recipe:
    """The recipe of a shipped model, continued: for `train(…, start_from=folder)` in a new state folder."""
    data = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    stages = (*(Stage(**earlier) for earlier in data.pop("stages")), stage)
    return Recipe(stages=stages, **data)
