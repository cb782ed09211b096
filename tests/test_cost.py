import time

import pytest
import torch
from conftest import kv_heads, small_model

from gqalib import cost, models, surgery


@pytest.fixture
def uneven(model):
    surgery.keep_groups(model, 0, range(max(1, kv_heads(model) - 1)))
    surgery.keep_channels(model, 1, range(10))
    return model


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
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 4
    assert cost.kv_cache_bytes_per_token(uneven) * windows.numel() == held


def test_bytes():
    untied, tied = small_model(tie_word_embeddings=False), small_model()
    table = 61 * 32 * 4
    assert cost.weight_bytes(untied) - cost.weight_bytes(tied) == table
    assert cost.decode_bytes(untied) == cost.weight_bytes(untied) - table
    assert cost.decode_bytes(tied) == cost.weight_bytes(tied)


def test_ceiling(clone):
    model = small_model(tie_word_embeddings=False)
    pruned = clone(model)
    assert cost.decode_ceiling(model, pruned) == 1
    surgery.keep_channels(pruned, 0, range(12))
    gone = 12 * 3 * 32 * 4
    assert cost.decode_ceiling(model, pruned) == pytest.approx(cost.decode_bytes(model) / (cost.decode_bytes(model) - gone))


def test_llama_3_8b_ceilings():
    """The two readings of 84.64 %: 1.2 if kept, about 10 if removed (METHODS 8)."""
    counts = models.count_parameters(models.empty_llama_3_8b())
    read = counts["total"] - counts["embeddings"] / 2
    assert read / (read - 0.1536 * counts["total"]) == pytest.approx(1.2, abs=0.01)
    assert read / (read - 0.8464 * counts["total"]) == pytest.approx(10.6, abs=0.2)


def test_speed_table(uneven):
    table = cost.compare_speed({"a": uneven, "b": uneven}, [1, 2], prompt_tokens=8, new_tokens=2, min_run_s=0.02)
    assert table[["model", "batch_size"]].to_numpy().tolist() == [["a", 1], ["b", 1], ["a", 2], ["b", 2]]
    assert (table[["prefill_ms", "decode_ms", "tokens_per_s"]] > 0).all().all()
    assert table["tokens_per_s"][2] == pytest.approx(2e3 / table["decode_ms"][2])


def test_decoding_leaves_the_cache_as_long_as_it_was(uneven):
    decode = cost._phases(uneven, 1, 8, 3)["decode"]
    decode()
    decode()  # fails or slows down if the first call had left its tokens behind
    cache = dict(zip(decode.__code__.co_freevars, (c.cell_contents for c in decode.__closure__), strict=True))["cache"]
    assert cache.get_seq_length() == 8


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
