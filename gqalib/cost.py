"""What a model costs: counted where it can be counted, measured where it cannot.

Units: bytes, FLOPs (not MACs), milliseconds, GB = 1e9 bytes. Shapes are read from the weights, so uneven layers count right.
"""

import contextlib
import ctypes
import gc
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd
import psutil
import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from gqalib.attention import attention_implementation
from gqalib.models import layer_shapes


def count_flops(model: nn.Module, batch_size: int, num_tokens: int) -> int:
    """FLOPs of one forward pass over [batch_size, num_tokens], counted operator by operator.

    Attention runs as `eager` for the count: torch's counter silently leaves out the fused CPU kernel.
    """
    input_ids = torch.zeros(batch_size, num_tokens, dtype=torch.long, device=model.device)
    with attention_implementation("eager", model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, use_cache=False)
    return counter.get_total_flops()


def closed_form_flops(model: nn.Module, num_tokens: int) -> int:
    """The same on paper, for n tokens: Σ_l 2n(2·d·h + 2·d·k + 3·d·f) + 4n²h, plus 2·n·d·vocabulary for lm_head.

    h, k, f: query, KV and MLP width of layer l; d: hidden size. The full n × n score matrix is counted, as eager attention computes it.
    Norms, softmax, rotary embedding and activations (no matrix products) are left out by both.
    """
    n, d, head_dim = num_tokens, model.config.hidden_size, model.config.head_dim
    total = 2 * n * d * model.config.vocab_size
    for shape in layer_shapes(model).itertuples():
        h, k, f = shape.num_attention_heads * head_dim, shape.num_key_value_heads * head_dim, shape.intermediate_size
        total += 2 * n * (2 * d * h + 2 * d * k + 3 * d * f) + 4 * n * n * h
    return total


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights; tied weights count once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def kv_cache_bytes_per_token(model: nn.Module) -> int:
    """Bytes that one token adds to the KV cache of one sequence: 2 · head_dim · itemsize · Σ_l num_key_value_heads."""
    kv_heads = int(layer_shapes(model)["num_key_value_heads"].sum())
    return 2 * model.config.head_dim * model.dtype.itemsize * kv_heads


def decode_bytes(model: nn.Module) -> int:
    """Bytes of weights that one decoded token reads at batch size 1: everything but an embedding table that is only looked up.

    A tied table is the lm_head too, and is read in full.
    """
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    return weight_bytes(model) - (0 if tied else table.numel() * table.element_size())


def decode_ceiling(dense: nn.Module, pruned: nn.Module) -> float:
    """The largest speed-up of decoding at batch size 1 that the bytes allow."""
    return decode_bytes(dense) / decode_bytes(pruned)


def peak_memory_gb(device: torch.device | str) -> float:
    """Peak memory so far in GB: the allocator's on a GPU (reset it first), the process' resident set on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---------------------------------------------------------------- time and memory of any block


@dataclass
class Used:
    """What a block took; memory in bytes above the start of the block."""

    seconds: float = 0.0  # wall time
    peak_bytes: int = 0
    held_bytes: int = 0  # not given back at the end


@contextlib.contextmanager
def measured(device: torch.device | str, every_s: float = 0.005) -> Iterator[Used]:
    """Wall time and memory of the block, filled in when it ends, by an error or not.

    On a GPU the memory is the allocator's, and the host's is left out; on a CPU it is the process' resident set, looked at
    `every_s` seconds by a thread, so a peak that is shorter can be missed.
    """
    used, memory, watch = Used(), *(_on_gpu(device) if torch.device(device).type == "cuda" else _on_cpu(every_s))
    before, peak, start = memory(), watch(), time.perf_counter()
    try:
        yield used
    finally:
        most = peak()  # waits for a GPU
        used.seconds = time.perf_counter() - start
        used.held_bytes = max(0, memory() - before)
        used.peak_bytes = max(used.held_bytes, most - before)


def _on_gpu(device: torch.device | str) -> tuple[Callable[[], int], Callable[[], Callable[[], int]]]:
    """A function that gives the bytes in use now, and one that starts to watch and gives a function for the most since."""

    def most() -> int:
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)

    def watch() -> Callable[[], int]:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most

    return lambda: torch.cuda.memory_allocated(device), watch


def _on_cpu(every_s: float) -> tuple[Callable[[], int], Callable[[], Callable[[], int]]]:
    """The same for the resident set of this process."""
    process, done, seen = psutil.Process(), threading.Event(), [0]

    def memory() -> int:
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):  # glibc keeps what was freed, and a later block would get it for nothing
            ctypes.CDLL(None).malloc_trim(0)
        return process.memory_info().rss

    def sample() -> None:
        while not done.wait(every_s):
            seen[0] = max(seen[0], process.memory_info().rss)

    def watch() -> Callable[[], int]:
        thread = threading.Thread(target=sample, daemon=True)
        thread.start()

        def most() -> int:
            done.set()
            thread.join()
            return max(seen[0], process.memory_info().rss)

        return most

    return memory, watch


# ---------------------------------------------------------------- time


def compare_speed(
    models: dict[str, nn.Module], batch_sizes: list[int], prompt_tokens: int, new_tokens: int, min_run_s: float = 0.5, rounds: int = 3
) -> pd.DataFrame:
    """Prefill and decode of several models, measured in turn in this process so that drift hits all alike.

    Returns:
        One row per model and batch size: `prefill_ms` (whole prompt), `decode_ms` (one token of each sequence, warm cache),
        their spread over the rounds (largest − smallest, in percent of the median), and `tokens_per_s` of decoding.
    """
    samples: dict[tuple[str, int, str], list[float]] = {}
    with torch.no_grad():
        for batch_size in batch_sizes:
            for _ in range(rounds):
                for name, model in models.items():
                    for phase, function in _phases(model, batch_size, prompt_tokens, new_tokens).items():
                        samples.setdefault((name, batch_size, phase), []).append(_time_ms(function, model.device, min_run_s / rounds))
    return pd.DataFrame([_speed_row(samples, name, size, new_tokens) for size in batch_sizes for name in models])


def _phases(model: nn.Module, batch_size: int, prompt_tokens: int, new_tokens: int) -> dict[str, Callable[[], object]]:
    prompt = torch.ones(batch_size, prompt_tokens, dtype=torch.long, device=model.device)
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    token = prompt[:, :1]

    def decode() -> None:
        for _ in range(new_tokens):
            model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-new_tokens)

    return {"prefill": lambda: model(input_ids=prompt, use_cache=True), "decode": decode}


def _time_ms(function: Callable[[], object], device: torch.device, min_run_s: float) -> float:
    """Median milliseconds of a call after a warm-up; CUDA events on a GPU, `blocked_autorange` on a CPU."""
    function()
    if device.type != "cuda":
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=min_run_s).median * 1e3
    times = []
    while sum(times) < min_run_s * 1e3:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _speed_row(samples: dict, name: str, batch_size: int, new_tokens: int) -> dict:
    row = {"model": name, "batch_size": batch_size}
    for phase, per in (("prefill", 1), ("decode", new_tokens)):
        times = samples[name, batch_size, phase]
        median = statistics.median(times)
        row |= {f"{phase}_ms": median / per, f"{phase}_spread_%": 100 * (max(times) - min(times)) / median}
    return row | {"tokens_per_s": batch_size * 1e3 / row["decode_ms"]}


# ---------------------------------------------------------------- money


def usd_per_million_tokens(tokens_per_s: float, usd_per_gpu_hour: float) -> float:
    """Price of a million decoded tokens at this throughput."""
    return usd_per_gpu_hour / 3600 / tokens_per_s * 1e6


def break_even_tokens(investment_usd: float, dense_usd_per_million: float, pruned_usd_per_million: float) -> float:
    """Decoded tokens after which the saving has paid the investment; infinity if there is no saving."""
    saving = (dense_usd_per_million - pruned_usd_per_million) / 1e6
    return investment_usd / saving if saving > 0 else float("inf")


def return_on_investment(
    investment_usd: float, dense_usd_per_million: float, pruned_usd_per_million: float, tokens_per_month: float
) -> float:
    """A month's saving as a multiple of the investment; negative if the pruned model costs more."""
    return (dense_usd_per_million - pruned_usd_per_million) * tokens_per_month / 1e6 / investment_usd
