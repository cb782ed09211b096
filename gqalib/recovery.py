"""LoRA recovery: peft adapts, trl trains, the result merges back into a plain model."""

import math
import warnings
from pathlib import Path

import pandas as pd
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig, SFTTrainer

from gqalib.errors import InputError
from gqalib.presets import Recovery


def finetune_lora(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    settings: Recovery,
    folder: Path,
    seed: int = 0,
) -> tuple[PeftModel, pd.DataFrame]:
    """Train a LoRA adapter on `prompt` / `completion` rows; the loss is on the completion only.

    Every linear module of the layers is adapted (`all-linear`; lm_head never is). The base weights do not change.

    Returns:
        The model with its adapter, and the training log: `step`, `tokens`, `loss` (nats per token), `learning_rate`.

    Raises:
        InputError: no rows, or the loss became infinite or NaN.
    """
    if not rows:
        raise InputError("there are no rows to learn from: give instructions with at least one prompt and completion")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # trl's, about transformers
        trainer = _trainer(model, tokenizer, rows[: settings.num_examples], settings, folder, seed)
        trainer.train()
    log = _log(trainer)
    if not log["loss"].map(math.isfinite).all():
        raise InputError(f"the loss became {log['loss'].iloc[-1]}: lower recovery.learning_rate from {settings.learning_rate}")
    return trainer.model.eval(), log


def _trainer(model, tokenizer, rows, settings: Recovery, folder: Path, seed: int) -> SFTTrainer:
    trainer = SFTTrainer(
        model=model,
        args=_arguments(settings, folder, seed),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(settings.lora_r, settings.lora_alpha, settings.lora_dropout),
    )
    trainer.remove_callback(PrinterCallback)  # the log is returned, not printed
    return trainer


def lora_config(r: int, alpha: int, dropout: float = 0.0) -> LoraConfig:
    """An adapter of rank `r`, scaled by `alpha` / `r`, on every linear module of the layers."""
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")


def _arguments(settings: Recovery, folder: Path, seed: int) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder),
        seed=seed,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_ratio,  # below 1 transformers reads it as a ratio
        num_train_epochs=settings.num_epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        max_length=settings.max_length,
        report_to=settings.report_to,
        completion_only_loss=True,
        packing=False,  # right only with FlashAttention
        activation_checkpointing=False,
        bf16=False,  # the weights' own dtype decides
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        log_level="error",
    )


def _log(trainer: SFTTrainer) -> pd.DataFrame:
    rows = [entry for entry in trainer.state.log_history if "loss" in entry]
    frame = pd.DataFrame(rows)[["step", "num_tokens", "loss", "learning_rate"]]
    return frame.rename(columns={"num_tokens": "tokens"})


def merge(model: PeftModel) -> nn.Module:
    """Fold the adapter into the weights: a plain model again, with the same logits, that saves and loads as before."""
    return model.merge_and_unload()
