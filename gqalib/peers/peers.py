"""The methods that a user would otherwise pick, each compact and as its source describes it, on one model class and one budget.

    peer(model, windows, fraction)

prunes a dense model in place: `windows` is the calibration text, token ids [count, length]; `fraction` is the part of the
backbone (parameters of the attention and MLP projections, biases included) to remove, met within one unit. Width pruners
meet it within one MLP channel where one fits, depth pruners within one layer. All end in the uneven model class, so that
what they leave is counted, saved and measured alike. A model is left as it was when a peer raises.

The unit of attention is the whole GQA group for every peer but torch-pruning's own mode. The sources remove single heads of
MHA models; on a GQA model a removed query head saves no key, no value and no cache, and a KV head removed without its query
heads breaks the pairing (02_v2_failure), so the group is the choice that favours the peer. Where a source leaves another
choice open, the docstring of the peer says which one was taken. Those that cut every layer alike take a `multiple`, of
which the channels that stay are a whole number; FLAP's one ranking over all layers and the depth pruners set their own.

v2, the pipeline whose failure the workbook starts from, is in `baselines`.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from gqalib.errors import InputError, OutOfReach
from gqalib.model.attention import attention_implementation
from gqalib.model.shapes import count_parameters, decoder_layers, layer_shape, layer_shapes
from gqalib.model.surgery import (
    add_output_bias,
    drop_layers,
    keep_channels,
    keep_groups,
    record_shapes,
    restored_on_error,
)
from gqalib.peers.v2 import traced_inputs, traced_without_rotation
from gqalib.prune import refit
from gqalib.prune.founding import Plan, prune, size, spread_channels, uniform_plan, unit_costs
from gqalib.prune.rates import whole_units
from gqalib.prune.scores import (
    activation_importance,
    backward,
    channel_scores,
    largest,
    misaligned_group_scores,
    removal_importance,
)
from gqalib.stream import advance

RIDGE = 1e-2  # of the mean diagonal of a Gram matrix: what makes every solve well-posed

PEERS: dict[str, Callable[..., None]] = {}


def peer(function: Callable[..., None]) -> Callable[..., None]:
    """Enter a peer into `PEERS`: its arguments are checked first, and the model is as it was if it raises."""

    @functools.wraps(function)
    def checked(model: nn.Module, windows: torch.Tensor, fraction: float, *more, **options) -> None:
        if not 0 < fraction < 1:
            raise InputError(f"fraction {fraction} of the backbone is outside (0, 1): give a fraction such as 0.25")
        with restored_on_error(model):
            function(model, windows, fraction, *more, **options)
        model.requires_grad_(True)
        model.zero_grad(set_to_none=True)

    PEERS[function.__name__] = checked
    return checked


# ---------------------------------------------------------------- what flows into o_proj and down_proj


def output_projections(layer: nn.Module) -> dict[str, nn.Linear]:
    """The two projections that write into the residual stream; their inputs are the features that pruning removes."""
    return {"o_proj": layer.self_attn.o_proj, "down_proj": layer.mlp.down_proj}


@torch.no_grad()
def feed(
    model: nn.Module, stream: torch.Tensor | None, windows: torch.Tensor, index: int, see: dict[str, Callable]
) -> torch.Tensor:
    """Carry the residual stream (None: the embeddings) through one layer, and show its features on the way.

    `see`: {"o_proj" or "down_proj": function of the features [tokens, width] of one batch, in float64}.
    """
    projections = output_projections(decoder_layers(model)[index])
    hooks = [
        projections[name].register_forward_pre_hook(lambda _, args, look=look: look(args[0].flatten(0, -2).double()))
        for name, look in see.items()
    ]
    try:
        return advance(model, stream, windows, index, index + 1)
    finally:
        for hook in hooks:
            hook.remove()


class Moments:
    """Mean and variance of features over all tokens, float64 [width]."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def see(self, features: torch.Tensor) -> None:
        self.count += len(features)
        self.sum = self.sum + features.sum(0)
        self.squares = self.squares + features.square().sum(0)

    @property
    def mean(self) -> torch.Tensor:
        return self.sum / self.count

    @property
    def variance(self) -> torch.Tensor:
        return (self.squares / self.count - self.mean.square()).clamp(min=0)


def by_group(columns: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Columns of o_proj [heads × head_dim] → one row per group [num_key_value_heads, size × head_dim]."""
    return columns.view(layer_shape(layer)["num_key_value_heads"], -1)


# ---------------------------------------------------------------- no data, one gradient


@peer
def random(model: nn.Module, windows: torch.Tensor, fraction: float, seed: int = 0, multiple: int = 1) -> None:
    """Groups and channels at random, the same rate in every layer: the control."""
    _prune_at_once(model, windows, uniform_plan(model, fraction, multiple=multiple), "random", seed=seed)


@peer
def magnitude(model: nn.Module, windows: torch.Tensor, fraction: float, multiple: int = 1) -> None:
    """The least Σ W² over all weights of a unit, o_proj included, the same rate in every layer; reads no text."""
    _prune_at_once(model, windows, uniform_plan(model, fraction, multiple=multiple), "magnitude", include_o_proj=True)


def _prune_at_once(model: nn.Module, windows: torch.Tensor, plan: Plan, statistic: str, **options) -> None:
    settings = {"group_statistic": statistic, "channel_statistic": statistic, "sequential": False, **options}
    prune(model, plan, windows, **settings)


@peer
def llm_pruner(
    model: nn.Module, windows: torch.Tensor, fraction: float, protect: bool = True, multiple: int = 1
) -> None:
    """LLM-Pruner (Ma et al., NeurIPS 2023): first-order element-wise Taylor, Σ |W ⊙ G|, one shot.

    Heads are chosen by its own fold (`view(size, groups).sum(0)`, which credits KV head k with query heads k, k + groups, …),
    channels by gate, up and down. Its script for Llama-7B prunes layers 4 to 29 of 32: the first eighth and the last
    sixteenth of the layers stay whole.

    Choices: the chosen KV heads go with the query heads that read them; all of `windows` is used, not ten short samples; a budget
    that the unprotected layers cannot give is taken from all layers.
    """
    plan = (_protecting_plan if protect else uniform_plan)(model, fraction, multiple=multiple)
    backward(model, windows)
    for index, layer in enumerate(decoder_layers(model)):
        groups, channels = misaligned_group_scores(layer), channel_scores(layer)
        keep_groups(model, index, largest(groups, len(groups) - plan.groups[index]))
        keep_channels(model, index, largest(channels, len(channels) - plan.channels[index]))


def _protecting_plan(model: nn.Module, fraction: float, multiple: int) -> Plan:
    count = len(decoder_layers(model))
    first, last = round(count / 8), round(count / 16)
    try:
        return uniform_plan(model, fraction, [*range(first), *range(count - last, count)], multiple)
    except OutOfReach:
        return uniform_plan(model, fraction, multiple=multiple)


# ---------------------------------------------------------------- torch-pruning


@peer
def torch_pruning_gqa(model: nn.Module, windows: torch.Tensor, fraction: float, multiple: int = 1) -> None:
    """torch-pruning's pruner in its GQA mode (Fang et al., CVPR 2023; `MetaPruner` with `num_heads`, `prune_num_heads=True`).

    Inside each group the same number of query heads goes and all KV heads stay, so only q_proj and o_proj shrink, and two
    query heads of each group must stay (with one, version 1.6.1 takes the layer for MHA, asks for the KV heads as well, and
    then prunes nothing): the rest of the budget comes from the MLP, on a 2:1 model all of it. On MHA whole heads go. What is
    left has a smaller `num_key_value_groups` and is an uneven model like any other.

    Choices: the library's `GroupTaylorImportance`, better than the magnitude of its Llama example; the hidden width stays, which
    that example cuts as well; the heads that go are spread over the layers to come as near to the fraction as they can.
    """
    import torch_pruning as tp

    heads, channels = _query_heads_and_channels(model, fraction, multiple)
    backward(model, windows)
    model.requires_grad_(True)  # the graph is traced through autograd
    layers = decoder_layers(model)
    ratios, head_ratios, num_heads = {}, {}, {}
    for layer, gone, width in zip(layers, heads, channels, strict=True):
        attention, shape = layer.self_attn, layer_shape(layer)
        if width:  # half a unit less or more than whole, so that the library's floor and ceil of a float cannot slip
            ratios[layer.mlp.gate_proj] = (width - 0.5) / shape["intermediate_size"]
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            queries = projection is attention.q_proj
            num_heads[projection] = shape["num_attention_heads" if queries else "num_key_value_heads"]
            if gone:
                head_ratios[projection] = (gone - 0.5) / shape["num_attention_heads"]
                ratios[projection] = 0.5  # any: head_dim is not pruned, but a ratio of 0 would skip the heads as well
    # eager: keys and values are repeated by an `expand`, which torch-pruning knows as GQA; it cannot see into fused kernels
    with traced_without_rotation(), attention_implementation("eager", model):
        pruner = tp.pruner.MetaPruner(
            model,
            traced_inputs(model, windows),
            importance=tp.importance.GroupTaylorImportance(bias=True),
            pruning_ratio=0.0,
            pruning_ratio_dict=ratios,
            ignored_layers=[model.get_input_embeddings(), model.get_output_embeddings()]
            + [projection for layer in layers for projection in output_projections(layer).values()],
            num_heads=num_heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio_dict=head_ratios,
            in_channel_groups={},  # the defaults are dicts that every pruner of the process would share
            out_channel_groups={},
            channel_groups={},
        )
    pruner.step()
    for layer in layers:
        shape = layer_shape(layer)
        layer.self_attn.num_key_value_groups = shape["num_attention_heads"] // shape["num_key_value_heads"]
    record_shapes(model)


def _query_heads_and_channels(model: nn.Module, fraction: float, multiple: int) -> tuple[list[int], list[int]]:
    """Query heads and channels that each layer loses in torch-pruning's GQA mode.

    A step takes one query head from every group of a layer; on MHA it is one head with its key and value.
    """
    layers = decoder_layers(model)
    shapes, costs = layer_shapes(model), torch.tensor([unit_costs(layer) for layer in layers], dtype=torch.float64)
    queries, kv_heads, widths = (torch.tensor(shapes[name].to_numpy()) for name in shapes)
    mha = queries == kv_heads
    step_heads = torch.where(mha, 1, kv_heads)
    query_costs = [size(layer.self_attn.q_proj) + size(layer.self_attn.o_proj, rows=False) for layer in layers]
    step_costs = torch.where(mha, costs[:, 0], torch.tensor(query_costs, dtype=torch.float64) / (queries // kv_heads))
    steps = torch.where(
        mha, kv_heads, queries // kv_heads - 1
    )  # whole_units leaves one, so two query heads of a group stay
    taken = torch.tensor(whole_units(fraction * kv_heads * costs[:, 0] / step_costs / steps, steps))
    target = fraction * count_parameters(model)["backbone"]
    left, free = target - (taken * step_costs).sum(), torch.ones_like(costs[:, 1])
    return (taken * step_heads).tolist(), spread_channels(left, widths, costs[:, 1], free, multiple)


# ---------------------------------------------------------------- weights and activations


@peer
def wanda_sp(model: nn.Module, windows: torch.Tensor, fraction: float, multiple: int = 1) -> None:
    """Wanda-sp (An et al., AAAI 2024, from Sun et al., ICLR 2024): |W_ij| · ‖X_j‖ of o_proj and down_proj, summed over a unit.

    The same rate in every layer, front to back: a layer reads what the layers before it, already pruned, give.

    Choices: no calibration text of its own; units are ranked within a layer, as in FLAP's code.
    """
    plan, stream = uniform_plan(model, fraction, multiple=multiple), None
    for index, layer in enumerate(decoder_layers(model)):
        moments = {name: Moments() for name in output_projections(layer)}
        feed(model, stream, windows, index, {name: m.see for name, m in moments.items()})
        scores = {
            name: wanda_scores(linear.weight, moments[name].squares)
            for name, linear in output_projections(layer).items()
        }
        groups, channels = by_group(scores["o_proj"], layer).sum(1), scores["down_proj"]
        keep_groups(model, index, largest(groups, len(groups) - plan.groups[index]))
        keep_channels(model, index, largest(channels, len(channels) - plan.channels[index]))
        stream = advance(model, stream, windows, index, index + 1)


def wanda_scores(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Σ_i |W_ij| · ‖X_j‖ of each column j, float64; `squares`: Σ X_j² over the tokens."""
    return weight.detach().double().abs().sum(0) * squares.sqrt()


@peer
def flap(model: nn.Module, windows: torch.Tensor, fraction: float, by_column: bool = True) -> None:
    """FLAP (An et al., AAAI 2024), metric WIFV, structure AL-AM: one threshold over all layers and modules, and a bias correction.

    A feature's score is the variance of the input times the squared norm of its column, Var(X_j) · ‖W_:,j‖², on the dense
    model; a head's is the mean of its features'. Scores are standardised within each module, and units are removed from
    the lowest score up, each at its price in parameters. What the removed features gave on average, W · mean(X), becomes a
    bias of o_proj or down_proj. Every layer gets both biases, as in FLAP's code, and they count: the budget pays for them.

    Choices: as FLAP's code does, the scores of attention are squared, columns are standardised, and then a head's are averaged;
    without `by_column` heads are averaged first, which the paper leaves open: much worse on the reference model, where it cuts into
    the first layer, and at some sizes better on stories260K. A module keeps at least its best unit; a unit that no longer fits the budget is passed
    over for the next.
    """
    stream, statistics = None, []
    for index, layer in enumerate(decoder_layers(model)):
        moments = {name: Moments() for name in output_projections(layer)}
        stream = feed(model, stream, windows, index, {name: m.see for name, m in moments.items()})
        statistics.append(moments)
    kept = _flap_selection(model, statistics, fraction, by_column)
    for index, layer in enumerate(decoder_layers(model)):
        biases = {
            name: removed_mean(linear.weight, statistics[index][name].mean, _columns(layer, name, kept[index][name]))
            for name, linear in output_projections(layer).items()
        }
        keep_groups(model, index, kept[index]["o_proj"])
        keep_channels(model, index, kept[index]["down_proj"])
        for name, bias in biases.items():
            add_output_bias(model, index, name, bias)


def flap_scores(weight: torch.Tensor, variance: torch.Tensor, num_units: int, by_column: bool = False) -> torch.Tensor:
    """Mean of Var(X_j) · ‖W_:,j‖² over the columns of each unit, standardised over the module; float64 [num_units]."""
    scores = variance * weight.detach().double().square().sum(0)
    if by_column:
        scores = standardise(scores.square() if num_units < len(scores) else scores)
        return scores.view(num_units, -1).mean(1)
    return standardise(scores.view(num_units, -1).mean(1))


def standardise(scores: torch.Tensor) -> torch.Tensor:
    """Mean 0 and standard deviation 1; zeros if all are equal or there is only one."""
    spread = scores.std(correction=0)
    return (scores - scores.mean()) / spread if spread > 0 else scores - scores.mean()


def removed_mean(weight: torch.Tensor, mean: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """What the columns that are not kept give on average, W_removed · mean(X_removed), float64 [hidden]."""
    gone = torch.ones_like(mean)
    gone[kept] = 0
    return weight.detach().double() @ (mean * gone)


def _flap_selection(model: nn.Module, statistics: list, fraction: float, by_column: bool) -> list[dict[str, list[int]]]:
    """The units that stay, for each layer and projection."""
    scores, costs, modules, added = [], [], [], 0
    for index, layer in enumerate(decoder_layers(model)):
        for (name, linear), cost in zip(output_projections(layer).items(), unit_costs(layer), strict=True):
            num_units = layer_shape(layer)["num_key_value_heads" if name == "o_proj" else "intermediate_size"]
            score = flap_scores(linear.weight, statistics[index][name].variance, num_units, by_column)
            scores.append(score.cpu())
            costs.append(torch.full((len(score),), cost))
            modules += [(index, name, unit) for unit in range(len(score))]
            added += linear.out_features if linear.bias is None else 0
    best = torch.cat([torch.arange(len(score)) == score.argmax() for score in scores])
    target = fraction * count_parameters(model)["backbone"] + added
    removed = cheapest_units(torch.cat(scores), torch.cat(costs), best, target)
    kept = [{name: [] for name in output_projections(layer)} for layer in decoder_layers(model)]
    for unit, gone in zip(modules, removed.tolist(), strict=True):
        if not gone:
            kept[unit[0]][unit[1]].append(unit[2])
    return kept


def cheapest_units(scores: torch.Tensor, costs: torch.Tensor, protected: torch.Tensor, target: float) -> torch.Tensor:
    """Which units go, from the lowest score up, so that their costs come to `target` within half the cheapest unit; bool [units].

    Raises:
        InputError: the scores are not finite. OutOfReach: all unprotected units together do not reach the target.
    """
    if not torch.isfinite(scores).all():
        raise InputError("the scores of some units are not finite: use dtype float32 or another calibration text")
    least = int(costs.min())
    if int(costs[~protected].sum()) < target - least / 2:
        most = f"{int(costs[~protected].sum()):,} at most: every module keeps a unit"
        raise OutOfReach(f"{int(target):,} parameters cannot go, {most}; lower the fraction")
    removed, total = torch.zeros_like(protected), 0
    for unit in torch.argsort(scores, stable=True).tolist():
        if not protected[unit] and total + int(costs[unit]) <= target + least / 2:
            removed[unit] = True
            total += int(costs[unit])
    return removed


def _columns(layer: nn.Module, name: str, units: Sequence[int]) -> torch.Tensor:
    """Columns of o_proj or down_proj that belong to these groups or channels, int64."""
    linear = output_projections(layer)[name]
    num_units = layer_shape(layer)["num_key_value_heads" if name == "o_proj" else "intermediate_size"]
    return torch.arange(linear.in_features).view(num_units, -1)[list(units)].flatten()


# ---------------------------------------------------------------- depth


@peer
def shortgpt(model: nn.Module, windows: torch.Tensor, fraction: float) -> None:
    """ShortGPT (Men et al., 2024): drop the layers of least block influence, 1 − cos(input, output), measured once on the dense model.

    Choices: as many layers as come nearest to the fraction, at least one.
    """
    _drop_least(model, activation_importance(model, windows), fraction)


@peer
def layer_removal(
    model: nn.Module, windows: torch.Tensor, fraction: float, removal: torch.Tensor | None = None
) -> None:
    """Drop the layers whose removal, one at a time, raises the calibration perplexity least (Kim et al., Shortened LLaMA, 2024).

    Choices: measured once on the dense model, as published, by `importance.removal_importance` (`removal`, if it is at hand); as
    many layers as come nearest to the fraction, at least one.
    """
    _drop_least(model, removal_importance(model, windows) if removal is None else removal, fraction)


def _drop_least(model: nn.Module, influence: torch.Tensor, fraction: float) -> None:
    if not torch.isfinite(influence).all():
        raise InputError(f"layer importances {influence.tolist()} are not all finite: use a longer sample or float32")
    layers = decoder_layers(model)
    order = torch.argsort(influence, stable=True).tolist()
    sizes = [
        sum(p.numel() for block in (layers[i].self_attn, layers[i].mlp) for p in block.parameters()) for i in order
    ]
    target, totals = fraction * sum(sizes), torch.tensor(sizes).cumsum(0)
    count = int((totals - target).abs().argmin()) + 1
    if count == len(layers):
        raise OutOfReach(f"fraction {fraction} is nearest to all {count} layers: one must stay; lower the fraction")
    drop_layers(model, order[:count])


# ---------------------------------------------------------------- least squares


@peer
def osscar(model: nn.Module, windows: torch.Tensor, fraction: float, rounds: int = 16, multiple: int = 1) -> None:
    """OSSCAR (Meng et al., ICML 2024), in compact form: units by least-squares reconstruction error, with local search, and a refit.

    Front to back, at a uniform rate. With X the features that the model pruned so far feeds to o_proj or down_proj, units are
    eliminated greedily by the exact rise of min_V ‖X_S Vᵀ − X Wᵀ‖², then single swaps are made as long as they lower it
    (`rounds` at most); the projection becomes the minimiser V. Ridge: `RIDGE` of the mean diagonal of XᵀX.

    Choices: the target is the dense weight on the pruned stream, as in the paper's formula (the dense model's own output as
    target did worse on stories260K); channels are eliminated 1/64 of the width at a time.

    Raises:
        InputError: fewer calibration tokens than the widest projection has features, or a Gram matrix that is not finite.
    """
    widest = max(linear.in_features for layer in decoder_layers(model) for linear in output_projections(layer).values())
    if windows.numel() < widest:
        raise InputError(
            f"{windows.numel()} calibration tokens are too few to refit {widest} features: give at least {widest}"
        )
    plan, stream = uniform_plan(model, fraction, multiple=multiple), None
    for index in range(len(plan.groups)):
        _select_and_refit(model, stream, windows, index, "o_proj", plan.groups[index], rounds)
        _select_and_refit(model, stream, windows, index, "down_proj", plan.channels[index], rounds)
        stream = advance(model, stream, windows, index, index + 1)


def _select_and_refit(model: nn.Module, stream, windows, index: int, name: str, removed: int, rounds: int) -> None:
    """Cut one module to its best units, and make its output projection the best one for them."""
    layer = decoder_layers(model)[index]
    linear, attention = output_projections(layer)[name], name == "o_proj"
    gram = _damped_gram(model, stream, windows, index, name)
    cross = gram @ linear.weight.detach().double().T
    kept = select_units(
        gram, cross, layer_shape(layer)["num_key_value_heads" if attention else "intermediate_size"], removed, rounds
    )
    columns = _columns(layer, name, kept.tolist())
    (keep_groups if attention else keep_channels)(model, index, kept.tolist())
    with torch.no_grad():
        linear.weight.copy_(torch.linalg.solve(gram[columns][:, columns], cross[columns]).T)


def _damped_gram(model: nn.Module, stream, windows, index: int, name: str) -> torch.Tensor:
    """H = XᵀX + λI of the features of a projection, float64 [width, width]."""
    gram = 0.0

    def see(features: torch.Tensor) -> None:
        nonlocal gram
        gram = gram + features.T @ features

    feed(model, stream, windows, index, {name: see})
    if not torch.isfinite(gram).all():
        raise InputError(
            f"the Gram matrix of layer {index}'s {name} is not finite: use dtype float32 or another calibration text"
        )
    return refit.damped(gram, RIDGE)


def select_units(gram: torch.Tensor, cross: torch.Tensor, num_units: int, count: int, rounds: int = 0) -> torch.Tensor:
    """The units that stay when `count` are eliminated: greedy backward elimination, then swaps. int64, ascending.

    Args:
        gram: H [features, features], positive definite; the features of unit u are consecutive.
        cross: B [features, outputs]. The error of a set S is constant − tr(B_Sᵀ H_SS⁻¹ B_S).
    """
    weight, unit = torch.cholesky_solve(cross, refit.cholesky(gram)).T, len(gram) // num_units
    kept = refit.choose(weight, gram, count, unit, damping=0.0, per_step=max(1, num_units // 64))
    kept = torch.tensor(kept, device=gram.device)
    for _ in range(rounds if 0 < count else 0):
        swapped = _swap(gram, cross, kept, num_units)
        if swapped is None:
            break
        kept = swapped
    return kept


def _features(units: torch.Tensor, size: int) -> torch.Tensor:
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def _rise_without(gram: torch.Tensor, cross: torch.Tensor, kept: torch.Tensor, num_units: int) -> torch.Tensor:
    """Rise of the error when one more of the kept units goes: tr(W_uᵀ (H⁻¹_uu)⁻¹ W_u), with W = H_SS⁻¹ B_S; [kept]."""
    size = len(gram) // num_units
    columns = _features(kept, size)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[columns][:, columns]))
    weight = (inverse @ cross[columns]).view(len(kept), size, -1)
    blocks = torch.stack([inverse[i : i + size, i : i + size] for i in range(0, len(inverse), size)])
    return (weight * torch.linalg.solve(blocks, weight)).sum((1, 2))


def _fall_with(
    gram: torch.Tensor, cross: torch.Tensor, kept: torch.Tensor, out: torch.Tensor, num_units: int
) -> torch.Tensor:
    """Fall of the error when one unit comes back: tr(R_vᵀ S_v⁻¹ R_v), R and S the rest of B and H that S does not explain; [out]."""
    size = len(gram) // num_units
    inside, outside = _features(kept, size), _features(out, size)
    explained = torch.cholesky_solve(gram[inside][:, outside], torch.linalg.cholesky(gram[inside][:, inside]))
    rest = (cross[outside] - explained.T @ cross[inside]).view(len(out), size, -1)
    left = gram[outside][:, outside] - gram[outside][:, inside] @ explained
    blocks = torch.stack([left[i : i + size, i : i + size] for i in range(0, len(left), size)])
    return (rest * torch.linalg.solve(blocks, rest)).sum((1, 2))


def _swap(gram: torch.Tensor, cross: torch.Tensor, kept: torch.Tensor, num_units: int) -> torch.Tensor | None:
    """The best unit comes back and the least of the others goes, if the error falls by it; otherwise None."""
    out = torch.tensor([u for u in range(num_units) if u not in set(kept.tolist())], device=kept.device)
    falls = _fall_with(gram, cross, kept, out, num_units)
    back = out[falls.argmax()]
    larger = torch.cat([kept, back[None]]).sort().values
    rise = _rise_without(gram, cross, larger, num_units)
    gone = larger[rise.argmin()]
    if gone == back or rise.min() >= falls.max() * (1 - 1e-9):
        return None
    return larger[larger != gone]
