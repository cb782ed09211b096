"""How sure a pruned model may be of what it says: one number on its final norm.

A least-squares fit errs towards the mean, so a cut model's stream is too short. The final norm makes it long again, and
the logits then differ by more than the model knows. Every other reader of the stream is refitted to it
(`refit.refit_inputs`); this one cannot be, since lm_head is often the embedding, too. But its norm's weight can be
multiplied by the one number c that brings the logits z nearest to the dense model's p, as temperature scaling does for
labels (Guo et al. 2017). With q = softmax(cz) the divergence is convex in c:

    d/dc Σ KL(p ‖ q) = Σ E_q[z] − E_p[z],      d²/dc² Σ KL(p ‖ q) = Σ Var_q[z]
"""

import torch
from torch import Tensor, nn

ROUNDS = 4  # of Newton's rule; after three c stands to four digits
EVERY = 4  # one token in so many is asked: c is known to one in a hundred from a few thousand of them
PIECE = 512  # tokens at a time, for the logits' sake


@torch.no_grad()
def temperature(dense: nn.Module, model: nn.Module, wanted: Tensor, current: Tensor) -> float:
    """The number c for `model`, from the dense one's and its own streams after the last layer, [count, length, hidden].

    A model without sense has a divergence that is nowhere near a parabola, so a round halves or doubles c at most.
    """
    pairs, c = list(zip(_pieces(wanted), _pieces(current), strict=True)), 1.0
    for _ in range(ROUNDS):
        slope, curvature = sum(_derivatives(_logits(dense, a).softmax(-1), _logits(model, b), c) for a, b in pairs)
        c = min(max(c - float(slope / curvature), c / 2), 2 * c) if curvature > 0 else c
    return c


def temper(model: nn.Module, c: float) -> None:
    """Multiply all logits of a model by c."""
    norm = model.get_decoder().norm
    norm.weight = nn.Parameter(norm.weight.detach() * c, norm.weight.requires_grad)


def _pieces(stream: Tensor) -> tuple[Tensor, ...]:
    return stream.flatten(0, 1)[::EVERY].split(PIECE)


def _logits(model: nn.Module, stream: Tensor) -> Tensor:
    norm = model.get_decoder().norm
    return model.get_output_embeddings()(norm(stream.to(norm.weight))).float()


def _derivatives(p: Tensor, z: Tensor, c: float) -> Tensor:
    """Of the divergence by c, summed over tokens, float64 [2]."""
    z = z - z.mean(-1, keepdim=True)  # nothing changes, and squares stay small
    q = (c * z).softmax(-1)
    mean = (q * z).sum(-1)
    variance = (q * z.square()).sum(-1) - mean.square()
    return torch.stack([(mean - (p * z).sum(-1)).sum(dtype=torch.float64), variance.sum(dtype=torch.float64)])
