import contextlib
import gc
import json
import re
import sys
import weakref
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import biased_model, small_config, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from gqalib import InputError, figures
from gqalib.measure import cost, speed
from gqalib.model import load, surgery
from gqalib.model.shapes import count_parameters, has_attention, layer_shapes
from gqalib.run import publish


@pytest.fixture
def small():
    """One uneven model, where how it is grouped makes no difference."""
    model = small_model(num_attention_heads=9, num_key_value_heads=3)
    surgery.keep_groups(model, 0, [0, 2])
    return model


# ---------------------------------------------------------------- the two phases


@torch.no_grad()
def test_a_decoding_step_is_the_models_own(uneven, windows):
    """A step over a full cache gives what the model gives for the last token after all the others, call after call."""
    expected = uneven(windows).logits[:, -1]
    dynamic = DynamicCache(config=uneven.config)
    uneven(windows[:, :-1], past_key_values=dynamic)
    full = speed.full_cache(uneven, len(windows), windows.shape[1])
    for own, other in zip(full.layers, [x for x in dynamic.layers if x.is_initialized], strict=True):
        own.keys[:, :, :-1], own.values[:, :, :-1] = other.keys, other.values
    position = torch.tensor([[windows.shape[1] - 1]])
    for _ in range(3):
        logits = uneven(windows[:, -1:], position_ids=position, past_key_values=full, use_cache=True).logits[:, 0]
        assert torch.allclose(logits, expected, atol=1e-5)
        assert full.layers[0].keys.shape[2] == windows.shape[1]


def test_the_cache_is_as_large_as_counted(uneven):
    cache = speed.full_cache(uneven, 3, 11)
    assert sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) == cost.cache_bytes(uneven, 3, 11)
    assert all(x.keys.std() > 0.5 and x.values.std() > 0.5 for x in cache.layers)


class NoLookingAtValues(TorchDispatchMode):
    """Fails where an operator would make a GPU wait for the host, which a CUDA graph cannot hold."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert str(function) not in (
            "aten._local_scalar_dense.default",
            "aten.nonzero.default",
            "aten.equal.default",
        ), function
        return function(*arguments, **(options or {}))


@torch.no_grad()
def test_a_decoding_step_looks_at_no_value_and_needs_no_mask(uneven, monkeypatch):
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: masks.append(k["attn_mask"]) or attend(*a, **k),
    )
    step = speed.decode_step(uneven, 2, 9)
    with NoLookingAtValues():
        assert step().shape == (2, 1, 61)
    assert masks == [None] * sum(map(has_attention, uneven.model.layers))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoLookingAtValues():
        torch.ones(1).item()


def test_a_captured_step_keeps_its_tensors(monkeypatch):
    """A CUDA graph holds addresses: were the cache given back, a replay would read what took its place."""
    calls, stream = [], SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda what: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: calls.append("replay")))
    cache = torch.ones(3)
    alive = weakref.ref(cache)
    replay = speed._captured(lambda cache=cache: calls.append("step"), torch.device("cuda"))
    del cache
    replay()
    gc.collect()
    assert calls == ["step"] * 4 + ["replay"] and alive() is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@torch.no_grad()
def test_a_captured_step_is_replayed(small):
    small.to("cuda")
    table = speed.compare_speed({"a": small}, [2], [16], 0.05, 1)
    assert (table["ms"] > 0).all() and not table["note"].any()


# ---------------------------------------------------------------- measuring


def test_table_of_every_point_in_turn(small, clone, monkeypatch):
    """One row per phase, batch size, context and model; in each round each model once; ratios are of one round."""
    turns, times = [], iter([8.0, 4.0, 9.0, 3.0, 6.0, 3.0] * 8)
    monkeypatch.setattr(
        speed, "_time_ms", lambda function, device, seconds: turns.append((function(), seconds)) or [next(times)]
    )
    table = speed.compare_speed({"dense": small, "cut": clone(small)}, [1, 2], [8, 12], 0.3, 3)
    assert table[["phase", "batch_size", "context"]].drop_duplicates().to_numpy().tolist() == [
        [phase, size, context] for phase in ("prefill", "decode") for size in (1, 2) for context in (8, 12)
    ]
    assert table["model"].tolist() == ["dense", "cut"] * 8 and len(turns) == 8 * 2 * 3
    assert [seconds for _, seconds in turns] == pytest.approx([0.1] * 48)
    cut = table[table["model"] == "cut"]
    assert cut[["ms", "speedup", "speedup_low", "speedup_high"]].drop_duplicates().to_numpy().tolist() == [
        [3.0, 2.0, 2.0, 3.0]
    ]
    assert (table[table["model"] == "dense"][["speedup", "speedup_low", "speedup_high"]] == 1).all().all()
    tokens = cut.set_index(["phase", "batch_size", "context"])["tokens_per_s"]
    assert tokens["prefill", 2, 12] == pytest.approx(24e3 / 3) and tokens["decode", 2, 12] == pytest.approx(2e3 / 3)


def test_measured_on_this_machine(small):
    table = speed.compare_speed({"a": small, "b": small}, [1], [8], 0.02)
    assert (table[["ms", "speedup", "tokens_per_s"]] > 0).all().all() and (table["note"] == "").all()
    assert (table["peak_gb"] >= 0).all() and table["joules_per_token"].isna().all()
    assert table["kv_cache_gb"].tolist() == [cost.cache_bytes(small, 1, 8) / 1e9] * 4


def test_calls_are_timed_for_so_long_and_at_least_once():
    calls = speed._time_ms(lambda: torch.ones(10), torch.device("cpu"), 0.02)
    assert len(calls) > 10 and 20 <= sum(calls) < 2000
    assert len(speed._time_ms(lambda: sum(range(100_000)), torch.device("cpu"), 1e-9)) == 1


def test_contexts_beyond_the_model_are_cut(small):
    table = speed.compare_speed({"a": small}, [1], [8, 64, 4096], 0.01, 1, ["decode"])
    assert table["context"].tolist() == [8, 64]


def test_a_point_without_memory_is_said_to_be_not_measured(small, monkeypatch):
    """Known before anything is timed; the points that fit are measured."""
    needed = cost.prefill_bytes(small, 4, 32)
    monkeypatch.setattr(cost, "free_bytes", lambda device: needed - 1)
    table = speed.compare_speed({"a": small, "b": small}, [1, 4], [32], 0.01, 1)
    notes = table.groupby(["phase", "batch_size"])["note"].agg(set).to_dict()
    says = re.fullmatch(r"not measured: needs (\S+) GiB, \S+ GiB are free", next(iter(notes.pop(("prefill", 4)))))
    assert float(says[1]) == pytest.approx(needed / 2**30, rel=0.01)
    assert list(notes.values()) == [{""}] * 3
    assert table["ms"].isna().sum() == 2


def test_running_out_of_memory_is_not_the_end(small, monkeypatch):
    def set_up(model, batch_size, context):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(speed.PHASES, "prefill", (set_up, cost.prefill_bytes))
    table = speed.compare_speed({"a": small}, [1], [8], 0.01, 1)
    assert [note.startswith("not measured") for note in table["note"]] == [True, False] and table[
        "ms"
    ].notna().tolist() == [False, True]


def test_energy_of_a_card_that_reports_it(small, monkeypatch):
    assert speed.energy_counter(torch.device("cpu")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert speed.energy_counter(torch.device("cuda:0")) is None  # not installed
    readings = iter([0, 7_000, 9_500])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-ab": 5}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda card: {5: next(readings)}[card],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab"))
    read = speed.energy_counter(torch.device("cuda:0"))
    assert read() == 7.0 and read() == 9.5  # joules


def test_joules_of_a_token(small, monkeypatch):
    readings = iter(range(0, 1000, 6))
    monkeypatch.setattr(speed, "energy_counter", lambda device: lambda: next(readings))
    monkeypatch.setattr(speed, "_time_ms", lambda function, device, seconds: [1.0, 1.0, 1.0])
    table = speed.compare_speed({"a": small}, [2], [8], 0.01, 1)
    assert table["joules_per_token"].tolist() == [2 / 16, 2 / 2]  # 6 J for three calls


def test_beside_ceilings(clone):
    dense = small_model(tie_word_embeddings=False)
    cut = clone(dense)
    surgery.keep_groups(cut, 0, [0])
    rows = [
        ("prefill", 1, 8, "cut", 1.0),
        ("decode", 1, 8, "cut", 1.0),
        ("decode", 8, 32, "cut", 1.2),
        ("decode", 8, 32, "dense", 1.0),
    ]
    table = pd.DataFrame(rows, columns=["phase", "batch_size", "context", "model", "speedup"])
    joined = speed.beside_ceilings(table, {"dense": dense, "cut": cut})
    ceilings = [
        cost.prefill_ceiling(dense, cut, 8),
        cost.decode_ceiling(dense, cut, 1, 8),
        cost.decode_ceiling(dense, cut, 8, 32),
        1.0,
    ]
    assert joined["ceiling"].tolist() == ceilings and len(set(ceilings)) == 4
    assert joined["of_ceiling_percent"][2] == pytest.approx(120 / ceilings[2])


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("kept", [0.9, 0.8464, 0.5, 0.1536])
def test_uniform_shape_keeps_what_was_asked(kept):
    config = load.shape_config("llama-3-8b")
    dense = count_parameters(load.random_model(config, device="meta"))
    cut = speed.uniform_shape(config, kept)
    counts = count_parameters(load.random_model(cut, device="meta"))
    assert abs(counts["total"] - kept * dense["total"]) <= 32 * 3 * 4096 / 2
    assert cut.num_attention_heads == 4 * cut.num_key_value_heads
    share = (counts["backbone"] / dense["backbone"]) * 8
    assert abs(cut.num_key_value_heads - max(1, share)) <= 0.5
    assert config.num_key_value_heads == 8  # the config that was given is left alone


def test_uniform_shape_with_biases():
    """Of a model that was pruned unevenly: its own groups are what is cut, and output biases stay."""
    model = biased_model(num_key_value_heads=8)
    for index, width in enumerate((4, 7, 24)):
        surgery.keep_groups(model, index, range(index + 1))
        surgery.keep_channels(model, index, range(width))
    cut = load.random_model(speed.uniform_shape(model.config, 0.9), device="meta")
    counts, dense = count_parameters(cut), count_parameters(model)
    assert abs(counts["total"] - 0.9 * dense["total"]) <= 3 * (3 * 32 + 2) / 2
    assert (layer_shapes(cut)["num_key_value_heads"] == 2).all()


def test_uniform_shape_of_an_uneven_model_runs_and_multiples_are_kept(model, windows, logits_of):
    config = small_config(num_attention_heads=9, num_key_value_heads=3, intermediate_size=256)
    cut = speed.uniform_shape(config, 0.5, multiple=32)
    assert cut.intermediate_size % 32 == 0
    assert logits_of(load.random_model(cut, device="cpu")).shape == (6, 20, 61)
    surgery.keep_channels(model, 0, range(5))  # per-layer entries are left behind
    assert layer_shapes(load.random_model(speed.uniform_shape(model.config, 0.8), device="meta")).nunique().max() == 1


def test_a_share_that_cannot_be():
    with pytest.raises(InputError, match="13 % of the parameters cannot be kept, 15.18 % at least must"):
        speed.uniform_shape(load.shape_config("llama-3-8b"), 0.13)


def test_aligned_shapes_are_multiples_of_just_that():
    shapes = speed.aligned_shapes(load.shape_config("llama-3-8b"), 0.75)
    target = speed.uniform_shape(load.shape_config("llama-3-8b"), 0.75).intermediate_size
    widths = [shape.intermediate_size for shape in shapes.values()]
    assert [width & -width for width in widths] == [1, 8, 64, 128]
    assert all(abs(width - target) <= width & -width for width in widths)
    assert len(speed.aligned_shapes(small_config(), 0.75)) == 1  # a width of 15 has no room for any


def test_compare_alignment():
    config = small_config(intermediate_size=256)
    table = speed.compare_alignment(config, 0.8, [8, 32, 1024], "float32", "cpu", [1], [8], 0.01, 1)
    assert table["model"].nunique() == 3 and (table["speedup"] > 0).all()
    first = table[table["model"] == table["model"][0]]
    assert (
        int(first["model"].iloc[0].split()[1]) % 2 == 1
        and (first["speedup"] == 1).all()
        and (first["ceiling"] == 1).all()
    )


# ---------------------------------------------------------------- what is drawn and published


@pytest.fixture
def record():
    """Two points of a run at real size, the second without memory."""
    row = {"phase": "decode", "batch_size": 1, "context": 128, "note": ""}
    measured = {"speedup": 1.123, "speedup_low": 1.1, "speedup_high": 1.2, "ceiling": 1.25}
    missing = row | {
        "batch_size": 32,
        "context": 8192,
        "note": "not measured: needs 90 GiB, 20 GiB are free",
        "ceiling": 1.3,
    }
    dense = {"model": "dense", "speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0, "ceiling": 1.0}
    rows = [row | dense, row | measured | {"model": "v3"}, missing | {"model": "dense"}, missing | {"model": "v3"}]
    parameters = {"model": "shape:llama-3-8b", "dtype": "bfloat16"}
    names = {"schema": 1, "notebook": "at_size_speed", "device": "cuda", "machine": "Linux, NVIDIA X"}
    return names | {"parameters": parameters, "tables": {"speed": rows}}


def test_readme_says_not_measured_until_there_is_a_record(record, tmp_path):
    assert publish.cost_block(tmp_path).startswith("Speed at this size: not measured.")
    assert publish.recovery_block(tmp_path) == "A real model on a GPU: not measured."
    folder = tmp_path / "llama3-8b-shape"
    folder.mkdir()
    (folder / "at_size_speed.json").write_text(json.dumps(record))
    stage = {"stage": "sweep", "seconds": 41.6, "expected_gb": 10.62, "peak_gb": 11.24}
    others = {"schema": 1, "metrics": {"layers": {"value": 3}}, "tables": {"stages": [stage]}}
    for name in ("at_size_pruning", "at_size_refit"):
        (folder / f"{name}.json").write_text(json.dumps(others | {"notebook": name}))
    block = publish.cost_block(tmp_path)
    assert "| phase | batch | context | v3 |" in block
    assert "| decode | 1 | 128 | 1.12 (1.10–1.20) of 1.25 |" in block
    assert "| decode | 32 | 8192 | not measured: needs 90 GiB, 20 GiB are free |" in block
    assert "shape:llama-3-8b with random weights in bfloat16, Linux, NVIDIA X" in block
    assert block.endswith("| sweep | 3 | 42 | 10.6 | 11.2 |")
    in_turn = record | {"notebook": "at_size_in_turn", "machine": "Linux, 2 cores"}
    (folder / "at_size_in_turn.json").write_text(json.dumps(in_turn))
    assert publish.cost_block(tmp_path).endswith("in bfloat16, Linux, 2 cores.")


def test_a_recovery_that_was_cut_off_is_not_shown(tmp_path):
    (tmp_path / "smollm2-gpu").mkdir()
    record = {"schema": 1, "notebook": "at_size_recovery", "tables": {"models": [{"model": "dense"}]}}
    (tmp_path / "smollm2-gpu" / "at_size_recovery.json").write_text(json.dumps(record))
    assert publish.recovery_block(tmp_path) == "A real model on a GPU: not measured."


def test_recovered_models_of_several_runs_are_one_table(tmp_path):
    row = {"window": 512, "corpus": "own", "perplexity": 30.0, "ratio": 1.0, "error": 0.0, "num_tokens": None}
    dense = row | {"model": "dense", "fraction": None, "parameters_kept_percent": 100.0}
    answers = {"task": "piqa", "accuracy": 62.84, "error": 1.5, "chance": 50.0}
    for cut in (61.5, 25):
        model = {"model": f"distilled-{cut}", "fraction": cut / 100, "parameters_kept_percent": 99.0 - cut}
        taught = row | model | {"ratio": 1 + cut / 100, "error": 0.02, "num_tokens": 2e7}
        tables = {"models": [dense, taught], "tasks": [answers | {"model": name} for name in ("dense", model["model"])]}
        record = {
            "schema": 1,
            "notebook": "at_size_recovery",
            "parameters": {"model": "m"},
            "machine": "Linux, 2 cores",
        }
        folder = tmp_path / f"smollm2-gpu-{cut}"
        folder.mkdir()
        (folder / "at_size_recovery.json").write_text(json.dumps(record | {"tables": tables}))
    lines = publish.recovery_block(tmp_path).splitlines()
    assert lines[0] == "| model | parameters kept % | tokens of distillation | own, 512 |"
    assert lines[2] == "| dense | 100.0 | 0 | 30.00 |" and lines[3].startswith(
        "| distilled-25 | 74.0 | 20,000,000 | 1.250 ±"
    )
    assert lines[4].endswith("| 1.615 ± 0.020 × |") and "m, Linux, 2 cores" in lines[6]
    assert lines[-3:] == [f"| {m} | 62.8 ± 1.5 |" for m in ("dense", "distilled-25", "distilled-61.5")]


def test_speedup_dots_have_their_range_and_name_what_is_missing(record):
    fig, ax = plt.subplots()
    figures.speedup_dots(ax, pd.DataFrame(record["tables"]["speed"]), "decode")
    (dots,) = ax.containers
    assert dots.lines[0].get_ydata() == pytest.approx([1.123, np.nan], nan_ok=True)
    assert dots.lines[2][0].get_segments()[0][:, 1] == pytest.approx([1.1, 1.2])
    assert [text.get_text() for text in ax.texts] == ["not measured"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1 × 128", "32 × 8,192"]
    ticks = ax.collections[-1].get_offsets()
    assert np.ma.filled(ticks, np.nan)[:, 1].tolist() == pytest.approx([1.25, np.nan], nan_ok=True)
    assert ax.get_yscale() == "log"
    plt.close(fig)


def test_joules_are_those_of_the_calls(monkeypatch):
    """Filling a cache, warming up and capturing cost energy, too, but not the call's."""
    joules = [0.0]

    def set_up(model, batch_size, context):
        joules[0] += 1000
        return lambda: joules.__setitem__(0, joules[0] + 4)

    monkeypatch.setattr(speed, "PHASES", {"decode": (set_up, lambda *_: 0)})
    monkeypatch.setattr(speed, "energy_counter", lambda device: lambda: joules[0])
    table = speed.compare_speed({"dense": small_model()}, [2], [8], 0.001, 2, ["decode"])
    assert table["joules_per_token"].tolist() == [2.0]
