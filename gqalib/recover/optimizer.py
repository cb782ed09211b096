"""Muon for the matrices of the layers and AdamW for the rest, as one optimiser of two groups, and their rates."""

from collections import defaultdict

import torch
from torch import nn

from gqalib.device import bf16_is_fast

STACK = 2**25  # values of the matrices that are orthogonalised together: 128 MiB in float32


class MuonAdamW(torch.optim.Optimizer):
    """Two optimisers that look like one: groups and state are shared, so a scheduler and a checkpoint see both.

    Args:
        model: what of it requires a gradient is trained; with `muon_lr` 0 all of it by AdamW.
        rounds: of Newton and Schulz, by which Muon orthogonalises; torch's own number is 5.
    """

    def __init__(self, model: nn.Module, muon_lr: float, adamw_lr: float, weight_decay: float, rounds: int = 5):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        by_muon = {name for name, p in trained if muon_lr and ".layers." in name and p.ndim == 2}
        matrices, others = ([p for name, p in trained if (name in by_muon) == wanted] for wanted in (True, False))
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(StackedMuon(matrices, muon_lr, weight_decay=weight_decay, ns_steps=rounds))
        if others:
            self.parts.append(torch.optim.AdamW(others, adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()


class StackedMuon(torch.optim.Muon):
    """torch's Muon on stacks of equal shapes: a layer's matrices are so small that a GPU waits for Python between
    them. Products are in bf16 where that is fast; torch's own are everywhere."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for shape, matrices in same_shape.items():
                most = max(1, STACK // shape.numel())
                for first in range(0, len(matrices), most):
                    self._update(matrices[first : first + most], group)

    def _update(self, matrices: list[nn.Parameter], group: dict) -> None:
        lr, momentum, (rows, columns) = group["lr"], group["momentum"], matrices[0].shape
        grads, buffers = [p.grad for p in matrices], []
        self._init_group({"params": matrices}, [], [], buffers)
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        step = orthogonal(torch.stack(torch._foreach_lerp(grads, buffers, momentum)), group)
        torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        torch._foreach_add_(matrices, step.to(matrices[0].dtype).unbind(), alpha=-lr * max(1, rows / columns) ** 0.5)


def orthogonal(matrices: torch.Tensor, group: dict) -> torch.Tensor:
    """The nearest matrices with orthonormal rows or columns, roughly: `ns_steps` rounds of Newton and Schulz with the
    `ns_coefficients` of Keller Jordan's Muon (2024).

    Args:
        matrices: [count, rows, columns].
        group: of torch's Muon, whose settings are taken.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT, group).mT
    a, b, c = group["ns_coefficients"]
    x = matrices.bfloat16() if bf16_is_fast(matrices.device) else matrices.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])  # so that no singular value is above 1
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def rate_at(recipe, tokens_seen: int) -> float:
    """The factor on all learning rates: warm-up over the first `recipe.warmup_steps` steps of `recipe.batch_tokens`
    tokens, constant, linear decay over the last `recipe.decay_tokens`. It goes by tokens: where rows do not fill an
    optimiser step, as where their length does not divide `batch_tokens`, warm-up takes more of those."""
    warmup = (tokens_seen / recipe.batch_tokens + 1) / recipe.warmup_steps
    decay = (recipe.num_tokens - tokens_seen) / recipe.decay_tokens
    return min(1.0, warmup, max(recipe.final_rate, decay))
