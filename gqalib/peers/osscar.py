"""OSSCAR: what stays is chosen and refitted by least squares, with local search."""

import torch
from torch import nn

from gqalib.model.surgery import replace_weight, rows_of_heads
from gqalib.peers.common import feed, peer
from gqalib.prune import least_squares, refit
from gqalib.prune.plans import uniform_plan
from gqalib.prune.sublayers import sublayers
from gqalib.stream import advance

RIDGE = 1e-2  # of the mean diagonal of a Gram matrix: what makes every solve well-posed
ROUNDS = 16  # of swaps at most


@peer
def osscar(model: nn.Module, windows: torch.Tensor, fraction: float, multiple: int = 1) -> None:
    """OSSCAR (Meng et al., ICML 2024), in compact form: units by least-squares reconstruction error, with local
    search, and a refit.

    Front to back, at a uniform rate. With X the features that the model pruned so far feeds to o_proj or down_proj,
    units are eliminated greedily by the exact rise of min_V ‖X_S Vᵀ − X Wᵀ‖², then single swaps are made as long as
    they lower it (`ROUNDS` at most); the projection becomes the minimiser V. Ridge: `RIDGE` of the mean diagonal of
    XᵀX.

    Choices: the target is the dense weight on the pruned stream, as in the paper's formula (the dense model's own
    output as target did worse on stories260K); channels are eliminated 1/64 of the width at a time.

    Raises:
        InputError: fewer calibration tokens than the widest projection has features, or a Gram matrix that is not
        finite.
    """
    refit.check_tokens(model, windows)
    plan, stream = uniform_plan(model, fraction, multiple=multiple), None
    for index in range(len(plan.groups)):
        for part, removed in zip(sublayers(model, index), (plan.groups[index], plan.channels[index]), strict=True):
            weight = part.output.weight.detach().double()
            gram = torch.zeros(len(weight.T), len(weight.T), dtype=torch.float64, device=weight.device)
            feed([part], [lambda x, gram=gram: gram.add_((x.T @ x).to(gram.device))], stream, windows)
            gram = least_squares.damped(gram, (RIDGE * gram.diagonal().mean()).clamp(min=1e-30))
            cross = gram @ weight.T
            kept = select_units(gram, cross, part.num_units, removed, ROUNDS)
            columns = rows_of_heads(kept, part.unit)
            part.keep(kept)
            replace_weight(part.output, torch.linalg.solve(gram[columns][:, columns], cross[columns]).T)
        stream = advance(model, stream, windows, index, index + 1)


def select_units(gram: torch.Tensor, cross: torch.Tensor, num_units: int, count: int, rounds: int) -> list[int]:
    """The units that stay when `count` are eliminated, ascending: greedy backward elimination, then swaps. In a swap
    the best unit comes back and the least of the others goes, as long as the error falls by it.

    Args:
        gram: H [features, features], positive definite; the features of unit u are consecutive.
        cross: B [features, outputs]. The error of a set S is constant − tr(B_Sᵀ H_SS⁻¹ B_S).
        rounds: swaps at most.
    """
    weight, unit = torch.cholesky_solve(cross, least_squares.cholesky(gram)).T, len(gram) // num_units
    kept = least_squares.choose(weight, gram, count, unit, damping=0.0, per_step=max(1, num_units // 64))
    for _ in range(rounds if count else 0):
        out = sorted(set(range(num_units)).difference(kept))
        falls = _fall_with(gram, cross, kept, out, unit)
        back = out[int(falls.argmax())]
        larger = sorted([*kept, back])
        rises = _rise_without(gram, cross, larger, unit)
        gone = larger[int(rises.argmin())]
        if gone == back or rises.min() >= falls.max() * (1 - 1e-9):
            break
        kept = [u for u in larger if u != gone]
    return kept


def _rise_without(gram: torch.Tensor, cross: torch.Tensor, kept: list[int], unit: int) -> torch.Tensor:
    """Rise of the error when one more of the kept units goes: tr(W_uᵀ (H⁻¹_uu)⁻¹ W_u), with W = H_SS⁻¹ B_S; [kept]."""
    columns = rows_of_heads(kept, unit)
    inverse = torch.cholesky_inverse(least_squares.cholesky(gram[columns][:, columns]))
    return least_squares.unit_losses((inverse @ cross[columns]).T, inverse, unit)


def _fall_with(gram: torch.Tensor, cross: torch.Tensor, kept: list[int], out: list[int], unit: int) -> torch.Tensor:
    """Fall of the error when one unit comes back: tr(R_vᵀ S_v⁻¹ R_v), R and S the rest of B and H that S does not
    explain; [out]."""
    inside, outside = rows_of_heads(kept, unit), rows_of_heads(out, unit)
    explained = torch.cholesky_solve(gram[inside][:, outside], least_squares.cholesky(gram[inside][:, inside]))
    rest = cross[outside] - explained.T @ cross[inside]
    return least_squares.unit_losses(rest.T, gram[outside][:, outside] - gram[outside][:, inside] @ explained, unit)
