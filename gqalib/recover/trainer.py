"""What every training here shares: the arguments of transformers' Trainer, its checkpoints, its result in a folder.

The state lives in a folder: the same call goes on from the last of ten checkpoints, or finds what a run that ended came
to; another run begins there anew. Several processes (`torchrun`, `accelerate launch`) make the same call with one
folder that all see. They share the rows of each step, so a step sees the same rows as in one process and differs by
rounding. `recover` keeps that folder beside the model that it writes.
"""

import dataclasses
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from gqalib.device import is_one_of_several
from gqalib.errors import InputError, new_place, one_sentence
from gqalib.model.load import load_model, load_tokenizer, save_model
from gqalib.run.resume import FRAME, Progress, code_hash, lock, replacing

PACKAGES = ("torch", "transformers", "peft", "trl")  # that train
PAUSE = 5  # times the median of its training: a step that takes longer was interrupted
Weights = dict[str, torch.Tensor]


def arguments(folder: Path, device: torch.device, cls: type = TrainingArguments, **changes: Any) -> TrainingArguments:
    """Arguments of a training whose state lives in `folder`: ten checkpoints in all, of which the last one stays."""
    logging.disable_progress_bar()  # one for each checkpoint
    args = cls(**{
        "output_dir": str(folder),
        "use_cpu": not torch.cuda.is_available() or (device.type == "cpu" and not is_one_of_several()),
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 1,  # the last one goes when the next is whole
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "log_level": "error",
        **changes,
    })  # fmt: skip
    args._n_gpu = min(args.n_gpu, 1)  # one process, one card: more would be wrapped in DataParallel
    if device.type == "cuda" and not is_one_of_several():  # else the first card, whichever the model is on
        torch.cuda.set_device(device)  # accelerate goes by this
        vars(args)["_setup_devices"] = device  # and transformers by this
    return args


def progress(folder: Path, args: TrainingArguments, module: str, settings: Any, **what: Any) -> Progress:
    """Where a training keeps its state. It finds nothing there that began with other settings (a dataclass) or another
    of `what` (JSON), by other code or packages, or in shards (FSDP) where this one is whole, or the other way round:
    their checkpoints are files of different kinds.

    Args:
        module: of gqalib.recover, that trains.
    """
    what |= {
        "settings": dataclasses.asdict(settings),
        "library": code_hash(f"from gqalib.recover import {module}", FRAME),
        "versions": {name: version(name) for name in PACKAGES},
        "shards": parse_flag_from_env("ACCELERATE_USE_FSDP"),  # accelerate goes by this
    }
    with args.main_process_first(local=False):
        return Progress(folder, what)


def training_seconds(log: pd.DataFrame) -> float:
    """How long a training took. A pause of the machine does not count (`PAUSE`): such a step counts as a median one."""
    seconds, median = log["seconds"], log["seconds"].median()
    return float(seconds.where(seconds <= PAUSE * median, median).sum())


def shared(number: int, processes: int, what: str) -> int:
    """Each process' part of a number.

    Raises:
        InputError: it cannot be shared.
    """
    if number % processes:
        number_of = f"{what} {number} cannot be shared by {processes} processes"
        raise InputError(f"{number_of}: start a number that divides it, or make it a multiple of {processes}")
    return number // processes


class Watch(TrainerCallback):
    """Notes how long each step took, and ends a training whose loss or gradient is no number."""

    def __init__(self, knob: str):
        self.knob = knob

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.begun = time.perf_counter()

    def on_log(self, args, state, control, **kwargs) -> None:
        entry = state.log_history[-1]
        if "loss" not in entry:
            return
        entry["seconds"] = time.perf_counter() - self.begun
        if not (math.isfinite(entry["loss"]) and math.isfinite(entry.get("grad_norm", 0.0))):
            raise InputError(f"the loss or its gradient is not finite: lower {self.knob}")


def result(trainer: Trainer, state: Progress) -> tuple[Weights, list[dict[str, float]]]:
    """What is trained, and a row of the log for each step: by training from the last checkpoint on, or from `state`.

    All processes call it; the main one keeps the result, and deletes the checkpoints then.
    """
    trainer.remove_callback(PrinterCallback)
    weights, log, begun = state.load("weights"), state.load("log"), time.monotonic()
    if weights is None or log is None:
        trainer.train(resume_from_checkpoint=_last_checkpoint(state.folder))
        weights = _whole_weights(trainer)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        if trainer.accelerator.is_main_process:
            state.keep("weights", weights)
            state.keep("log", log)
    for checkpoint in state.folder.glob("checkpoint-*") if trainer.accelerator.is_main_process else ():
        shutil.rmtree(checkpoint)
    trainer.accelerator.wait_for_everyone()
    Progress.spared += max(0.0, sum(entry["seconds"] for entry in log) - (time.monotonic() - begun))
    return weights, log


def _whole_weights(trainer: Trainer) -> Weights:
    """All that is trained, from the shards of all processes, in the main one."""
    whole = trainer.accelerator.get_state_dict(trainer.model)
    if isinstance(trainer.model, PeftModel):
        return get_peft_model_state_dict(trainer.model, whole)
    return {name: whole[name] for name, _ in trainer.model.named_parameters() if name in whole}


def _last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint whose state, which is written last, can be read."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        with suppress(OSError, ValueError):
            TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            return str(checkpoint)
    return None


# ---------------------------------------------------------------- adapters


def lora_config(r: int, alpha: int, dropout: float = 0.0) -> LoraConfig:
    """An adapter of rank `r`, scaled by `alpha` / `r`, on every linear module of the layers."""
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")


def adapted(model: nn.Module, r: int, alpha: int, seed: int = 0) -> nn.Module:
    """A model with a new adapter, as `lora_config` says; with `r` 0 the model itself."""
    if not r:
        return model
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, lora_config(r, alpha))


def merge(model: nn.Module) -> nn.Module:
    """Fold an adapter into the weights: a plain model again, with the same logits, that saves and loads as before."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def put(weights: Weights, model: nn.Module) -> None:
    """What `result` found, into the model that was trained, or one like it."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, weights)
    else:
        model.load_state_dict(weights, strict=False)  # of tied weights only one is there


# ---------------------------------------------------------------- around a training


@contextmanager
def quiet(*configs: object) -> Iterator[None]:
    """Without a warning of trl's and peft's about transformers. Afterwards the configurations are as they came:
    trainers write into them, and transformers saves odd ones only if nobody has."""
    with ExitStack() as stack, warnings.catch_warnings():
        for config in configs:
            stack.enter_context(patch.dict(vars(config)))
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        yield


def place_of(out: Path) -> Path:
    """Where a training lives that ends as a model in `out`: a folder beside it.

    Raises:
        InputError: as `new_place`.
    """
    out = new_place(out)
    return out.with_name(f"{out.name}.training")


@contextmanager
def alone_at(out: Path) -> Iterator[Path]:
    """`place_of`, where one command works at a time: its main process holds a lock beside that folder, which may be
    deleted meanwhile.

    Raises:
        InputError: as `place_of`, another command is at work there, or what is there is no training: it would go.
    """
    training = place_of(out)
    if os.environ.get("RANK", "0") != "0":  # a launcher's others; they wait for the main process
        yield training
        return
    place = training.with_name(f".{training.name}.lock")
    with one_sentence(f"{place} cannot be written", "give another --out"):
        file = place.open("w")
    with file:
        lock(file, f"another training is working in {training}: wait for it, or give another --out")
        try:
            if any(training.glob("[!.]*")) and not (training / "key.json").is_file():
                raise InputError(f"{training} is there and is no training: move it away, or give another --out")
            yield place_of(out)  # whoever had the lock may have filled it
        finally:
            place.unlink(missing_ok=True)


def finish(out: Path, source: str, settings: Any, log: pd.DataFrame, dtype: str, saved: str) -> None:
    """In the main process: put what was trained into the model that came, in `dtype`, merge an adapter, save it to
    `out` in dtype `saved`, whole or not at all, and end the training. The processes do not know each other any more.

    Args:
        settings: `lora_r` and `lora_alpha` of the adapter; with `lora_r` 0 there was none.
    """
    state = PartialState()
    state.destroy_process_group()
    if not state.is_main_process:
        return
    training, tokenizer = place_of(out), load_tokenizer(source)
    model = adapted(load_model(source, dtype, "cpu"), settings.lora_r, settings.lora_alpha)
    put(load_file(training / "weights.safetensors"), model)
    with replacing(new_place(out)) as folder:
        save_model(merge(model).to(getattr(torch, saved)), tokenizer, folder)
    shutil.rmtree(training)
    first, last = log["loss"].iloc[[0, -1]]
    print(f"{len(log)} steps, {log['tokens'].iloc[-1]:,.0f} tokens: loss {first:.4f} → {last:.4f} nats per token")
