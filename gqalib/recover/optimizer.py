"""Muon for the matrices of the layers and AdamW for the rest, as one optimiser of two groups, and their rates."""

from contextlib import nullcontext

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gqalib.device import bf16_is_fast


class MuonAdamW(torch.optim.Optimizer):
    """Two optimisers that look like one: groups and state are shared, so a scheduler and a checkpoint see both.

    Args:
        model: what of it requires a gradient is trained; with `muon_lr` 0 all of it by AdamW.
        rounds: of Newton and Schulz, by which Muon orthogonalises; torch's own number is 5.
    """

    def __init__(self, model: nn.Module, muon_lr: float, adamw_lr: float, weight_decay: float, rounds: int = 5):
        self.in_bf16 = bf16_is_fast(next(model.parameters()).device)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        by_muon = {name for name, p in trained if muon_lr and ".layers." in name and p.ndim == 2}
        matrices, others = ([p for name, p in trained if (name in by_muon) == wanted] for wanted in (True, False))
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, muon_lr, weight_decay=weight_decay, ns_steps=rounds))
        if others:
            self.parts.append(torch.optim.AdamW(others, adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]

    @torch.no_grad()
    def step(self, closure=None) -> None:
        with nullcontext() if self.in_bf16 else _InFloat32():
            for part in self.parts:
                part.step()

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()


class _InFloat32(TorchFunctionMode):
    """Inside, nothing becomes bf16: torch's Muon orthogonalises in bf16 wherever it runs."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16:
            return args[0].float().clone()  # a copy, as it would have been
        return function(*args, **(kwargs or {}))


def rate_at(recipe, tokens_seen: int) -> float:
    """The factor on all learning rates: warm-up, constant, linear decay over the last `recipe.decay_tokens`."""
    warmup = (tokens_seen / recipe.batch_tokens + 1) / recipe.warmup_steps
    decay = (recipe.num_tokens - tokens_seen) / recipe.decay_tokens
    return min(1.0, warmup, max(recipe.final_rate, decay))
