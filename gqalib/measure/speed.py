"""How fast models are: prefill and decode, measured in turn in one process, so that drift of the machine hits all
alike.

*Prefill* reads a prompt of `context` tokens of every sequence and computes the last token's logits. *Decode* is one
step of generation: one token of every sequence, which attends to a cache that holds `context` tokens with it. On a GPU
the step is captured once as a CUDA graph and replayed: without it, launching a thousand kernels takes longer than what
a small batch gives them to do, and hides what pruning saves. What can be counted instead stands in `cost`.
"""

import contextlib
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest.mock import patch

import pandas as pd
import torch
from torch import nn
from transformers.cache_utils import Cache, StaticLayer
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gqalib.errors import InputError
from gqalib.measure import cost
from gqalib.model.load import random_model
from gqalib.model.modeling_gqa_llama import GqaLlamaConfig
from gqalib.model.shapes import count_parameters, decoder_layers, layer_shapes
from gqalib.prune.plans import unit_costs

# ---------------------------------------------------------------- the two phases


class FullLayer(StaticLayer):
    """A layer of a static cache that is full: the new token takes the last place, call after call, and attends to all
    of it.

    Every place counts, so no mask is needed, and attention takes the fastest kernel that it has.
    """

    is_compileable = False  # transformers' word for "has places that must be masked"

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, ...]:
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.max_cache_len - 1


def full_cache(model: nn.Module, batch_size: int, context: int) -> Cache:
    """A cache of `context` places for every sequence, filled with noise: zeros would let a GPU draw less power and
    run faster."""
    kv_heads = [count for count in layer_shapes(model)["num_key_value_heads"].tolist() if count]
    cache = Cache(layers=[FullLayer(context) for _ in kv_heads])
    cache.early_initialization(batch_size, kv_heads, model.config.head_dim, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys.normal_(), layer.values.normal_()
    return cache


def decode_step(model: nn.Module, batch_size: int, context: int) -> Callable[[], torch.Tensor]:
    """One step of decoding as a call without arguments, which gives the logits [batch_size, 1, vocabulary]; no call
    looks at values."""
    cache = full_cache(model, batch_size, context)
    token = torch.ones(batch_size, 1, dtype=torch.long, device=model.device)
    position = torch.full((1, 1), context - 1, device=model.device)
    return lambda: model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits


def _decode(model: nn.Module, batch_size: int, context: int) -> Callable[[], object]:
    step = decode_step(model, batch_size, context)
    return _captured(step, model.device) if model.device.type == "cuda" else step


def _captured(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same as a CUDA graph, warmed up on a stream of its own, as capture asks for."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return lambda step=step: graph.replay()  # a graph knows addresses only: what lies there has to outlive it


def _prefill(model: nn.Module, batch_size: int, context: int) -> Callable[[], object]:
    prompt = torch.randint(model.config.vocab_size, (batch_size, context), device=model.device)
    return lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1)


# phase: how to set it up, the bytes that it needs above the weights
PHASES = {"prefill": (_prefill, cost.prefill_bytes), "decode": (_decode, cost.cache_bytes)}


@contextlib.contextmanager
def fused(backend: str = "inductor") -> Iterator[None]:
    """Inside, norms and rotary embedding are compiled, so that a step of decoding launches half as many kernels.

    Small kernels take a GPU longer to start than to run, and pruning makes all of them smaller and none of them fewer.
    """
    compiled = partial(torch.compile, dynamic=True, backend=backend)
    with contextlib.ExitStack() as inside:
        inside.enter_context(torch._dynamo.config.patch(recompile_limit=64))  # of the many shapes
        for owner, name in ((LlamaRMSNorm, "forward"), (modeling_llama, "apply_rotary_pos_emb")):
            inside.enter_context(patch.object(owner, name, compiled(getattr(owner, name))))
        yield


# ---------------------------------------------------------------- measuring


@torch.no_grad()
def compare_speed(
    models: dict[str, nn.Module], batch_sizes: Sequence[int], contexts: Sequence[int], min_run_s: float = 0.5,
    rounds: int = 5, phases: Sequence[str] = tuple(PHASES),
) -> pd.DataFrame:  # fmt: skip
    """Prefill and decode of several models on one device, at every batch size and context; the first is what the
    others are compared with.

    In each round every model is timed once, one after the other, and the first model's time over this one's is one
    sample of the speed-up. One call of each before the first round warms up and shows the peak of memory. A point that
    one of the models has no memory for is not measured for any; this is decided before the first is timed.

    Args:
        contexts: tokens; those above the models' `max_position_embeddings` are cut to it.
        min_run_s: seconds of measurement per model and point, all rounds together.

    Returns:
        One row per phase, batch size, context and model: `ms` of a call (median of the rounds), `speedup` (median of
        the rounds' ratios) with `speedup_low` and `speedup_high` (the lowest and the highest), `tokens_per_s` (read or
        written), `peak_gb` above what was held before, `kv_cache_gb`, `joules_per_token` where a card reports its
        energy, `note`: "" or why it was not measured.
    """
    longest = min(model.config.max_position_embeddings for model in models.values())
    points = itertools.product(phases, batch_sizes, sorted({min(context, longest) for context in contexts}))
    free, rows = cost.free_bytes(_device(models)), []
    needed = {point: max(PHASES[point[0]][1](model, *point[1:]) for model in models.values()) for point in points}
    with cost.old_objects_left_alone():
        for point, size in needed.items():
            note, found = "", ({}, {}, {})
            try:
                if size > free:
                    raise torch.OutOfMemoryError
                found = _measure(models, point, min_run_s / rounds, rounds)
            except torch.OutOfMemoryError:  # the estimate can be wrong: the hours before must not be lost
                note = f"not measured: needs {size / 2**30:.3g} GiB, {free / 2**30:.3g} GiB are free"
            rows += [_row(point, name, models, *found, note) for name in models]
    return pd.DataFrame(rows)


def _device(models: dict[str, nn.Module]) -> torch.device:
    return next(iter(models.values())).device


def _measure(
    models: dict[str, nn.Module], point: tuple[str, int, int], min_run_s: float, rounds: int
) -> tuple[dict, dict, dict]:
    """Milliseconds and joules of a call for every model, one entry per round, and the peak bytes.

    What a model needs for the point is made for its turn and given back, so that two caches never lie in memory
    together.
    """
    (phase, *size), device = point, _device(models)
    set_up, read_joules = PHASES[phase][0], energy_counter(device)
    times, joules, peaks = {name: [] for name in models}, {name: [] for name in models}, {}
    for name, model in models.items():
        with cost.measured(device) as used:
            set_up(model, *size)()
        peaks[name] = used.peak_bytes
    for name, model in list(models.items()) * rounds:
        call = set_up(model, *size)
        before = read_joules() if read_joules else 0.0  # what setting up took is not the call's
        calls = _time_ms(call, device, min_run_s)
        del call
        times[name].append(statistics.median(calls))
        joules[name] += [(read_joules() - before) / len(calls)] if read_joules else []
    return times, joules, peaks


@torch.no_grad()
def _time_ms(function: Callable[[], object], device: torch.device, min_run_s: float) -> list[float]:
    """Milliseconds of each call, for so many seconds and at least once; CUDA events on a GPU, the wall clock on a
    CPU."""
    times = []
    while sum(times) < min_run_s * 1e3:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(), function(), end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end))
        else:
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
    return times


def _row(
    point: tuple[str, int, int], name: str, models: dict[str, nn.Module], times: dict[str, list[float]],
    joules: dict[str, list[float]], peaks: dict[str, int], note: str,
) -> dict[str, object]:  # fmt: skip
    """One of the rows of `compare_speed`; `times`: milliseconds, one per round."""
    phase, batch_size, context = point
    row = {"phase": phase, "batch_size": batch_size, "context": context, "model": name}
    row |= {"kv_cache_gb": cost.cache_bytes(models[name], batch_size, context) / 1e9, "note": note}
    if note:
        return row
    ratios = [dense / pruned for dense, pruned in zip(times[next(iter(models))], times[name], strict=True)]
    ms, tokens = statistics.median(times[name]), batch_size * (context if phase == "prefill" else 1)
    energy = statistics.median(joules[name]) / tokens if joules[name] else float("nan")
    row |= {"ms": ms, "speedup": statistics.median(ratios), "speedup_low": min(ratios), "speedup_high": max(ratios)}
    return row | {"tokens_per_s": tokens * 1e3 / ms, "peak_gb": peaks[name] / 1e9, "joules_per_token": energy}


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """A function for the joules that a card has used so far, as NVML counts them; None where there is no NVML or the
    card does not say."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
    # noqa: BLE001 not installed, no driver, or a card that does not report it: each has an exception of its own
    except Exception:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3


def beside_ceilings(table: pd.DataFrame, models: dict[str, nn.Module]) -> pd.DataFrame:
    """The rows of `compare_speed` with `ceiling`, the speed-up that bytes (decode) or FLOPs (prefill) allow, and
    `of_ceiling_percent`.

    `models` are the same as in `compare_speed`, the first one dense; shapes on the meta device do as well.
    """
    dense = next(iter(models.values()))

    def ceiling(row: pd.Series) -> float:
        pruned = models[row["model"]]
        if row["phase"] == "prefill":
            return cost.prefill_ceiling(dense, pruned, row["context"])
        return cost.decode_ceiling(dense, pruned, row["batch_size"], row["context"])

    joined = table.assign(ceiling=table.apply(ceiling, axis=1))
    speedup = joined.get("speedup")  # there is none where no point was measured
    return joined if speedup is None else joined.assign(of_ceiling_percent=100 * speedup / joined["ceiling"])


# ---------------------------------------------------------------- shapes to measure


def uniform_shape(config: GqaLlamaConfig, kept: float, multiple: int = 1) -> GqaLlamaConfig:
    """The same cut in every layer, so that `kept` of all parameters stay, within a channel (or `multiple`) of each
    layer.

    Whole groups come as near to the backbone's share as they can; what their rounding leaves is met by the MLP's width.
    Speed depends on shapes alone: `random_model` makes a model of it.

    Raises:
        InputError: embeddings, norms, one group and `multiple` channels of each layer are more than that.
    """
    model = random_model(config, device="meta")
    counts, shapes = count_parameters(model), layer_shapes(model)
    layers, kv_heads = len(shapes), shapes["num_key_value_heads"].sum()
    size = round(shapes["num_attention_heads"].sum() / kv_heads)
    smallest = _reshaped(config, num_attention_heads=size, num_key_value_heads=1, intermediate_size=multiple)
    smallest = random_model(smallest, device="meta")
    group, channel = unit_costs(decoder_layers(smallest)[0])
    output_biases = count_parameters(smallest)["backbone"] / layers - group - multiple * channel
    backbone = kept * counts["total"] - counts["embeddings"] - counts["norms"]
    groups = max(1, round(kv_heads / layers * backbone / counts["backbone"]))
    width = round((backbone / layers - groups * group - output_biases) / channel / multiple) * multiple
    if width < multiple:
        least = 100 * count_parameters(smallest)["total"] / counts["total"]
        told = f"{100 * kept:.4g} % of the parameters cannot be kept, {least:.4g} % at least must"
        raise InputError(f"{told}: give a larger share")
    return _reshaped(config, num_attention_heads=groups * size, num_key_value_heads=groups, intermediate_size=width)


def _reshaped(config: GqaLlamaConfig, **changes: int) -> GqaLlamaConfig:
    config = copy.deepcopy(config)
    config.update({"per_layer_config": None, **changes})
    config.validate_architecture()
    return config


def aligned_shapes(
    config: GqaLlamaConfig, kept: float, multiples: Sequence[int] = (8, 64, 128)
) -> dict[str, GqaLlamaConfig]:
    """`uniform_shape` with an odd MLP width, and with the nearest widths that are multiples of these and of nothing
    twice as large.

    Multiples of more than a quarter of the width are left out: they would be another cut.
    """
    cut = uniform_shape(config, kept)
    width = cut.intermediate_size
    shapes = {}
    for multiple in (1, *(m for m in multiples if 4 * m <= width)):
        nearest = (2 * round((width / multiple - 1) / 2) + 1) * multiple
        shapes[f"width {nearest:,}"] = _reshaped(cut, intermediate_size=nearest)
    return shapes


def compare_alignment(
    config: GqaLlamaConfig, kept: float, multiples: Sequence[int], dtype: str, device: str, *args, **kwargs
) -> pd.DataFrame:
    """`compare_speed` of `aligned_shapes` beside their ceilings, all compared with the odd width; random weights.

    The widths differ by a little, and the ceiling says how much speed that alone can explain. Other arguments go to
    `compare_speed`.
    """
    shapes = aligned_shapes(config, kept, multiples)
    models = {name: random_model(shape, dtype, device) for name, shape in shapes.items()}
    return beside_ceilings(compare_speed(models, *args, **kwargs), models)
