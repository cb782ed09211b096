"""Pruning and recovery of a real model with as much text as a GPU reads in minutes.

Every size of `frontier.fractions`, the smallest model first: the refit with its allocated rates, then distillation of all weights
by `distillation.num_tokens`, whose learning rate a few short runs choose. The record is written anew after each step,
so a run that is cut off keeps what it has; models are saved beside it.
"""

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from gqalib.measure.frontier import covariances_and_table
from gqalib.measure.perplexity import ratio_with_error, window_losses
from gqalib.model.load import load_model, load_tokenizer, save_model
from gqalib.model.shapes import count_parameters, size_of
from gqalib.prune import refit
from gqalib.recover.distill import distill
from gqalib.run import corpora
from gqalib.run.notebook import Notebook

READS = ("evaluation", "pruning", "frontier", "distillation")
PROBED = (0.4, 1.0, 2.0, 4.0)  # times `distillation.muon_lr`
PROBE_TOKENS = 1_000_000
MICRO_TOKENS = 16_384  # that go through student and teacher at once


class Budget:
    """What the steps share, and the record that they write."""

    def __init__(self, preset: str, overrides: dict[str, Any], out: Path, texts: dict[str, str]):
        """texts: corpora whose test split is read at both windows of `evaluation`, by the names that the record has."""
        self.nb, self.out = Notebook("at_budget", preset, overrides, out, reads=READS), out
        p = self.preset = self.nb.preset
        self.dense = load_model(p.model, p.dtype, p.device)
        self.teacher = load_model(p.model, "bfloat16", p.device)
        self.tokenizer = load_tokenizer(p.model)
        self.counts, self.rows, self.logs = count_parameters(self.dense), [], []
        self.test = {
            f"{p.corpus}, ctx{p.frontier.test.length}": self._windows(p.corpus, "test", *self._sizes(p.frontier.test))
        }
        for name, corpus in texts.items():
            for length in (p.evaluation.short_window, p.evaluation.long_window):
                self.test[f"{name}, ctx{length}"] = self._windows(corpus, "test", length, 10**9)
        self.reference = {name: window_losses(self.dense, windows) for name, windows in self.test.items()}
        self.calibration = self._windows(p.corpus, "train", *self._sizes(p.frontier.calibration))
        self.validation = self._windows(p.corpus, "validation", *self._sizes(p.frontier.test))
        self.training = corpora.training_windows(p.corpus, self.tokenizer, p.frontier.test.length, 10**9)
        self.record(self.dense, "dense")

    @staticmethod
    def _sizes(sample) -> tuple[int, int]:
        return sample.length, sample.num_tokens

    def _windows(self, corpus: str, split: str, length: int, num_tokens: int) -> torch.Tensor:
        return corpora.evaluation_windows(corpus, split, self.tokenizer, length, num_tokens)

    def record(self, model: nn.Module, name: str, **what: Any) -> None:
        """One row per test text: perplexity, its ratio to dense with the paired error, and what led to the model."""
        for text, windows in self.test.items():
            losses = window_losses(model, windows)
            ratio, error = ratio_with_error(losses, self.reference[text])
            row = {
                "model": name,
                "text": text,
                "tokens_read": windows.numel(),
                "perplexity": losses.mean().exp().item(),
            }
            self.rows.append(row | {"ratio": ratio, "error": error} | size_of(model, self.counts) | what)
            print(name, text, f"{row['perplexity']:.3f} = {ratio:.4f} ± {error:.4f} × dense", what, flush=True)
        self.nb.table("models", pd.DataFrame(self.rows))
        self.nb.save()

    def save(self, model: nn.Module, name: str) -> None:
        save_model(copy.deepcopy(model).to(torch.bfloat16), self.tokenizer, self.out / "models" / name)


def at_budget(preset: str, overrides: dict[str, Any], out: Path, texts: dict[str, str], seconds: float) -> None:
    """Run the steps that begin within so many seconds; see the module."""
    started = time.monotonic()
    budget = Budget(preset, overrides, out, texts)
    p, multiple = budget.preset, budget.preset.pruning.channel_multiple
    with budget.nb.stage("cost table", budget.dense, budget.calibration.shape, "frontier.calibration.num_examples",
                         of=("gradient covariances", "cost table")):  # fmt: skip
        covariances, table = covariances_and_table(budget.dense, budget.calibration, multiple)
    rate = None
    for fraction in sorted(p.frontier.fractions, reverse=True):
        if time.monotonic() - started > seconds:
            break
        began, name = time.monotonic(), f"{100 * fraction:g}"
        model = copy.deepcopy(budget.dense)
        refit.sweep(model, table.plan(fraction), budget.calibration, covariances=covariances)
        budget.record(model, f"refit-{name}", fraction=fraction, seconds=time.monotonic() - began, tokens=0)
        budget.save(model, f"refit-{name}")
        if time.monotonic() - started > seconds:
            break
        rate = rate or _best_rate(budget, model)
        _taught(budget, model, f"distilled-{name}", fraction, muon_lr=rate)
    budget.nb.finish()


def _taught(budget: Budget, model: nn.Module, name: str, fraction: float, **changes: Any) -> None:
    settings = dataclasses.replace(budget.preset.distillation, **changes)
    began = time.monotonic()
    log = distill(model, budget.teacher, budget.training, settings, budget.out / "training" / name, MICRO_TOKENS, 1e9)
    took = time.monotonic() - began
    print(f"{name}: {log['tokens'].iloc[-1] / log['seconds'].sum():,.0f} tokens/s, {took:.0f} s", flush=True)
    budget.save(model, name)
    budget.logs.append(log.iloc[:: max(1, len(log) // 50)].assign(model=name))
    budget.nb.table("training", pd.concat(budget.logs))
    budget.record(model, name, fraction=fraction, seconds=took, tokens=int(log["tokens"].iloc[-1]), **changes)


def _best_rate(budget: Budget, start: nn.Module) -> float:
    """Muon's rate that leaves the least loss on validation text after `PROBE_TOKENS`."""
    rates = [factor * budget.preset.distillation.muon_lr for factor in PROBED]
    rows = []
    for rate in rates:
        model, folder = copy.deepcopy(start), budget.out / "training" / f"probe-{rate:g}"
        settings = dataclasses.replace(budget.preset.distillation, num_tokens=PROBE_TOKENS, muon_lr=rate)
        log = distill(model, budget.teacher, budget.training, settings, folder, MICRO_TOKENS, 1e9)
        loss = window_losses(model, budget.validation).mean().item()
        rows.append({"muon_lr": rate, "validation_loss": loss, "kl": log["kl"].tail(10).mean()})
        print(rows[-1], f"{log['tokens'].iloc[-1] / log['seconds'].sum():,.0f} tokens/s", flush=True)
    budget.nb.table("probes", pd.DataFrame(rows))
    budget.nb.save()
    return min(rows, key=lambda row: row["validation_loss"])["muon_lr"]
