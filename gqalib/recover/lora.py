"""LoRA recovery: peft adapts, trl trains, the result merges back into a plain model.

`recover` does it from folder to folder, which is `python -m gqalib recover`: alone, under `torchrun` or under
`accelerate launch`, whose settings (plain data parallel, FSDP) reach trl by themselves.
"""

from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks
from trl import SFTConfig, SFTTrainer

from gqalib.device import is_one_of_several
from gqalib.errors import InputError, one_sentence
from gqalib.measure import memory
from gqalib.model.load import load_model, load_tokenizer
from gqalib.recover import trainer
from gqalib.recover.trainer import merge  # noqa: F401 (06 merges with it)
from gqalib.run.instructions import examples, read_instructions
from gqalib.run.presets import Preset, Recovery
from gqalib.run.resume import digest

COLUMNS = {"step": "step", "num_input_tokens_seen": "tokens"} | {x: x for x in ("loss", "learning_rate", "seconds")}


def finetune_lora(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], settings: Recovery, folder: Path,
    seed: int = 0,
) -> tuple[PeftModel, pd.DataFrame]:  # fmt: skip
    """Train a LoRA adapter on `prompt` / `completion` rows; the loss is on the completion only.

    Every linear module of the layers is adapted (`all-linear`; lm_head never is). The base weights do not change. State
    and several processes: see `trainer`. There dropout masks differ, and where a pass ends with fewer micro-batches
    than processes, the others repeat its first rows; trl's DDP or FSDP wraps the model.

    Returns:
        The model with its adapter, and the training log: `step`, `tokens`, `loss` (nats per token), `learning_rate`,
        `seconds`.

    Raises:
        InputError: no rows, or none whose prompt is short enough, accumulation that the number of processes does not
            divide, nothing installed to report to, or the loss became infinite or NaN.
    """
    check_reporter(settings.report_to)
    if not rows:
        raise InputError("there are no rows to learn from: give instructions with at least one prompt and completion")
    rows = rows[: settings.num_examples]
    encoded = examples(rows, tokenizer, settings.max_length)
    args = _arguments(settings, folder, seed, model.device)
    tokens = [torch.tensor(ids) for row in encoded for ids in row.values()]  # what the tokenizer made of the rows
    what = {"start": digest(model, tokens), "seed": seed, "processes": args.world_size}
    state = trainer.progress(folder, args, "lora", settings, **what)
    with trainer.quiet(model.config, model.generation_config):
        sft = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(encoded),
            processing_class=tokenizer,
            peft_config=trainer.lora_config(settings.lora_r, settings.lora_alpha, settings.lora_dropout),
            callbacks=[trainer.Watch(f"recovery.learning_rate from {settings.learning_rate}")],
        )
        weights, log = trainer.result(sft, state)
    if not is_one_of_several():
        trainer.put(weights, sft.model)
    return sft.model.eval(), pd.DataFrame(log)[list(COLUMNS)].rename(columns=COLUMNS)


def check_reporter(name: str) -> None:
    """Raises InputError if transformers cannot report there, or what does is not installed."""
    with one_sentence(f"recovery.report_to = {name!r} cannot be used", "install it, or set recovery.report_to=none"):
        for callback in get_reporting_integration_callbacks(name):
            callback()


def _arguments(settings: Recovery, folder: Path, seed: int, device: torch.device) -> SFTConfig:
    args = trainer.arguments(
        folder,
        device,
        SFTConfig,
        seed=seed,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_ratio,  # below 1 transformers reads it as a ratio
        num_train_epochs=settings.num_epochs,
        per_device_train_batch_size=settings.batch_size,
        max_length=settings.max_length,
        report_to=settings.report_to,
        packing=False,  # right only with FlashAttention
        activation_checkpointing=False,
        bf16=False,  # the weights' own dtype decides
        include_num_input_tokens_seen="non_padding",
    )
    args.gradient_accumulation_steps = trainer.shared(
        settings.gradient_accumulation_steps, args.world_size, "recovery.gradient_accumulation_steps"
    )
    return args


def recover(source: str, preset: Preset, out: Path, seed: int = 0) -> None:
    """Train an adapter on a model with a preset's instructions and `recovery`, and save the two merged, whole or not
    at all.

    State and several processes: see `trainer`.

    Args:
        source: a pruned model's folder.

    Raises:
        InputError: `out` is there or being made, its parent is not, the model cannot be had, too little memory (one
            process only), or as `finetune_lora`.
    """
    settings, several = preset.recovery, is_one_of_several()  # then the trainer places the model, as the launcher says
    check_reporter(settings.report_to)
    with trainer.alone_at(out) as folder:
        model, tokenizer = load_model(source, preset.dtype, "cpu" if several else preset.device), load_tokenizer(source)
        rows = read_instructions(preset.instructions, "train", preset.corpus, settings.num_examples)
        terms = memory.expected("LoRA", model, settings.batch_size, settings.max_length, settings=settings)
        with nullcontext() if several else memory.stage("LoRA", terms, model, "lower recovery.batch_size"):
            _, log = finetune_lora(model, tokenizer, rows, settings, folder, seed)
        trainer.finish(out, source, settings, log, preset.dtype, preset.dtype)
