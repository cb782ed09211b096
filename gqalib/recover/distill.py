"""Recovery by the dense model's logits: all weights or a LoRA adapter, alone or mixed with the language-model loss.

    loss = alpha · T² · KL(teacher || student) + (1 − alpha) · cross entropy          [nats per predicted token]

with both distributions softened by the temperature T in the first term (Hinton, Vinyals & Dean 2015; T² keeps the size
of the gradients). The loop, its optimisers and its checkpoints are those of `training`.

`recover` does it from folder to folder, which is `python -m gqalib distill`: alone, under `torchrun` or under
`accelerate launch`.
"""

import bisect
import dataclasses
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pandas as pd
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gqalib.errors import InputError
from gqalib.measure import memory
from gqalib.measure.cost import weight_bytes
from gqalib.measure.perplexity import kl_divergence
from gqalib.model.attention import attention_implementation
from gqalib.model.load import load_model, load_tokenizer, resolve_device, to_device
from gqalib.model.names import NO_LABEL
from gqalib.parallel import in_shards, is_in_shards, is_one_of_several, processes, rank_and_size, wait_for_all
from gqalib.recover.lora import into_folder, lora_config, merge, summary
from gqalib.reference import training
from gqalib.reference.training import Batch, as_inputs
from gqalib.run.corpora import training_windows
from gqalib.run.instructions import examples
from gqalib.run.presets import Distillation, Preset
from gqalib.run.resume import code_hash, digest

COLUMNS = ["tokens", "loss", "kl", "cross_entropy", "learning_rate", "seconds"]
MICRO_TOKENS = 2048  # that go through student and teacher at once
Batches = torch.Tensor | Callable[[int], Batch]


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    train_batches: Batches,
    settings: Distillation,
    folder: Path,
    micro_tokens: int = MICRO_TOKENS,
    checkpoint_s: float = 300,
) -> pd.DataFrame:
    """Teach a pruned model, in place, until `settings.num_tokens` are seen (the last step is a whole one).

    With `lora_r` only an adapter is trained, and merged at the end, so the student is a plain model again. The state
    lives
    in `folder`: the same call on the same student goes on where a killed run was saved; another run begins there anew.
    To
    train all weights, load the student in float32: bfloat16 rounds small steps away.

    Several processes call it with the same arguments, a teacher each and one `folder` that all see. They share the
    micro-batches of each step, so a step sees the same tokens as in one process and differs by rounding. Under FSDP 2
    the student comes back in shards (and with its adapter): what was trained is in `folder`, from where
    `trained_student` reads it.

    Args:
        teacher: the dense model, which never changes; on any device; it may be None where `alpha` is 0.
        train_batches: token ids [count, length], shuffled anew for each pass; or a function from the number of tokens
            seen to the next batch, token ids [rows, length] or `input_ids`, `labels` and, with padding on the right,
            `attention_mask`. Where `labels` is −100 (a prompt, padding) neither loss is taken. See
            `instruction_batches`.
        micro_tokens: how many tokens go through the models at once: what memory and caches like.
        checkpoint_s: seconds between two checkpoints.

    Returns:
        One row per optimiser step: `tokens` seen, `loss`, its terms `kl` (with T²; none at alpha 0) and
        `cross_entropy`, `learning_rate` (Muon's if it runs), `seconds`.

    Raises:
        InputError: a teacher is missing or has another vocabulary, there is no text, a matrix has fewer rows than there
            are shards, or the loss or its gradient became infinite or NaN; then the student is as it was at the last
            checkpoint, at worst as it came.
    """
    _check(student, teacher, train_batches, settings)
    if settings.num_tokens == 0:
        return pd.DataFrame(columns=COLUMNS, dtype=float)
    text = train_batches if isinstance(train_batches, torch.Tensor) else None  # a function's text is not seen
    run = {
        "settings": dataclasses.asdict(settings),
        "start": digest(student, teacher, text),
        "library": code_hash(Path(__file__).read_text(encoding="utf-8")),
    }
    loss_of = distillation_loss(teacher, settings.alpha, settings.temperature)
    with _trained(student, settings) as trained:
        opts = in_shards(trained, training.optimizers(trained, settings))
        _check_shards(trained, settings)
        on_cpu = [model for model in (student, teacher) if model is not None and model.device.type == "cpu"]
        tokens_seen = _resume(folder, trained, opts, run)

        def prepare(model, opts, tokens_seen):
            return model, opts, _micro_batches(train_batches, tokens_seen, settings, micro_tokens, student.device)

        try:
            with attention_implementation("blocked", *on_cpu):
                training.descend(trained, opts, tokens_seen, settings, folder, prepare, loss_of, checkpoint_s)
        except FloatingPointError as error:
            rates = f"distillation.adamw_lr from {settings.adamw_lr}"
            rates = f"distillation.muon_lr from {settings.muon_lr} or {rates}" if settings.muon_lr else rates
            raise InputError(f"the loss or its gradient is not finite: lower {rates}") from error
        finally:  # what stands in the folder is what the student is, whatever ended the run
            training.load_checkpoint(folder, trained, opts)
            trained.zero_grad(set_to_none=True)
    return pd.read_json(folder / "log.jsonl", lines=True).reindex(columns=COLUMNS)


def distillation_loss(teacher: nn.Module | None, alpha: float, temperature: float) -> Callable:
    """The loss above as (model, batch) → `loss` and its terms, means over the batch's predicted tokens."""

    def loss_of(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        inputs = as_inputs(batch)
        labels = inputs["labels"][:, 1:]
        predicted = labels != NO_LABEL
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1][predicted].float()
        terms = {"cross_entropy": (1 - alpha, cross_entropy(logits, labels[predicted]))}
        if alpha:
            with torch.no_grad():
                target = teacher(input_ids=inputs["input_ids"].to(teacher.device), use_cache=False).logits
            target = target[:, :-1].to(logits.device)[predicted].float()
            terms["kl"] = (alpha, temperature**2 * kl_divergence(logits / temperature, target / temperature).mean())
        loss = sum(weight * term for weight, term in terms.values() if weight)
        return {"loss": loss, **{name: term for name, (_, term) in terms.items()}}

    return loss_of


def rows_at(windows: torch.Tensor, tokens_seen: int, batch_tokens: int, seed: int) -> torch.Tensor:
    """The windows [rows, length] that belong to a position in the run; each pass over [count, length] is shuffled
    anew."""
    count, length = windows.shape
    first, rows = tokens_seen // length, max(1, batch_tokens // length)
    orders = [
        torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1000 + epoch))
        for epoch in range(first // count, (first + rows - 1) // count + 1)
    ]
    return windows[torch.cat(orders)[first % count :][:rows]]


def instruction_batches(
    rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int, seed: int = 0
) -> Callable[[int], Batch]:
    """Batches of `prompt` / `completion` rows for `distill`: shuffled once, labels on completion and end of text only.

    Raises:
        InputError: no row has a prompt of less than `max_length` tokens.
    """
    found = examples(rows, tokenizer, max_length)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).split(batch_size)
    batches = [_pad([found[i] for i in numbers]) for numbers in order]
    ends = list(itertools.accumulate(map(training.num_tokens_of, batches)))
    return lambda tokens_seen: batches[bisect.bisect_right(ends, tokens_seen % ends[-1])]


def _pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of unequal length in one batch, filled on the right with what no loss and no token count sees."""
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    filling = {"input_ids": 0, "labels": NO_LABEL, "attention_mask": 0}
    return {key: pad_sequence([torch.tensor(row[key]) for row in rows], True, value) for key, value in filling.items()}


def prune_and_recover(
    model: nn.Module,
    cut: Callable[[nn.Module, int], None],
    train_batches: Batches,
    settings: Distillation,
    steps: int,
    teacher: nn.Module,
    folder: Path,
) -> pd.DataFrame:
    """Prune a model in place in `steps` cuts, each followed by its share of the distillation.

    Args:
        cut: prunes the model so far in place, given the number of the step, 1 … steps.
        folder: each step's state goes to a folder of its own in it; a killed run goes on from there.

    Returns:
        The steps' logs, one after the other, with their number as `step`.
    """
    logs = []
    for step in range(1, steps + 1):
        cut(model, step)
        share = dataclasses.replace(settings, num_tokens=settings.num_tokens // steps, seed=settings.seed + step - 1)
        logs.append(distill(model, teacher, train_batches, share, folder / f"step-{step}").assign(step=step))
    return pd.concat(logs, ignore_index=True)


def _check(student: nn.Module, teacher: nn.Module | None, train_batches: Batches, settings: Distillation) -> None:
    if settings.alpha and teacher is None:
        raise InputError(f"distillation.alpha = {settings.alpha} needs a teacher: give the dense model, or alpha 0")
    if teacher is not None and teacher.config.vocab_size != student.config.vocab_size:
        sizes = f"{teacher.config.vocab_size} tokens, the student's {student.config.vocab_size}"
        raise InputError(f"the teacher's vocabulary has {sizes}: give the dense model that the student was cut from")
    if isinstance(train_batches, torch.Tensor) and (train_batches.ndim != 2 or len(train_batches) == 0):
        raise InputError(
            f"the text to learn from has shape {list(train_batches.shape)}: give token ids [count, length]"
        )


def _check_shards(student: nn.Module, settings: Distillation) -> None:
    """torch cannot orthogonalise what some processes have no row of."""
    size = rank_and_size()[1]
    rows = min(
        p.shape[0] for name, p in student.named_parameters() if p.requires_grad and ".layers." in name and p.ndim == 2
    )
    if is_in_shards(student) and settings.muon_lr and rows < size:
        fewer = f"start at most {rows} processes, or set distillation.muon_lr=0"
        raise InputError(f"Muon cannot work on a matrix of {rows} rows in {size} shards: {fewer}")


@contextmanager
def _trained(student: nn.Module, settings: Distillation) -> Iterator[nn.Module]:
    """What the optimisers see: the student with all its weights, or an adapter that is merged into it at the end."""
    student.requires_grad_(True)
    if not settings.lora_r:
        yield student
        return
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft's, about transformers
        torch.manual_seed(settings.seed)
        adapted = get_peft_model(student, lora_config(settings.lora_r, settings.lora_alpha))
    try:
        yield adapted
    finally:
        if not is_in_shards(adapted):
            merge(adapted)
            student.requires_grad_(True)


def trained_student(student: nn.Module, settings: Distillation, folder: Path) -> nn.Module:
    """A student as it came to `distill`, changed in place to what the run in `folder` made of it, its adapter
    merged."""
    with _trained(student, settings) as trained:
        training.load_checkpoint(folder, trained, [])
    return student


def _resume(folder: Path, model: nn.Module, opts: list[torch.optim.Optimizer], run: dict) -> int:
    """Tokens seen by the run that `folder` holds, its state loaded; a run that is described otherwise is dropped and
    begun anew."""
    if rank_and_size()[0] == 0:
        _forget_others(folder, json.dumps(run, indent=1))
    wait_for_all()
    is_new = not (folder / "state.json").exists()
    wait_for_all()  # until all have looked
    if is_new:
        training.save_checkpoint(folder, model, opts, 0)
    return training.load_checkpoint(folder, model, opts)


def _forget_others(folder: Path, description: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "run.json").exists() or (folder / "run.json").read_text() != description:
        for stale in ("state.json", "log.jsonl"):
            (folder / stale).unlink(missing_ok=True)
        (folder / "run.json").write_text(description)


def _micro_batches(
    train_batches: Batches, tokens_seen: int, settings: Distillation, micro_tokens: int, device
) -> list[dict]:
    if isinstance(train_batches, torch.Tensor):
        batch = rows_at(train_batches, tokens_seen, settings.batch_tokens, settings.seed)
    else:
        batch = train_batches(tokens_seen)
    inputs = {name: tensor.to(device) for name, tensor in as_inputs(batch).items()}
    count, length = inputs["input_ids"].shape
    rows = max(1, min(micro_tokens // length, math.ceil(count / rank_and_size()[1])))  # no process goes without
    parts = [tensor.split(rows) for tensor in inputs.values()]
    return [dict(zip(inputs, part, strict=True)) for part in zip(*parts, strict=True)]


def recover(source: str, preset: Preset, out: Path, seed: int = 0) -> None:
    """Teach a pruned model with the logits of a preset's model, its text and `distillation`, and save the result,
    whole or not at all.

    In several processes every one calls it; the main one writes. The training lives in a folder beside `out` until
    then, so the same call goes on where a killed run was saved.

    Args:
        source: a pruned model's folder.

    Raises:
        InputError: `out` is there, its parent is not, a model cannot be had, too little memory (one process only), or
        as `distill`.
    """
    settings = dataclasses.replace(preset.distillation, seed=preset.distillation.seed + seed)
    if not settings.num_tokens:
        raise InputError("distillation.num_tokens is 0, so there is nothing to learn: give a number of tokens")
    folder, save = into_folder(out)
    several = is_one_of_several()
    device, dtype = (
        "cpu" if several else preset.device,
        preset.dtype if settings.lora_r else "float32",
    )  # peft's adapter is float32
    # before the processes know each other: for FSDP, transformers would read the weights in one of them only
    student, teacher = load_model(source, dtype, device), load_model(preset.model, preset.dtype, device)
    tokenizer = load_tokenizer(source)
    length = min(preset.frontier.calibration.length, student.config.max_position_embeddings)
    text = training_windows(preset.corpus, tokenizer, length, settings.num_tokens)
    with (
        processes(resolve_device(preset.device)) as place,
        nullcontext() if several else _stage(student, teacher, length, settings),
    ):
        is_main = rank_and_size()[0] == 0
        log = distill(student, to_device(teacher, place) if several else teacher, text, settings, folder)
    if is_main:
        trained = trained_student(load_model(source, dtype, "cpu"), settings, folder)
        save(trained.to(getattr(torch, preset.dtype)), tokenizer)
        print(summary(log))


def _stage(student: nn.Module, teacher: nn.Module, length: int, settings: Distillation) -> AbstractContextManager:
    """Both models are there already."""
    rows = max(1, min(settings.batch_tokens, MICRO_TOKENS) // length)
    terms = memory.expected("distillation", student, rows, length, settings=settings)
    terms["weights"] += weight_bytes(teacher)
    knob = "lower distillation.batch_tokens, or take more cards (see README)"
    return memory.stage("distillation", terms, student, knob)
