"""OSSCAR."""

import torch
from torch import nn

from gqalib.errors import InputError
from gqalib.model.shapes import decoder_layers, layer_shape
from gqalib.model.surgery import keep_channels, keep_groups
from gqalib.peers.common import columns, feed, output_projections, peer
from gqalib.prune import refit
from gqalib.prune.founding import uniform_plan
from gqalib.stream import advance

RIDGE = 1e-2  # of the mean diagonal of a Gram matrix: what makes every solve well-posed


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
    chosen = columns(layer, name, kept.tolist())
    (keep_groups if attention else keep_channels)(model, index, kept.tolist())
    with torch.no_grad():
        linear.weight.copy_(torch.linalg.solve(gram[chosen][:, chosen], cross[chosen]).T)


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
