"""LoRA recovery: peft adapts, trl trains, the result merges back into a plain model."""

import dataclasses
import math
import shutil
import time
import warnings
from pathlib import Path

import pandas as pd
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from gqalib.errors import InputError
from gqalib.presets import Recovery
from gqalib.progress import Progress, digest, library_hash


def finetune_lora(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    settings: Recovery,
    folder: Path,
    seed: int = 0,
    checkpoint_s: float = 300,
) -> tuple[PeftModel, pd.DataFrame]:
    """Train a LoRA adapter on `prompt` / `completion` rows; the loss is on the completion only.

    Every linear module of the layers is adapted (`all-linear`; lm_head never is). The base weights do not change. The state
    lives in `folder`: the same call goes on where a killed run was saved, and finds the adapter of one that ended; another
    run begins there anew.

    Args:
        checkpoint_s: seconds between two checkpoints.

    Returns:
        The model with its adapter, and the training log: `step`, `tokens`, `loss` (nats per token), `learning_rate`, `seconds`.

    Raises:
        InputError: no rows, or the loss became infinite or NaN.
    """
    if not rows:
        raise InputError("there are no rows to learn from: give instructions with at least one prompt and completion")
    rows = rows[: settings.num_examples]
    run = {"settings": dataclasses.asdict(settings), "seed": seed, "start": digest(model, rows), "library": library_hash()}
    state = Progress(folder / "state", run)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # trl's, about transformers
        trainer = _trainer(model, tokenizer, rows, settings, state.folder, seed, checkpoint_s)
        log, adapter = state.load("log"), state.load("adapter")
        if log is None or adapter is None:
            _go_on(trainer)
            log, adapter = _log(trainer), get_peft_model_state_dict(trainer.model)
            if not all(math.isfinite(row["loss"]) for row in log):
                raise InputError(f"the loss became {log[-1]['loss']}: lower recovery.learning_rate from {settings.learning_rate}")
            state.keep("adapter", adapter)
            state.keep("log", log)
            for checkpoint in state.folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        else:
            set_peft_model_state_dict(trainer.model, adapter)
    return trainer.model.eval(), pd.DataFrame(log)


def _go_on(trainer: SFTTrainer) -> None:
    """Train from the last whole checkpoint, or from the beginning."""
    checkpoint, state = _last_checkpoint(Path(trainer.args.output_dir))
    if state is not None:
        trainer._total_train_tokens = state.log_history[-1]["num_tokens"]  # trl would count from 0 again
    trainer.train(resume_from_checkpoint=checkpoint)


def _last_checkpoint(folder: Path) -> tuple[str | None, TrainerState | None]:
    """The last checkpoint whose state, which is written last, can be read."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            return str(checkpoint), TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        except (OSError, ValueError):
            continue
    return None, None


class _Checkpoints(TrainerCallback):
    """Asks for a checkpoint now and then, and notes how long each step took."""

    def __init__(self, every_s: float):
        self.every_s, self.saved = every_s, time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds = time.perf_counter() - self.begun
        control.should_save |= time.monotonic() - self.saved >= self.every_s

    def on_log(self, args, state, control, **kwargs) -> None:
        if "loss" in state.log_history[-1]:
            state.log_history[-1]["seconds"] = self.seconds

    def on_save(self, args, state, control, **kwargs) -> None:
        self.saved = time.monotonic()


def _trainer(model, tokenizer, rows, settings: Recovery, folder: Path, seed: int, checkpoint_s: float) -> SFTTrainer:
    trainer = SFTTrainer(
        model=model,
        args=_arguments(settings, folder, seed),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(settings.lora_r, settings.lora_alpha, settings.lora_dropout),
    )
    trainer.remove_callback(PrinterCallback)  # the log is returned, not printed
    trainer.add_callback(_Checkpoints(checkpoint_s))
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
        save_strategy="no",  # by steps; `_Checkpoints` asks by time
        save_total_limit=1,  # the last one goes when the next is whole
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        log_level="error",
    )


def _log(trainer: SFTTrainer) -> list[dict[str, float]]:
    names = {"step": "step", "num_tokens": "tokens", "loss": "loss", "learning_rate": "learning_rate", "seconds": "seconds"}
    return [{names[key]: entry[key] for key in names} for entry in trainer.state.log_history if "loss" in entry]


def merge(model: PeftModel) -> nn.Module:
    """Fold the adapter into the weights: a plain model again, with the same logits, that saves and loads as before."""
    return model.merge_and_unload()
