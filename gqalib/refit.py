"""Cut and mend: second-order choice of what goes, least-squares repair of what stays, one sweep from front to back.

With X the inputs of `o_proj` or `down_proj` on calibration text, [tokens, features], Y the output that is wanted, W the dense
weight [hidden, features], all sums in float64:

    H = XᵀX + λI,  B = YᵀX + λW         λ = damping × mean diagonal of XᵀX
    refit       W'_S = B_S H_SS⁻¹       the best weight on the kept features S, drawn towards W
    choice      start from W = B H⁻¹; remove the unit u with the least tr(G W_u (H⁻¹_uu)⁻¹ W_uᵀ), correct W and H⁻¹, repeat
                (optimal brain surgery, Hassibi & Stork 1993; in whole units: SlimGPT 2024); G is the covariance of the loss'
                gradient at the output (K-FAC's other factor), or I

Y is what the dense model's residual stream is after this sublayer, less what the pruned model's stream is before it: each
layer also repairs what the layers in front of it broke. The *input refit* does the same for q, k, v, gate and up: on the pruned
stream they are to give what they gave on the dense one.

On paper, Llama-3-8B in bf16 with n calibration tokens, one layer at a time (f = 14,336, the width of `down_proj`, decides):

    bytes    weights 16.1e9; four residual streams of 8,192·n; H of `down_proj` and two matrices of its size in a solve, 3 · 8f²
             = 4.9e9; YᵀX, W and their solutions in float64 1.9e9: 24.0e9 at n = 32,768, within a 24 GiB GPU. The original
             weights of the layers done wait in host memory (at most 14.0e9), so that an error leaves the model as it was.
    FLOPs    2n(f² + hidden² + hidden·f) for the moments, 5f³ at most for the choice and the solves, 1.3e9·n for three forward
             passes: 3.3e13 a layer at n = 32,768, 1.0e15 in all, most of it float64.

The weighted choice (and `importance.fisher_scores`) needs one backward pass over the whole model, without weight gradients: 16.1e9
of weights, about 14e9 of activations and 3e9 of logits per batch of 2,048 tokens, and 64 covariances of 8 · 4096² = 8.6e9.
The seed's Taylor scores need 14.0e9 of weight gradients more when taken at once, and 0.4e9 layer by layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gqalib import importance
from gqalib.errors import InputError
from gqalib.models import decoder_layers, layer_shape
from gqalib.perplexity import advance, batches
from gqalib.pruning import Plan, check_plan
from gqalib.surgery import keep_channels, keep_groups, replace_weight, restored_on_error, rows_of_heads


@dataclass(frozen=True)
class Ingredients:
    """What the sweep does; each can be switched off."""

    refit: bool = True  # least squares on what stays
    residual_target: bool = True  # towards the dense stream, not the layer's own output
    input_refit: bool = True  # q, k, v, gate, up as well
    weighted: bool = True  # the choice weighs outputs by the gradient's covariance
    damping: float = 1e-2  # of H, times its mean diagonal
    input_damping: float = 1e-2  # the same in the input refit
    output_damping: float = 0.05  # of G, times its mean diagonal
    rounds: int = 64  # a layer's channels go in steps of 1/rounds of them; groups go one by one


# ---------------------------------------------------------------- linear algebra


class Moments:
    """Running sums XᵀX [features, features] and YᵀX [out, features] over batches of tokens, in float64."""

    def __init__(self) -> None:
        self.gram = self.cross = 0.0

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        inputs, outputs = inputs.flatten(0, -2).double(), outputs.flatten(0, -2).double()
        self.gram = self.gram + inputs.T @ inputs
        self.cross = self.cross + outputs.T @ inputs


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """`gram` + damping × its mean diagonal × I."""
    return _ridged(gram.clone(), damping * gram.diagonal().mean())


def _ridged(matrix: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    matrix.diagonal().add_(ridge)
    return matrix


def solve(weight: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor, damping: float, kept: Sequence[int] | None = None) -> torch.Tensor:
    """W'_S = (YᵀX + λW)_S (XᵀX + λI)_SS⁻¹, float64 [out, |S|]: least squares on the kept features, drawn towards `weight`.

    Args:
        weight: [out, features]. gram: XᵀX [features, features]. cross: YᵀX [out, features]. kept: S (default: all features).

    Raises:
        InputError: the Gram matrix is not finite, or singular in spite of the damping.
    """
    columns = torch.arange(len(gram), device=gram.device) if kept is None else torch.as_tensor(kept, device=gram.device)
    ridge = damping * gram.diagonal().mean()
    target = cross[:, columns] + ridge * weight[:, columns].double()
    return torch.cholesky_solve(target.T, cholesky(_ridged(gram[columns][:, columns], ridge))).T


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor(s) of [..., n, n].

    Raises:
        InputError: the matrix is not finite, or singular to working precision.
    """
    if not torch.isfinite(matrix.sum()):
        raise InputError("a Gram matrix is not finite: use dtype float32 or another calibration text")
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots, scale = factor.diagonal(dim1=-2, dim2=-1).square(), matrix.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    if failed.any() or (pivots <= len(matrix) * torch.finfo(matrix.dtype).eps * scale).any():
        raise InputError("a Gram matrix is singular: raise the damping, or give other calibration text")
    return factor


def choose(
    weight: torch.Tensor,
    gram: torch.Tensor,
    num_removed: int,
    unit: int = 1,
    output: torch.Tensor | None = None,
    damping: float = 1e-2,
    per_step: int = 1,
) -> list[int]:
    """The units that stay when `num_removed` go one step after the other, ascending. Arguments as in `removal_order`."""
    gone = set(removal_order(weight, gram, num_removed, unit, output, damping, per_step))
    return [u for u in range(len(gram) // unit) if u not in gone]


def removal_order(
    weight: torch.Tensor,
    gram: torch.Tensor,
    num_removed: int,
    unit: int = 1,
    output: torch.Tensor | None = None,
    damping: float = 1e-2,
    per_step: int = 1,
) -> list[int]:
    """The first `num_removed` units to go, in their order, by optimal brain surgery.

    Args:
        weight: [out, features], the best one with all features (`solve`); a unit is `unit` neighbouring columns.
        gram: XᵀX. output: G [out, out], damped already; None is the identity.
        per_step: units that go before the rest is corrected for their loss.

    Raises:
        InputError: a matrix is not finite, or singular in spite of the damping.
    """
    inverse = torch.cholesky_inverse(cholesky(damped(gram, damping)))
    weight = weight.double().clone() if output is None else cholesky(output).T @ weight.double()  # tr(G A Aᵀ) = ‖LᵀA‖², G = LLᵀ
    alive, order = torch.ones(len(gram) // unit, dtype=torch.bool, device=gram.device), []
    while len(order) < num_removed:
        losses = unit_losses(weight, inverse, unit).masked_fill(~alive, torch.inf)
        gone = losses.argsort(stable=True)[: min(per_step, num_removed - len(order))]
        _eliminate(weight, inverse, (gone[:, None] * unit + torch.arange(unit, device=gone.device)).flatten())
        alive[gone] = False
        order += gone.tolist()
    return order


def unit_losses(weight: torch.Tensor, inverse: torch.Tensor, unit: int = 1) -> torch.Tensor:
    """Rise of the squared error when one unit goes and the rest is corrected: tr(W_u (H⁻¹_uu)⁻¹ W_uᵀ), [units]."""
    if unit == 1:
        return weight.square().sum(0) / inverse.diagonal()
    blocks = torch.stack([inverse[i : i + unit, i : i + unit] for i in range(0, len(inverse), unit)])
    columns = weight.unflatten(1, (-1, unit)).permute(1, 2, 0)  # [units, unit, out]
    return (columns * torch.cholesky_solve(columns, cholesky(blocks))).sum((1, 2))


def _eliminate(weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> None:
    """Correct weight and H⁻¹, in place, for the loss of these columns; what they leave is 0 columns and an identity block."""
    across = inverse[gone]
    correction = torch.cholesky_solve(across, cholesky(across[:, gone]))
    weight.addmm_(weight[:, gone], correction, alpha=-1)
    inverse.addmm_(across.T, correction, alpha=-1)
    inverse[gone] = inverse[:, gone] = 0
    inverse[gone, gone] = 1


# ---------------------------------------------------------------- one sublayer


@dataclass(frozen=True)
class Sublayer:
    """Attention or MLP of a layer, in the words that both share."""

    norm: nn.Module
    inputs: tuple[nn.Linear, ...]  # they read the normalised stream
    output: nn.Linear  # it writes to the stream; its input features are the units' activations
    num_units: int  # groups or channels
    keep: Callable[[nn.Module, int, Sequence[int]], None]  # surgery

    @property
    def unit(self) -> int:
        """Features per unit."""
        return self.output.in_features // self.num_units


def sublayers(layer: nn.Module) -> tuple[Sublayer, Sublayer]:
    """Attention and MLP, in the order in which they run."""
    attention, mlp, shape = layer.self_attn, layer.mlp, layer_shape(layer)
    inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
    return (
        Sublayer(layer.input_layernorm, inputs, attention.o_proj, shape["num_key_value_heads"], keep_groups),
        Sublayer(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), mlp.down_proj, shape["intermediate_size"], keep_channels),
    )


class _Nothing(nn.Module):
    """An MLP that adds nothing to the stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def through(model: nn.Module, index: int, half: int, stream: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Carry a residual stream through the attention (half 0) or the MLP (half 1) of a layer."""
    layer = decoder_layers(model)[index]
    if half == 1:
        return torch.cat([stream[rows] + layer.mlp(layer.post_attention_layernorm(stream[rows])) for rows in batches(windows)])
    mlp, layer.mlp = layer.mlp, _Nothing()
    try:
        return advance(model, stream, windows, index, index + 1)
    finally:
        layer.mlp = mlp


def features(model: nn.Module, index: int, half: int, stream: torch.Tensor, windows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Batch by batch, what enters `o_proj` (half 0) or `down_proj` (half 1): rows, and [windows, length, features]."""
    seen = []
    linear = sublayers(decoder_layers(model)[index])[half].output
    hook = linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        for rows in batches(windows):
            through(model, index, half, stream[rows], windows[rows])
            yield rows, seen.pop()
    finally:
        hook.remove()


def refit_inputs(sublayer: Sublayer, wanted: torch.Tensor, current: torch.Tensor, windows: torch.Tensor, damping: float) -> None:
    """Make q, k, v (or gate, up) give on the `current` stream what they give on the `wanted` one."""
    moments = Moments()
    for rows in batches(windows):
        moments.add(sublayer.norm(current[rows]), sublayer.norm(wanted[rows]))
    for linear in sublayer.inputs:
        replace_weight(linear, solve(linear.weight, moments.gram, linear.weight.double() @ moments.cross, damping))


def cut(
    sublayer: Sublayer,
    moments: Moments,
    num_removed: int,
    ingredients: Ingredients,
    scores: torch.Tensor | None = None,
    covariance: torch.Tensor | None = None,
) -> tuple[list[int], torch.Tensor]:
    """The units to keep, and the weight of the output projection on them, float64; nothing changes yet.

    Args:
        scores: of the units, the largest stay (default: OBS). covariance: G, not damped (default: the identity).
    """
    weight, damping = sublayer.output.weight, ingredients.damping
    if scores is not None:
        kept = importance.largest(scores, sublayer.num_units - num_removed)
    else:
        best = solve(weight, moments.gram, moments.cross, damping)
        output = None if covariance is None else damped(covariance, ingredients.output_damping)
        per_step = max(1, sublayer.num_units // ingredients.rounds)
        kept = choose(best, moments.gram, num_removed, sublayer.unit, output, damping, per_step)
    columns = rows_of_heads(kept, sublayer.unit).to(weight.device)
    return kept, solve(weight, moments.gram, moments.cross, damping, columns) if ingredients.refit else weight[:, columns]


# ---------------------------------------------------------------- the sweep


@torch.no_grad()
def sweep(
    model: nn.Module,
    plan: Plan,
    windows: torch.Tensor,
    ingredients: Ingredients = Ingredients(),
    *,
    scores: Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
    covariances: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    after_layer: Callable[[int], None] | None = None,
) -> None:
    """Prune and refit a model in place, front to back; what it was before is what it is fitted to.

    Args:
        windows: calibration text, token ids [count, length].
        scores: from `importance.unit_scores`; the units with the largest stay (default: chosen by OBS).
        covariances: from `importance.gradient_covariances`, for the weighted choice (default: computed here).
        after_layer: called with the index of each layer when it is done.

    Raises:
        InputError: a plan that does not fit, too little text, a singular or non-finite Gram matrix; the model is as before.
    """
    check_plan(plan, model)
    check_tokens(model, windows)
    if not ingredients.weighted:
        covariances = None
    elif scores is None and covariances is None:
        with torch.enable_grad():
            covariances = importance.gradient_covariances(model, windows)
    wanted = current = advance(model, None, windows, 0, 0)
    with restored_on_error(model):
        for index, layer in enumerate(decoder_layers(model)):
            for half, sublayer in enumerate(sublayers(layer)):
                goal = through(model, index, half, wanted, windows)
                if ingredients.input_refit:
                    refit_inputs(sublayer, wanted, current, windows, ingredients.input_damping)
                moments = Moments()
                for rows, inputs in features(model, index, half, current, windows):
                    moments.add(inputs, goal[rows] - current[rows] if ingredients.residual_target else sublayer.output(inputs))
                kept, weight = cut(
                    sublayer, moments, (plan.groups, plan.channels)[half][index], ingredients,
                    None if scores is None else scores[index][half], None if covariances is None else covariances[index][half],
                )  # fmt: skip
                sublayer.keep(model, index, kept)
                replace_weight(sublayer.output, weight)
                wanted, current = goal, through(model, index, half, current, windows)
            if after_layer is not None:
                after_layer(index)


def check_tokens(model: nn.Module, windows: torch.Tensor) -> None:
    """Raises InputError if there are fewer calibration tokens than unknowns in a row of the widest projection."""
    widths = {m.in_features for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, nn.Linear)}
    if windows.numel() < max(widths):
        raise InputError(f"{windows.numel()} calibration tokens are too few for a least-squares fit: give at least {max(widths)}")
