"""A real model pruned and taught with as much text as a GPU reads in minutes: step `recovery` of `measure.at_size`.

Every size of `frontier.fractions`, the smallest model first: the refit with its allocated rates, then distillation of
all weights, then the downstream tasks. Models are saved in `models/` beside the record, which is written anew after
each of them; a run that was cut off goes on where it was.
"""

import copy
from importlib.metadata import version
from typing import Any

import pandas as pd
import torch
from torch import nn

from gqalib.measure import tasks
from gqalib.measure.frontier import covariances_and_table, describe
from gqalib.measure.perplexity import window_losses
from gqalib.model.load import load_model, load_tokenizer, save_model
from gqalib.prune import refit
from gqalib.recover.distill import distill
from gqalib.recover.trainer import training_seconds
from gqalib.run import corpora
from gqalib.run.notebook import Notebook
from gqalib.run.presets import Sample

READS = ("pruning", "frontier", "evaluation", "distillation")
EXAMPLES = 1000  # of each task
KNOB = "frontier.calibration.num_examples"


def measure_recovery(nb: Notebook, also: str | None = None) -> None:
    """All sizes; `also` is another corpus whose test text is read at both windows of `evaluation`."""
    bench, progress = Bench(nb, also), nb.progress("cuts")
    dense, multiple = bench.dense, nb.preset.pruning.channel_multiple
    with nb.stage("cost table", dense, bench.calibration.shape, KNOB, of=("gradient covariances", "cost table")):
        covariances, table = covariances_and_table(dense, bench.calibration, multiple, progress)
    for fraction in sorted(nb.preset.frontier.fractions, reverse=True):
        size, model = f"{100 * fraction:g}", copy.deepcopy(dense)
        with nb.stage("sweep", model, bench.calibration.shape, KNOB):
            progress.run(refit.sweep, model, table.plan(fraction), bench.calibration, covariances=covariances)
        bench.record(model, f"refit-{size}", fraction=fraction, num_tokens=0)
        num_tokens = bench.teach(model, f"distilled-{size}")
        bench.record(model, f"distilled-{size}", fraction=fraction, num_tokens=num_tokens)
        bench.score(model, f"distilled-{size}")
    bench.score(dense, "dense")


class Bench:
    """What all sizes share: models, texts, and the record."""

    def __init__(self, nb: Notebook, also: str | None) -> None:
        p, self.nb, self.rows, self.answers = nb.preset, nb, [], []
        self.dense, self.teacher = (load_model(p.model, dtype, p.device) for dtype in ("float32", "bfloat16"))
        self.tokenizer = load_tokenizer(p.model)
        self.calibration = self.windows(p.corpus, "train", p.frontier.calibration)
        own = self.windows(p.corpus, "test", p.frontier.test)
        self.text = corpora.training_windows(p.corpus, self.tokenizer, own.shape[1], p.distillation.num_tokens)
        whole = [Sample(p.evaluation.num_tokens // n, n) for n in (p.evaluation.short_window, p.evaluation.long_window)]
        self.tests = [(p.corpus, own), *((also, self.windows(also, "test", sample)) for sample in whole if also)]
        self.reference = [window_losses(self.dense, windows) for _, windows in self.tests]
        self.record(self.dense, "dense")

    def windows(self, corpus: str, split: str, sample: Sample) -> torch.Tensor:
        return corpora.evaluation_windows(corpus, split, self.tokenizer, sample.length, sample.num_tokens)

    def record(self, model: nn.Module, name: str, **what: Any) -> None:
        """Save the model; a row per test text: perplexity, its ratio to dense with the paired error, what was done."""
        save_model(copy.deepcopy(model).to(torch.bfloat16), self.tokenizer, self.nb.artefact(name))
        for (corpus, windows), reference in zip(self.tests, self.reference, strict=True):
            row = {"model": name, "window": windows.shape[1], "test_tokens": windows.numel()}
            row |= {"corpus": corpus.split("/")[-1]} | describe(model, self.dense, windows, reference) | what
            self.rows.append(row)
            print("{model}, {corpus}, ctx{window}: {perplexity:.2f}, {ratio:.3f} ± {error:.3f}".format(**row))
        self.nb.table("models", pd.DataFrame(self.rows).drop(columns="losses"))
        self.nb.save()

    def teach(self, model: nn.Module, name: str) -> int:
        """Distillation in place; returns the tokens that were seen."""
        folder = self.nb.run_dir / "training" / name
        log = distill(model, self.teacher, self.text, self.nb.preset.distillation, folder)
        num_tokens, loss = int(log["tokens"].iloc[-1]), log["loss"].iloc[-1]
        print(f"{name}: {num_tokens / training_seconds(log):,.0f} tokens/s, last loss {loss:.3f}")
        self.nb.table(f"training {name}", log.iloc[:: max(1, len(log) // 50)])
        return num_tokens

    def score(self, model: nn.Module, name: str) -> None:
        """The downstream tasks of a model, in bfloat16."""
        narrow = copy.deepcopy(model).to(torch.bfloat16)
        kept = self.nb.progress("tasks").of(narrow, EXAMPLES, version("lm-eval"))
        found = kept.once(name, lambda: tasks.score_tasks(narrow, self.tokenizer, ["all"], EXAMPLES, rows=64).to_dict())
        self.answers.append(tasks.summary(pd.DataFrame(found)).assign(model=name))
        self.nb.table("tasks", pd.concat(self.answers))
        self.nb.save()
