"""Cut and mend: the algebra against brute force, the sweep against its promises."""

import itertools

import pytest
import torch
from conftest import kl_to, kv_heads, small_model

from gqalib import InputError
from gqalib.measure.perplexity import window_losses
from gqalib.model import surgery
from gqalib.model.modeling_gqa_llama import GqaLlamaForCausalLM
from gqalib.model.shapes import count_parameters, layer_shapes
from gqalib.prune import allocate, founding, least_squares, plans, refit
from gqalib.prune.founding import unit_scores
from gqalib.prune.scores import fisher_scores, gradient_covariances, largest
from gqalib.prune.sublayers import Sublayer, sublayers
from gqalib.stream import hidden_states_before

EVERY_SWITCH = ("refit", "residual_target", "input_refit", "weighted", "newton_rounds", "tempered")
PLAIN = refit.Ingredients(**dict.fromkeys(EVERY_SWITCH, False))


def random_problem(out=5, features=12, tokens=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ torch.randn(
        features, features, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(out, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(tokens, out, generator=generator, dtype=torch.float64)
    return weight, inputs, inputs @ weight.T + noise


def plan_for(model, rate=0.4):
    return plans.Plan.from_rates(model, torch.full((3,), rate, dtype=torch.float64))


# ---------------------------------------------------------------- algebra


@pytest.mark.parametrize("kept", [[0, 3, 4, 9], list(range(12)), [11]])
def test_solve_is_the_minimum(kept):
    """Against lstsq on the augmented problem: rows √Λ towards the dense weight, whose other columns are lost."""
    weight, inputs, wanted = random_problem()
    solved = least_squares.solve(weight, inputs.T @ inputs, wanted.T @ inputs, 0.1, kept)
    root = (0.1 * inputs.square().sum(0)).sqrt()[kept]
    rows = torch.cat([inputs[:, kept], root.diag()])
    targets = torch.cat([wanted, root[:, None] * weight[:, kept].T])
    assert torch.allclose(solved, torch.linalg.lstsq(rows, targets).solution.T, atol=1e-8)


def test_damping_knows_no_units():
    """A feature that is a thousand times as large is damped no more, and the others no more because of it."""
    weight, inputs, wanted = random_problem()
    sizes = torch.ones(12, dtype=torch.float64)
    sizes[3] = 1000
    plain = least_squares.solve(weight, inputs.T @ inputs, wanted.T @ inputs, 0.1, [0, 3, 4])
    larger = inputs * sizes
    scaled = least_squares.solve(weight / sizes, larger.T @ larger, wanted.T @ larger, 0.1, [0, 3, 4])
    assert torch.allclose(scaled * sizes[[0, 3, 4]], plain)


def test_few_tokens_are_believed_less():
    """The recipe's damping against hardly any, on other tokens: better where they are few, as good where they are
    many."""
    draw = torch.Generator().manual_seed(0)
    truth, weight = (torch.randn(8, 40, generator=draw, dtype=torch.float64) for _ in range(2))
    truth = weight + 0.3 * truth

    def text(tokens):
        inputs = torch.randn(tokens, 40, generator=draw, dtype=torch.float64)
        return inputs, inputs @ truth.T + 4 * torch.randn(tokens, 8, generator=draw, dtype=torch.float64)

    def error(tokens, strength):
        moments, (inputs, wanted) = least_squares.Moments(), text(20_000)
        moments.add(*text(tokens))
        fitted = least_squares.solve(weight, moments.gram, moments.cross, strength * 40 / tokens)
        return (inputs @ fitted.T - wanted).square().mean().item()

    assert error(80, refit.RECIPE.damping) < 0.8 * error(80, 1e-3)
    assert error(20_000, refit.RECIPE.damping) == pytest.approx(error(20_000, 1e-3), rel=0.02)


def test_solve_with_everything_kept_is_the_identity():
    weight, inputs, _ = random_problem()
    gram = inputs.T @ inputs
    assert torch.allclose(least_squares.solve(weight, gram, weight @ gram, 1e-2), weight, atol=1e-10)


@pytest.mark.parametrize("unit", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_choose_is_the_greedy_choice(unit, weighted):
    """One unit per step: each time the unit goes without which the best weight on the rest loses least (regularised,
    weighted)."""
    weight, inputs, wanted = random_problem()
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    output = root @ root.T if weighted else None
    gram, cross = inputs.T @ inputs, wanted.T @ inputs
    best, damped = least_squares.solve(weight, gram, cross, 0.1), least_squares.damped(gram, 0.1 * gram.diagonal())

    def loss(units):
        columns = surgery.rows_of_heads(units, unit)
        difference = best.clone()
        difference[:, columns] -= torch.linalg.solve(damped[columns][:, columns], (best @ damped)[:, columns].T).T
        return torch.trace(
            (torch.eye(5, dtype=torch.float64) if output is None else output) @ difference @ damped @ difference.T
        )

    left = list(range(12 // unit))
    for removed in range(1, len(left)):
        left = min(([u for u in left if u != gone] for gone in left), key=loss)
        assert least_squares.choose(best, gram, removed, unit, output, 0.1) == left


@pytest.mark.parametrize(("unit", "per_step"), [(1, 1), (1, 5), (3, 2)])
def test_rises_are_those_of_the_refit(unit, per_step):
    """What a removal is said to cost is what the error of the best weight on the rest is above that of all features."""
    weight, inputs, wanted = random_problem()
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    output, gram, cross = root @ root.T, inputs.T @ inputs, wanted.T @ inputs
    best, num_units = least_squares.solve(weight, gram, cross, 0.0), 12 // unit
    order, rises = least_squares.removal_order(best, gram, num_units - 1, unit, output, 0.0, per_step)

    def error(weight, columns):
        missed = wanted - inputs[:, columns] @ weight.T
        return (missed @ output * missed).sum()

    whole = error(best, list(range(12)))
    for step, rise in enumerate(rises, 1):
        left = [u for u in range(num_units) if u not in order[: step * per_step]]
        columns = [u * unit + i for u in left for i in range(unit)]
        assert error(least_squares.solve(weight, gram, cross, 0.0, columns), columns) - whole == pytest.approx(
            rise.item(), rel=1e-6
        )


def test_choice_on_a_diagonal_hessian_is_magnitude_times_activation():
    weight, inputs, _ = random_problem()
    norms = inputs.square().sum(0)
    order, rises = least_squares.removal_order(weight, torch.diag(norms), 12, damping=0.0)
    losses = weight.square().sum(0) * norms
    assert order == losses.argsort().tolist()
    assert torch.allclose(rises, losses.sort().values.cumsum(0))
    assert least_squares.choose(weight, torch.diag(norms), 7, damping=0.0, per_step=3) == sorted(order[7:])


@pytest.mark.parametrize("per_step", [1, 2, 5])
def test_choose_keeps_the_right_number(per_step):
    weight, inputs, _ = random_problem()
    gram = inputs.T @ inputs
    assert least_squares.choose(weight, gram, 0) == list(range(12))
    assert [len(least_squares.choose(weight, gram, n, per_step=per_step)) for n in range(12)] == list(range(12, 0, -1))


def test_gram_that_cannot_be_solved():
    weight, inputs, wanted = random_problem()
    doubled = torch.cat([inputs, inputs], 1)
    twice = torch.cat([weight, weight], 1)
    with pytest.raises(InputError, match="singular"):
        least_squares.solve(twice, doubled.T @ doubled, wanted.T @ doubled, 0.0)
    assert torch.isfinite(least_squares.solve(twice, doubled.T @ doubled, wanted.T @ doubled, 1e-2)).all()
    with pytest.raises(InputError, match="not finite"):
        least_squares.choose(weight, torch.full((12, 12), torch.nan, dtype=torch.float64), 3)


# ---------------------------------------------------------------- gradients of activations


def mask_gradients(model, windows, layer):
    """The definition, one window at a time, masks written into the weights: ∂/∂m of W[:, unit]·m."""
    attention, mlp = model.model.layers[layer].self_attn, model.model.layers[layer].mlp
    groups, width = kv_heads(model, layer), mlp.down_proj.in_features
    rows = []
    for window in windows:
        masks = torch.ones(groups, requires_grad=True), torch.ones(width, requires_grad=True)
        weights = {
            "self_attn.o_proj.weight": attention.o_proj.weight.detach()
            * masks[0].repeat_interleave(attention.o_proj.in_features // groups),
            "mlp.down_proj.weight": mlp.down_proj.weight.detach() * masks[1],
        }
        named = {f"model.layers.{layer}.{name}": weight for name, weight in weights.items()}
        logits = torch.func.functional_call(model, named, (window[None],), {"use_cache": False}).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], window[1:])
        rows.append(torch.autograd.grad(loss, masks))
    return [torch.stack(parts).double().square().mean(0) for parts in zip(*rows, strict=True)]


def test_fisher_scores_by_the_definition(model, windows):
    surgery.keep_channels(model, 1, range(3, 20))
    scores = fisher_scores(model, windows)
    for layer in range(3):
        for score, expected in zip(scores[layer], mask_gradients(model, windows, layer), strict=True):
            assert torch.allclose(score, expected, rtol=1e-3, atol=1e-12)


def test_fisher_scores_by_finite_differences(windows):
    model = small_model().double()
    score, total = fisher_scores(model, windows)[1][1][4].item(), 0.0
    weight = model.model.layers[1].mlp.down_proj.weight
    for window in windows:
        losses = []
        for factor in (1.02, 0.98 / 1.02):
            with torch.no_grad():
                weight[:, 4] *= factor
                logits = model(window[None], use_cache=False).logits
            losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], window[1:]).item())
        with torch.no_grad():
            weight[:, 4] /= 0.98
        total += ((losses[0] - losses[1]) / 0.04) ** 2
    assert score == pytest.approx(total / len(windows), rel=1e-2)  # the norms compute in float32


def test_fisher_scores_of_some_layers_from_their_stream(model, windows):
    whole, stream = fisher_scores(model, windows), hidden_states_before(model, windows, 1)
    part = fisher_scores(model, windows, [2], stream, 1)
    assert list(part) == [2]
    assert all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(part[2], whole[2], strict=True))


def test_no_weight_gets_a_gradient(model, windows):
    model.model.layers[0].mlp.requires_grad_(False)
    fisher_scores(model, windows)
    gradient_covariances(model, windows)
    assert all(p.grad is None for p in model.parameters())
    assert (
        not model.model.layers[0].mlp.up_proj.weight.requires_grad
        and model.model.layers[0].self_attn.q_proj.weight.requires_grad
    )


def test_gradient_covariances_by_the_definition(model, windows):
    """∂L/∂output, token by token, is also the gradient of a bias given to the projection."""
    covariances = gradient_covariances(model, windows)
    for layer in range(3):
        for linear, covariance in zip(
            (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj),
            covariances[layer],
            strict=True,
        ):
            nudge = torch.zeros(*windows.shape, 32, requires_grad=True)
            hook = linear.register_forward_hook(lambda module, inputs, output, nudge=nudge: output + nudge)
            logits = model(windows, use_cache=False).logits
            hook.remove()
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum"
            )
            gradient = torch.autograd.grad(loss, nudge)[0].flatten(0, 1).double()
            assert torch.allclose(covariance, gradient.T @ gradient / windows.numel(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("sequential", [True, False])
def test_prune_by_fisher(model, windows, clone, sequential):
    expected = fisher_scores(model, windows)[0]
    plan = plan_for(model)
    first = clone(model).model.layers[0].mlp.up_proj.weight
    founding.prune(model, plan, windows, group_statistic="fisher", channel_statistic="fisher", sequential=sequential)
    kept = largest(expected[1], 24 - plan.channels[0])
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, first[kept])
    assert [24 - c for c in plan.channels] == layer_shapes(model)["intermediate_size"].tolist()


# ---------------------------------------------------------------- the sweep


def reconstruction_error(model, dense, index, half, windows):
    """Squared error of the stream after one sublayer, against the dense model's, both from the dense stream before
    it."""
    streams = []
    for m in (model, dense):
        stream = hidden_states_before(dense, windows, index)
        for part in range(half + 1):
            owner = m if part == half else dense
            stream = Sublayer(owner, index, part).after(stream, windows)
        streams.append(stream)
    return (streams[0] - streams[1]).double().square().sum().item()


@torch.no_grad()
def test_refit_never_reconstructs_worse_than_slicing(model, windows, clone):
    """The same kept set, one sublayer at a time (so that nothing stands before it), without damping."""
    scores = unit_scores(model, windows, ("magnitude", "magnitude"))
    for index in range(3):
        for half in (0, 1):
            units = [[0, 0, 0], [0, 0, 0]]
            units[half][index] = (1, 10)[half]
            only = plans.Plan([0.4] * 3, *units)
            sliced, mended = clone(model), clone(model)
            refit.sweep(sliced, only, windows, PLAIN, scores=scores)
            refit.sweep(mended, only, windows, refit.Ingredients(damping=1e-9), scores=scores)
            before, after = (reconstruction_error(m, model, index, half, windows) for m in (sliced, mended))
            assert 0 < after <= before * (1 + 1e-6)


def test_conjugate_gradients_solve():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    matrix, wanted = (
        root @ root.T + torch.eye(30, dtype=torch.float64),
        torch.randn(5, 6, generator=generator, dtype=torch.float64),
    )
    factor = least_squares.cholesky(matrix[:6, :6])
    solved = least_squares.conjugate_gradients(lambda d: (matrix @ d.flatten()).view(5, 6), wanted, factor, 100)
    assert torch.allclose(solved.flatten(), torch.linalg.solve(matrix, wanted.flatten()), atol=1e-6)
    nothing = least_squares.conjugate_gradients(
        lambda d: (matrix @ d.flatten()).view(5, 6), torch.zeros_like(wanted), factor, 5
    )
    assert torch.equal(nothing, torch.zeros_like(wanted))


@pytest.mark.parametrize("half", [0, 1], ids=["attention", "mlp"])
@pytest.mark.parametrize("biases", [False, True])
@torch.no_grad()
def test_refit_together_is_gauss_newton(windows, half, biases):
    """Against lstsq on the whole Jacobian of a small sublayer, in float64; so near the target that no step is
    halved."""
    model = small_model(attention_bias=biases, mlp_bias=biases, hidden_size=8, intermediate_size=5, head_dim=2).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.normal_(generator=generator)
    model.set_attn_implementation("eager")
    sublayer = Sublayer(model, 1, half)
    stream = torch.randn(6, 20, 8, generator=generator, dtype=torch.float64)
    now = list(sublayer.calls(stream, windows))
    target = torch.cat([sublayer.run(call) for call in now]) + 1e-4 * torch.randn(
        6, 20, 8, generator=generator, dtype=torch.float64
    )
    start = torch.cat([linear.weight for linear in sublayer.inputs])
    jacobian = torch.cat(
        [torch.func.jacrev(lambda w, c=call: sublayer.run(c, w))(start).flatten(0, 2) for call in now]
    ).flatten(1)
    residual = torch.cat([(target[call.rows] - sublayer.run(call)).flatten() for call in now])
    expected = torch.linalg.lstsq(jacobian, residual, driver="gelsd", rcond=1e-10).solution.view(start.shape)
    refit.refit_together(sublayer, now, target, 500, 1e-3)
    change = torch.cat([linear.weight for linear in sublayer.inputs]) - start
    reached = [(jacobian @ d.flatten() - residual).norm() for d in (change, expected)]
    assert reached[0].item() == pytest.approx(reached[1].item(), rel=1e-4) and reached[1] < 0.99 * residual.norm()


@pytest.mark.parametrize("half", [0, 1], ids=["attention", "mlp"])
@torch.no_grad()
def test_every_round_comes_nearer(model, windows, half):
    model.set_attn_implementation("blocked")
    sublayer = Sublayer(model, 1, half)
    now = list(sublayer.calls(hidden_states_before(model, windows, 1), windows))
    target = torch.cat([sublayer.run(call) for call in now])
    if half == 0:
        surgery.keep_groups(model, 1, [1])
    else:
        surgery.keep_channels(model, 1, range(14))
    errors = [refit.output_moments(sublayer, now, target)[1]]
    for _ in range(3):
        moments = refit.refit_together(sublayer, now, target, 5, 1e-3)
        errors.append(refit.output_moments(sublayer, now, target)[1])
        refit.replace_weight(
            sublayer.output, least_squares.solve(sublayer.output.weight, moments.gram, moments.cross, 1e-9)
        )
        errors.append(refit.output_moments(sublayer, now, target)[1])
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


@torch.no_grad()
def test_after_gauss_newton_the_output_is_drawn_towards_the_dense_weight(model, windows):
    """Not towards what was just fitted to the same text, which would be half of the damping."""
    stream, mlp = hidden_states_before(model, windows, 1), sublayers(model, 1)[1]
    goal, dense = mlp.after(stream, windows), mlp.output.weight
    settings, target = refit.Ingredients(input_refit=False, damping=0.5, weighted=False), goal - stream
    kept, _ = refit.cut(mlp, refit.output_moments(mlp, mlp.calls(stream, windows), target)[0], 9, settings)
    refit.mend(mlp, 9, windows, stream, stream, goal, settings)
    moments, damping = refit.output_moments(mlp, mlp.calls(stream, windows), target)[0], settings.part(mlp.widest, 120)
    expected = least_squares.solve(dense[:, kept], moments.gram, moments.cross, damping)
    assert torch.allclose(mlp.output.weight.double(), expected, atol=1e-6)


@pytest.mark.parametrize("halves", [(), (1,), (0, 1)])
def test_gauss_newton_only_where_it_is_asked_for(model, windows, clone, halves):
    """In the first layer, before one half's weights change what the other reads."""
    plain, other = clone(model), clone(model)
    refit.sweep(plain, plan_for(model), windows, refit.Ingredients(newton_rounds=0))
    refit.sweep(other, plan_for(model), windows, refit.Ingredients(newton_halves=halves))
    for half, (one, two) in enumerate(zip(sublayers(plain, 0), sublayers(other, 0), strict=True)):
        if half == 0 or 0 not in halves:
            same = [torch.equal(a.weight, b.weight) for a, b in zip(one.inputs, two.inputs, strict=True)]
            assert same == [half not in halves] * len(same)


@pytest.mark.parametrize("off", EVERY_SWITCH)
def test_nothing_removed_is_the_identity(model, windows, logits_of, off):
    before = logits_of(model)
    refit.sweep(model, plans.Plan([0.0] * 3, [0] * 3, [0] * 3), windows, refit.Ingredients(**{off: False}))
    assert torch.allclose(logits_of(model), before, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("ingredients", [refit.Ingredients(), PLAIN], ids=["all", "none"])
def test_sweep_meets_the_plan_and_survives_the_folder(model, windows, logits_of, tmp_path, ingredients):
    plan = plan_for(model)
    shapes, before = layer_shapes(model), count_parameters(model)["backbone"]
    refit.sweep(model, plan, windows, ingredients)
    after = layer_shapes(model)
    assert (shapes["num_key_value_heads"] - after["num_key_value_heads"]).tolist() == plan.groups
    assert (shapes["intermediate_size"] - after["intermediate_size"]).tolist() == plan.channels
    assert count_parameters(model)["backbone"] < before
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(GqaLlamaForCausalLM.from_pretrained(tmp_path).eval()), logits_of(model))


def test_without_refit_nothing_is_fitted_to_what_stays(model, windows, clone):
    dense = clone(model)
    refit.sweep(model, plan_for(model), windows, refit.Ingredients(refit=False, input_refit=False))
    for old, new in zip(dense.model.layers, model.model.layers, strict=True):
        columns = {tuple(column) for column in old.mlp.down_proj.weight.T.tolist()}
        assert {tuple(column) for column in new.mlp.down_proj.weight.T.tolist()} <= columns


def test_uneven_pruned_model_can_be_swept_again(model, windows):
    refit.sweep(model, plans.Plan([0.0] * 3, [1, 0, 0], [3, 0, 9]), windows)
    first = layer_shapes(model)
    refit.sweep(model, plans.Plan([0.0] * 3, [0, 1, 1], [5, 2, 0]), windows)
    second = layer_shapes(model)
    assert (first["num_key_value_heads"] - second["num_key_value_heads"]).tolist() == [0, 1, 1]
    assert (first["intermediate_size"] - second["intermediate_size"]).tolist() == [5, 2, 0]


def test_input_refit_restores_a_drifted_stream(windows):
    """Half the stream's scale lost in front of a layer: its refitted projections must give nearly what they gave."""
    model = small_model()
    stream = hidden_states_before(model, windows, 1)
    mix = torch.eye(32) + 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    attention, _ = sublayers(model, 1)
    drifted = stream @ mix
    with torch.no_grad():
        wanted = [linear(attention.norm(stream)) for linear in attention.inputs]
        before = [
            (linear(attention.norm(drifted)) - y).square().sum()
            for linear, y in zip(attention.inputs, wanted, strict=True)
        ]
        refit.refit_inputs(attention, *(attention.calls(x, windows) for x in (stream, drifted)), 1e-6)
        after = [
            (linear(attention.norm(drifted)) - y).square().sum()
            for linear, y in zip(attention.inputs, wanted, strict=True)
        ]
    assert all(a < 0.2 * b for a, b in zip(after, before, strict=True))


def test_weighted_choice_uses_the_covariance(windows):
    """Only one direction of the output matters to the loss: the channels that write there must stay."""
    model = small_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, :6] *= 20  # channels 0–5 write strongly to coordinate 0 …
        model.model.layers[1].mlp.down_proj.weight[1, 6:12] *= 400  # … and 6–11 more strongly to 1
    covariance = torch.diag(torch.tensor([1.0] + [1e-6] * 31, dtype=torch.float64))
    covariances, plan = [(covariance, covariance)] * 3, plans.Plan([0.0] * 3, [0] * 3, [0, 18, 0])
    kept = {}
    for weighted in (True, False):
        copy = small_model()
        copy.load_state_dict(model.state_dict())
        settings = refit.Ingredients(
            **dict.fromkeys(EVERY_SWITCH, False) | {"weighted": weighted, "output_damping": 1e-9}
        )
        refit.sweep(copy, plan, windows, settings, covariances=covariances)
        rows = copy.model.layers[1].mlp.up_proj.weight
        kept[weighted] = {int((model.model.layers[1].mlp.up_proj.weight == row).all(1).nonzero()) for row in rows}
    assert kept == {True: set(range(6)), False: set(range(6, 12))}


# ---------------------------------------------------------------- bad input leaves everything alone


def snapshot(model):
    return [p.clone() for p in model.parameters()], model.config.to_dict()


def assert_untouched(model, before):
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before[0], strict=True))
    assert model.config.to_dict() == before[1]
    assert all(
        m.weight.shape == (m.out_features, m.in_features) for m in model.modules() if isinstance(m, torch.nn.Linear)
    )


def test_too_few_tokens(model, windows):
    before, widest = snapshot(model), max(32, model.model.layers[0].self_attn.o_proj.in_features)
    with pytest.raises(InputError, match=f"20 calibration tokens are too few .* at least {widest}"):
        refit.sweep(model, plan_for(model), windows[:1])
    assert_untouched(model, before)


def test_singular_gram_in_a_later_layer(model, windows):
    """Two channels that always do the same, and no damping: found in layer 2, when layers 0 and 1 are cut already."""
    mlp = model.model.layers[2].mlp
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[1] = linear.weight[0]
    before, done = snapshot(model), []
    with pytest.raises(InputError, match="singular"):
        refit.sweep(model, plan_for(model), windows, refit.Ingredients(damping=0.0), after_layer=done.append)
    assert done == [0, 1]
    assert_untouched(model, before)


def test_gram_that_is_not_finite(model, windows):
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.inf
    before = snapshot(model)
    with pytest.raises(InputError, match="not finite"):
        refit.sweep(model, plan_for(model), windows, refit.Ingredients(weighted=False))
    with pytest.raises(InputError, match="loss is nan"):
        refit.sweep(model, plan_for(model), windows)
    assert_untouched(model, before)


def test_plan_that_does_not_fit(model, windows):
    before = snapshot(model)
    with pytest.raises(InputError, match="layer 1 cannot lose"):
        refit.sweep(model, plans.Plan([0.0] * 3, [0, 99, 0], [1, 0, 0]), windows)
    assert_untouched(model, before)


def test_the_tolerance_of_a_batch_is_its_matrices():
    matrices = torch.diag(torch.tensor([1.0, 1e-14], dtype=torch.float64)).expand(300, 2, 2)
    assert torch.allclose(least_squares.cholesky(matrices)[0].diagonal(), matrices[0].diagonal().sqrt())
    with pytest.raises(InputError, match="singular"):
        least_squares.cholesky(torch.zeros(300, 2, 2, dtype=torch.float64))


@torch.no_grad()
def test_units_that_do_nothing_cost_nothing_and_go_first(windows, clone):
    """As masking leaves them: a whole layer's values are zero, or those of one group."""
    model = small_model()
    head_dim = model.config.head_dim
    model.model.layers[0].self_attn.v_proj.weight[:head_dim] = 0
    model.model.layers[1].self_attn.v_proj.weight.zero_()
    with torch.enable_grad():
        covariances = gradient_covariances(model, windows)
    table = allocate.cost_table(model, windows, covariances)
    assert table.groups[0][1] < 1e-12 < table.groups[0][2] and table.groups[1].max() < 1e-12
    expected, kept = clone(model), model.model.layers[0].self_attn.k_proj.weight[head_dim:].clone()
    refit.sweep(
        model,
        plans.Plan([0.1] * 3, [1, 3, 0], [0] * 3),
        windows,
        refit.Ingredients(input_refit=False, newton_rounds=0, weighted=False),
    )
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight, kept)
    assert torch.allclose(window_losses(model, windows), window_losses(expected, windows), atol=1e-3)


@torch.no_grad()
def test_streams_of_bf16_models_are_float32(windows, clone):
    """A residual stream far larger than what a layer adds: in bf16 the difference of two is rounding."""
    model = small_model(tie_word_embeddings=False)
    model.model.embed_tokens.weight.mul_(50)
    model.to(torch.bfloat16)
    plan, errors = plans.Plan([0.3] * 3, [1, 1, 1], [8, 8, 8]), []
    for dtype in (torch.float32, torch.bfloat16):
        pruned = clone(model).to(dtype)
        refit.sweep(pruned, plan, windows, refit.Ingredients(weighted=False))
        errors.append(kl_to(clone(model).float(), pruned.float(), windows))
    assert errors[1] < 1.1 * errors[0]
