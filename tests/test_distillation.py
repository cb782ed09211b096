"""Distillation: the loss by hand, what is trained and what never is, and that an interruption changes nothing."""

import dataclasses
import json
import warnings

import pytest
import torch
from conftest import small_model
from safetensors import safe_open
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy

from gqalib import InputError
from gqalib.measure.perplexity import kl_divergence
from gqalib.model import load, shapes, surgery
from gqalib.prune import founding, plans
from gqalib.recover.distill import COLUMNS, distill, distillation_loss, instruction_batches, prune_and_recover, rows_at
from gqalib.reference import training
from gqalib.run.presets import Distillation

FULL = Distillation(num_tokens=600, batch_tokens=60, muon_lr=0.02, adamw_lr=1e-3, warmup_steps=1)
ADAMW = dataclasses.replace(FULL, muon_lr=0.0, adamw_lr=3e-3)
LORA = dataclasses.replace(ADAMW, adamw_lr=1e-2, lora_r=2, lora_alpha=4)


@pytest.fixture
def teacher(model, clone):
    return clone(model)


@pytest.fixture
def student(model, teacher):
    surgery.keep_groups(model, 0, [0])
    surgery.keep_channels(model, 1, range(12))
    return model


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def killed_at(count, monkeypatch):
    step, calls = training.step, iter(range(1000))

    def killed(*arguments):
        if next(calls) == count:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(training, "step", killed)


# ---------------------------------------------------------------- the loss


@pytest.fixture
def logits():
    return torch.randn(2, 7, 61, generator=torch.Generator().manual_seed(0)) * 3


def test_kl_is_the_definition(logits):
    p, q = logits[1].double().softmax(-1), logits[0].double().softmax(-1)
    assert torch.allclose(kl_divergence(*logits).double(), (p * (p / q).log()).sum(-1), atol=1e-5)


def test_gradient_at_temperature_one_is_that_of_soft_labels(logits):
    first, second = (logits[0].clone().requires_grad_(True) for _ in range(2))
    kl_divergence(first, logits[1]).mean().backward()
    cross_entropy(second, logits[1].softmax(-1)).backward()
    assert torch.allclose(first.grad, second.grad, atol=1e-7) and first.grad.abs().max() > 1e-3


def test_gradient_of_equal_logits_is_exactly_zero(logits):
    equal = logits[0].clone().requires_grad_(True)
    kl = kl_divergence(equal, logits[0])
    kl.sum().backward()
    assert kl.abs().max() == 0 and equal.grad.abs().max() == 0


def test_mixture_by_hand(student, teacher, windows, logits_of):
    labels = windows.clone()
    labels[:, :8] = training.NO_LABEL  # a prompt
    terms = distillation_loss(teacher, alpha=0.3, temperature=2.0)(student, {"input_ids": windows, "labels": labels})
    log_q, log_p = (logits_of(m)[:, 7:-1].double() for m in (student, teacher))
    nll = -log_q.log_softmax(-1).gather(-1, windows[:, 8:, None]).mean()
    soft_q, soft_p = (log_q / 2).log_softmax(-1), (log_p / 2).log_softmax(-1)
    kl = 4 * (soft_p.exp() * (soft_p - soft_q)).sum(-1).mean()
    assert terms["cross_entropy"].item() == pytest.approx(nll.item(), rel=1e-5)
    assert terms["kl"].item() == pytest.approx(kl.item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx((0.3 * kl + 0.7 * nll).item(), rel=1e-5)


def test_alpha_zero_is_the_language_model_loss(student, windows):
    terms = distillation_loss(None, alpha=0.0, temperature=1.0)(student, windows)
    assert terms.keys() == {"loss", "cross_entropy"}
    assert terms["loss"].item() == pytest.approx(
        training.language_model_loss(student, windows)["loss"].item(), rel=1e-6
    )


def test_micro_batches_are_weighted_by_their_labels(student, teacher, windows, clone, tmp_path):
    labels = windows.clone()
    labels[0, 3:] = labels[4, 9:] = training.NO_LABEL
    one_step = dataclasses.replace(FULL, num_tokens=1)
    losses = [
        distill(
            clone(student),
            teacher,
            lambda _: {"input_ids": windows, "labels": labels},
            one_step,
            tmp_path / f"{micro}",
            micro,
        )["loss"][0]
        for micro in (20, 120)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # products in bf16
    unweighted = sum(distillation_loss(teacher, 1.0, 1.0)(student, w[None])["loss"].item() for w in windows) / 6
    assert abs(unweighted - losses[1]) > 5e-3 * losses[1]


def test_padding_on_the_right_changes_nothing(student, teacher, windows, clone, tmp_path):
    padded = {"input_ids": torch.cat([windows, torch.zeros(6, 5, dtype=torch.long)], 1)}
    padded["attention_mask"] = (padded["input_ids"] > 0).long()
    padded["labels"] = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, training.NO_LABEL)
    settings = dataclasses.replace(ADAMW, num_tokens=120, alpha=0.5)
    plain = distill(clone(student), teacher, lambda _: windows, settings, tmp_path / "plain")
    log = distill(student, teacher, lambda _: padded, settings, tmp_path / "padded")
    assert log["tokens"].tolist() == plain["tokens"].tolist() == [120]
    assert log["loss"].tolist() == pytest.approx(plain["loss"].tolist(), rel=2e-3)


# ---------------------------------------------------------------- what is trained


def test_zero_tokens_is_the_identity(student, teacher, windows, tmp_path):
    before = weights(student)
    log = distill(student, teacher, windows, dataclasses.replace(FULL, num_tokens=0), tmp_path)
    assert same(weights(student), before) and len(log) == 0 and list(log.columns) == COLUMNS


@pytest.mark.parametrize("settings", [FULL, ADAMW, LORA], ids=["muon", "adamw", "lora"])
def test_a_student_that_is_its_teacher_stays(model, teacher, windows, settings, tmp_path):
    log = distill(model, teacher, windows, settings, tmp_path)
    assert len(log) == 10 and log["kl"].abs().max() == 0 and log["cross_entropy"].min() > 1
    for name, tensor in weights(model).items():
        assert torch.allclose(tensor, teacher.state_dict()[name], atol=1e-7), name


@pytest.mark.parametrize("settings", [FULL, ADAMW, LORA], ids=["muon", "adamw", "lora"])
def test_kl_falls_and_the_teacher_stays(student, teacher, windows, logits_of, settings, tmp_path):
    teacher.requires_grad_(False)
    before, target = weights(teacher), logits_of(teacher).log_softmax(-1)
    start = kl_divergence(logits_of(student), target).mean()
    log = distill(student, teacher, windows, dataclasses.replace(settings, num_tokens=2400), tmp_path)
    assert kl_divergence(logits_of(student), target).mean() < 0.75 * start
    assert log["kl"].iloc[0] == pytest.approx(start.item(), rel=0.3) and len(log) == 40
    assert log["tokens"].iloc[-1] == 2400 and log["learning_rate"].iloc[-1] < 0.1 * log["learning_rate"].iloc[0]
    assert same(weights(teacher), before) and not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for m in (student, teacher) for p in m.parameters())
    assert {m.config._attn_implementation for m in (student, teacher)} == {"sdpa"}


def test_all_weights_are_trained(student, teacher, windows, tmp_path):
    before = weights(student)
    student.requires_grad_(False)  # as scoring leaves it
    distill(student, teacher, windows, FULL, tmp_path)
    assert not [name for name, tensor in weights(student).items() if torch.equal(tensor, before[name])]


def test_lora_trains_an_adapter_and_merges_it(student, teacher, windows, logits_of, tmp_path):
    before = weights(student)
    distill(student, teacher, windows, LORA, tmp_path / "run")
    after = weights(student)
    assert type(student).__name__ == "GqaLlamaForCausalLM" and after.keys() == before.keys()
    for name, tensor in after.items():
        if "_proj" in name:
            assert torch.linalg.matrix_rank((tensor - before[name]).double(), rtol=1e-4) == LORA.lora_r, name
        else:
            assert torch.equal(tensor, before[name]), name
    checkpoint = json.loads((tmp_path / "run" / "state.json").read_text())["checkpoint"]
    with safe_open(tmp_path / "run" / checkpoint / "model.safetensors", "pt") as file:
        assert all("lora_" in key for key in file.keys())  # noqa: SIM118 (no mapping)
    student.save_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(load.load_model(tmp_path / "model", device="cpu")), logits_of(student))


# ---------------------------------------------------------------- interruptions and errors


def test_an_adapter_warns_of_nothing(student, teacher, windows, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        distill(student, teacher, windows, dataclasses.replace(LORA, num_tokens=60), tmp_path)


@pytest.mark.parametrize("settings", [FULL, LORA], ids=["muon", "lora"])
def test_interrupted_equals_uninterrupted(student, teacher, windows, clone, settings, tmp_path, monkeypatch):
    start, whole = clone(student), clone(student)
    expected = distill(whole, teacher, windows, settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_at(7, patch)
        with pytest.raises(KeyboardInterrupt):
            distill(student, teacher, windows, settings, tmp_path / "killed", checkpoint_s=0)
    assert weights(student).keys() == weights(whole).keys() and not same(weights(student), weights(whole))
    (tmp_path / "killed" / "log.jsonl").open("a").write('{"tokens": 480, "lo')  # a line that the kill cut short
    resumed, steps = clone(start), []
    monkeypatch.setattr(training, "step", lambda *a, step=training.step: steps.append(a) or step(*a))
    log = distill(resumed, teacher, windows, settings, tmp_path / "killed")
    assert len(steps) == 3 and same(weights(resumed), weights(whole))
    assert log.drop(columns="seconds").equals(expected.drop(columns="seconds"))
    again = clone(start)
    distill(again, teacher, windows, settings, tmp_path / "killed")
    assert len(steps) == 3 and same(weights(again), weights(whole))  # complete: nothing more is done


def test_another_run_begins_anew(student, teacher, windows, clone, tmp_path):
    other = clone(student)
    distill(clone(student), teacher, windows, FULL, tmp_path / "first")
    other.model.norm.weight.data.mul_(1.1)
    fresh = clone(other)
    assert len(distill(other, teacher, windows, FULL, tmp_path / "first")) == 10
    distill(fresh, teacher, windows, FULL, tmp_path / "second")
    assert same(weights(other), weights(fresh))


@pytest.mark.parametrize("settings", [FULL, ADAMW, LORA], ids=["muon", "adamw", "lora"])
@pytest.mark.parametrize("checkpoint_s", [0, 300])
def test_a_loss_that_is_not_finite(student, teacher, windows, settings, checkpoint_s, tmp_path):
    start, at_checkpoint = weights(student), {}

    def batches(tokens_seen):
        if tokens_seen == 180:
            at_checkpoint.update(weights(student))
            teacher.model.norm.weight.data.fill_(float("nan"))
        return rows_at(windows, tokens_seen, settings.batch_tokens, settings.seed)

    knob = (
        "muon_lr from 0.02 or distillation.adamw_lr from 0.001"
        if settings.muon_lr
        else f"adamw_lr from {settings.adamw_lr}"
    )
    with pytest.raises(InputError, match=f"not finite: lower distillation.{knob}"):
        distill(student, teacher, batches, settings, tmp_path, checkpoint_s=checkpoint_s)
    if checkpoint_s:
        assert same(weights(student), start)
    elif not settings.lora_r:
        assert same(weights(student), at_checkpoint) and not same(weights(student), start)
    else:  # merged: changed in the layers, but whole
        assert weights(student).keys() == start.keys() and not same(weights(student), start)


def test_a_learning_rate_far_too_high(student, teacher, windows, tmp_path):
    start = weights(student)
    with pytest.raises(InputError, match="lower distillation.muon_lr from 1e\\+30"):
        distill(student, teacher, windows, dataclasses.replace(FULL, muon_lr=1e30), tmp_path)
    assert same(weights(student), start) and all(p.grad is None for p in student.parameters())


def test_impossible_input(student, windows, clone, tmp_path):
    start = weights(student)
    with pytest.raises(InputError, match="alpha = 1.0 needs a teacher"):
        distill(student, None, windows, FULL, tmp_path)
    with pytest.raises(InputError, match="vocabulary has 50 tokens, the student's 61"):
        distill(student, small_model(vocab_size=50), windows, FULL, tmp_path)
    with pytest.raises(InputError, match=r"has shape \[0, 20\]"):
        distill(student, clone(student), windows[:0], FULL, tmp_path)
    with pytest.raises(InputError, match="no token to learn from"):
        distill(student, clone(student), windows[:, :1], FULL, tmp_path)
    assert same(weights(student), start)


# ---------------------------------------------------------------- batches and steps


def test_rows_cover_a_pass_once_and_then_differ():
    windows = torch.arange(7 * 4).view(7, 4)
    rows = torch.cat([rows_at(windows, seen, 12, 0) for seen in range(0, 7 * 4 * 3, 12)])
    passes = rows[:, 0].view(3, 7)
    assert (passes.sort(1).values == windows[:, 0]).all() and not torch.equal(passes[0], passes[1])
    assert torch.equal(rows_at(windows, 24, 12, 0), rows[6:9]) and len(rows_at(windows, 0, 80, 0)) == 20


ROWS = [
    {"prompt": "w2 w3", "completion": " w4 w5 w6 w7"},
    {"prompt": "w8", "completion": " w9"},
    {"prompt": "w2 w2 w2 w2", "completion": " w9"},
]


def test_instruction_batches(tokenizer):
    batch_at = instruction_batches(ROWS, tokenizer, max_length=6, batch_size=3)
    batch, none = batch_at(0), training.NO_LABEL
    rows = sorted(zip(*(batch[name].tolist() for name in ("input_ids", "labels", "attention_mask")), strict=True))
    assert rows == [
        ([2, 2, 2, 2, 9, 0], [none] * 4 + [9, 0], [1] * 6),
        ([2, 3, 4, 5, 6, 7], [none] * 2 + [4, 5, 6, 7], [1] * 6),
        ([8, 9, 0, 0, 0, 0], [none, 9, 0, none, none, none], [1] * 3 + [0] * 3),
    ]
    assert training.num_tokens_of(batch) == 15
    single = instruction_batches(ROWS, tokenizer, max_length=6, batch_size=1)
    seen = [0]
    while len(seen) < 7:
        seen.append(seen[-1] + training.num_tokens_of(single(seen[-1])))
    assert seen[3] == 15 and seen[6] == 30 and torch.equal(single(seen[1])["input_ids"], single(seen[4])["input_ids"])
    with pytest.raises(InputError, match="within max_length = 1"):
        instruction_batches(ROWS, tokenizer, max_length=1, batch_size=1)


def marked(tokenizer):
    """The same tokenizer, with marks before and after every text that it encodes."""
    marks = TemplateProcessing(single="<u> $A <e>", special_tokens=[("<u>", 1), ("<e>", 0)])
    tokenizer.backend_tokenizer.post_processor = marks
    return tokenizer


def test_an_end_mark_stands_at_the_end_alone(tokenizer):
    batch = instruction_batches(ROWS[:2], marked(tokenizer), max_length=8, batch_size=2)(0)
    none = training.NO_LABEL
    assert sorted(batch["input_ids"].tolist()) == [[1, 2, 3, 4, 5, 6, 7, 0], [1, 8, 9, 0, 0, 0, 0, 0]]
    assert sorted(batch["labels"].tolist()) == [[none] * 3 + [4, 5, 6, 7, 0], [none] * 2 + [9, 0] + [none] * 4]


def test_distils_on_instructions(tokenizer, teacher, student, tmp_path):
    rows = instruction_batches(ROWS, tokenizer, max_length=8, batch_size=2)
    log = distill(student, teacher, rows, dataclasses.replace(LORA, num_tokens=160, alpha=0.5), tmp_path)
    assert log["tokens"].iloc[-1] >= 160 and log["loss"].iloc[-2:].mean() < log["loss"].iloc[:2].mean()


def test_prune_and_recover(model, teacher, windows, logits_of, tmp_path):
    backbone = shapes.count_parameters(model)["backbone"]

    def cut(model, step):
        rate = 1 - (1 - 0.2 * step) / (1 - 0.2 * (step - 1))  # of what is left; 40 % after two steps
        founding.prune(
            model,
            plans.Plan.from_rates(model, torch.full((3,), rate, dtype=torch.float64)),
            windows,
            sequential=False,
        )

    settings = dataclasses.replace(FULL, num_tokens=1200)
    log = prune_and_recover(model, cut, windows, settings, 2, teacher, tmp_path)
    assert log["step"].tolist() == [1] * 10 + [2] * 10
    assert shapes.count_parameters(model)["backbone"] == pytest.approx(0.6 * backbone, rel=0.05)
    one_shot = teacher
    target = logits_of(teacher).log_softmax(-1)
    founding.prune(
        one_shot,
        plans.Plan.from_rates(one_shot, torch.full((3,), 0.4, dtype=torch.float64)),
        windows,
        sequential=False,
    )
    assert kl_divergence(logits_of(model), target).mean() < kl_divergence(logits_of(one_shot), target).mean()
