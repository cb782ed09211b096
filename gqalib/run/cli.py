"""`python -m gqalib`: run the series or a grid of runs, score, recover or distill a model on several devices, publish a run, report it."""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from gqalib.errors import InputError
from gqalib.measure import at_size
from gqalib.recover import distill as recover_distill
from gqalib.recover import lora
from gqalib.run import grid, publish, series
from gqalib.run.notebook import NOTEBOOKS, default_run_dir
from gqalib.run.presets import load_preset, number_or_text, preset_names


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m gqalib", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the numbered notebooks through papermill; finished ones are kept")
    recover = commands.add_parser(
        "recover", help="LoRA on a pruned model, merged into a new one; also under accelerate launch or torchrun"
    )
    distill = commands.add_parser(
        "distill", help="the preset's model teaches a pruned model; also under accelerate launch or torchrun"
    )
    size = commands.add_parser("at-size", help="speed and pruning of the preset's shape, measured with random weights")
    size.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where the records go, for example data/results/llama3-8b-shape",
    )
    size.add_argument("--steps", default="speed,pruning,refit", help="some of speed,pruning,refit (default: all)")
    size.add_argument("--layers", type=int, help="layers of the model that is refitted (default: all)")
    for command in (recover, distill):
        command.add_argument(
            "--model", required=True, metavar="FOLDER", help="the pruned model, for example runs/tiny/models/v3"
        )
        command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the trained model goes")
    run.add_argument("--from", dest="first", metavar="NN", help="start with this notebook")
    run.add_argument("--only", metavar="NN", help="run this notebook alone, or several: 01,05")
    sweep = commands.add_parser(
        "grid",
        aliases=["sweep"],
        help="run a grid of presets × overrides × seeds with Ray Tune; finished runs are kept",
    )
    sweep.add_argument("grid", type=Path, help="a YAML file: preset, notebooks, seeds, overrides, num_cpus, num_gpus")
    sweep.add_argument(
        "--run-dir", type=Path, help="where the runs and their table go (default: runs/grid-<name of the grid>)"
    )
    sweep.add_argument(
        "--address", help="a Ray cluster that shares this folder, host:port (default: this machine alone)"
    )
    for command in (run, sweep):
        command.add_argument("--force", action="store_true", help="run finished notebooks again")
        command.add_argument(
            "--notebooks-dir", type=Path, default=NOTEBOOKS, help="a series of your own (default: the workbook's)"
        )
    for command in (run, recover, distill, size):
        command.add_argument(
            "--preset",
            default="llama3-8b-shape" if command is size else "tiny",
            help=f"one of {', '.join(preset_names())} (default: tiny)",
        )
        command.add_argument(
            "--set",
            dest="overrides",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="e.g. pruning.mean_rate=0.5; repeatable",
        )
        command.add_argument("--seed", type=int, default=0)
    for command in (run, commands.add_parser("publish", help="copy a finished run into notebooks/, figures/, data/results/, README"),
                    commands.add_parser("report", help="HTML pages of a run")):  # fmt: skip
        command.add_argument("--run-dir", type=Path, help="where results go (default: runs/<preset>)")
        if command is not run:
            command.add_argument("--preset", default="tiny")
    return top


def overrides(pairs: list[str]) -> dict[str, Any]:
    """`name=value` pairs; values are read as YAML, so 0.5 is a number and [1, 8] a list."""
    result = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--set {pair} is no NAME=VALUE: write for example --set pruning.mean_rate=0.5")
        try:
            result[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--set {pair} has a value that cannot be read: write it as YAML") from error
        result[name] = number_or_text(result[name])
    return result


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 a notebook or a run of a grid failed, 2 bad input, 3 a notebook's process was killed, 130 interrupted."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "run":
            job = series.Series(
                options.preset, overrides(options.overrides), options.run_dir, options.seed, options.first, options.only,
                options.notebooks_dir,
            )  # fmt: skip
            job.run(options.force)
            print(job.summary())
        elif options.command in ("grid", "sweep"):
            return (
                1
                if grid.run(options.grid, options.run_dir, options.force, options.address, options.notebooks_dir)
                else 0
            )
        elif options.command in ("recover", "distill"):
            train = lora.recover if options.command == "recover" else recover_distill.recover
            train(options.model, load_preset(options.preset, overrides(options.overrides)), options.out, options.seed)
        elif options.command == "at-size":
            at_size.at_size(
                options.preset, overrides(options.overrides), options.out, options.steps.split(","), options.layers
            )
        elif options.command == "publish":
            publish.publish(options.run_dir or default_run_dir(options.preset), options.preset)
        else:
            print(publish.report(options.run_dir or default_run_dir(options.preset)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except series.NotebookFailed as error:
        print(f"\nfailed: {error}", file=sys.stderr)
        return series.KERNEL_DIED if isinstance(error, series.KernelDied) else 1
    except KeyboardInterrupt:
        print("\ninterrupted; finished notebooks are kept, the same command goes on", file=sys.stderr)
        return 130
    return 0
