"""LoRA recovery: peft adapts, trl trains, the result merges back into a plain model.

`recover` does it from folder to folder, which is `python -m gqalib recover`: alone, under `torchrun` or under
`accelerate launch`, whose settings (plain data parallel, FSDP) reach trl by themselves.
"""

import dataclasses
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from gqalib.errors import InputError, new_folder
from gqalib.measure import memory
from gqalib.model.load import load_model, load_tokenizer, save_model
from gqalib.parallel import is_one_of_several, total_over_ranks
from gqalib.run.instructions import examples, instructions
from gqalib.run.presets import Preset, Recovery
from gqalib.run.resume import Progress, code_hash, digest, replacing


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

    Every linear module of the layers is adapted (`all-linear`; lm_head never is). The base weights do not change. The
    state
    lives in `folder`: the same call goes on where a killed run was saved, and finds the adapter of one that ended;
    another run begins there anew.

    Several processes (`torchrun`, `accelerate launch`) call it with the same arguments and one `folder` that all see.
    They share the micro-batches of each step, so a step sees the same rows as in one process and differs by rounding
    (and by the dropout masks, if there is dropout); where a pass ends with fewer micro-batches than processes, the
    others repeat its first rows. trl's DDP or FSDP wraps the
    model. Under FSDP the model that comes back is in shards: the whole adapter is what `trained_adapter` reads.

    Args:
        checkpoint_s: seconds between two checkpoints.

    Returns:
        The model with its adapter, and the training log: `step`, `tokens`, `loss` (nats per token), `learning_rate`,
        `seconds`.

    Raises:
        InputError: no rows, or none whose prompt is short enough, accumulation that the number of processes does not
            divide, or the loss became infinite or NaN.
    """
    if not rows:
        raise InputError("there are no rows to learn from: give instructions with at least one prompt and completion")
    rows = rows[: settings.num_examples]
    encoded = examples(rows, tokenizer, settings.max_length)
    args = _arguments(settings, _state(folder), seed, model.device)
    args.gradient_accumulation_steps = _share(settings.gradient_accumulation_steps, args.world_size)
    run = {
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        "start": digest(model, rows),
        "library": code_hash(Path(__file__).read_text(encoding="utf-8")),
    }
    with args.main_process_first(local=False):
        state = Progress(_state(folder), run | {"processes": args.world_size})
    with _quiet(), _unchanged(model.config, model.generation_config):
        trainer = _trainer(model, tokenizer, encoded, settings, args, checkpoint_s)
        log, adapter = state.load("log"), state.load("adapter")
        if log is None or adapter is None:
            _go_on(trainer)
            whole = trainer.accelerator.get_state_dict(trainer.model)  # from all processes' shards, in the main one
            log, adapter = _log(trainer), get_peft_model_state_dict(trainer.model, whole)
            if not all(math.isfinite(row["loss"]) for row in log):
                raise InputError(
                    f"the loss became {log[-1]['loss']}: lower recovery.learning_rate from {settings.learning_rate}"
                )
            if trainer.accelerator.is_main_process:
                state.keep("adapter", adapter)
                state.keep("log", log)
        else:
            set_peft_model_state_dict(trainer.model, adapter)
        for checkpoint in state.folder.glob("checkpoint-*") if trainer.accelerator.is_main_process else ():
            shutil.rmtree(checkpoint)
        trainer.accelerator.wait_for_everyone()
    return trainer.model.eval(), pd.DataFrame(log)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # trl's and peft's, about transformers
        yield


@contextmanager
def _unchanged(*configs: object) -> Iterator[None]:
    """Afterwards they are as they came: trl writes into them, and transformers saves odd ones only if nobody has."""
    before = [dict(vars(config)) for config in configs]
    try:
        yield
    finally:
        for config, values in zip(configs, before, strict=True):
            vars(config).clear()
            vars(config).update(values)


def _state(folder: Path) -> Path:
    return folder / "state"


def _share(steps: int, processes: int) -> int:
    """Accumulation steps of each process, so that together they take the batch of one."""
    if steps % processes:
        raise InputError(
            f"recovery.gradient_accumulation_steps {steps} cannot be shared by {processes} processes: "
            f"start a number that divides it, or make it a multiple of {processes} and recovery.batch_size smaller by as much"
        )
    return steps // processes


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
        control.should_save |= (
            total_over_ranks(int(time.monotonic() - self.saved >= self.every_s)) > 0
        )  # all or none: saving waits for all

    def on_log(self, args, state, control, **kwargs) -> None:
        if "loss" in state.log_history[-1]:
            state.log_history[-1]["seconds"] = self.seconds

    def on_save(self, args, state, control, **kwargs) -> None:
        self.saved = time.monotonic()


def _trainer(model, tokenizer, encoded, settings: Recovery, args: SFTConfig, checkpoint_s: float) -> SFTTrainer:
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(encoded),
        processing_class=tokenizer,
        peft_config=lora_config(settings.lora_r, settings.lora_alpha, settings.lora_dropout),
    )
    trainer.remove_callback(PrinterCallback)  # the log is returned, not printed
    trainer.add_callback(_Checkpoints(checkpoint_s))
    return trainer


def lora_config(r: int, alpha: int, dropout: float = 0.0) -> LoraConfig:
    """An adapter of rank `r`, scaled by `alpha` / `r`, on every linear module of the layers."""
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")


def _arguments(settings: Recovery, folder: Path, seed: int, device: torch.device) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder),
        seed=seed,
        use_cpu=not torch.cuda.is_available()
        or (device.type == "cpu" and not is_one_of_several()),  # several processes meet through gloo then
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_ratio,  # below 1 transformers reads it as a ratio
        num_train_epochs=settings.num_epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        max_length=settings.max_length,
        report_to=settings.report_to,
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
    names = {
        "step": "step",
        "num_tokens": "tokens",
        "loss": "loss",
        "learning_rate": "learning_rate",
        "seconds": "seconds",
    }
    return [{names[key]: entry[key] for key in names} for entry in trainer.state.log_history if "loss" in entry]


def merge(model: PeftModel) -> nn.Module:
    """Fold the adapter into the weights: a plain model again, with the same logits, that saves and loads as before."""
    return model.merge_and_unload()


def trained_adapter(folder: Path) -> dict[str, torch.Tensor] | None:
    """The adapter of a `finetune_lora` that ended in this folder, by peft's names, on the CPU; None if there is
    none."""
    file = _state(folder) / "adapter.safetensors"
    return load_file(file) if file.exists() else None


def recover(source: str, preset: Preset, out: Path, seed: int = 0) -> None:
    """Train an adapter on a model with a preset's instructions and `recovery`, and save the two merged, whole or not
    at all.

    In several processes every one calls it; the main one merges and writes. The training lives in a folder beside `out`
    until then, so the same call goes on where a killed run was saved.

    Args:
        source: a pruned model's folder.

    Raises:
        InputError: `out` is there, its parent is not, the model cannot be had, too little memory (one process only), or
        as `finetune_lora`.
    """
    training, save = into_folder(out)
    several = is_one_of_several()  # then the trainer places the model, as the launcher's settings say
    model, tokenizer = load_model(source, preset.dtype, "cpu" if several else preset.device), load_tokenizer(source)
    rows = instructions(preset.instructions, "train", preset.corpus, preset.recovery.num_examples)
    terms = memory.expected(
        "LoRA", model, preset.recovery.batch_size, preset.recovery.max_length, settings=preset.recovery
    )
    with nullcontext() if several else memory.stage("LoRA", terms, model, "lower recovery.batch_size"):
        _, log = finetune_lora(model, tokenizer, rows, preset.recovery, training, seed)
    state = PartialState()
    state.destroy_process_group()
    if state.is_main_process:
        save(_merged(load_model(source, preset.dtype, "cpu"), trained_adapter(training), preset.recovery), tokenizer)
        print(summary(log))


def into_folder(out: Path) -> tuple[Path, Callable[[nn.Module, PreTrainedTokenizerBase], None]]:
    """Where a training lives that ends as a model in `out`, and what saves that model there, whole or not at all, and
    ends the training.

    Raises:
        InputError: as `new_folder`.
    """
    out = new_folder(out)
    training = out.with_name(f"{out.name}.training")

    def save(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        with replacing(out) as folder:
            save_model(model, tokenizer, folder)
        shutil.rmtree(training)

    return training, save


def summary(log: pd.DataFrame) -> str:
    """One line about a training that is done."""
    first, last = log["loss"].iloc[[0, -1]]
    return f"{len(log)} steps, {log['tokens'].iloc[-1]:,.0f} tokens: loss {first:.4f} → {last:.4f} nats per token"


def _merged(model: nn.Module, adapter: dict[str, torch.Tensor], settings: Recovery) -> nn.Module:
    with _quiet():
        adapted = get_peft_model(model, lora_config(settings.lora_r, settings.lora_alpha))
    set_peft_model_state_dict(adapted, adapter)
    return merge(adapted)
