"""Recovery by the dense model's logits: all weights or a LoRA adapter, alone or mixed with the language-model loss.

    loss = alpha · T² · KL(teacher || student) + (1 − alpha) · cross entropy          [nats per predicted token]

with both distributions softened by the temperature T in the first term (Hinton, Vinyals & Dean 2015; T² keeps the size
of the gradients). transformers' Trainer trains; ours are the loss, the optimiser and the order of the text.

`recover` does it from folder to folder, which is `python -m gqalib distill`: alone, under `torchrun` or under
`accelerate launch`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainingArguments

from gqalib.device import in_bf16, is_one_of_several
from gqalib.errors import InputError
from gqalib.measure import memory
from gqalib.measure.cost import weight_bytes
from gqalib.model.attention import attention_implementation
from gqalib.model.load import load_model, load_tokenizer, resolve_device
from gqalib.model.names import NO_LABEL
from gqalib.recover import trainer
from gqalib.recover.optimizer import MuonAdamW, rate_at
from gqalib.run.corpora import training_windows
from gqalib.run.presets import Distillation, Preset
from gqalib.run.resume import digest

COLUMNS = ["tokens", "loss", "kl", "cross_entropy", "learning_rate", "seconds"]
AT_ONCE = {"cpu": 2048, "cuda": 32_768}  # tokens that go through student and teacher together
PIECE = {"cpu": 2**17, "cuda": 2**26}  # logits of a piece of the divergence: what caches like, and what fills a card
Rows = torch.Tensor | Sequence[dict[str, list[int]]]


def distill(
    student: nn.Module, teacher: nn.Module | None, rows: Rows, settings: Distillation, folder: Path,
    micro_tokens: int | None = None, callbacks: Sequence[TrainerCallback] = (),
) -> pd.DataFrame:  # fmt: skip
    """Teach a pruned model, in place, until `settings.num_tokens` are seen (the last step is a whole one).

    With `lora_r` only an adapter is trained, and merged at the end, so the student is a plain model again. To train all
    weights, load the student in float32: bfloat16 rounds small steps away. The teacher may well be in bfloat16. State
    and several processes: see `trainer`; after several the student is of no use, what was trained is in `folder`.

    Args:
        teacher: the dense model, which never changes; on any device; it may be None where `alpha` is 0.
        rows: token ids [count, length], or `input_ids` and `labels` (see `instructions.examples`); where a label is
            −100 (a prompt) neither loss is taken. Shuffled anew for each pass. As many go into a step as
            `settings.batch_tokens` holds of the longest.
        micro_tokens: how many go through the models at once (default: `AT_ONCE`).
        callbacks: for Trainer; what they add to the log comes back as columns.

    Returns:
        One row per optimiser step: `tokens` seen, `loss`, its terms `kl` (with T²; none at alpha 0) and
        `cross_entropy`, `learning_rate` (Muon's if it runs), `seconds`.

    Raises:
        InputError: a teacher is missing or has another vocabulary, there is no text, the processes cannot share a
            step's rows, or the loss or its gradient became infinite or NaN; then the student is of no use, and the
            last checkpoint is from before.
    """
    _check(student, teacher, rows, settings)
    if settings.num_tokens == 0:
        return pd.DataFrame(columns=COLUMNS, dtype=float)
    lessons = Lessons.of(rows, settings)
    args = _arguments(lessons, settings, folder, student.device, micro_tokens)
    start = digest(student, teacher, _batch(lessons.rows.dataset))
    state = trainer.progress(folder, args, "distill", settings, start=start)
    on_cpu = [model for model in (student, teacher) if model is not None and args.device.type == "cpu"]
    narrow_heads = attention_implementation("blocked", *on_cpu)
    with narrow_heads, trainer.quiet(student.config), _trained(student, settings) as trained:
        weights, log = trainer.result(Distiller(trained, teacher, lessons, settings, args, callbacks), state)
        if not is_one_of_several():
            trainer.put(weights, trained)
    log = pd.DataFrame([{**entry, "tokens": lessons.tokens_seen[entry["step"]]} for entry in log])
    more = [name for name in log if name not in (*COLUMNS, "step", "epoch", "grad_norm")]
    return log.reindex(columns=COLUMNS + more)


# ---------------------------------------------------------------- what is learned from, and in which order


@dataclasses.dataclass
class Lessons:
    """All rows of a run, one after the other, as they go into its steps."""

    rows: Subset
    per_step: int  # rows
    length: int  # tokens of the longest row
    tokens_seen: list[int]  # before the first step, and after each

    @classmethod
    def of(cls, rows: Rows, settings: Distillation) -> "Lessons":
        """Each pass over the rows is shuffled anew; a step may take its rows from two passes."""
        if isinstance(rows, torch.Tensor):
            rows = [{"input_ids": row, "labels": row} for row in rows]
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        per_step = max(1, settings.batch_tokens // int(lengths.max()))
        passes = settings.num_tokens // int(lengths.sum()) + per_step // len(lengths) + 2
        seeds = (torch.Generator().manual_seed(settings.seed * 1000 + number) for number in range(passes))
        order = torch.cat([torch.randperm(len(lengths), generator=seed) for seed in seeds])
        seen = lengths[order].cumsum(0)[per_step - 1 :: per_step]
        seen = [0, *seen[: int((seen < settings.num_tokens).sum()) + 1].tolist()]
        return cls(Subset(rows, order[: per_step * (len(seen) - 1)].tolist()), per_step, int(lengths.max()), seen)


def _batch(rows: Sequence[dict[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels` [rows, length], filled on the right with what no loss sees; the first token of a row has
    no label, because nothing predicts it."""
    filling = {"input_ids": 0, "labels": NO_LABEL}.items()
    batch = {key: pad_sequence([torch.as_tensor(row[key]) for row in rows], True, value) for key, value in filling}
    batch["labels"][:, 0] = NO_LABEL
    return batch


def at_once(settings: Distillation, length: int, device: torch.device, most: int | None = None) -> tuple[int, int]:
    """Rows of this length that go through the models together, and their length: what memory is needed for."""
    most = most or AT_ONCE.get(device.type, AT_ONCE["cuda"])
    return max(1, min(settings.batch_tokens, most) // length), length


def _arguments(
    lessons: Lessons, settings: Distillation, folder: Path, device: torch.device, micro_tokens: int | None
) -> TrainingArguments:
    args = trainer.arguments(
        folder, device, seed=settings.seed, max_steps=len(lessons.tokens_seen) - 1, remove_unused_columns=False,
        train_sampling_strategy="sequential", ddp_find_unused_parameters=False,
    )  # fmt: skip
    each = trainer.shared(lessons.per_step, args.world_size, "the rows of a step (distillation.batch_tokens / length)")
    most = at_once(settings, lessons.length, args.device, micro_tokens)[0]
    args.per_device_train_batch_size = max(rows for rows in range(1, min(each, most) + 1) if each % rows == 0)
    args.gradient_accumulation_steps = each // args.per_device_train_batch_size
    return args


# ---------------------------------------------------------------- the loss


class Distiller(Trainer):
    """Trainer with the loss above, Muon and AdamW, and rates by tokens seen."""

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the predicted tokens of a whole step

    def __init__(self, student, teacher, lessons: Lessons, settings: Distillation, args, callbacks=()):
        muon = f"distillation.muon_lr from {settings.muon_lr} or " if settings.muon_lr else ""
        watch = trainer.Watch(f"{muon}distillation.adamw_lr from {settings.adamw_lr}")
        super().__init__(student, args, _batch, lessons.rows, callbacks=[watch, *callbacks])
        self.model_accepts_loss_kwargs = True  # so that those tokens are counted, over all processes
        self.teacher = teacher.to(args.device) if teacher is not None and args.world_size > 1 else teacher
        self.settings, self.lessons = settings, lessons
        self.terms = torch.zeros(2, device=args.device)
        _check_shards(self)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        s = self.settings
        self.optimizer = MuonAdamW(self.model, s.muon_lr, s.adamw_lr, s.weight_decay, s.muon_rounds)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        rates = [rate_at(self.settings, tokens) for tokens in self.lessons.tokens_seen]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rates[step])
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        s, ids, labels = self.settings, inputs["input_ids"], inputs["labels"]
        at = pad(labels[:, 1:] != NO_LABEL, (0, 1))  # the tokens that predict one with a label
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=in_bf16(s.dtype, ids.device)):
            logits, target = logits_at(model, self.model, ids, at), None
            if s.alpha:
                with torch.no_grad():
                    target = logits_at(self.teacher, self.teacher, ids.to(self.teacher.device), at).to(ids.device)
        scale = self.accelerator.num_processes / num_items_in_batch.item()
        loss, terms = Divergence.apply(logits, target, labels[:, 1:][at[:, :-1]], s.alpha, s.temperature, scale)
        self.terms += terms
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            kl, logs["cross_entropy"] = self.accelerator.reduce(self.terms, "mean").tolist()
            logs |= {"kl": kl} if self.settings.alpha else {}
            self.terms.zero_()
        super().log(logs, start_time)


def logits_at(model: nn.Module, inner: nn.Module, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocabulary] of the n tokens that `at` [rows, length] marks; lm_head reads no others.

    Args:
        inner: the model without what a launcher has wrapped it in.
    """

    def chosen(head: nn.Module, hidden_states: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (hidden_states[0][at.to(hidden_states[0].device)],)

    with inner.get_output_embeddings().register_forward_pre_hook(chosen):
        return model(input_ids=ids, use_cache=False).logits


class Divergence(torch.autograd.Function):
    """The loss above and its terms, a few tokens at a time in float32; the gradient is found on the way.

    What stays for the backward pass is the gradient, in the logits' own memory and dtype: nobody reads those again.
    """

    @staticmethod
    def forward(ctx, logits, target, labels, alpha: float, temperature: float, scale: float):
        """Sums over tokens, times `scale`.

        Args:
            logits, target: of student and teacher [tokens, vocabulary]; labels: [tokens].

        Returns:
            The loss, and its terms [2]: KL with T², cross entropy.
        """
        terms, ctx.gradient = torch.zeros(2, device=logits.device), logits.detach()
        rows = max(1, PIECE.get(logits.device.type, PIECE["cuda"]) // logits.shape[-1])
        pieces = (tensor.split(rows) for tensor in (ctx.gradient, logits if target is None else target, labels))
        for z, t, y in zip(*pieces, strict=True):
            terms += scale * _piece(z, t, y, alpha, temperature, scale)
        ctx.mark_non_differentiable(terms)
        return alpha * terms[0] + (1 - alpha) * terms[1], terms

    @staticmethod
    def backward(ctx, loss_gradient, _):
        return ctx.gradient.mul_(loss_gradient), None, None, None, None, None


def _piece(z, t, y, alpha: float, temperature: float, scale: float) -> torch.Tensor:
    """The terms of a few tokens; logits `z` become their gradient.

    Where student and teacher agree the gradient is exactly zero; Muon and Adam would blow a rounding error up to a
    whole step.
    """
    student, kl, gradient = z.float(), z.new_zeros((), dtype=torch.float32), None
    q, log_sum = _softmax(student)
    cross_entropy = (log_sum - student.gather(1, y[:, None])[:, 0]).sum()
    if alpha:
        if temperature != 1:
            student = student / temperature
        q_soft, log_sum = (q, log_sum) if temperature == 1 else _softmax(student)
        teacher = t.float() / temperature
        p, log_sum_p = _softmax(teacher)
        kl = temperature**2 * (torch.linalg.vecdot(p, teacher.sub_(student)) - log_sum_p + log_sum).sum()
        gradient = torch.sub(q_soft, p, out=p).mul_(scale * alpha * temperature)
    if alpha < 1:
        q[torch.arange(len(y), device=y.device), y] -= 1
        gradient = q.mul_(scale * (1 - alpha)).add_(0 if gradient is None else gradient)
    z.copy_(gradient)
    return torch.stack([kl, cross_entropy])


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, and the logarithm of the sum that normalises them, from the largest of each: one exponential."""
    probabilities = logits.softmax(-1)
    return probabilities, logits.amax(-1) - probabilities.amax(-1).log()


# ---------------------------------------------------------------- around it


def prune_and_recover(
    model: nn.Module, cut: Callable[[nn.Module, int], None], rows: Rows, settings: Distillation, steps: int,
    teacher: nn.Module, folder: Path,
) -> pd.DataFrame:  # fmt: skip
    """Prune a model in place in `steps` cuts, each followed by its share of the distillation, on its share of the rows.

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
        own = rows[step - 1 :: steps] if len(rows) >= steps else rows
        logs.append(distill(model, teacher, own, share, folder / f"step-{step}").assign(step=step))
    return pd.concat(logs, ignore_index=True)


def _check(student: nn.Module, teacher: nn.Module | None, rows: Rows, settings: Distillation) -> None:
    if settings.alpha and teacher is None:
        raise InputError(f"distillation.alpha = {settings.alpha} needs a teacher: give the dense model, or alpha 0")
    if teacher is not None and teacher.config.vocab_size != student.config.vocab_size:
        sizes = f"{teacher.config.vocab_size} tokens, the student's {student.config.vocab_size}"
        raise InputError(f"the teacher's vocabulary has {sizes}: give the dense model that the student was cut from")
    if isinstance(rows, torch.Tensor) and (rows.ndim != 2 or len(rows) == 0 or rows.shape[1] < 2):
        shape = list(rows.shape)
        raise InputError(f"the text to learn from has shape {shape}: give token ids [count, length], length at least 2")
    if not isinstance(rows, torch.Tensor) and not (rows and all({*row["labels"][1:]} - {NO_LABEL} for row in rows)):
        raise InputError("there are no rows, or one has no label after its first token: give rows with answers")


def _check_shards(distiller: Distiller) -> None:
    """torch cannot orthogonalise what some processes have no row of."""
    size, named = distiller.args.world_size, distiller.model.named_parameters()
    rows = min(p.shape[0] for name, p in named if p.requires_grad and ".layers." in name and p.ndim == 2)
    if distiller.is_fsdp_enabled and distiller.settings.muon_lr and rows < size:
        fewer = f"start at most {rows} processes, or set distillation.muon_lr=0"
        raise InputError(f"Muon cannot work on a matrix of {rows} rows in {size} shards: {fewer}")


@contextmanager
def _trained(student: nn.Module, settings: Distillation) -> Iterator[nn.Module]:
    """What the optimiser sees: the student with all its weights, or an adapter that is merged into it at the end."""
    model = trainer.adapted(student.requires_grad_(True), settings.lora_r, settings.lora_alpha, settings.seed)
    try:
        yield model
    finally:
        if not is_one_of_several():
            trainer.merge(model)
        student.requires_grad_(True).eval()
        student.zero_grad(set_to_none=True)


def load_teacher(preset: Preset, device: str, dense: nn.Module | None = None) -> nn.Module:
    """A preset's model as it teaches: in bfloat16 where a training's products are, which is faster and half as large.

    Args:
        dense: that model, if it is there already; it is returned where its dtype will do.
    """
    narrow = in_bf16(preset.distillation.dtype, torch.device(resolve_device(device)))
    dtype = "bfloat16" if narrow else preset.dtype
    there = dense is not None and dense.dtype == getattr(torch, dtype)
    return dense if there else load_model(preset.model, dtype, device)


def recover(source: str, preset: Preset, out: Path, seed: int = 0) -> None:
    """Teach a pruned model with the logits of a preset's model, its text and `distillation`, and save the result,
    whole or not at all.

    State and several processes: see `trainer`.

    Args:
        source: a pruned model's folder.

    Raises:
        InputError: `out` is there or being made, its parent is not, a model cannot be had, too little memory (one
            process only), or as `distill`.
    """
    settings = dataclasses.replace(preset.distillation, seed=preset.distillation.seed + seed)
    if not settings.num_tokens:
        raise InputError("distillation.num_tokens is 0, so there is nothing to learn: give a number of tokens")
    with trainer.alone_at(out) as folder:
        several = is_one_of_several()  # then the trainer places the models, as the launcher's settings say
        device, dtype = "cpu" if several else preset.device, preset.dtype if settings.lora_r else "float32"
        student, teacher = load_model(source, dtype, device), load_teacher(preset, device)
        tokenizer = load_tokenizer(source)
        length = min(preset.frontier.calibration.length, student.config.max_position_embeddings)
        text = training_windows(preset.corpus, tokenizer, length, settings.num_tokens)
        terms = memory.expected("distillation", student, *at_once(settings, length, student.device), settings=settings)
        terms["weights"] += weight_bytes(teacher)  # both models are there already
        knob = "lower distillation.batch_tokens, or take more cards (see README)"
        with nullcontext() if several else memory.stage("distillation", terms, student, knob):
            log = distill(student, teacher, text, settings, folder)
        trainer.finish(out, source, settings, log, dtype, preset.dtype)
