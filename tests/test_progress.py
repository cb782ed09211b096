"""Killed at any part and run again: the same result, bit for bit, and nothing that was done is done twice."""

import copy
import dataclasses
import errno
import itertools
import json
import math
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import small_model
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from test_distillation import marked
from test_series import write_notebook
from torch import nn
from trl import SFTTrainer

from gqalib.errors import InputError
from gqalib.measure import frontier
from gqalib.measure.perplexity import perplexity
from gqalib.model import load
from gqalib.prune import allocate, founding, plans, refit, scores, search
from gqalib.prune.founding import removal_importance, unit_scores
from gqalib.prune.scores import gradient_covariances
from gqalib.recover import lora as recover_lora
from gqalib.recover.lora import finetune_lora
from gqalib.recover.trainer import Watch, finish, place_of
from gqalib.run import publish, resume, series
from gqalib.run.notebook import SHARED, Notebook, code_used, fingerprints, progress_dir, read_record
from gqalib.run.presets import Distillation, load_preset
from gqalib.run.resume import NOT_KEPT, PACKED_BYTES, Progress, digest, lock

QUICK = refit.Ingredients(newton_rounds=1, newton_steps=1, damping=0.01)
UNTRIED = refit.Ingredients(newton_rounds=0, damping=0.01)  # so little that every other argument shows


class Killed(BaseException):
    pass


@pytest.fixture
def text():
    return torch.randint(1, 61, (8, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def kept(tmp_path):
    return lambda key="key": Progress(tmp_path / "progress", key)


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """What a method of the frontier takes is measured in half a second, and is no result that could be the same
    twice."""
    monkeypatch.setattr(frontier, "measured", lambda *places: nullcontext(frontier.Used()))
    monkeypatch.setattr(frontier, "old_objects_left_alone", nullcontext)


@pytest.fixture
def counted(monkeypatch):
    """Counts the calls of a function, or of a class' method, from here on."""

    def count(owner, name):
        calls, original = [], getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
        return calls

    return count


@pytest.fixture
def killed_after(monkeypatch):
    """Runs something that dies as soon as so many parts are kept."""
    original = Progress.keep

    def run(num_parts, compute):
        names = []

        def keep(self, name, part, *seconds):
            original(self, name, part, *seconds)
            names.append(name)
            if len(names) == num_parts:
                raise Killed

        monkeypatch.setattr(Progress, "keep", keep)
        with pytest.raises(Killed):
            compute()
        monkeypatch.setattr(Progress, "keep", original)
        return names

    return run


# ---------------------------------------------------------------- the functions


def with_random_groups(model, text, progress):
    plan = plans.Plan([0.3] * 3, [1, 2, 1], [5, 0, 9])
    how = {"group_statistic": "random", "include_o_proj": True, "seed": 7}
    table = progress.run(founding.prune, model, plan, text, **how)
    return model, table.drop(columns="seconds")


def sweep(model, text, progress, plan=None):
    progress.run(refit.sweep, model, plan or plans.Plan([0.3] * 3, [1, 2, 1], [5, 0, 9]), text, QUICK)
    return model


def sweep_without_a_layer(model, text, progress):
    return sweep(model, text, progress, plans.Plan([0.3] * 3, [1, 4, 1], [5, 24, 9]))


def sweep_in_bfloat16(model, text, progress):
    return sweep(model.to(torch.bfloat16), text, progress)


def trial_and_table(model, text, progress=NOT_KEPT):
    covariances = gradient_covariances(model, text)
    table = progress.run(allocate.cost_table, model, text, covariances, UNTRIED)
    return search.Trial(model, text, covariances, UNTRIED), table


def in_context(model, text, progress):
    return progress.run(search.in_context, *trial_and_table(model, text), 0.4, text[:4], candidates=5)


def spoken(model, text):
    """What a random model says is a text that it can read, and that a pruned one cannot."""
    return model.generate(
        text[:, :4], attention_mask=torch.ones_like(text[:, :4]), min_new_tokens=12, max_new_tokens=12, do_sample=False
    )


def prune_to(model, text, progress):
    scoring = spoken(model, text)
    limit = 1.05 * perplexity(model, scoring)
    return progress.run(search.prune_to, *trial_and_table(model, text), scoring, limit, trials=5), model


def rows(model, text, progress):
    methods = ["random", "layer removal", "FLAP", "founding Taylor, one shot", "ShortGPT"]
    found = frontier.frontier(model, [text, text.flip(0)], text[:4], [1 / 3, 0.98], methods, progress)
    return found.drop(columns=["seconds", "peak_mib"])


CASES = {  # what is run, what must not run twice, parts after which it dies
    "removal": (
        lambda model, text, progress: progress.run(removal_importance, model, text),
        (founding, "perplexity"),
        (2, 3),
    ),
    "prune": (with_random_groups, (founding, "unit_scores"), (1, 3, 4)),
    "sweep": (sweep, (refit, "mend"), (1, 2, 5)),
    "sweep, a layer goes": (sweep_without_a_layer, (refit, "mend"), (1, 3)),
    "sweep, bfloat16": (sweep_in_bfloat16, (refit, "mend"), (2, 3)),
    "cost table": (lambda *args: trial_and_table(*args)[1], (allocate, "_costs"), (1, 4)),
    "search": (in_context, (search.Trial, "__call__"), (3,)),
    "frontier": (rows, (frontier, "try_method"), (1, 7)),
}


def same(a, b):
    """Bit for bit."""
    if isinstance(a, nn.Module):
        return digest(a) == digest(b)
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
        return True
    if dataclasses.is_dataclass(a):
        return all(same(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
    if isinstance(a, tuple | list):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return np.array_equal(a, b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "num_parts"), [(name, n) for name, (_, _, parts) in CASES.items() for n in parts])
def test_a_killed_run_goes_on(name, num_parts, text, kept, counted, killed_after):
    run, target, _ = CASES[name]
    calls, model = counted(*target), small_model()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    expected, total = run(model, text, NOT_KEPT), len(calls)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    killed_after(num_parts, lambda: run(small_model(), text, kept()))
    done = len(calls) - total
    assert 0 < done < total
    resumed = run(small_model(), text, kept())
    assert same(resumed, expected) and len(calls) == 2 * total  # with what was done before, each once
    assert same(run(small_model(), text, kept()), expected) and len(calls) == 2 * total


def test_covariances_are_taken_once(text, kept, counted):
    calls, models = counted(scores, "_covariances"), (small_model(), small_model(seed=5))
    expected = [gradient_covariances(model, text) for model in models]
    for _ in range(2):
        assert same([kept().run(gradient_covariances, model, text) for model in models], expected)
    assert len(calls) == 4


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_prune_to_goes_on(num_parts, text, kept, counted, killed_after):
    """The trials before the kill are not run again; the best model is made at the end, whoever tried it."""
    trials = counted(search.Trial, "__call__")
    expected, total = prune_to(small_model(), text, NOT_KEPT), len(trials)
    reached = expected[0]["perplexity"]
    killed_after(num_parts, lambda: prune_to(small_model(), text, kept()))
    done = len(trials) - total
    assert (
        len(reached) == 5
        and not same(expected[1], small_model())
        and done == np.isfinite(reached[:num_parts]).sum() < total
    )
    assert same(prune_to(small_model(), text, kept()), expected)
    assert len(trials) == 2 * total
    assert same(prune_to(small_model(), text, kept()), expected)
    assert len(trials) == 2 * total + 1


def test_seconds_are_those_of_the_run_that_did_it(text, kept, killed_after, monkeypatch):
    plan, clock = plans.Plan([0.3] * 3, [1, 1, 1], [5, 5, 5]), iter([0.0, 100.0, 0.0])
    monkeypatch.setattr(founding.time, "perf_counter", lambda: next(clock))
    killed_after(3, lambda: kept().run(founding.prune, small_model(), plan, text))
    monkeypatch.undo()
    seconds = kept().run(founding.prune, small_model(), plan, text)["seconds"]
    assert seconds[0] == 100.0 and (seconds[1:] < 50).all()


def test_after_layer_hears_of_every_layer(text, kept, killed_after):
    config = small_model().config
    dropped = [0, config.num_key_value_heads, 0], [0, config.intermediate_size, 0]  # the sweep can leave a layer out
    for function, counts in ((founding.prune, ([1, 1, 1], [5, 5, 5])), (refit.sweep, dropped)):
        plan, heard = plans.Plan([0.3] * 3, *counts), []
        killed_after(3, lambda plan=plan, function=function: kept().run(function, small_model(), plan, text))
        kept().run(function, small_model(), plan, text, after_layer=heard.append)
        assert heard == [0, 1, 2]


# ---------------------------------------------------------------- other settings, broken parts


@pytest.mark.parametrize("name", ["removal", "prune", "sweep", "cost table", "search", "frontier"])
def test_other_inputs_find_nothing(name, text, kept, counted):
    run, target, _ = CASES[name]
    calls = counted(*target)
    run(small_model(), text, kept())
    once = len(calls)
    expected = run(small_model(seed=5), text.flip(1), NOT_KEPT)
    others = len(calls) - once
    assert same(run(small_model(seed=5), text.flip(1), kept()), expected) and len(calls) == once + 2 * others > 0


def test_another_key_begins_anew(kept):
    kept().keep("x", 1)
    assert kept("another key").load("x") is None and kept().load("x") is None  # what was under the first one is gone


PLAN, OTHER_PLAN = plans.Plan([0.3] * 3, [1, 2, 1], [5, 0, 9]), plans.Plan([0.3] * 3, [2, 2, 1], [5, 3, 9])


def prune_with(model, text, progress, plan=PLAN, **how):
    return model, progress.run(founding.prune, model, plan, text, **how).drop(columns="seconds")


def sweep_with(model, text, progress, plan=PLAN, ingredients=UNTRIED, scored=False, weight=None):
    scores = unit_scores(model, text, ("magnitude", "magnitude")) if scored else None
    covariances = None if weight is None else [(weight @ weight.T,) * 2] * 3
    progress.run(refit.sweep, model, plan, text, ingredients, scores=scores, covariances=covariances)
    return model


def search_with(model, text, progress, fraction=0.4, scored=4, candidates=3, ingredients=UNTRIED, times=1):
    trial, table = trial_and_table(model, text)
    trial, table = (
        dataclasses.replace(trial, ingredients=ingredients),
        dataclasses.replace(table, groups=[times * x for x in table.groups]),
    )
    return progress.run(search.in_context, trial, table, fraction, text[:scored], candidates)


def targets_with(model, text, progress, times=1.2, scored=8):
    goal = times * perplexity(model, spoken(model, text))
    return progress.run(search.prune_to, *trial_and_table(model, text), spoken(model, text)[:scored], goal, trials=3)


def rows_with(model, text, progress, test=4, fractions=(0.3,), flipped=False, method="random"):
    found = frontier.frontier(model, [text.flip(1) if flipped else text], text[:test], fractions, [method], progress)
    return found.drop(columns=["seconds", "peak_mib"])


ARGUMENTS = {
    prune_with: [{}, {"plan": OTHER_PLAN}, {"include_o_proj": True},
        *({"group_statistic": "random", "seed": seed} for seed in (0, 1))],
    sweep_with: [
        {}, {"plan": OTHER_PLAN}, {"ingredients": QUICK}, {"scored": True}, {"weight": torch.eye(32).double()},
        {"weight": torch.arange(32.0).double().diag()},
    ],
    search_with: [{}, {"fraction": 0.3}, {"scored": 5}, {"times": 5}],
    targets_with: [{}, {"times": 1.05}, {"scored": 4}],
    rows_with: [{}, {"test": 5}, {"fractions": (0.2,)}, {"flipped": True, "method": "FLAP"}, {"method": "FLAP"}],
}  # fmt: skip


@pytest.mark.parametrize("run", ARGUMENTS, ids=lambda run: run.__name__)
def test_calls_with_other_arguments_share_one_progress(run, text, kept):
    """As calls in one notebook do: none finds what another one kept."""
    alone = [run(small_model(), text, NOT_KEPT, **arguments) for arguments in ARGUMENTS[run]]
    together = [run(small_model(), text, kept(), **arguments) for arguments in ARGUMENTS[run]]
    assert same(together, alone)
    for one, other in itertools.combinations(alone, 2):
        with pytest.raises(AssertionError):
            assert same(one, other)


@pytest.mark.parametrize("name", ["removal", "prune"])
@pytest.mark.parametrize("damage", ["empty", "half", "garbage"])
def test_a_broken_part_is_done_anew(name, damage, text, kept, counted, killed_after, tmp_path):
    run, target, _ = CASES[name]
    expected = run(small_model(), text, NOT_KEPT)
    run(small_model(), text, kept())
    calls = counted(*target)
    file = next(file for file in sorted((tmp_path / "progress").rglob("*")) if file.stem.startswith("layer-1"))
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "garbage": b"\xff" * len(whole)}[damage])
    for _ in range(2):  # and the new one is whole
        assert same(run(small_model(), text, kept()), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("text", ["{}", '{"seconds": "1.0"}', "[]", '["part"]', "1", '"part"', "null"])
def test_json_that_holds_no_part_is_none(text, kept, tmp_path):
    kept().keep("x", 1.5)
    (tmp_path / "progress" / "x.json").write_text(text)
    assert kept().load("x") is None and kept().once("x", lambda: 2.5) == kept().load("x") == 2.5


def test_a_torn_key_is_no_key(kept, tmp_path):
    kept().keep("x", 1.5)
    (tmp_path / "progress" / "key.json").write_bytes(b"\xff")
    assert kept().load("x") is None
    kept().keep("x", 2.5)
    assert kept().load("x") == 2.5


# ---------------------------------------------------------------- Progress itself


def test_what_parts_took_in_an_earlier_run(tmp_path, monkeypatch):
    """Counts as if it were of this one: nested parts once, what another owner kept or this run itself not at all."""
    now = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])

    def slow(part=1):
        now[0] += 5
        return part

    def took(name, compute=slow, owner="01", counted=()):
        monkeypatch.setattr(Progress, "counted", set(counted))  # as in a new process
        before, _ = resume.spent(), Progress(tmp_path / "progress", "key", owner).once(name, compute)
        return round(resume.spent() - before)

    tensors = {"a": torch.ones(1)}
    assert [took("x"), took("x"), took("x", owner="02")] == [5, 5, 0]
    assert took("x", counted=[tmp_path / "progress" / "x"]) == 0
    assert [took("t", lambda: slow(tensors)), took("t", lambda: slow(tensors))] == [5, 5]
    assert [took("both", lambda: took("x") + took("y")), took("both"), took("y")] == [10, 10, 5] and now[0] == 15


@pytest.mark.parametrize("part", [0.1 + 0.2, math.inf, 0, [], {}, "ä", {"a": [1, None, 5e-324]}])
def test_what_json_can_say_comes_back(part, kept):
    kept().keep("a/b: c", part)
    assert kept().load("a/b: c") == part and kept().load("a") is None


def test_tensors_come_back(kept):
    tensors = {
        "a": torch.randn(3, 2).T,
        "b": torch.tensor([math.nan], dtype=torch.bfloat16),
        "c": torch.zeros(0, dtype=torch.int64),
    }
    kept().keep("x", tensors)
    loaded = kept().load("x")
    assert loaded.keys() == tensors.keys() and all(digest(loaded[key]) == digest(tensors[key]) for key in tensors)


def test_the_last_part_of_a_name_is_the_one_that_is_kept(kept):
    for part in ({"a": torch.ones(2)}, None, 1, {"a": torch.zeros(2)}, None):
        kept().keep("x", part)
        found = kept().load("x")
        assert digest(found) == digest(part)


def test_a_part_appears_whole_or_not_at_all(kept, tmp_path, monkeypatch):
    kept().keep("x", 1)
    monkeypatch.setattr(resume.os, "replace", lambda *names: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        kept().keep("x", 2)
    assert kept().load("x") == 1
    assert sorted(file.name for file in (tmp_path / "progress").iterdir()) == ["key.json", "x.json"]


def test_what_takes_a_name_is_on_the_disk_before(tmp_path, tokenizer, monkeypatch):
    """A merged model, a notebook: no power cut leaves half of one."""
    on_disk, fsync = set(), os.fsync
    monkeypatch.setattr(resume.os, "fsync", lambda number: (on_disk.add(os.fstat(number).st_ino), fsync(number)))
    training_folder = place_of(tmp_path / "out")
    training_folder.mkdir()
    save_file(dict(small_model().named_parameters()), training_folder / "weights.safetensors")
    load.save_model(small_model(), tokenizer, tmp_path / "model")
    log, settings = pd.DataFrame({"tokens": [1], "loss": [1.0]}), Distillation(lora_r=0)
    finish(tmp_path / "out", str(tmp_path / "model"), settings, log, "float32", "float32")
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks", "01_first")
    run_dir, overrides = tmp_path / "run", {"model": str(tmp_path / "out")}
    job = series.Series(overrides=overrides, run_dir=run_dir, notebooks=tmp_path / "notebooks")

    def execute(path, out, *_, **__):
        notebook(run_dir).finish()
        shutil.copy(path, out)

    monkeypatch.setattr("papermill.execute_notebook", execute)
    job.execute(job.paths[0])
    files = [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name != ".lock" and path.parent.name not in ("notebooks", "model")
    ]
    assert {"model.safetensors", "01_first.ipynb"} <= {path.name for path in files}
    assert not [path for path in files if path.stat().st_ino not in on_disk]


def test_progress_that_several_begin_at_once(kept, monkeypatch):
    """As notebooks that run beside each other do: none throws away what another has kept."""
    all_there, remove = threading.Barrier(4), shutil.rmtree
    monkeypatch.setattr(resume.shutil, "rmtree", lambda *given, **how: (time.sleep(0.05), remove(*given, **how)))

    def begin(name):
        all_there.wait()
        kept().keep(name, name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(begin, "abcd"))
    assert [kept().load(name) for name in "abcd"] == [*"abcd"]


def test_a_lock_is_one_process(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    with path.open("w") as late:
        with path.open("w") as first:
            lock(first, "taken")
            with pytest.raises(InputError, match="^taken$"):
                lock(late, "taken")
            path.unlink()
        with pytest.raises(InputError, match="^taken$"):  # others would find another file of this name
            lock(late, "taken")

    def without_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(resume.fcntl, "flock", without_locks)
    with path.open("w") as file:
        lock(file, "taken")


def test_nothing_is_kept_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert NOT_KEPT.of(object()).once("x", lambda: 1) == 1 and NOT_KEPT.once("x", lambda: 2) == 2
    assert not list(tmp_path.iterdir())


def test_digest_tells_things_apart():
    model, other = small_model(), small_model()
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight[3, 4] *= 1 + 1e-7
    theta = small_model()
    theta.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4 + 1}
    eager = small_model()
    eager.set_attn_implementation("eager")
    things = [
        model, other, theta, eager, [], [[]], None, 0, 0.0, False, "0", [1, 23], [12, 3], ["a", "b"], ["ab"],
        {"a": 1}, {"b": 1},
        torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).double(), torch.zeros(()), QUICK, UNTRIED,
        np.zeros(3), np.ones(3),
    ]  # fmt: skip
    digests = [digest(thing) for thing in things]
    assert len(set(digests)) == len(things) and digests == [digest(copy.deepcopy(thing)) for thing in things]
    assert digest(1, 2) != digest(2, 1) != digest([2, 1])
    with pytest.raises(TypeError, match="a function cannot be told"):
        digest(lambda: 0)


def test_a_model_is_the_same_wherever_it_lies(tmp_path, tokenizer):
    model, places = small_model(), (tmp_path / "here", tmp_path / "there")
    for place in places:
        load.save_model(model, tokenizer, place)
    here, there = map(load.load_model, places)
    assert here.config._name_or_path != there.config._name_or_path and digest(here) == digest(there)


# ---------------------------------------------------------------- LoRA


@pytest.fixture
def lora(tokenizer, tmp_path):
    """`train(folder, **changes)` → adapter and log; with dropout, so that random numbers matter."""
    base = load_preset("tiny").recovery
    settings = dataclasses.replace(
        base,
        num_epochs=3,
        num_examples=12,
        batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_length=24,
        lora_dropout=0.2,
    )
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{int(i)}" for i in torch.randint(2, 61, (6,), generator=generator)) for _ in range(12)]
    examples = [{"prompt": text, "completion": " w9 w4 w5"} for text in texts]

    def train(name, seed=0, **changes):
        how = dataclasses.replace(settings, **changes)
        adapted, log = finetune_lora(small_model(), tokenizer, examples, how, tmp_path / name, seed)
        return [*get_peft_model_state_dict(adapted).values()], log.drop(columns="seconds")

    return train


@pytest.mark.parametrize("num_steps", [3, 7])  # an epoch has three
def test_lora_goes_on(num_steps, lora, counted, monkeypatch, tmp_path):
    expected = lora("whole")
    assert len(expected[1]) == 9

    def die(self, args, state, *_, **__):
        if state.global_step == num_steps:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Watch, "on_save", die)
        lora("killed")
    last = tmp_path / "killed" / f"checkpoint-{num_steps}"
    torn = last.with_name(f"checkpoint-{num_steps + 1}")
    torn.mkdir()
    (torn / "trainer_state.json").write_bytes((last / "trainer_state.json").read_bytes()[:100])
    steps = counted(Watch, "on_step_begin")
    assert same(lora("killed"), expected) and len(steps) == 9 - num_steps
    assert {file.name for file in (tmp_path / "killed").iterdir() if file.suffix != ".md"} == {
        "key.json", "weights.safetensors", "log.json",
    }  # fmt: skip


def test_lora_that_ended_is_not_trained_again(lora, counted, change_code, monkeypatch, tmp_path):
    first, left = lora("folder"), tmp_path / "folder" / "checkpoint-9"
    left.mkdir()  # by a kill between the result and the tidying
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
        assert same(lora("folder"), first) and not left.exists()
    assert not same(lora("folder", learning_rate=1e-3)[0], first[0])
    assert same(lora("folder"), first)
    trained = counted(SFTTrainer, "train")
    change_code(recover_lora)
    lora("folder")
    assert len(trained) == 1  # other code finds nothing


def test_lora_begins_anew_with_other_tokens(lora, tokenizer, counted):
    """As where a tokenizer was corrected: the text is the same."""
    lora("folder")
    trained = counted(SFTTrainer, "train")
    lora("folder")
    assert not trained
    marked(tokenizer)
    lora("folder")
    assert len(trained) == 1


# ---------------------------------------------------------------- the notebook's


def notebook(tmp_path, name="01_first", **changes):
    return Notebook(**{"name": name, "preset": "tiny", "overrides": {}, "run_dir": tmp_path, "seed": 0, **changes})


def test_progress_of_a_notebook(tmp_path, monkeypatch):
    notebook(tmp_path).progress("a").keep("x", 1)
    notebook(tmp_path, "02_second").progress("a").keep("x", 2)
    assert notebook(tmp_path).progress("a").load("x") == 1 and notebook(tmp_path).progress("b").load("x") is None
    notebook(tmp_path).finish()
    assert notebook(tmp_path).progress("a").load("x") == 1
    assert notebook(tmp_path, "02_second").progress("a").load("x") == 2
    for changes in ({"seed": 1}, {"overrides": {"dtype": "bfloat16"}}):
        nb = notebook(tmp_path)
        nb.progress("a").keep("x", 1)
        assert notebook(tmp_path, **changes).progress("a").load("x") is None


@pytest.mark.parametrize(("more", "forgets"), [
    ({"budgets.curve": [64, 128]}, False), ({"long_run.num_tokens": 512}, False), ({"cost.contexts": [9]}, False),
    ({"answers.prompts": ["Hello"]}, False), ({"distillation.alpha": 0.5}, True),
])  # fmt: skip
def test_asking_for_more_forgets_nothing(more, forgets, tmp_path):
    reads = {part.partition(".")[0] for part in more}
    notebook(tmp_path, reads=reads).progress("a").keep("x", 1)
    found = notebook(tmp_path, overrides=more, reads=reads).progress("a").load("x")
    assert found == (None if forgets else 1)


def test_a_record_counts_what_an_earlier_run_took(tmp_path, capsys, monkeypatch):
    """And says nothing of its memory, which only that run could measure."""
    peaks = []
    for _ in range(2):
        monkeypatch.setattr(Progress, "counted", set())  # as in a new process
        nb = notebook(tmp_path)
        with nb.stage("a stage", small_model(), (1, 8), "knob", of=("sweep",)):
            nb.progress("a").once("x", lambda: time.sleep(0.3) or 1)
        record = nb.save()
        peaks.append(record["tables"]["stages"][0]["peak_gb"])
        assert record["seconds"] >= 0.3 and record["tables"]["stages"][0]["seconds"] >= 0.3
    assert capsys.readouterr().out.count("a stage: 0 s more in an earlier run, whose peak is not known") == 1
    assert peaks[0] is not None and peaks[1] is None


def test_a_training_leaves_its_result_and_no_checkpoint(tmp_path):
    """A killed one finds its folder; the result stays, also when the record is written."""
    found = []

    def train(folder):
        found.append((folder / "checkpoint").exists())
        (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        if len(found) == 1:
            raise Killed
        return {"ratio": 1.5}

    with pytest.raises(Killed):
        notebook(tmp_path).trained("a", train)
    assert [notebook(tmp_path).trained("a", train) for _ in range(2)] == [{"ratio": 1.5}] * 2
    assert found == [False, True] and not list(tmp_path.rglob("checkpoint"))
    notebook(tmp_path).finish()
    assert notebook(tmp_path).trained("a", train) == {"ratio": 1.5} and len(found) == 2


def test_a_training_of_other_inputs_is_another(tmp_path):
    """Whatever its name says: a notebook's own parameters are in no preset."""
    rates = [notebook(tmp_path).trained("a", lambda _, rate=rate: rate, {"rate": rate}) for rate in (1, 2, 1)]
    assert rates == [1, 2, 1]


def test_a_model_that_another_training_replaced_is_trained_again(tmp_path):
    """There is one folder for it, and a row of each training."""
    model = tmp_path / "models" / "taught"

    def trained(tokens):
        def train(_):
            model.mkdir(parents=True, exist_ok=True)
            (model / "tokens").write_text(str(tokens))
            if tokens < 0:
                raise Killed
            return tokens

        row = notebook(tmp_path).trained("a", train, {"tokens": tokens}, model=model)
        return row, int((model / "tokens").read_text())

    assert [trained(tokens) for tokens in (1, 1, 2, 1)] == [(1, 1), (1, 1), (2, 2), (1, 1)]
    with pytest.raises(Killed):
        trained(-1)
    assert trained(1) == (1, 1)


def test_progress_of_what_is_no_page_is_of_the_code(tmp_path, change_code):
    notebook(tmp_path, "at_size_x").progress("a").keep("x", 1)
    assert notebook(tmp_path, "at_size_x").progress("a").load("x") == 1
    change_code(refit)
    assert notebook(tmp_path, "at_size_x").progress("a").load("x") is None


def test_a_folder_that_is_called_like_a_text_is_not_that_text(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    assert fingerprints({"model": "shape:tiny", "corpus": "random-tokens", "instructions": "corpus"}) == {}


def test_a_record_of_a_text_that_has_changed_is_no_upstream(tmp_path, monkeypatch):
    """As `run` would judge; a committed one knows no times of files."""
    (rows := tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    nb = Notebook("01_first", "tiny", {"instructions": f"file:{rows}"}, tmp_path / "run", 0, ["instructions"])
    nb.finish()
    assert nb.upstream("01_first")["notebook"] == "01_first"
    rows.write_text('[{"instruction": "a", "output": "c"}]')
    with pytest.raises(InputError, match="01_first was made with another file of instructions: run 01_first again"):
        nb.upstream("01_first")
    monkeypatch.setattr("gqalib.run.notebook.COMMITTED", tmp_path)
    assert nb.upstream("01_first")["notebook"] == "01_first"


@pytest.mark.parametrize("what", ["code_used", "fingerprints", "version"])
def test_progress_is_of_these_files_and_versions(what, tmp_path, monkeypatch):
    notebook(tmp_path).progress("a").keep("x", 1)
    monkeypatch.setattr(f"gqalib.run.notebook.{what}", lambda *args: "another")
    assert notebook(tmp_path).progress("a").load("x") is None


def test_force_begins_anew(tmp_path, monkeypatch):
    small_model().save_pretrained(tmp_path / "model")
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks", "01_first")
    job = series.Series(
        overrides={"model": str(tmp_path / "model")}, run_dir=tmp_path / "run", notebooks=tmp_path / "notebooks"
    )
    there, folders = [], [progress_dir(job.run_dir, name) for name in ("01_first", SHARED)]
    monkeypatch.setattr(series.Series, "execute", lambda *_: there.append([folder.exists() for folder in folders]))
    for force in (False, True):
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        job.run(force)
    assert there == [[True, True], [False, False]]


def test_what_long_stages_found_travels_with_the_repository(tmp_path, monkeypatch, tokenizer):
    """Published, then found in a fresh run folder on another machine; --force begins with nothing all the same."""
    monkeypatch.setattr("gqalib.run.notebook.COMMITTED", tmp_path / "results")
    nb, large = notebook(tmp_path / "first"), torch.zeros(PACKED_BYTES)
    for progress in (nb.progress("a"), nb.shared_progress("b", "")):
        progress.keep("row", {"x": 1.5})
        progress.keep("model", {"weight": large})
        load.save_model(small_model(), tokenizer, progress.folder / "saved")
    nb.shared_progress("decode speed", "").of("a file").keep("speed", 1.5)  # of that machine alone
    publish._pack_progress(tmp_path / "first", [nb.name, SHARED, "none"], progress_dir(tmp_path / "results" / "tiny"))
    nb = notebook(tmp_path / "second")
    for progress in (nb.progress("a"), nb.shared_progress("b", "")):
        assert progress.load("row") == {"x": 1.5} and progress.load("model") is None
        assert not (progress.folder / "saved").exists()
    assert notebook(tmp_path / "second").progress("a").load("row") == {"x": 1.5}
    assert not list((tmp_path / "second").rglob("decode speed"))
    assert notebook(tmp_path / "third", seed=1).progress("a").load("row") is None
    progress_dir(tmp_path / "fourth").mkdir(parents=True)  # as --force leaves it
    assert notebook(tmp_path / "fourth").progress("a").load("row") is None


def test_a_record_says_what_the_results_depend_on(tmp_path):
    nb = notebook(tmp_path)
    nb.finish()
    record = read_record(tmp_path / "01_first.json")
    assert json.loads(json.dumps(nb._reasons())).items() <= record.items() and record["library"] == code_used(
        Path("01_first.ipynb")
    )
