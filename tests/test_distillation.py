"""Distillation: the loss by hand, what is trained and what never is, and that an interruption changes nothing."""

import dataclasses
import warnings

import pytest
import torch
from conftest import small_model
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gqalib import InputError, device
from gqalib.measure.perplexity import kl_divergence
from gqalib.model import load, shapes, surgery
from gqalib.model.names import NO_LABEL
from gqalib.prune import founding, plans
from gqalib.recover import distill as module
from gqalib.recover import optimizer, trainer
from gqalib.recover.distill import COLUMNS, Distiller, Divergence, Lessons, distill, prune_and_recover
from gqalib.run.instructions import examples
from gqalib.run.presets import Distillation, load_preset

FULL = Distillation(num_tokens=600, batch_tokens=60, muon_lr=0.02, adamw_lr=1e-3, warmup_steps=1)
ADAMW = dataclasses.replace(FULL, muon_lr=0.0, adamw_lr=3e-3)
LORA = dataclasses.replace(ADAMW, adamw_lr=1e-2, lora_r=2, lora_alpha=4)


@pytest.fixture(params=[(4, True), (2, False)], ids=["2:1-tied", "4:1"])
def model(request):
    return small_model(num_key_value_heads=request.param[0], tie_word_embeddings=request.param[1])


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


def steps_of(monkeypatch, killed_at=None):
    """The micro-batches that are trained on, with one row in each step of these tests; a kill before one of them."""
    trained, step = [], Distiller.training_step

    def noted(self, *arguments, **options):
        if len(trained) == killed_at:
            raise KeyboardInterrupt
        trained.append(arguments[1])
        return step(self, *arguments, **options)

    monkeypatch.setattr(Distiller, "training_step", noted)
    return trained


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


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_is_what_autograd_makes_of_its_definition(logits, alpha, temperature, monkeypatch):
    """In pieces of two tokens; the gradient takes the place of the logits."""
    monkeypatch.setitem(module.PIECE, "cpu", 2 * 61)
    labels, (given, target) = torch.arange(7), logits
    ours, theirs = (given.clone().requires_grad_(True) for _ in range(2))
    loss, (kl, nll) = Divergence.apply(ours * 1, target if alpha else None, labels, alpha, temperature, 0.25)
    expected_nll = cross_entropy(theirs, labels, reduction="sum") / 4
    expected_kl = temperature**2 * kl_divergence(theirs / temperature, target / temperature).sum() / 4
    expected = alpha * expected_kl + (1 - alpha) * expected_nll
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and nll.item() == pytest.approx(expected_nll.item())
    assert kl.item() == pytest.approx(expected_kl.item() if alpha else 0, rel=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_divergence_of_equal_logits_is_exactly_zero(logits):
    equal = logits[0].clone().requires_grad_(True)
    loss, _ = Divergence.apply(equal * 1, logits[0].clone(), torch.arange(7), 1.0, 1.0, 1.0)
    loss.backward()
    assert loss == 0 and equal.grad.abs().max() == 0


def test_mixture_by_hand(student, teacher, windows, logits_of, tmp_path):
    rows = [{"input_ids": w, "labels": [NO_LABEL] * 8 + w[8:]} for w in windows.tolist()]  # a prompt
    log_q, log_p = (logits_of(m)[:, 7:-1].double() for m in (student, teacher))
    nll = -log_q.log_softmax(-1).gather(-1, windows[:, 8:, None]).mean()
    soft_q, soft_p = (log_q / 2).log_softmax(-1), (log_p / 2).log_softmax(-1)
    kl = 4 * (soft_p.exp() * (soft_p - soft_q)).sum(-1).mean()
    step = dataclasses.replace(FULL, num_tokens=1, batch_tokens=120, alpha=0.3, temperature=2.0, dtype="float32")
    found = distill(student, teacher, rows, step, tmp_path).iloc[0]
    assert found["cross_entropy"] == pytest.approx(nll.item(), rel=1e-4)
    assert found["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert found["loss"] == pytest.approx((0.3 * kl + 0.7 * nll).item(), rel=1e-4)


def test_lm_head_reads_what_is_predicted(student, teacher, windows, tmp_path):
    rows, seen = [{"input_ids": w, "labels": [NO_LABEL] * 15 + w[15:]} for w in windows.tolist()], []
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    distill(student, teacher, rows, dataclasses.replace(FULL, num_tokens=1, batch_tokens=120), tmp_path)
    assert seen == [(6 * 5, 61)] * 2


def test_alpha_zero_is_the_language_model_loss(student, windows, tmp_path):
    with torch.no_grad():
        expected = student(windows, labels=windows).loss.item()
    step = dataclasses.replace(FULL, num_tokens=1, batch_tokens=120, alpha=0.0, dtype="float32")
    log = distill(student, None, windows, step, tmp_path)
    assert log["loss"][0] == log["cross_entropy"][0] == pytest.approx(expected, rel=1e-5) and log["kl"].isna().all()


def test_micro_batches_are_weighted_by_their_labels(student, teacher, windows, clone, tmp_path):
    """And shorter rows change nothing but their own share; products are in float32, here."""
    rows = [{"input_ids": w, "labels": list(w)} for w in windows.tolist()]
    rows[0] = {key: row[:11] for key, row in rows[0].items()}
    rows[4]["labels"][9:] = [NO_LABEL] * 11
    one_step = dataclasses.replace(FULL, num_tokens=1, batch_tokens=120, dtype="float32")
    logs = [distill(clone(student), teacher, rows, one_step, tmp_path / f"{micro}", micro) for micro in (20, 120)]
    assert logs[0]["loss"][0] == pytest.approx(logs[1]["loss"][0], rel=1e-5)
    assert [log["tokens"].tolist() for log in logs] == [[111], [111]]


@pytest.mark.parametrize(("dtype", "fast"), [("auto", True), ("auto", False), ("bfloat16", False), ("float32", True)])
def test_products_are_in_the_dtype_that_was_asked_for(dtype, fast, student, teacher, windows, tmp_path, monkeypatch):
    """On a CPU without instructions for it neither the model's products nor Muon's are in bf16, unless told so."""
    for place in (device, optimizer):
        monkeypatch.setattr(place, "bf16_is_fast", lambda device: fast)
    seen, steps, orthogonal = set(), set(), optimizer.orthogonal

    def watched(*given):
        with _disable_current_modes():  # Newton's and Schulz's products are not the model's
            steps.add((found := orthogonal(*given)).dtype)
        return found

    monkeypatch.setattr(optimizer, "orthogonal", watched)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.update((function.overloadpacket, x.dtype) for x in args if isinstance(x, torch.Tensor))
            return function(*args, **(kwargs or {}))

    with Watch():
        distill(student, teacher, windows, dataclasses.replace(FULL, num_tokens=60, dtype=dtype), tmp_path)
    aten = torch.ops.aten
    products = {dtype for operation, dtype in seen if operation in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)}
    in_bf16 = dtype == "bfloat16" or (dtype == "auto" and fast)
    assert products == {torch.bfloat16 if in_bf16 else torch.float32}
    assert steps == {torch.bfloat16 if fast else torch.float32}
    assert all(p.dtype == torch.float32 for p in student.parameters())


@pytest.mark.parametrize("limit", [1, 2**25], ids=["one by one", "all of a shape"])
def test_stacked_muon_is_torchs(limit, monkeypatch):
    """Tall, wide and square matrices, one of them without a gradient; in bf16, as torch's always are."""
    monkeypatch.setattr(optimizer, "STACK", limit)
    monkeypatch.setattr(optimizer, "bf16_is_fast", lambda device: True)
    start = [torch.randn(shape) for shape in ((24, 8), (8, 24), (24, 8), (8, 8), (24, 8))]
    ends = []
    for muon in (torch.optim.Muon, optimizer.StackedMuon):
        matrices = [torch.nn.Parameter(m.clone()) for m in start]
        steps, noise = muon(matrices, lr=0.1, weight_decay=0.1, ns_steps=3), torch.Generator().manual_seed(1)
        for _ in range(3):
            for m in matrices[:4]:
                m.grad = torch.randn(m.shape, generator=noise)
            steps.step()
        ends.append(matrices)
    assert all(torch.equal(*both) for both in zip(*ends, strict=True)) and torch.equal(ends[1][4], start[4])
    assert not torch.equal(ends[1][0], start[0])


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


@pytest.mark.parametrize("settings", [FULL, LORA], ids=["muon", "lora"])
def test_a_student_with_less_attention_learns(student, teacher, windows, logits_of, settings, tmp_path):
    surgery.drop_attention(student, 0)
    target = logits_of(teacher).log_softmax(-1)
    start = kl_divergence(logits_of(student), target).mean()
    distill(student, teacher, windows, dataclasses.replace(settings, num_tokens=2400), tmp_path)
    assert kl_divergence(logits_of(student), target).mean() < start
    assert "model.layers.0.self_attn.q_proj.weight" not in student.state_dict()


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
    assert all("lora_" in key for key in load_file(tmp_path / "run" / "weights.safetensors"))
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
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        steps_of(patch, killed_at=7)
        distill(student, teacher, windows, settings, tmp_path / "killed")
    assert weights(student).keys() == weights(whole).keys() and not same(weights(student), weights(whole))
    torn = tmp_path / "killed" / "checkpoint-8"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"epoch": 0.')
    resumed, steps = clone(start), steps_of(monkeypatch)
    log = distill(resumed, teacher, windows, settings, tmp_path / "killed")
    assert len(steps) == 3 and same(weights(resumed), weights(whole))
    assert log.drop(columns="seconds").equals(expected.drop(columns="seconds"))
    again = clone(start)
    distill(again, teacher, windows, settings, tmp_path / "killed")
    assert len(steps) == 3 and same(weights(again), weights(whole))  # complete: nothing more is done
    assert {path.name for path in (tmp_path / "killed").iterdir() if path.suffix != ".md"} == {
        "key.json", "log.json", "weights.safetensors",
    }  # fmt: skip


def test_another_run_begins_anew(student, teacher, windows, clone, tmp_path):
    other = clone(student)
    distill(clone(student), teacher, windows, FULL, tmp_path / "first")
    other.model.norm.weight.data.mul_(1.1)
    fresh = clone(other)
    assert len(distill(other, teacher, windows, FULL, tmp_path / "first")) == 10
    distill(fresh, teacher, windows, FULL, tmp_path / "second")
    assert same(weights(other), weights(fresh))


@pytest.mark.parametrize("change", ["code", "packages"])
def test_other_code_and_packages_begin_anew(change, change_code, teacher, windows, clone, tmp_path, monkeypatch):
    student, steps = clone(teacher), steps_of(monkeypatch)
    for _ in range(2):
        distill(clone(student), teacher, windows, FULL, tmp_path)
    assert len(steps) == 10
    if change == "code":
        change_code(module)
    else:
        monkeypatch.setattr(trainer, "version", lambda name: "0.1")
    distill(student, teacher, windows, FULL, tmp_path)
    assert len(steps) == 20


@pytest.mark.parametrize("settings", [FULL, ADAMW, LORA], ids=["muon", "adamw", "lora"])
def test_a_loss_that_is_not_finite(student, teacher, windows, settings, tmp_path, monkeypatch):
    names, step, muon = weights(student).keys(), Distiller.training_step, "muon_lr from 0.02 or distillation."

    def spoilt(self, *arguments, **options):
        if self.state.global_step == 3:
            teacher.model.norm.weight.data.fill_(float("nan"))
        return step(self, *arguments, **options)

    monkeypatch.setattr(Distiller, "training_step", spoilt)
    knob = f"{muon if settings.muon_lr else ''}adamw_lr from {settings.adamw_lr}"
    with pytest.raises(InputError, match=f"not finite: lower distillation.{knob}"):
        distill(student, teacher, windows, settings, tmp_path)
    assert weights(student).keys() == names and (tmp_path / "checkpoint-3").exists()


def test_a_learning_rate_far_too_high(student, teacher, windows, tmp_path):
    with pytest.raises(InputError, match="lower distillation.muon_lr from 1e\\+30"):
        distill(student, teacher, windows, dataclasses.replace(FULL, muon_lr=1e30), tmp_path)


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_teacher_is_narrow_where_its_products_are(teacher, tokenizer, tmp_path, monkeypatch, fast, dtype):
    monkeypatch.setattr(device, "bf16_is_fast", lambda device: fast)
    load.save_model(teacher, tokenizer, tmp_path / "dense")
    preset = load_preset("smoke", {"model": str(tmp_path / "dense"), "device": "cpu"})
    found = module.load_teacher(preset, "cpu", teacher)
    assert found.dtype == dtype and (found is teacher) == (not fast)
    assert module.load_teacher(preset, "cpu", found) is found
    in_float32 = load_preset("smoke", {"model": str(tmp_path / "dense"), "distillation.dtype": "float32"})
    assert module.load_teacher(in_float32, "cpu").dtype == torch.float32


def test_impossible_input(student, windows, clone, tmp_path):
    start = weights(student)
    with pytest.raises(InputError, match="alpha = 1.0 needs a teacher"):
        distill(student, None, windows, FULL, tmp_path)
    with pytest.raises(InputError, match="vocabulary has 50 tokens, the student's 61"):
        distill(student, small_model(vocab_size=50), windows, FULL, tmp_path)
    with pytest.raises(InputError, match=r"has shape \[0, 20\]"):
        distill(student, clone(student), windows[:0], FULL, tmp_path)
    with pytest.raises(InputError, match=r"has shape \[6, 1\].* length at least 2"):
        distill(student, clone(student), windows[:, :1], FULL, tmp_path)
    for rows in ([], [{"input_ids": [1, 2, 3], "labels": [1, -100, -100]}]):
        with pytest.raises(InputError, match="no rows, or one has no label after its first token"):
            distill(student, clone(student), rows, FULL, tmp_path)
    assert same(weights(student), start)


# ---------------------------------------------------------------- batches and steps


def test_warm_up_goes_by_tokens():
    """A row of 60 tokens does not fill a step of 80: after three of them 2.25 steps are over."""
    settings = Distillation(num_tokens=6000, batch_tokens=80, warmup_steps=4)
    lessons = Lessons.of(torch.ones(9, 60, dtype=torch.long), settings)
    rates = [optimizer.rate_at(settings, tokens) for tokens in lessons.tokens_seen[:5]]
    assert rates == pytest.approx([0.25, 0.4375, 0.625, 0.8125, (6000 - 240) / 6000])


def test_rows_cover_a_pass_once_and_then_differ():
    windows = torch.arange(7 * 4).view(7, 4)
    lessons = Lessons.of(windows, Distillation(num_tokens=7 * 4 * 3, batch_tokens=12))
    passes = torch.stack([row["input_ids"][0] for row in lessons.rows]).view(3, 7)
    assert (passes.sort(1).values == windows[:, 0]).all() and not torch.equal(passes[0], passes[1])
    assert lessons.per_step == 3 and lessons.tokens_seen == list(range(0, 85, 12))
    assert Lessons.of(windows, Distillation(num_tokens=1, batch_tokens=80)).tokens_seen == [0, 80]


@pytest.mark.parametrize(("processes", "micro_tokens", "expected"), [(1, 40, (2, 3)), (2, 40, (1, 3)), (3, 99, (2, 1))])
def test_a_step_is_shared(processes, micro_tokens, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(module.TrainingArguments, "world_size", processes)
    lessons = Lessons.of(torch.ones(9, 20, dtype=torch.long), FULL := Distillation(num_tokens=500, batch_tokens=120))
    args = module._arguments(lessons, FULL, tmp_path, torch.device("cpu"), micro_tokens)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == expected


def test_what_cannot_be_shared():
    with pytest.raises(InputError, match="rows 16 cannot be shared by 3 processes: start a number that divides it"):
        trainer.shared(16, 3, "rows")


ROWS = [
    {"prompt": "w2 w3", "completion": " w4 w5 w6 w7"},
    {"prompt": "w8", "completion": " w9"},
    {"prompt": "w2 w2 w2 w2", "completion": " w9"},
]


def test_rows_of_different_lengths(tokenizer):
    rows, none = examples(ROWS, tokenizer, 6), NO_LABEL
    batch = module._batch(rows)
    assert sorted(zip(*(tensor.tolist() for tensor in batch.values()), strict=True)) == [
        ([2, 2, 2, 2, 9, 0], [none] * 4 + [9, 0]),
        ([2, 3, 4, 5, 6, 7], [none] * 2 + [4, 5, 6, 7]),
        ([8, 9, 0, 0, 0, 0], [none, 9, 0, none, none, none]),
    ]
    lessons = Lessons.of(rows, Distillation(num_tokens=30, batch_tokens=6))
    assert lessons.per_step == 1 and lessons.tokens_seen[3] == 15 and lessons.tokens_seen[6] == 30
    with pytest.raises(InputError, match="within max_length = 1"):
        examples(ROWS, tokenizer, 1)


def marked(tokenizer):
    """The same tokenizer, with marks before and after every text that it encodes."""
    marks = TemplateProcessing(single="<u> $A <e>", special_tokens=[("<u>", 1), ("<e>", 0)])
    tokenizer.backend_tokenizer.post_processor = marks
    return tokenizer


def test_an_end_mark_stands_at_the_end_alone(tokenizer):
    batch, none = module._batch(examples(ROWS[:2], marked(tokenizer), 8)), NO_LABEL
    assert sorted(batch["input_ids"].tolist()) == [[1, 2, 3, 4, 5, 6, 7, 0], [1, 8, 9, 0, 0, 0, 0, 0]]
    assert sorted(batch["labels"].tolist()) == [[none] * 3 + [4, 5, 6, 7, 0], [none] * 2 + [9, 0] + [none] * 4]


def test_distils_on_instructions(tokenizer, teacher, student, tmp_path):
    settings = dataclasses.replace(LORA, num_tokens=160, batch_tokens=16, alpha=0.5)
    log = distill(student, teacher, examples(ROWS, tokenizer, 8), settings, tmp_path)
    assert log["tokens"].iloc[-1] >= 160 and log["loss"].iloc[-2:].mean() < log["loss"].iloc[:2].mean()


def test_prune_and_recover(model, teacher, windows, logits_of, tmp_path):
    backbone = shapes.count_parameters(model)["backbone"]

    def cut(model, step):
        rate = 1 - (1 - 0.2 * step) / (1 - 0.2 * (step - 1))  # of what is left; 40 % after two steps
        founding.prune(
            model, plans.Plan.from_rates(model, torch.full((3,), rate, dtype=torch.float64)), windows, sequential=False
        )

    settings = dataclasses.replace(FULL, num_tokens=1200)
    log = prune_and_recover(model, cut, windows, settings, 2, teacher, tmp_path)
    assert log["step"].tolist() == [1] * 10 + [2] * 10
    assert shapes.count_parameters(model)["backbone"] == pytest.approx(0.6 * backbone, rel=0.05)
    one_shot = teacher
    target = logits_of(teacher).log_softmax(-1)
    founding.prune(
        one_shot, plans.Plan.from_rates(one_shot, torch.full((3,), 0.4, dtype=torch.float64)), windows, sequential=False
    )
    assert kl_divergence(logits_of(model), target).mean() < kl_divergence(logits_of(one_shot), target).mean()
