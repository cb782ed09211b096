"""What a model costs, counted: parameters, FLOPs, bytes, ceilings, money; and the memory that a block of code took.

Units: bytes, FLOPs (not MACs), GB = 1e9 bytes. Shapes are read from the weights, which may be on the meta device, so
uneven layers count right. Speed is measured in `speed`.
"""

import contextlib
import ctypes
import gc
import resource
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gqalib.model.attention import attention_implementation
from gqalib.model.shapes import layer_shapes

CONTROL_GROUP = Path("/sys/fs/cgroup")  # what a container may use; of Linux


def count_flops(model: nn.Module, batch_size: int, num_tokens: int) -> int:
    """FLOPs of one forward pass over [batch_size, num_tokens], counted operator by operator.

    Attention runs as `eager` for the count: torch's counter silently leaves out the fused CPU kernel. The mask is
    given, and empty: to make one transformers looks at values, which a model on the meta device does not have.
    """
    input_ids = torch.zeros(batch_size, num_tokens, dtype=torch.long, device=model.device)
    mask = torch.zeros(1, 1, num_tokens, num_tokens, dtype=model.dtype, device=model.device)
    with attention_implementation("eager", model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    return counter.get_total_flops()


def closed_form_flops(model: nn.Module, num_tokens: int) -> int:
    """The same on paper, for n tokens: Σ_l 2n(2·d·h + 2·d·k + 3·d·f) + 4n²h, plus 2·n·d·vocabulary for lm_head.

    h, k, f: query, KV and MLP width of layer l; d: hidden size. The full n × n score matrix is counted, as eager
    attention computes it. Norms, softmax, rotary embedding and activations (no matrix products) are left out by both.
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


def step_bytes(model: nn.Module, batch_size: int = 1, context: int = 0) -> int:
    """Bytes that one step of decoding reads: every weight once, and the KV cache of `context` tokens of every sequence.

    weights − embedding table + batch_size · context · `kv_cache_bytes_per_token`. The table is only looked up, unless
    it is tied: then it is the lm_head too, and is read in full.
    """
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    weights = weight_bytes(model) - (0 if tied else table.numel() * table.element_size())
    return weights + batch_size * context * kv_cache_bytes_per_token(model)


def decode_ceiling(dense: nn.Module, pruned: nn.Module, batch_size: int = 1, context: int = 0) -> float:
    """The largest speed-up of decoding that the bytes allow: `step_bytes` of the one over those of the other.

    It holds while a step is limited by reading memory, as at small batches. Where arithmetic limits it, the ratio of
    the FLOPs does.
    """
    return step_bytes(dense, batch_size, context) / step_bytes(pruned, batch_size, context)


def prefill_flops(model: nn.Module, context: int) -> int:
    """FLOPs of reading n tokens as generation does it: `closed_form_flops` − Σ_l 2n²h − 2(n − 1)·d·vocabulary.

    A causal kernel computes half of the score matrix, and lm_head sees the last token only.
    """
    n, config = context, model.config
    widths = int(layer_shapes(model)["num_attention_heads"].sum()) * config.head_dim
    return closed_form_flops(model, n) - 2 * n * n * widths - 2 * (n - 1) * config.hidden_size * config.vocab_size


def prefill_ceiling(dense: nn.Module, pruned: nn.Module, context: int) -> float:
    """The largest speed-up of reading a prompt that the arithmetic allows: the ratio of `prefill_flops`. The batch
    size cancels out."""
    return prefill_flops(dense, context) / prefill_flops(pruned, context)


# ---------------------------------------------------------------- memory


def cache_bytes(model: nn.Module, batch_size: int, context: int) -> int:
    """Bytes of a full KV cache: batch_size · context · `kv_cache_bytes_per_token`."""
    return batch_size * context * kv_cache_bytes_per_token(model)


def prefill_bytes(model: nn.Module, batch_size: int, context: int) -> int:
    """Peak bytes, above the weights, of reading a prompt: the cache, and the activations of the widest layer.

    Per token and in units of the dtype: 2d + max_l(3f, 4h + 3k), the residual stream, its norm, and what an MLP (gate,
    up, their product) or an attention (q, k, v, rotated and not, and the output) holds at once; d, h, k, f as in
    `closed_form_flops`.
    """
    head_dim, shapes = model.config.head_dim, layer_shapes(model)
    attention = head_dim * (4 * shapes["num_attention_heads"] + 3 * shapes["num_key_value_heads"])
    widest = max(int(attention.max()), 3 * int(shapes["intermediate_size"].max()))
    per_token = kv_cache_bytes_per_token(model) + model.dtype.itemsize * (2 * model.config.hidden_size + widest)
    return batch_size * context * per_token


def free_bytes(device: torch.device | str) -> int:
    """What an allocation can still get: on a GPU the driver's free memory and what torch's allocator keeps for reuse,
    on a CPU what the machine and the control group leave, whose file cache gives way."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, KeyError):  # no control group, or no limit
        limit, used, stat = ((CONTROL_GROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        cache = dict(line.split() for line in stat.splitlines())["inactive_file"]
        free = min(free, int(limit) - int(used) + int(cache))
    return max(0, free)


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
def measured(*devices: torch.device | str, every_s: float = 0.005) -> Iterator[Used]:
    """Wall time and memory of the block, filled in when it ends, by an error or not.

    On GPUs the memory is the allocators', of all these cards together, and the host's is left out; on a CPU it is the
    process' resident set, looked at `every_s` seconds by a thread, so a peak that is shorter can be missed.
    """
    on_gpu = torch.device(devices[0]).type == "cuda"
    used, watch = Used(), _GpuWatch(*devices) if on_gpu else _CpuWatch(every_s)
    with old_objects_left_alone():
        before = watch.now()
        watch.begin()
        start = time.perf_counter()
        try:
            yield used
        finally:
            peak = watch.end()  # waits for a GPU
            used.seconds = time.perf_counter() - start
            used.held_bytes = max(0, watch.now() - before)
            used.peak_bytes = max(used.held_bytes, peak - before)


@contextlib.contextmanager
def old_objects_left_alone() -> Iterator[None]:
    """Inside, the garbage collector passes over what is there already: all of transformers, a third of a second each
    time. Around many `measured` it does so once."""
    outer = gc.get_freeze_count() == 0
    if outer:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if outer:
            gc.unfreeze()


class _GpuWatch:
    """The bytes in use now, and the most since `begin`. A GPU has one peak for all blocks that are under way: a block
    that begins or ends passes it on to the others, and then resets it."""

    under_way: ClassVar[list["_GpuWatch"]] = []

    def __init__(self, *devices: torch.device | str):
        self.devices, self.most = devices, dict.fromkeys(devices, 0)

    def now(self) -> int:
        return sum(map(torch.cuda.memory_allocated, self.devices))

    def begin(self) -> None:
        self._tell()
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
        self.under_way.append(self)

    def end(self) -> int:
        self._tell()
        self.under_way.remove(self)
        return sum(self.most.values())

    def _tell(self) -> None:
        for device in self.devices:
            torch.cuda.synchronize(device)
        for watch in self.under_way:
            watch.most = {d: max(most, torch.cuda.max_memory_allocated(d)) for d, most in watch.most.items()}


class _CpuWatch(threading.Thread):
    """The same for the resident set of this process."""

    def __init__(self, every_s: float):
        super().__init__(daemon=True)
        self.every_s, self.done, self.most, self.process = every_s, threading.Event(), 0, psutil.Process()
        self.begin = self.start

    def now(self) -> int:
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):  # glibc keeps what was freed: a later block would get it
            ctypes.CDLL(None).malloc_trim(0)
        return self.process.memory_info().rss

    def run(self) -> None:
        while not self.done.wait(self.every_s):
            self.most = max(self.most, self.process.memory_info().rss)

    def end(self) -> int:
        self.done.set()
        self.join()
        return max(self.most, self.process.memory_info().rss)


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
