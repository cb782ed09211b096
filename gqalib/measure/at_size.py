"""Cost and pruning of a model too large to run the series on, by its shape alone: `python -m gqalib at-size`.

Steps, each with a record of its own that is written as results come, so that a run that is cut off keeps what it has.
In all but the last weights and words are random, so time, memory and speed are the real model's, and perplexities mean
nothing:

    speed     prefill and decode at every batch size and context, beside the ceilings; widths that
              hardware likes and that it does not
    in_turn   the same for one sequence, all models in the memory of the dense one: for a processor, whose memory holds
              no two of them
    pruning   the founding document's method: layer removal, sequential scores, surgery
    refit     gradient covariances, cost table and sweep, with layers and streams waiting in host memory
    recovery  a real model, preset `smollm2-gpu`: the refit and distillation with much text, see `measure.recovery`
"""

import contextlib
import itertools
import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from gqalib.errors import InputError
from gqalib.measure import cost, recovery, speed
from gqalib.model.load import load_config, random_model, resolve_device
from gqalib.model.modeling_gqa_llama import GqaLlamaConfig
from gqalib.model.shapes import layer_shapes
from gqalib.prune import allocate, founding, plans, refit, scores
from gqalib.run.checks import STEPS
from gqalib.run.notebook import Notebook
from gqalib.run.presets import Sample
from gqalib.stream import streamed

ROUNDS = 5
READS = ("removal", "calibration", "pruning", "frontier", "cost")
KEPT = {"84.64 % kept": 0.8464, "half kept": 0.5, "84.64 % removed": 0.1536}  # of all parameters


def at_size(
    preset: str, overrides: dict[str, Any], out: Path, steps: list[str], num_layers: int | None = None,
    also: str | None = None,
) -> None:  # fmt: skip
    """Run some of the steps, each into its record in the folder `out`.

    Args:
        num_layers: of the model that `refit` goes through (default: all); time per layer is what counts.
        also: a corpus whose test text `recovery` reads beside the preset's own.

    Raises:
        InputError: a step needs more memory than there is.
    """
    for step in steps:
        reads = recovery.READS if step == "recovery" else READS
        nb = Notebook(f"at_size_{step}", preset, overrides, out, reads=reads)
        config = load_config(nb.preset.model)
        config.num_hidden_layers = num_layers if step == "refit" and num_layers else config.num_hidden_layers
        nb.metric("layers", config.num_hidden_layers, "decoder layers")
        MEASURES[step](nb, also if step == "recovery" else config)
        nb.finish()


def shapes(config: GqaLlamaConfig, multiple: int) -> dict[str, GqaLlamaConfig]:
    """Dense and the cuts of `KEPT`; MLP widths are multiples of `multiple`, or of a smaller power of two if need be."""
    found = {"dense": config}
    for name, kept in KEPT.items():
        for power in [1, 8, 32, multiple]:  # the largest that can be stays
            with contextlib.suppress(InputError):  # the width would be zero, or the embedding alone is more
                found[name] = speed.uniform_shape(config, kept, power)
    return found


def measure_speed(nb: Notebook, config: GqaLlamaConfig) -> None:
    """Small points first; the record is written anew after each."""
    p, c, device = nb.preset, nb.preset.cost, resolve_device(nb.preset.device)
    configs = shapes(config, p.pruning.channel_multiple)
    models = {name: random_model(shape, p.dtype, device) for name, shape in configs.items()}
    nb.metric("bytes_per_s", copy_bandwidth(device), "bytes read and written by a copy")
    nb.table("shapes", pd.DataFrame([_counted(name, model) for name, model in models.items()]))
    contexts = _contexts(nb, config)
    cells = sorted(itertools.product(c.batch_sizes, contexts), key=math.prod)
    few, many = cells[: len(cells) // 2 + 2], cells[len(cells) // 2 + 2 :]

    def measure(name: str, phase: str, points: list[tuple[int, int]]) -> None:
        for point in points:
            found = speed.compare_speed(models, *([n] for n in point), c.min_run_s, 3, [phase])
            rows.setdefault(name, []).append(speed.beside_ceilings(found, models))
            nb.table(name, pd.concat(rows[name], ignore_index=True))
            nb.save()
            print(name, phase, *point, flush=True)

    rows: dict[str, list[pd.DataFrame]] = {}
    with speed.fused():
        measure("speed", "decode", cells)
        measure("speed", "prefill", few)
    measure("speed_unfused", "decode", [cell for cell in cells if cell[0] == 1])
    cut = (config, KEPT["84.64 % kept"], (8, 64, 128), p.dtype, device)
    nb.table("alignment", speed.compare_alignment(*cut, [1], contexts[:2][-1:], c.min_run_s, 3))
    nb.save()
    with speed.fused():
        measure("speed", "prefill", many)


def _contexts(nb: Notebook, config: GqaLlamaConfig) -> list[int]:
    """The preset's, as far as the model takes them, the shortest first."""
    return sorted({min(length, config.max_position_embeddings) for length in nb.preset.cost.contexts})


def _counted(name: str, model: nn.Module) -> dict[str, Any]:
    first = layer_shapes(model).iloc[0][["num_key_value_heads", "intermediate_size"]].to_dict()
    return {"model": name, "parameters": model.num_parameters(), **first, "step_gb": cost.step_bytes(model) / 1e9}


def measure_in_turn(nb: Notebook, config: GqaLlamaConfig) -> None:
    """Decode of one sequence at the first two contexts, prefill at the first, without compilation; the record is
    written after each. All models are there at once, so that each is timed within seconds of the others: a machine's
    memory drifts more in minutes than a small cut gains."""
    p, c, device = nb.preset, nb.preset.cost, torch.device(resolve_device(nb.preset.device))
    configs, rows = shapes(config, p.pruning.channel_multiple), []
    size, free = cost.weight_bytes(random_model(config, p.dtype, "meta")), cost.free_bytes(device)
    if size > free:
        needs = f"dense needs {size / 2**30:.3g} GiB, {free / 2**30:.3g} GiB are free"
        raise InputError(f"{needs}: close what else is running, or give a smaller model")
    dense = random_model(config, p.dtype, device)
    models = {name: dense if shape is config else inside(dense, shape) for name, shape in configs.items()}
    nb.metric("bytes_per_s", copy_bandwidth(device), "bytes read and written by a copy")
    nb.table("shapes", pd.DataFrame([_counted(name, model) for name, model in models.items()]))
    for phase, contexts in (("decode", _contexts(nb, config)[:2]), ("prefill", _contexts(nb, config)[:1])):
        found = speed.compare_speed(models, [1], contexts, c.min_run_s, ROUNDS, [phase])
        rows.append(speed.beside_ceilings(found, models))
        nb.table("speed", pd.concat(rows, ignore_index=True))
        nb.save()


def inside(model: nn.Module, config: GqaLlamaConfig) -> nn.Module:
    """A model of a smaller shape whose weights are the first of each of this model's: it takes no memory of its own,
    and a step reads as many bytes as if it did. For time alone."""
    small = random_model(config, str(model.dtype).removeprefix("torch."), "meta")
    large = dict(model.named_parameters())
    first = {name: large[name].data.flatten()[: p.numel()].view_as(p) for name, p in small.named_parameters()}
    small.load_state_dict(first, strict=False, assign=True)
    small.model.rotary_emb = model.model.rotary_emb
    return small


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a large copy on the device reads and writes: what reading weights is to be held against."""
    size = 2**30
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = source.clone()  # its memory is there before the clock runs
    times = speed._time_ms(lambda: target.copy_(source), torch.device(device), 0.2)
    return 2 * size / min(times) * 1e3


def measure_pruning(nb: Notebook, config: GqaLlamaConfig) -> None:
    """The founding document's method, from layer importance to a pruned model."""
    p = nb.preset
    model = random_model(config, p.dtype, p.device)
    removal, calibration = (random_windows(config, sample) for sample in (p.removal, p.calibration))
    with nb.stage("layer removal", model, removal.shape, "removal.num_examples"):
        importances = founding.removal_importance(model, removal)
    plan = founding.make_plan(model, importances, p.pruning)
    with nb.stage("sequential Taylor", model, calibration.shape, "calibration.num_examples"):
        nb.table("layers", founding.prune(model, plan, calibration).reset_index())


def measure_refit(nb: Notebook, config: GqaLlamaConfig) -> None:
    """Covariances, cost table and sweep of half of every layer's groups and channels."""
    p = nb.preset
    windows, device = random_windows(config, p.frontier.calibration), resolve_device(p.device)
    model = streamed(random_model(config, p.dtype, device), device)
    how = {"shape": windows.shape, "knob": "frontier.calibration.num_examples", "device": device}
    with nb.stage("gradient covariances", model, **how):
        covariances = scores.gradient_covariances(model, windows)
    nb.save()
    with nb.stage("cost table", model, **how):
        table = allocate.cost_table(model, windows, covariances)
    halves = [[units // 2 for units in column] for column in zip(*table.widths, strict=True)]
    nb.save()
    with nb.stage("sweep", model, **how):
        refit.sweep(model, plans.Plan([0.5] * len(table.widths), *halves), windows, covariances=covariances)


def random_windows(config: GqaLlamaConfig, sample: Sample) -> torch.Tensor:
    """Token ids drawn evenly, [num_examples, length]."""
    length = min(sample.length, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (sample.num_examples, length), generator=torch.Generator().manual_seed(0))


BY_STEP = measure_speed, measure_in_turn, measure_pruning, measure_refit, recovery.measure_recovery
MEASURES = dict(zip(STEPS, BY_STEP, strict=True))
