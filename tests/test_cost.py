import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import MEASURED, small_model

from gqalib.measure import cost, speed
from gqalib.model import load, surgery


def test_counted_flops_equal_the_closed_form(uneven):
    assert cost.count_flops(uneven, 1, 16) == cost.closed_form_flops(uneven, 16)
    assert uneven.config._attn_implementation == "sdpa"


def test_closed_form_by_hand():
    model = small_model(num_hidden_layers=1)  # d 32, 8 × 6 query, 4 × 6 KV, MLP 24, vocabulary 61
    n = 10
    expected = 2 * n * (2 * 32 * 48 + 2 * 32 * 24 + 3 * 32 * 24) + 4 * n * n * 48 + 2 * n * 32 * 61
    assert cost.closed_form_flops(model, n) == expected


def test_kv_cache_bytes_are_the_caches(uneven, windows):
    cache = uneven(windows, use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers if layer.is_initialized) * 4
    assert cost.kv_cache_bytes_per_token(uneven) * windows.numel() == held


def test_step_bytes():
    untied, tied = small_model(tie_word_embeddings=False), small_model()
    table = 61 * 32 * 4
    assert cost.weight_bytes(untied) - cost.weight_bytes(tied) == table
    assert cost.step_bytes(untied) == cost.weight_bytes(untied) - table
    assert cost.step_bytes(tied) == cost.weight_bytes(tied)
    assert cost.step_bytes(tied, 8, 100) == cost.weight_bytes(tied) + 8 * 100 * (
        3 * 2 * 4 * 6 * 4
    )  # layers, k and v, heads, head_dim, float32


def test_decode_ceiling(clone):
    model = small_model(tie_word_embeddings=False)
    pruned = clone(model)
    assert cost.decode_ceiling(model, pruned) == 1
    surgery.keep_channels(pruned, 0, range(12))
    gone, read = 12 * 3 * 32 * 4, cost.step_bytes(model)
    assert cost.decode_ceiling(model, pruned) == pytest.approx(read / (read - gone))
    cache = (
        4 * 64 * cost.kv_cache_bytes_per_token(model)
    )  # channels leave the cache alone, so it dilutes what they save
    assert cost.decode_ceiling(model, pruned, 4, 64) == pytest.approx((read + cache) / (read + cache - gone))


def test_prefill_ceiling(clone):
    model = small_model()
    pruned = clone(model)
    surgery.keep_channels(pruned, 0, range(12))
    n = 10  # d 32, three layers of 8 × 6 query, 4 × 6 KV, MLP 24; half of a causal score matrix; one token's logits
    flops = 3 * (2 * n * (2 * 32 * 48 + 2 * 32 * 24 + 3 * 32 * 24) + 2 * n * n * 48) + 2 * 32 * 61
    assert cost.prefill_flops(model, n) == flops
    assert cost.prefill_ceiling(model, pruned, n) == pytest.approx(flops / (flops - 2 * n * 3 * 32 * 12))


def test_llama_3_8b_ceilings():
    """The two readings of 84.64 %: 1.2 if kept, about 10 if removed (METHODS 8)."""
    config = load.shape_config("llama-3-8b")
    dense = load.random_model(config, "bfloat16", "meta")
    readings = {
        kept: load.random_model(speed.uniform_shape(config, kept), "bfloat16", "meta") for kept in (0.8464, 0.1536)
    }
    assert cost.decode_ceiling(dense, readings[0.8464]) == pytest.approx(1.2, abs=0.01)
    assert cost.decode_ceiling(dense, readings[0.1536]) == pytest.approx(10.6, abs=0.1)


def test_shapes_are_counted_without_weights(uneven):
    """A model on the meta device has the same FLOPs and bytes."""
    empty = load.random_model(uneven.config, "float32", "meta")
    assert cost.count_flops(empty, 2, 16) == cost.count_flops(uneven, 2, 16)
    assert cost.step_bytes(empty, 3, 9) == cost.step_bytes(uneven, 3, 9)


PREFILL = """
import json, sys, torch
from conftest import small_model
from gqalib.measure import cost
model = small_model(hidden_size=256, max_position_embeddings=512, **json.loads(sys.argv[1]))
prompt = torch.ones(16, 512, dtype=torch.long)
with torch.no_grad():
    model(prompt[:1], logits_to_keep=1)
    with cost.measured("cpu", every_s=0.001) as used:
        model(prompt, use_cache=True, logits_to_keep=1)
print(used.peak_bytes / cost.prefill_bytes(model, 16, 512))
"""


@pytest.mark.parametrize(
    "widths",
    [
        {"num_attention_heads": 16, "head_dim": 16, "intermediate_size": 1792},
        {"num_attention_heads": 64, "head_dim": 16},
    ],
)
def test_prefill_bytes_is_the_peak(widths):
    """Wide in the MLP, or in attention: the estimate is within a third of what a process of its own took, which has
    no heap to reuse."""
    command = [sys.executable, "-c", PREFILL, json.dumps(widths)]
    finished = subprocess.run(command, env=MEASURED, capture_output=True, text=True, check=True, timeout=300)
    assert float(finished.stdout.splitlines()[-1]) == pytest.approx(1, rel=0.34)


def test_free_bytes():
    before = cost.free_bytes("cpu")
    block = torch.ones(100_000_000)
    assert cost.free_bytes("cpu") < before and before > 1e9 and block.numel()


def test_free_bytes_of_a_gpu(monkeypatch):
    """What the driver has free, and what torch's allocator holds and does not use."""
    for name, value in {"mem_get_info": (100, 1000), "memory_reserved": 70, "memory_allocated": 50}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert cost.free_bytes("cuda:0") == 120


def test_free_bytes_minds_the_control_group(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 600\n")
    monkeypatch.setattr(cost, "CONTROL_GROUP", tmp_path)
    assert cost.free_bytes("cpu") == 3600
    (tmp_path / "memory.max").write_text("max\n")
    assert cost.free_bytes("cpu") > 10**6


def test_measured_sees_the_peak_and_the_seconds():
    with cost.measured("cpu") as used:
        block = torch.ones(50_000_000)  # 200 MB
        time.sleep(0.05)
        del block
    assert 150e6 < used.peak_bytes < 400e6 and used.held_bytes < 20e6 and 0.05 < used.seconds < 5
    with cost.measured("cpu") as used:
        pass
    assert used.peak_bytes < 20e6 and used.seconds < 0.5


def test_measured_tells_what_is_still_held():
    with cost.measured("cpu") as used:
        block = torch.ones(50_000_000)
    assert 150e6 < used.held_bytes <= used.peak_bytes < 400e6 and len(block)


def test_measured_does_not_give_a_block_what_the_last_one_freed():
    def many_small() -> int:
        with cost.measured("cpu") as used:
            blocks = [torch.ones(250_000) for _ in range(100)]  # 1 MB each, on the heap
            time.sleep(0.02)
        del blocks
        return used.peak_bytes

    assert min(many_small(), many_small()) > 80e6


def test_measured_asks_the_allocator_of_a_gpu(monkeypatch):
    """The order of the calls, on an allocator that holds 100 bytes before, 150 after and 300 at most."""
    calls, held = [], iter([100, 150])
    answers = {
        "synchronize": lambda: None, "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: next(held), "max_memory_allocated": lambda: 300,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, answer=answer: calls.append(name) or answer())
    with cost.measured("cuda:0") as used:
        calls.append("block")
    assert (used.peak_bytes, used.held_bytes) == (200, 50)
    assert calls.index("reset_peak_memory_stats") < calls.index("block") < calls.index("max_memory_allocated")
    assert calls[calls.index("block") + 1] == "synchronize"


def test_measured_fills_in_after_an_error():
    with pytest.raises(ValueError, match="stop"), cost.measured("cpu") as used:
        time.sleep(0.02)
        raise ValueError("stop")
    assert used.seconds > 0.02


def test_money():
    assert cost.usd_per_million_tokens(1000, 3.6) == pytest.approx(1.0)
    assert cost.break_even_tokens(10, 2.0, 1.0) == pytest.approx(10e6)
    assert cost.break_even_tokens(10, 1.0, 1.0) == float("inf")
    assert cost.return_on_investment(10, 2.0, 1.0, 1e9) == pytest.approx(100)
    assert cost.return_on_investment(10, 1.0, 2.0, 1e9) == pytest.approx(-100)


def test_a_block_inside_another_leaves_its_peak(monkeypatch):
    """A GPU has one peak, which each block starts anew: what came before must not be lost to the block around it."""
    used = {"now": 0, "peak": 0}
    fakes = {
        "synchronize": lambda _: None,
        "memory_allocated": lambda _: used["now"],
        "max_memory_allocated": lambda _: used["peak"],
        "reset_peak_memory_stats": lambda _: used.update(peak=used["now"]),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def take(size):
        used.update(peak=max(used["peak"], used["now"] + size))

    with cost.measured("cuda:0") as outer:
        take(100)
        with cost.measured("cuda:0") as inner:
            take(10)
    assert (inner.peak_bytes, outer.peak_bytes) == (10, 100)


def test_cards_have_peaks_of_their_own(monkeypatch):
    """A model that is spread over two: what one held is not the other's."""
    peaks = {"cuda:0": 100, "cuda:1": 7}
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.get)
    with cost.measured("cuda:1") as little, cost.measured("cuda:0") as large:
        pass
    assert (large.peak_bytes, little.peak_bytes) == (100, 7)
