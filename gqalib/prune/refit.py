"""Cut and mend: second-order choice of what goes, least-squares repair of what stays, one sweep from front to back.

The algebra is in `least_squares`: X are the inputs of `o_proj` or `down_proj` on calibration text, G the covariance of
the loss' gradient at its output, and Y what the dense model's residual stream is after this sublayer, less what the
pruned model's stream is before it: each sublayer also repairs what those in front of it broke. The *input refit* does
the same for q, k, v, gate and up before the cut: on the pruned stream they are to give what they gave on the dense one.
After the cut gate and up are refitted together, by Gauss–Newton, for the one thing that counts, the MLP's output
against Y; that and the refit of the output projection take turns. The same for q, k and v took more time and gained
nothing on SmolLM2-135M and the reference model (LOG.md). Memory is for one sublayer at a time; `memory` has the sums.
The weights of the layers done wait in host memory, so that an error leaves the model as it was.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import vjp

from gqalib.errors import InputError
from gqalib.model.shapes import decoder_layers
from gqalib.model.surgery import drop_layers, replace_weight, restored_on_error, rows_of_heads, take_weights
from gqalib.prune.least_squares import (
    Moments, at_least_float32, cholesky, conjugate_gradients, damped, removal_order, ridge, solve,
)  # fmt: skip
from gqalib.prune.plans import Plan, check_plan
from gqalib.prune.scores import gradient_covariances, largest
from gqalib.prune.sublayers import Call, Sublayer, empty_like, sublayers
from gqalib.steps import in_steps
from gqalib.stream import advance, at_work, is_streamed


@dataclass(frozen=True)
class Ingredients:
    """What the sweep does; each can be switched off."""

    refit: bool = True  # least squares on what stays, Gauss–Newton included
    residual_target: bool = True  # towards the dense stream, not the layer's own output
    input_refit: bool = True  # q, k, v, gate, up as well
    weighted: bool = True  # the choice weighs outputs by the gradient's covariance
    newton_rounds: int = 1  # afterwards: Gauss–Newton for q, k, v or gate, up together, then the output projection
    newton_halves: tuple[int, ...] = (1,)  # where: 0 is attention, 1 the MLP
    newton_steps: int = 3  # of conjugate gradients in each
    newton_share: float = 0.25  # of the calibration batches that the curvature is taken from
    damping: float = 2.5  # of H, see `part`
    output_damping: float = 0.05  # of G, times its mean diagonal
    cuts: int = 64  # a layer's channels go in steps of 1/cuts of them; groups go one by one

    def part(self, num_features: int, num_tokens: int) -> float:
        """The part of H's diagonal that is added: the fewer tokens there are for a feature, the more of what a fit
        finds is chance. For o_proj and down_proj the features are those of the wider one, so that their costs
        compare."""
        return self.damping * num_features / num_tokens


RECIPE = Ingredients()

# ---------------------------------------------------------------- one sublayer


def mend(
    sublayer: Sublayer, num_removed: int, windows: Tensor, wanted: Tensor, current: Tensor, goal: Tensor,
    ingredients: Ingredients = RECIPE, scores: Tensor | None = None, covariance: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Cut one sublayer and refit it.

    Args:
        wanted, current: the dense and the pruned model's streams before it, [count, length, hidden]; goal: the dense
            one after it. scores, covariance: as in `cut`.

    Returns:
        Its weights and biases.
    """
    now, target = ready(sublayer, windows, wanted, current, goal, ingredients)
    kept, weight = cut(sublayer, output_moments(sublayer, now, target)[0], num_removed, ingredients, scores, covariance)
    sublayer.keep(kept)
    replace_weight(sublayer.output, weight)
    inner, damping = (ingredients.part(count, windows.numel()) for count in (current.shape[-1], sublayer.widest))
    newton = ingredients.refit and sublayer.half in ingredients.newton_halves
    for _ in range(ingredients.newton_rounds if newton else 0):
        steps = ingredients.newton_steps, inner, ingredients.newton_share
        moments = refit_together(sublayer, now, target, *steps)
        replace_weight(sublayer.output, solve(sublayer.output.weight, moments.gram, moments.cross, damping))
    return sublayer.module.state_dict()


def ready(
    sublayer: Sublayer, windows: Tensor, wanted: Tensor, current: Tensor, goal: Tensor, ingredients: Ingredients
) -> tuple[list[Call], Tensor]:
    """Refit the inputs, before the cut; the batches, and what the output is to be on them. Arguments as in `mend`."""
    now, target = list(sublayer.calls(current, windows)), empty_like(goal)
    if ingredients.input_refit:
        damping = ingredients.part(current.shape[-1], windows.numel())
        refit_inputs(sublayer, sublayer.calls(wanted, windows), now, damping)
    if ingredients.residual_target:
        torch.sub(goal, current, out=target)
    else:
        for call in now:
            target[call.rows].copy_(sublayer.run(call))
    return now, target


def metric(covariance: Tensor, damping: float) -> Tensor:
    """G, damped by a part of its mean diagonal: no direction is free."""
    return damped(covariance, damping * covariance.diagonal().mean())


def refit_inputs(sublayer: Sublayer, wanted: Iterable[Call], current: Iterable[Call], damping: float) -> None:
    """Make q, k, v (or gate, up) give on the current stream what they give on the wanted one."""
    moments = Moments()
    for call, goal in zip(current, wanted, strict=True):
        moments.add(call.inputs, goal.inputs)
    for linear in sublayer.inputs:
        cross = linear.weight.double() @ moments.cross
        replace_weight(linear, solve(linear.weight, moments.gram, cross, damping))


def output_moments(sublayer: Sublayer, current: Iterable[Call], target: Tensor) -> tuple[Moments, float]:
    """XᵀX and YᵀX at `o_proj` or `down_proj`, Y: the target [count, length, hidden], less the bias if there is one;
    and Σ‖output − target‖²."""
    moments, error, seen, bias = Moments(), 0.0, [], 0.0 if sublayer.output.bias is None else sublayer.output.bias
    with sublayer.output.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        for call in current:
            goal = call.of(target)
            error += _squared(sublayer.run(call) - goal)
            moments.add(seen.pop(), goal - bias)
    return moments, float(error)


def _squared(difference: Tensor) -> Tensor:
    return difference.square().sum(dtype=torch.float64)


def cut(sublayer: Sublayer, moments: Moments, num_removed: int, *how, **options) -> tuple[list[int], Tensor]:
    """The units to keep, and the weight of the output projection on them, float64; nothing changes yet. Other
    arguments as in `cuts`."""
    return next(cuts(sublayer, moments, [num_removed], *how, **options))


def cuts(
    sublayer: Sublayer, moments: Moments, counts: Sequence[int], ingredients: Ingredients,
    scores: Tensor | None = None, covariance: Tensor | None = None,
) -> Iterator[tuple[list[int], Tensor]]:  # fmt: skip
    """`cut` for several numbers of removed units, from one elimination.

    Args:
        scores: of the units, the largest stay (default: OBS). covariance: G, not damped (default: the identity).
    """
    weight, gram, cross = sublayer.output.weight, moments.gram, moments.cross
    damping = ingredients.part(sublayer.widest, moments.tokens)
    if scores is None:
        best = solve(weight, gram, cross, damping)
        output = None if covariance is None else metric(covariance.to(weight.device), ingredients.output_damping)
        per_step = max(1, sublayer.num_units // ingredients.cuts)
        order, _ = removal_order(best, gram, max(counts), sublayer.unit, output, damping, per_step)
    for count in counts:
        if scores is None:
            kept = sorted(set(range(sublayer.num_units)) - set(order[:count]))
        else:
            kept = largest(scores, sublayer.num_units - count)
        columns = rows_of_heads(kept, sublayer.unit).to(weight.device)
        yield kept, solve(weight, gram, cross, damping, columns) if ingredients.refit else weight[:, columns]


# ---------------------------------------------------------------- Gauss–Newton


def refit_together(
    sublayer: Sublayer, current: Sequence[Call], target: Tensor, num_steps: int, damping: float, share: float = 1.0
) -> Moments:
    """One Gauss–Newton step for q, k, v (or gate, up) together: Σ‖output − target‖² falls, or nothing changes.

    The output is linearised in the stacked weights V [rows, hidden], output ≈ output(V) + J·D, and JᵀJ D = Jᵀ(target −
    output(V)) is solved by `num_steps` of conjugate gradients, preconditioned by XᵀX + Λ of the normalised stream X:
    nothing larger than V and a batch. Few steps keep D small where the text says little. JᵀJ is taken from a `share` of
    the batches, as in Hessian-free optimisation (Martens 2010). A step that does not help is halved, three times at
    most.

    Returns `output_moments` of what the inputs have become.
    """
    start = torch.cat([linear.weight for linear in sublayer.inputs]).detach()
    some = current[:: max(1, round(1 / share))]
    wanted, before = _pull(sublayer, current, start, lambda call, outputs: call.of(target) - outputs)

    def product(direction: Tensor) -> Tensor:
        """JᵀJ·direction; J·direction is a difference quotient: one forward pass, where forward AD takes the time of
        four."""
        width = (1e-3 * start.norm() / direction.norm()).to(start.dtype)
        moved = start + width * direction.to(start.dtype)
        with in_tf32(False):  # its ten bits are too few for a difference
            pulled = _pull(sublayer, some, start, lambda call, out: (sublayer.run(call, moved) - out) / width)[0]
        return pulled * (len(current) / len(some))

    gram = sum((x.T @ x).double() for x in (call.inputs.flatten(0, -2) for call in current))
    change = conjugate_gradients(product, wanted, cholesky(damped(gram, ridge(gram, damping))), num_steps)
    for scale in (1.0, 0.5, 0.25, 0.125, 0.0):
        parts = sublayer.split((start + scale * change).to(start.dtype) if scale else start)
        for linear, part in zip(sublayer.inputs, parts, strict=True):
            replace_weight(linear, part)
        moments, error = output_moments(sublayer, current, target)
        if error < before:
            break
    return moments


def _pull(
    sublayer: Sublayer, current: Sequence[Call], weights: Tensor, vector: Callable[[Call, Tensor], Tensor]
) -> tuple[Tensor, float]:
    """Jᵀ·vector, summed over the batches in float64, and Σ‖vector‖²; `vector` is given the batch and its output."""
    total, size = torch.zeros_like(weights, dtype=torch.float64), 0.0
    for call in current:
        outputs, transpose = vjp(partial(sublayer.run, call), weights)
        pulled = vector(call, outputs)
        size += _squared(pulled)
        total += transpose(pulled)[0]
    return total, float(size)


@contextmanager
def in_tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU may round the factors of float32 products to ten bits, for a sixth of the time; a CPU does not."""
    backend = torch.backends.cuda.matmul
    before, backend.allow_tf32 = backend.allow_tf32, allowed
    try:
        yield
    finally:
        backend.allow_tf32 = before


# ---------------------------------------------------------------- the sweep


@in_steps("after_layer")
def sweep(
    model: nn.Module, plan: Plan, windows: Tensor, ingredients: Ingredients = RECIPE, *,
    scores: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    covariances: Sequence[tuple[Tensor, Tensor]] | None = None, after_layer: Callable[[int], None] | None = None,
    mending: Callable[..., dict[str, Tensor]] | None = None,
) -> None:  # fmt: skip
    """Prune and refit a model in place, front to back; what it was before is what it is fitted to. A step for each
    sublayer: its weights, in at least float32, as they are at work.

    Args:
        windows: calibration text, token ids [count, length].
        scores: from `founding.unit_scores`; the units with the largest stay (default: chosen by OBS).
        covariances: from `scores.gradient_covariances`, of the model as it is (default: taken here if needed).
        after_layer: called with the index of each layer when it is done, now or by an earlier run.
        mending: in the place of `mend`, for whoever wants to look at each sublayer on the way.

    Raises:
        InputError: a plan that does not fit, too little text, a singular or non-finite Gram matrix; the model is as
        before.
    """
    check_plan(plan, model, whole_layers=True)
    check_tokens(model, windows)
    if not ingredients.weighted or scores is not None:
        covariances = None
    elif covariances is None:
        covariances = gradient_covariances(model, windows)
    wanted = current = embedded(model, windows)
    dropped = plan.whole_layers(model)
    with torch.no_grad(), restored_on_error(model), in_tf32(True):
        for index, layer in enumerate(decoder_layers(model)):
            with at_work(layer), _layer_at_least_float32(layer):
                if index in dropped:  # the next layers' target makes up for it
                    wanted = advance(model, wanted, windows, index, index + 1)
                for half, part in enumerate(() if index in dropped else sublayers(model, index)):
                    goal, removed = part.after(wanted, windows), (plan.groups, plan.channels)[half][index]
                    how = ingredients, *(table and table[index][half] for table in (scores, covariances))
                    mended = partial(mending or mend, part, removed, windows, wanted, current, goal, *how)
                    take_weights(model, part.module, (yield f"layer-{index}-{half}", mended))
                    del mended  # and with it the streams in front
                    wanted, current = goal, part.after(current, windows)
            if after_layer is not None:
                after_layer(index)
        if dropped:
            drop_layers(model, dropped)


def embedded(model: nn.Module, windows: Tensor) -> Tensor:
    """The residual stream before the first layer, pinned, in float32: targets are differences of large numbers."""
    stream = at_least_float32(advance(model, None, windows, 0, 0))
    return stream.pin_memory() if is_streamed(model) and torch.cuda.is_available() else stream


@contextmanager
def _layer_at_least_float32(layer: nn.Module) -> Iterator[None]:
    dtype = next(layer.parameters()).dtype
    layer.to(torch.promote_types(dtype, torch.float32))
    try:
        yield
    finally:
        layer.to(dtype)


def check_tokens(model: nn.Module, windows: Tensor) -> None:
    """Raises InputError if there are fewer calibration tokens than unknowns in a row of the widest projection."""
    widest = max(m.in_features for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, nn.Linear))
    if windows.numel() < widest:
        raise InputError(f"{windows.numel()} calibration tokens are too few for a fit: give at least {widest}")
