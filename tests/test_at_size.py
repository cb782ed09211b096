"""Llama-3-8B's measurements, on the small shape of the same ratios and a CPU."""

from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import small_model

from gqalib import InputError
from gqalib.measure import at_size, recovery, speed
from gqalib.model.load import load_model, random_model, shape_config
from gqalib.recover import distill
from gqalib.run.cli import main
from gqalib.run.notebook import read_record
from gqalib.run.presets import load_preset

SMALL = {
    "model": "shape:tiny", "device": "cpu", "dtype": "bfloat16", "frontier.calibration.num_examples": 8,
    "frontier.calibration.length": 32, "cost.min_run_s": 0.01, "cost.contexts": [8, 16], "cost.batch_sizes": [1, 2],
    "removal.num_examples": 4, "calibration.num_examples": 4,
}  # fmt: skip


@pytest.fixture
def measured(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "fused", partial(speed.fused, backend="eager"))
    monkeypatch.setattr(at_size, "copy_bandwidth", lambda device: 1e9)

    def measure(step, **options):
        at_size.at_size("llama3-8b-shape", SMALL, tmp_path, [step], **options)
        return read_record(tmp_path / f"at_size_{step}.json")

    return measure


def test_speed(measured):
    tables = measured("speed")["tables"]
    assert [row["model"] for row in tables["shapes"]][0] == "dense"
    assert len(tables["speed"]) == 2 * 2 * 2 * len(tables["shapes"]) and len(tables["alignment"]) > 2
    assert all(row["ms"] > 0 and row["ceiling"] >= 1 for row in tables["speed"])
    assert {row["phase"] for row in tables["speed_unfused"]} == {"decode"}


@pytest.mark.parametrize("contexts", [[16], [16, 999, 1000]])
def test_speed_at_contexts_that_the_model_takes(contexts, measured, monkeypatch):
    monkeypatch.setitem(SMALL, "cost.contexts", contexts)
    tables = measured("speed")["tables"]
    found = {row["context"] for row in tables["speed"]}
    assert len(found) == min(len(contexts), 2) and len(tables["alignment"]) > 2


def test_speed_in_turn(measured, monkeypatch):
    tables = measured("in_turn")["tables"]
    names = [row["model"] for row in tables["shapes"]]
    assert names == ["dense", "84.64 % kept", "half kept"]  # the small shape's embedding is too large for the fourth
    parameters = [row["parameters"] for row in tables["shapes"]]
    assert parameters == sorted(parameters, reverse=True) and len(set(parameters)) == 3
    assert len(tables["speed"]) == 3 * len(names) and all(row["ms"] > 0 for row in tables["speed"])
    dense = [row for row in tables["speed"] if row["model"] == "dense"]
    assert all(row["speedup"] == row["ceiling"] == 1 for row in dense)
    monkeypatch.setattr(at_size.cost, "free_bytes", lambda device: 1000)
    with pytest.raises(InputError, match="dense needs .* are free"):
        measured("in_turn")


def test_a_model_inside_another_takes_no_memory():
    config = shape_config("shape:tiny")
    dense = random_model(config, "bfloat16", "cpu")
    small = at_size.inside(dense, at_size.shapes(config, 8)["half kept"])
    places = {p.untyped_storage().data_ptr() for p in dense.parameters()}
    assert {p.untyped_storage().data_ptr() for p in small.parameters()} <= places
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert small(ids).logits.isfinite().all() and not torch.equal(small(ids).logits, dense(ids).logits)
    assert all(p.is_contiguous() and p.dtype == torch.bfloat16 for p in small.parameters())


def test_pruning_and_refit(measured):
    stages = [row["stage"] for row in measured("pruning")["tables"]["stages"]]
    assert stages == ["layer removal", "sequential Taylor"]
    record = measured("refit", num_layers=2)
    assert [row["stage"] for row in record["tables"]["stages"]] == ["gradient covariances", "cost table", "sweep"]
    assert record["metrics"]["layers"]["value"] == 2


RECOVERED = {
    "model": "shape:tiny", "corpus": "random-tokens", "device": "cpu", "frontier.fractions": [0.5],
    "frontier.calibration.num_examples": 8, "frontier.calibration.length": 64, "frontier.test.num_examples": 4,
    "frontier.test.length": 64, "distillation.num_tokens": 256, "distillation.batch_tokens": 128,
    "evaluation.num_tokens": 512, "evaluation.short_window": 32, "evaluation.long_window": 64,
}  # fmt: skip


def test_recovery(tmp_path, monkeypatch):
    def scored(model, tokenizer, names, limit, rows):
        return pd.DataFrame({"task": "piqa", "example": [0, 1], "right": [0, 1], "nats": [-1.0, -2.0]})

    monkeypatch.setattr(recovery.tasks, "score_tasks", scored)
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"w{7 * i % 97}" for i in range(20_000)))
    at_size.at_size("smollm2-gpu", RECOVERED, tmp_path, ["recovery"], also=f"file:{other}")
    tables = read_record(tmp_path / "at_size_recovery.json")["tables"]
    rows = pd.DataFrame(tables["models"])
    assert rows["model"].unique().tolist() == ["dense", "refit-50", "distilled-50"]
    texts = zip(rows["corpus"], rows["window"], strict=True)
    assert list(texts) == [("random-tokens", 64), ("other.txt", 32), ("other.txt", 64)] * 3
    assert (rows.loc[rows["model"] == "dense", "ratio"] == 1).all()
    assert rows.loc[rows["model"] == "refit-50", "backbone_removed_percent"].between(49, 51).all()
    assert {row["model"] for row in tables["tasks"]} == {"dense", "distilled-50"}
    assert load_model(str(tmp_path / "models" / "distilled-50"), device="cpu").dtype == torch.float32
    monkeypatch.setattr("gqalib.prune.refit.mend", lambda *_: pytest.fail("what is kept was cut again"))
    at_size.at_size("smollm2-gpu", RECOVERED, tmp_path, ["recovery"], also=f"file:{other}")
    assert read_record(tmp_path / "at_size_recovery.json")["tables"]["models"] == tables["models"]


def test_a_training_stays_until_its_code_changes(windows, change_code, tmp_path, monkeypatch):
    settings = {"distillation.num_tokens": 60, "distillation.batch_tokens": 20}
    nb = SimpleNamespace(run_dir=tmp_path, preset=load_preset("tiny", settings), table=lambda *_: None)
    bench, steps, step = object.__new__(recovery.Bench), [], distill.Distiller.training_step
    vars(bench).update(nb=nb, teacher=small_model(), text=windows)
    monkeypatch.setattr(distill.Distiller, "training_step", lambda *given: steps.append(1) or step(*given))
    for _ in range(2):
        assert bench.teach(small_model(seed=5), "a") == 60 and len(steps) == 3
    change_code(distill)
    assert bench.teach(small_model(seed=5), "a") == 60 and len(steps) == 6


def test_widths_are_multiples_where_some_are_left():
    found = at_size.shapes(shape_config("shape:llama-3-8b"), 128)
    assert found["84.64 % kept"].intermediate_size % 128 == found["half kept"].intermediate_size % 128 == 0
    assert found["84.64 % removed"].num_key_value_heads == 1 and 0 < found["84.64 % removed"].intermediate_size < 128


def test_unknown_step(tmp_path, capsys):
    assert main(["at-size", "--out", str(tmp_path / "out"), "--steps", "sped"]) == 2
    assert not (tmp_path / "out").exists() and "unknown step" in capsys.readouterr().err


def test_fused_models_compute_the_same():
    model, ids = small_model(), torch.arange(12).view(2, 6)
    with torch.no_grad():
        plain = model(ids).logits
        with speed.fused(backend="aot_eager"):
            fused = model(ids).logits
        assert torch.allclose(fused, plain, atol=1e-5) and torch.equal(model(ids).logits, plain)
