"""The best weight on some of the features, and which features it can spare.

With X the inputs of a projection on calibration text, [tokens, features], Y the output that is wanted, W the dense
weight [out, features], all sums in float64:

    H = XᵀX + Λ,  B = YᵀX + WΛ          Λ = damping × the diagonal of XᵀX (Marquardt 1963)
    refit       W'_S = B_S H_SS⁻¹       the best weight on the kept features S, drawn towards W
    choice      start from W = B H⁻¹; remove the unit u with the least tr(G W_u (H⁻¹_uu)⁻¹ W_uᵀ),
                correct W and H⁻¹, repeat (optimal brain surgery, Hassibi & Stork 1993; in whole units: SlimGPT 2024); G
                is the covariance of the loss' gradient at the output (K-FAC's other factor), or I
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gqalib.errors import InputError


class Moments:
    """Running sums XᵀX [features, features] and YᵀX [out, features]: a batch's in float32, their sum in float64."""

    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    tokens = 0

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        inputs = at_least_float32(inputs.flatten(0, -2))
        self.tokens += len(inputs)
        self.gram += (inputs.T @ inputs).double()
        self.cross += (outputs.flatten(0, -2).to(inputs).T @ inputs).double()


def damped(matrix: Tensor, ridge: Tensor) -> Tensor:
    """The matrix with so much more on its diagonal: a number, or one for each entry."""
    damped = matrix.clone()
    damped.diagonal().add_(ridge)
    return damped


def ridge(gram: Tensor, damping: float) -> Tensor:
    """Λ of each feature, by its own size: one that is a thousand times as large on a few tokens, as Llama's are on the
    first, would drown the others in a common λ. Never zero, so that features that are zero on all of the text, as
    masked heads leave them, can be solved for."""
    squares = gram.diagonal()
    return (damping * squares.clamp(min=1e-6 * squares.mean())).clamp(min=1e-30)


def solve(weight: Tensor, gram: Tensor, cross: Tensor, damping: float, kept: Sequence[int] | None = None) -> Tensor:
    """W'_S = (YᵀX + WΛ)_S (XᵀX + Λ)_SS⁻¹, float64 [out, |S|]: least squares on the kept features, drawn towards
    `weight`.

    Args:
        weight: [out, features]. gram: XᵀX [features, features]. cross: YᵀX [out, features]. kept: S (default: all).
    """
    columns = torch.arange(len(gram), device=gram.device) if kept is None else torch.as_tensor(kept, device=gram.device)
    ridges = ridge(gram, damping)[columns]
    inner, target = damped(gram[columns][:, columns], ridges), cross[:, columns] + weight[:, columns].double() * ridges
    return torch.cholesky_solve(target.T, cholesky(inner)).T


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor(s) of [..., n, n]. Raises InputError if it is not finite, or singular to working
    precision."""
    if not torch.isfinite(matrix.sum()):
        raise InputError("a Gram matrix is not finite: use dtype float32 or another calibration text")
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots, scale = factor.diagonal(dim1=-2, dim2=-1).square(), matrix.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    if failed.any() or (pivots <= matrix.shape[-1] * torch.finfo(matrix.dtype).eps * scale).any():
        raise InputError("a Gram matrix is singular: raise the damping, or give other calibration text")
    return factor


def choose(weight: Tensor, gram: Tensor, num_removed: int, unit: int = 1, *more, **options) -> list[int]:
    """The units that stay when `num_removed` go, ascending. Arguments as in `removal_order`."""
    gone = set(removal_order(weight, gram, num_removed, unit, *more, **options)[0])
    return [u for u in range(len(gram) // unit) if u not in gone]


def removal_order(
    weight: Tensor, gram: Tensor, num_removed: int, unit: int = 1, output: Tensor | None = None,
    damping: float = 1e-2, per_step: int = 1,
) -> tuple[list[int], Tensor]:  # fmt: skip
    """The first `num_removed` units to go, in their order, by optimal brain surgery, and what that costs.

    Args:
        weight: [out, features], the best one with all features (`solve`); a unit is `unit` neighbouring columns.
        gram: XᵀX. output: G [out, out], damped already; None is the identity.
        per_step: units that go before the rest is corrected for their loss.

    Returns:
        The units; and after each step the rise of Σ (output error)ᵀ G (output error) so far, float64 [steps].
    """
    inverse = torch.cholesky_inverse(cholesky(damped(gram, ridge(gram, damping))))
    weight = weight.double() * (gram.diagonal() > 0)  # what does nothing costs nothing
    weight = weight if output is None else cholesky(output).T @ weight  # tr(G A Aᵀ) = ‖LᵀA‖², G = LLᵀ
    alive, order, rises = torch.ones(len(gram) // unit, dtype=torch.bool, device=gram.device), [], []
    while len(order) < num_removed:
        losses = unit_losses(weight, inverse, unit).masked_fill(~alive, torch.inf)
        gone = losses.argsort(stable=True)[: min(per_step, num_removed - len(order))]
        columns = (gone[:, None] * unit + torch.arange(unit, device=gone.device)).flatten()
        rises.append(_eliminate(weight, inverse, columns))
        alive[gone] = False
        order += gone.tolist()
    return order, torch.tensor(rises, dtype=torch.float64).cumsum(0)


def unit_losses(weight: Tensor, inverse: Tensor, unit: int = 1) -> Tensor:
    """Rise of the squared error when one unit goes and the rest is corrected: tr(W_u (H⁻¹_uu)⁻¹ W_uᵀ), [units]."""
    if unit == 1:
        return weight.square().sum(0) / inverse.diagonal()
    blocks = torch.stack([inverse[i : i + unit, i : i + unit] for i in range(0, len(inverse), unit)])
    columns = weight.unflatten(1, (-1, unit)).permute(1, 2, 0)  # [units, unit, out]
    return (columns * torch.cholesky_solve(columns, cholesky(blocks))).sum((1, 2))


def _eliminate(weight: Tensor, inverse: Tensor, gone: Tensor) -> float:
    """Correct weight and H⁻¹, in place, for the loss of these columns, which become 0 and an identity block; the rise
    of the error."""
    across, columns = inverse[gone], weight[:, gone]
    factor = cholesky(across[:, gone])
    rise = (columns * torch.cholesky_solve(columns.T, factor).T).sum().item()
    correction = torch.cholesky_solve(across, factor)
    weight.addmm_(columns, correction, alpha=-1)
    inverse.addmm_(across.T, correction, alpha=-1)
    inverse[gone] = inverse[:, gone] = 0
    inverse[gone, gone] = 1
    return rise


def at_least_float32(tensor: Tensor) -> Tensor:
    """Float32 where it is of fewer bits; else as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], residual: Tensor, factor: Tensor, num_steps: int
) -> Tensor:
    """D after some steps towards product(D) = residual, [rows, features]; preconditioned by LLᵀ, `factor` = L. All are
    large: none outlives its use."""
    direction = torch.cholesky_solve(residual.T, factor).T
    result, size = torch.zeros_like(residual), (residual * direction).sum()
    for _ in range(num_steps):
        along = product(direction)
        curvature = (direction * along).sum()
        if not curvature > 0:  # there is nothing left to gain
            break
        result += size / curvature * direction
        residual = residual - size / curvature * along
        del along
        solved = torch.cholesky_solve(residual.T, factor).T
        last, size = size, (residual * solved).sum()
        direction = solved + size / last * direction
        del solved
    return result
