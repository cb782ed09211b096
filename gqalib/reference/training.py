"""How the reference model was made: tokenizer, shape, Muon + AdamW, growth in depth, checkpoints.

The recipe is data (`Recipe`), the state is a folder: `train` started again in the same folder goes on where the last
checkpoint stood. The same code runs on a GPU (bf16, large batches) and on a CPU. The loop itself (`descend`) asks for a
loss and for the next batches only; `distillation` runs it with a teacher.
"""

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gqalib.errors import InputError
from gqalib.model.names import NO_LABEL
from gqalib.parallel import (
    as_sharded,
    is_in_shards,
    rank_and_size,
    sum_over_ranks,
    total_over_ranks,
    wait_for_all,
    whole,
)
from gqalib.run.python_docs import HELD_OUT_ONE_IN
from gqalib.run.resume import onto_disk, replacing  # noqa: F401  (registers attn_implementation="blocked")

END_OF_TEXT = "<|endoftext|>"
Batch = (
    torch.Tensor | dict[str, torch.Tensor]
)  # token ids [rows, length], or with `labels` (and `attention_mask`) beside `input_ids`


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
    decay_tokens: int  # the last tokens, over which the rates fall linearly to `final_rate`
    batch_tokens: int = 4096
    muon_lr: float = 0.02  # every matrix of the backbone
    adamw_lr: float = 3e-3  # embedding and norms
    weight_decay: float = 0.05  # Muon's
    warmup_steps: int = 50
    final_rate: float = 0.02
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(stage.num_tokens for stage in self.stages)

    def rate(self, tokens_seen: int) -> float:
        return rate_at(self, tokens_seen)

    def stage(self, tokens_seen: int) -> Stage:
        for stage in self.stages:
            if tokens_seen < stage.num_tokens:
                return stage
            tokens_seen -= stage.num_tokens
        return self.stages[-1]


def rate_at(recipe, tokens_seen: int) -> float:
    """The factor on all learning rates: warm-up, constant, linear decay."""
    warmup = (tokens_seen / recipe.batch_tokens + 1) / recipe.warmup_steps
    decay = (recipe.num_tokens - tokens_seen) / recipe.decay_tokens
    return min(1.0, warmup, max(recipe.final_rate, decay))


def train_tokenizer(documents, vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token, trained on an iterator of documents."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def reference_config(num_hidden_layers: int = 32, **overrides) -> LlamaConfig:
    """Llama-3-8B's topology (32 query and 8 KV heads, SwiGLU at 3.5 x, rope theta 500,000) at hidden 128, head_dim
    8."""
    shape = {
        "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 8, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaConfig(**{**shape, **overrides})


def initial_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A fresh model whose output projections are scaled by 1 / sqrt(2 layers), as GPT-2 does, to keep the residual
    stream tame."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(config, attn_implementation="blocked")
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
    config.layer_types = None
    deeper = LlamaForCausalLM._from_config(config, attn_implementation="blocked")
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


def optimizers(model: nn.Module, recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for what else is trained (with `muon_lr` 0: for everything).

    Each remembers its full rate as `base_lr`.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    by_muon = {name for name, p in trained if recipe.muon_lr and ".layers." in name and p.ndim == 2}
    matrices, others = ([p for name, p in trained if (name in by_muon) == wanted] for wanted in (True, False))
    result = []
    if matrices:
        result.append(torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay))
    if others:
        result.append(torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0))
    for optimizer in result:
        optimizer.param_groups[0]["base_lr"] = optimizer.param_groups[0]["lr"]
    return result


def batch_at(ids: torch.Tensor, tokens_seen: int, window: int, batch_tokens: int, seed: int) -> torch.Tensor:
    """The training batch [batch, window] that belongs to a position in the run: a function, so a resumed run goes on
    alike.

    Each pass over the text is cut at another offset and shuffled anew.
    """
    rows = batch_tokens // window
    per_epoch = (len(ids) - window) // window // rows * rows
    epoch, first = divmod(tokens_seen // window, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    offset = int(torch.randint(window, (1,), generator=generator))
    order = torch.randperm(per_epoch, generator=generator)[first : first + rows]
    return ids[(offset + order * window)[:, None] + torch.arange(window)]


def train(
    ids: torch.Tensor,
    validation: torch.Tensor,
    recipe: Recipe,
    folder: Path,
    device: str = "cpu",
    micro_tokens: int = 2048,
    checkpoint_s: float = 300,
    start_from: Path | None = None,
) -> LlamaForCausalLM:
    """Train the reference model; state and log live in `folder`, so that a killed run goes on where it was saved.

    Args:
        start_from: folder of a shipped model, to train it through the last stage of `recipe` (see `one_more_stage`).
        ids, validation: token ids [tokens] to learn from, and windows [count, window] that are watched at each
        checkpoint.
        micro_tokens: how many tokens go through the model at once: what the caches like, not part of the result.
    """
    model, opts, tokens_seen = _resume(recipe, folder, device, start_from)

    def prepare(model, opts, tokens_seen):
        stage = recipe.stage(tokens_seen)
        if model.config.num_hidden_layers != stage.num_hidden_layers:
            model = deepen(model, stage.num_hidden_layers)
            opts = optimizers(model, recipe)
        batch = batch_at(ids, tokens_seen, stage.window, recipe.batch_tokens, recipe.seed).to(device)
        return model, opts, batch.split(max(1, micro_tokens // stage.window))

    def watch(model, tokens_seen):
        _log(folder, tokens=tokens_seen, validation_loss=validation_loss(model, validation))

    return descend(model, opts, tokens_seen, recipe, folder, prepare, checkpoint_s=checkpoint_s, watch=watch)


def language_model_loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """`loss`: nats per token that is predicted."""
    inputs = as_inputs(batch)
    return {"loss": model(input_ids=inputs["input_ids"], labels=inputs["labels"], use_cache=False).loss}


def as_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch with `labels`; token ids alone are their own labels."""
    return {"input_ids": batch, "labels": batch} if isinstance(batch, torch.Tensor) else batch


def num_tokens_of(batch: Batch) -> int:
    """Tokens in a batch, without the padding that its `attention_mask` marks."""
    inputs = as_inputs(batch)
    return int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()


def num_predicted(batch: Batch) -> int:
    """Tokens that the loss is taken on: those with a label, but the first of each row."""
    return int((as_inputs(batch)["labels"][:, 1:] != NO_LABEL).sum())


def descend(
    model: nn.Module,
    opts: list[torch.optim.Optimizer],
    tokens_seen: int,
    recipe,
    folder: Path,
    prepare: Callable,
    loss_of: Callable[[nn.Module, Batch], dict[str, torch.Tensor]] = language_model_loss,
    checkpoint_s: float = 300,
    watch: Callable[[nn.Module, int], None] = lambda model, tokens_seen: None,
) -> nn.Module:
    """Optimiser steps until `recipe.num_tokens` are seen; one line of `folder / "log.jsonl"` each, a checkpoint now
    and then.

    Args:
        recipe: `num_tokens` and what `rate_at` reads.
        prepare: (model, opts, tokens_seen) → (model, opts, micro-batches of the next step).
        watch: called with the model and the tokens seen after each checkpoint.
    """
    saved_at = time.monotonic()
    while tokens_seen < recipe.num_tokens:
        model, opts, batches = prepare(model, opts, tokens_seen)
        started = time.monotonic()
        terms = step(model, opts, batches, rate_at(recipe, tokens_seen), loss_of)
        tokens_seen += sum(map(num_tokens_of, batches))
        is_main = rank_and_size()[0] == 0
        if is_main:
            _log(
                folder,
                tokens=tokens_seen,
                **terms,
                learning_rate=opts[0].param_groups[0]["lr"],
                seconds=time.monotonic() - started,
            )
        is_due = (
            total_over_ranks(int(time.monotonic() - saved_at > checkpoint_s)) > 0
        )  # for all or none: saving waits for all
        if is_due or tokens_seen >= recipe.num_tokens:
            save_checkpoint(folder, model, opts, tokens_seen)
            if is_main:
                watch(model, tokens_seen)
            saved_at = time.monotonic()
    return model


def step(
    model: nn.Module,
    opts: list[torch.optim.Optimizer],
    batches: Sequence[Batch],
    rate: float,
    loss_of: Callable[[nn.Module, Batch], dict[str, torch.Tensor]] = language_model_loss,
) -> dict[str, float]:
    """One optimiser step; matrix products in bf16, where that is fast. Returns the terms of the loss, in nats per
    predicted token.

    In several processes each takes its share of the batches and the gradients are summed over processes.

    Args:
        loss_of: (model, batch) → means over the batch's predicted tokens, by name; `loss` is the one that is descended.

    Raises:
        InputError: no token of the batches has a label.
        FloatingPointError: the loss or its gradient is not finite; the weights are as they were.
    """
    shards, totals = is_in_shards(model), {}
    for batch, weight in _share(batches):
        with fast_products(model.device):
            terms = {name: term * weight for name, term in loss_of(model, batch).items()}
        (terms["loss"] * (rank_and_size()[1] if shards else 1)).backward()  # FSDP takes the mean over processes
        totals = {name: totals.get(name, 0) + term.detach() for name, term in terms.items()}
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    sum_over_ranks([*([] if shards else gradients), *totals.values()])
    norm = whole(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    if not (torch.isfinite(totals["loss"]) and torch.isfinite(norm)):
        raise FloatingPointError("the training loss is not finite: lower the learning rates")
    with nullcontext() if bf16_is_fast(model.device) else _InFloat32():
        for optimizer in opts:
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["base_lr"] * rate
            optimizer.step()
            optimizer.zero_grad()
    return {name: total.item() for name, total in totals.items()}


def _share(batches: Sequence[Batch]) -> list[tuple[Batch, float]]:
    """This process' batches that have labels, each with its weight in the mean.

    Every process has as many, because shards wait for each other: some batches come twice and weigh nothing.
    """
    rank, world_size = rank_and_size()
    counts = [num_predicted(batch) for batch in batches]
    if not sum(counts):
        raise InputError("a batch has no token to learn from: give rows of at least 2 tokens, with labels")
    weighed = [(batch, count / sum(counts)) for batch, count in zip(batches, counts, strict=True) if count]
    filling = [(weighed[0][0], 0.0)] * (-len(weighed) % world_size)
    return [*weighed, *filling][rank::world_size]


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the processor has instructions for it: without, as on many a laptop, products in bf16 are 40 times
    slower than in float32."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fast_products(device: torch.device) -> torch.autocast:
    """Matrix products in bf16, where that is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast(device))


class _InFloat32(TorchFunctionMode):
    """Inside, nothing becomes bf16: torch's Muon orthogonalises in bf16 wherever it runs."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16:
            return args[0].float().clone()  # a copy, as it would have been
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def validation_loss(model: nn.Module, windows: torch.Tensor) -> float:
    """Mean loss in nats per token over windows [count, window], in the precision of the training."""
    with fast_products(model.device):
        losses = [model(input_ids=w, labels=w, use_cache=False).loss for w in windows.to(model.device).split(8)]
    return torch.stack(losses).mean().item()


def _resume(recipe: Recipe, folder: Path, device: str, start_from: Path | None):
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.json"
    if not state.exists():
        return _begin(recipe, device, start_from)
    saved = json.loads(state.read_text())
    model = LlamaForCausalLM.from_pretrained(folder / saved["checkpoint"], attn_implementation="blocked").to(device)
    opts = optimizers(model, recipe)
    return model, opts, load_checkpoint(folder, model, opts)


def _begin(recipe: Recipe, device: str, start_from: Path | None):
    if start_from is None:
        model, tokens_seen = initial_model(reference_config(recipe.stages[0].num_hidden_layers), recipe.seed), 0
    else:
        model = LlamaForCausalLM.from_pretrained(start_from, dtype=torch.float32, attn_implementation="blocked")
        tokens_seen = recipe.num_tokens - recipe.stages[-1].num_tokens
    model = model.to(device)
    return model, optimizers(model, recipe), tokens_seen


def save_checkpoint(folder: Path, model: nn.Module, opts, tokens_seen: int) -> None:
    """What is trained and the optimisers' state. `state.json` is replaced before the last checkpoint goes, so it
    always names a whole one.

    Every process calls it; the main one writes, whole tensors, so that any number of processes can go on.
    """
    trained = {key: _in_host(p) for key, p in model.named_parameters() if p.requires_grad}
    state = {
        f"{i}.{j}.{key}": _in_host(value)
        for i, optimizer in enumerate(opts)
        for j, parameter in enumerate(optimizer.param_groups[0]["params"])
        for key, value in optimizer.state[parameter].items()
    }
    if rank_and_size()[0] == 0:
        _write_checkpoint(folder, model, trained, state, tokens_seen)
    wait_for_all()


def _in_host(tensor: torch.Tensor) -> torch.Tensor | None:
    """The whole of a tensor on the CPU, in the main process; piece by piece, a model that is in shards fits no card."""
    tensor = whole(tensor.detach())
    return tensor.cpu().contiguous() if rank_and_size()[0] == 0 else None


def _write_checkpoint(folder: Path, model: nn.Module, trained: dict, state: dict, tokens_seen: int) -> None:
    current = (folder / "state.json").exists() and "checkpoint-a" in (folder / "state.json").read_text()
    name, last = ("checkpoint-b", "checkpoint-a") if current else ("checkpoint-a", "checkpoint-b")
    model.config.save_pretrained(folder / name)
    save_file(trained, folder / name / "model.safetensors", {"format": "pt"})
    save_file(state, folder / name / "optimizers.safetensors")
    onto_disk(folder / name)
    with replacing(folder / "state.json") as file:
        file.write_text(json.dumps({"checkpoint": name, "tokens_seen": tokens_seen}))
    shutil.rmtree(folder / last, ignore_errors=True)


@torch.no_grad()
def load_checkpoint(folder: Path, model: nn.Module, opts) -> int:
    """Put the last checkpoint of `folder` into a model and its optimisers; what was logged after it is forgotten.
    Returns the tokens seen."""
    saved = json.loads((folder / "state.json").read_text())
    weights, state = (
        load_file(folder / saved["checkpoint"] / name) for name in ("model.safetensors", "optimizers.safetensors")
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(_like(weights[name], parameter))
    for i, optimizer in enumerate(opts):
        for j, parameter in enumerate(optimizer.param_groups[0]["params"]):
            kept = {key.removeprefix(f"{i}.{j}."): value for key, value in state.items() if key.startswith(f"{i}.{j}.")}
            optimizer.state[parameter] = {key: _like(value, parameter) for key, value in kept.items()}
    if rank_and_size()[0] == 0:
        _forget_after(folder, saved["tokens_seen"])
    return saved["tokens_seen"]


def _like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor as a parameter is: its device, its shards. AdamW's number of steps stays on the CPU, as AdamW
    has it."""
    return as_sharded(value.to(parameter.device), parameter) if value.ndim else value


def _log(folder: Path, **values: float) -> None:
    """One line of `log.jsonl`; six digits of each value, so that small rates and losses keep theirs."""
    rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in values.items()}
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps(rounded) + "\n")


def _forget_after(folder: Path, tokens_seen: int) -> None:
    """Drop the lines of the log that are later than a checkpoint, and one that a kill cut short."""
    if (folder / "log.jsonl").exists():
        whole = (folder / "log.jsonl").read_text().split("\n")[:-1]
        with replacing(folder / "log.jsonl") as file:
            file.write_text("".join(f"{line}\n" for line in whole if json.loads(line)["tokens"] <= tokens_seen))


def model_card(recipe: Recipe, num_text_tokens: int, quality: dict[str, float], seconds: float) -> str:
    """README of the shipped model, written from the run itself."""
    stages = "; ".join(
        f"{s.num_tokens:,} tokens at {s.num_hidden_layers} layers, windows of {s.window}" for s in recipe.stages
    )
    return f"""# Reference model

Llama-3-8B's topology in miniature (32 layers, 32 query and 8 KV heads, SwiGLU at 3.5 ×, rope θ 500,000): hidden 128,
head_dim 8, MLP 448, byte-level BPE of 4,096 tokens, tied embeddings; 8.66 million parameters in bf16. Made by
`notebooks/00_reference_model.ipynb` to be pruned; it is no assistant.

| | |
|---|---|
| data | python-docs: docstrings of CPython and of the pinned packages, {num_text_tokens:,} tokens after removing repeated paragraphs |
| split | by a hash of the module's name, 1 in {HELD_OUT_ONE_IN} each for validation and test |
| tokens seen | {recipe.num_tokens:,} ({recipe.num_tokens / num_text_tokens:.2f} times the text) |
| stages | {stages} |
| optimisers | Muon {recipe.muon_lr} (matrices of the layers, weight decay {recipe.weight_decay}), AdamW {recipe.adamw_lr} (the rest) |
| schedule | {recipe.batch_tokens:,} tokens a step; constant rates, then linear decay over the last {recipe.decay_tokens:,} tokens |
| precision | fp32 weights, matrix products in bf16; shipped in bf16 |
| validation perplexity | {quality["validation"]:.2f} (256-token windows, 65,536 tokens) |
| test perplexity | {quality["test"]:.2f} (256-token windows, 65,536 tokens) |
| hardware, time | {platform.machine()} CPU, {os.cpu_count()} cores, {seconds / 60:.0f} minutes in training steps |
| licences of the text | those of CPython (PSF) and of the packages (BSD, Apache-2.0, MIT); no text is shipped |
"""


def publish(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, card: str, recipe: Recipe
) -> None:
    """Ship a model as a plain Llama: bf16 safetensors, tokenizer, card, and the recipe that `one_more_stage`
    continues."""
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
