"""What a stage is said to need, what it takes, and that what lowers it changes no result."""

import contextlib
import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import MEASURED, small_model

from gqalib import InputError
from gqalib import stream
from gqalib.measure import memory
from gqalib.measure.cost import Used, weight_bytes
from gqalib.measure.perplexity import window_losses
from gqalib.model import load, surgery
from gqalib.model.load import REPOSITORY
from gqalib.model.modeling_gqa_llama import GqaLlamaConfig
from gqalib.peers import llm_pruner
from gqalib.prune import allocate, founding, gradients, plans, refit, scores
from gqalib.prune.founding import removal_importance, taylor_scores
from gqalib.prune.scores import backward, channel_scores, fisher_scores, gradient_covariances, group_scores
from gqalib.run.presets import Distillation
from gqalib.stream import _arrive, at_work, hidden_states_before, is_streamed

@pytest.mark.parametrize("size", ["small", pytest.param("large", marks=pytest.mark.slow)])
def test_peaks_are_as_expected(size):
    """10M and 24M parameters in float32; what a stage adds to the weights, measured over expected."""
    command = [sys.executable, str(REPOSITORY / "tests" / "peaks.py"), size]
    finished = subprocess.run(command, env=MEASURED, capture_output=True, text=True, check=True, timeout=600)
    ratios = json.loads(finished.stdout.splitlines()[-1])
    assert len(ratios) == 13 and all(0.6 < ratio < 1.35 for ratio in ratios.values()), (
        ratios
    )  # above 1: buffers of the matrix library


def saved_bytes(model, narrow: bool) -> int:
    """What a forward pass keeps for the backward pass, but weights and copies of them."""
    ids, parts = torch.arange(129).view(3, 43), {}  # no shape of a weight
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {s for p in model.parameters() for s in (p.shape, p.shape[::-1])}

    def pack(tensor):
        if tensor.shape not in shapes and tensor.untyped_storage().data_ptr() not in weights:
            parts[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    keep = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keep, torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        model(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in parts.values())


WAYS = [(dtype, trained, False) for dtype in ("float32", "bfloat16") for trained in (True, False)]


@pytest.mark.parametrize("dtype, trained, narrow", [*WAYS, ("float32", True, True)])
def test_what_a_layer_keeps_for_the_backward_pass(dtype, trained, narrow):
    """`narrow`: products are in bf16."""
    sizes = []
    for layers in (2, 3):
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
        shape = heads | {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176}
        config = GqaLlamaConfig(**shape, num_hidden_layers=layers)
        model = load.random_model(config, dtype, "cpu").requires_grad_(trained)
        model.set_attn_implementation("sdpa")
        model.model.embed_tokens.weight.requires_grad_(True)
        sizes.append(saved_bytes(model, narrow))
    on_paper = memory._Sizes(model, 3, 43, torch.device("cuda"), False)
    expected = on_paper.kept_narrow() if narrow else on_paper.kept(trained)
    assert (sizes[1] - sizes[0]) / 129 == pytest.approx(expected, rel=0.02)


def test_llama_3_8b_on_paper():
    """The sizes that the plan for a GPU rests on."""
    model = load.random_model(load.shape_config("llama-3-8b"), "bfloat16", "meta")

    def total(stage, examples, length, **options):
        return sum(memory.expected(stage, model, examples, length, device="cuda", **options).values())

    assert weight_bytes(model) == 16_060_522_496
    assert total("sweep", 128, 2048, streams=True) <= 16e9 and total("cost table", 128, 2048, streams=True) <= 16e9
    for stage in ("one-shot Taylor", "sequential Taylor", "gradient covariances"):
        assert total(stage, 10, 128) <= 40e9
    assert total("one-shot Taylor", 128, 2048) <= 40e9 and total("gradient covariances", 128, 2048) <= 40e9


def test_refused_before_the_work(model, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2_000_000_000)
    begun = []
    terms, message = (
        {"weights": 10**9, "streams": 3 * 10**9},
        r"sweep needs 3\.0 GB beside the weights' 1\.0 GB, but 2\.0 GB are free on cpu: raise less",
    )
    with pytest.raises(InputError, match=message), memory.stage("sweep", terms, model, "raise less"):
        begun.append(True)
    assert not begun


def test_stage_says_before_and_after(model, windows):
    said, terms = [], memory.expected("one-shot Taylor", model, *windows.shape)
    with memory.stage("scores", terms, model, say=said.append) as peak:
        assert len(said) == 1 and "expected" in said[0] and peak.peak_gb == 0
        held = torch.ones(20_000_000)
    assert "at its peak" in said[1] and peak.peak_gb >= held.nbytes / 1e9 and peak.seconds > 0
    with pytest.raises(InputError, match="unknown stage 'surgery'"):
        memory.expected(("sweep", "surgery"), model, 1, 2)


def test_a_model_on_several_cards(monkeypatch):
    """What is free on all of them counts, and what was taken there; host memory, where layers may wait, does not."""
    places, said = [SimpleNamespace(device=torch.device(name)) for name in ("cuda:1", "cuda:0", "cpu", "meta")], []
    spread = SimpleNamespace(parameters=lambda: places, device=places[0].device)
    monkeypatch.setattr(memory, "free_bytes", lambda device: {"cuda:0": 2, "cuda:1": 3}[str(device)] * 10**9)
    monkeypatch.setattr(memory, "measured", lambda *cards: contextlib.nullcontext(Used(1.0, len(cards) * 10**9)))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * 10**9)
    with memory.stage("sweep", {"weights": 8 * 10**9, "streams": 5 * 10**9}, spread, say=said.append) as peak:
        pass
    assert "5.0 GB free on cuda:0, cuda:1" in said[0] and (peak.free_gb, peak.peak_gb, peak.seconds) == (5.0, 10.0, 1.0)
    with pytest.raises(InputError, match="but 5.0 GB are free on cuda:0, cuda:1"):
        memory.stage("sweep", {"streams": 6 * 10**9}, spread).__enter__()


def test_what_fails_as_a_measurement_begins_is_said(model, monkeypatch):
    """And not that nothing was measured."""

    def fails(*devices):
        raise RuntimeError("no driver")

    monkeypatch.setattr(memory, "measured", fails)
    with pytest.raises(RuntimeError, match="no driver"), memory.stage("sweep", {"weights": 1}, model):
        pass


def test_of_several_stages_the_largest(model):
    single = {
        name: memory.expected(name, model, 8, 32) for name in ("layer removal", "all gradients", "sweep", "context")
    }
    largest = max(single.values(), key=lambda terms: sum(terms.values()))
    assert memory.expected(tuple(single), model, 8, 32) == largest


def test_no_term_counts_the_widest_layer_for_all():
    """Where one layer is much wider than the others, as after a pruning with rates of its own for each."""
    model = small_model(intermediate_size=240)
    for layer in (0, 1):
        surgery.keep_channels(model, layer, [0])
    for stage in ("distillation", "all gradients", "sweep", "gradient covariances"):
        assert all(size >= 0 for size in memory.expected(stage, model, 2, 20).values())
    layers = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    terms = memory.expected("distillation", model, 2, 20, settings=Distillation())
    assert terms["optimisers"] == 4 * layers + 2 * (weight_bytes(model) - 4 * layers)
    assert memory.expected("all gradients", model, 2, 20)["gradients"] == 4 * layers


def test_distillation_where_bf16_is_slow(model, monkeypatch):
    """In float32 there are no copies, and activations are larger; on a CPU where the MLP is wide, because `blocked`
    keeps its probabilities in bf16 as well."""
    work, settings = "activations, logits, gradients", Distillation(num_tokens=64)
    for student, device, rows in ((model, "cuda", 2), (small_model(intermediate_size=480), "cpu", 64)):
        needs = {}
        for fast in (True, False):
            monkeypatch.setattr("gqalib.device.bf16_is_fast", lambda device, fast=fast: fast)
            needs[fast] = memory.expected("distillation", student, rows, 32, device=device, settings=settings)
        assert "weights in bf16" in needs[True] and "weights in bf16" not in needs[False]
        assert needs[False][work] > needs[True][work]


# ---------------------------------------------------------------- gradients


def plain_scores(model, windows, include_o_proj=False):
    """All gradients at once, then the scores."""
    backward(model, windows)
    layers = model.model.layers
    scores = {i: (group_scores(x, "taylor", include_o_proj), channel_scores(x)) for i, x in enumerate(layers)}
    model.zero_grad(set_to_none=True)
    model.requires_grad_(True)
    return scores


def equal(first, second):
    pairs = (zip(first[key], second[key], strict=True) for key in first)
    return first.keys() == second.keys() and all(torch.equal(a, b) for pair in pairs for a, b in pair)


@pytest.mark.parametrize("batch_tokens", [2048, 40], ids=["one batch", "three batches"])
@pytest.mark.parametrize("include_o_proj", [False, True])
def test_taylor_scores_are_those_of_all_gradients(model, windows, monkeypatch, batch_tokens, include_o_proj):
    monkeypatch.setattr("gqalib.stream.BATCH_TOKENS", batch_tokens)
    expected = plain_scores(model, windows, include_o_proj)
    assert equal(taylor_scores(model, windows, include_o_proj=include_o_proj), expected)


@pytest.mark.parametrize("layers", [[2], [1, 2]])
@pytest.mark.parametrize("batch_tokens", [2048, 40])
def test_taylor_scores_of_some_layers_from_their_stream(model, windows, layers, batch_tokens, monkeypatch):
    monkeypatch.setattr("gqalib.stream.BATCH_TOKENS", batch_tokens)
    expected, stream = plain_scores(model, windows), hidden_states_before(model, windows, 1)
    assert equal(taylor_scores(model, windows, layers, stream, 1), {layer: expected[layer] for layer in layers})


@pytest.mark.parametrize("by_layer", [True, False])
def test_no_gradient_stays_and_few_are_there_together(model, windows, by_layer, monkeypatch):
    monkeypatch.setattr("gqalib.stream.BATCH_TOKENS", 40 if by_layer else 2048)
    model.model.layers[0].mlp.requires_grad_(False)
    asking, most = [p.requires_grad for p in model.parameters()], [0]

    def count(_):
        most[0] = max(most[0], sum(p.numel() for p in model.parameters() if p.grad is not None))

    for layer in model.model.layers:  # before taylor_scores' own hooks, so that nothing is dropped yet
        for part in (layer.self_attn, layer.mlp):
            for parameter in part.parameters():
                parameter.requires_grad_(True).register_post_accumulate_grad_hook(count)
    model.model.layers[0].mlp.requires_grad_(False)
    taylor_scores(model, windows)
    assert all(p.grad is None for p in model.parameters()) and [p.requires_grad for p in model.parameters()] == asking
    assert 0 < most[0] <= plans.layer_sizes(model).max()


@pytest.mark.parametrize("batch_tokens", [2048, 40])
def test_layer_by_layer_changes_nothing(model, windows, monkeypatch, batch_tokens):
    monkeypatch.setattr("gqalib.stream.BATCH_TOKENS", batch_tokens)
    found = []
    for by_layer in (False, True):
        monkeypatch.setattr(scores, "one_layer_at_a_time", lambda _, by_layer=by_layer: by_layer)
        found.append((fisher_scores(model, windows), dict(enumerate(gradient_covariances(model, windows)))))
    assert all(equal(*pair) for pair in zip(*found, strict=True)) and all(p.grad is None for p in model.parameters())


def test_an_error_leaves_all_layers(model, windows, monkeypatch):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    for batch_tokens in (2048, 40):  # all layers at once, and one after the other
        monkeypatch.setattr("gqalib.stream.BATCH_TOKENS", batch_tokens)
        with pytest.raises(InputError, match="loss is nan"):
            taylor_scores(model, windows)
        assert len(model.model.layers) == 3 and all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------- streaming


def test_streamed_results_are_the_same(model, windows, monkeypatch):
    """Layers come and go through the same code as with a GPU, though here both places are the CPU."""
    monkeypatch.setattr("gqalib.stream.BATCH_TOKENS", 40)
    pruned = copy.deepcopy(model)
    covariances, plan = gradient_covariances(model, windows), plans.uniform_plan(model, 0.3)
    results = [
        window_losses(model, windows), removal_importance(model, windows),
        allocate.cost_table(model, windows, covariances).channels[1], taylor_scores(model, windows),
    ]  # fmt: skip
    refit.sweep(model, plan, windows, covariances=covariances)
    assert is_streamed(stream.streamed(pruned, "cpu"))
    covariances = gradient_covariances(pruned, windows)
    streamed = [
        window_losses(pruned, windows), removal_importance(pruned, windows),
        allocate.cost_table(pruned, windows, covariances).channels[1], taylor_scores(pruned, windows),
    ]  # fmt: skip
    refit.sweep(pruned, plan, windows, covariances=covariances)
    assert torch.equal(results[0], streamed[0]) and torch.equal(results[1], streamed[1])
    assert (results[2] == streamed[2]).all() and equal(results[3], streamed[3])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pruned.parameters(), strict=True))
    assert is_streamed(copy.deepcopy(pruned))


def test_gradients_of_streamed_layers_come_layer_by_layer(model, windows, monkeypatch):
    """A layer that has left has no weights for a backward pass any more, however short the text."""
    asked, differentiate = [], gradients.differentiate

    def noted(*arguments, **options):
        asked.append(arguments[6])
        return differentiate(*arguments, **options)

    monkeypatch.setattr(gradients, "differentiate", noted)
    stream.streamed(model, "cpu")
    founding.prune(model, plans.uniform_plan(model, 0.3), windows)
    assert asked and all(asked)
    with pytest.raises(InputError, match="gradients of all layers at once: give device cpu"):
        llm_pruner.llm_pruner(model, windows, 0.3)


def test_one_layer_is_away_from_home_at_a_time(model, windows, monkeypatch):
    """And it is fetched once per pass over the text, not once per batch."""
    from gqalib import stream

    monkeypatch.setattr("gqalib.stream.BATCH_TOKENS", 40)
    fetched, most, arrive = [], [0], _arrive

    def noted(layer, *arguments):
        fetched.extend([] if hasattr(layer, "host") else [layer])
        arrive(layer, *arguments)
        most[0] = max(most[0], sum(hasattr(x, "host") for x in model.model.layers))

    monkeypatch.setattr(stream, "_arrive", noted)
    layers = list(stream.streamed(model, "cpu").model.layers)
    window_losses(model, windows)
    assert fetched == layers and not any(hasattr(layer, "host") for layer in layers)
    with pytest.raises(RuntimeError), at_work(layers[1]):
        raise RuntimeError
    assert not any(hasattr(layer, "host") or hasattr(layer, "held") for layer in layers)
    assert most[0] == 1


def test_what_is_changed_at_work_comes_back_changed(model):
    weight, expected = model.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight.detach() * 2
    with at_work(stream.streamed(model, "cpu").model.layers[1]), torch.no_grad():
        weight.mul_(2)
    assert torch.equal(weight, expected)


def test_a_model_loaded_for_offload_is_streamed_for_its_life(tmp_path, tokenizer, windows, monkeypatch):
    """The card is the CPU here; a model that is pruned and saved comes back whole."""
    load.save_model(small_model(), tokenizer, tmp_path / "dense")
    with pytest.raises(InputError, match=r"^the model cannot be put on offload \(.+\): give a device that is there"):
        load.load_model(tmp_path / "dense", device="offload")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(load, "resolve_device", lambda device: "cpu")
    model, plain = (load.load_model(tmp_path / "dense", device=name) for name in ("offload", "cpu"))
    assert is_streamed(model) and not is_streamed(plain)
    for each in (model, plain):
        refit.sweep(each, plans.uniform_plan(each, 0.3), windows)
    load.save_model(model, tokenizer, tmp_path / "smaller")
    assert torch.equal(window_losses(load.load_model(tmp_path / "smaller"), windows), window_losses(plain, windows))


def test_device_map_models_work(tmp_path, tokenizer, windows):
    """accelerate's hooks and the runs from any layer on get along."""
    load.save_model(small_model(), tokenizer, tmp_path)
    plain, mapped = load.load_model(tmp_path, device="cpu"), load.load_model(tmp_path, device_map={"": "cpu"})
    plan = plans.uniform_plan(plain, 0.3)
    assert torch.equal(removal_importance(plain, windows), removal_importance(mapped, windows))
    for model in (plain, mapped):
        refit.sweep(model, plan, windows)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), mapped.parameters(), strict=True))


def test_a_gpu_gets_more_of_a_narrow_sublayer_at_a_time():
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert stream.sublayer_tokens(cpu, 1536) == stream.BATCH_TOKENS <= stream.sublayer_tokens(card, 14_336)
    assert stream.sublayer_tokens(card, 1536) * 1536 == pytest.approx(stream.SUBLAYER_VALUES, rel=1e-3)
