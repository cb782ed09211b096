"""What becomes of a finished run: the results table, the committed notebooks, figures and records, README's tables."""

import contextlib
import math
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from gqalib.errors import InputError
from gqalib.figures import as_markdown
from gqalib.measure import frontier
from gqalib.measure.report_card import side_by_side
from gqalib.model.names import REPOSITORY
from gqalib.run.checks import NOTEBOOKS, numbered_notebooks
from gqalib.run.notebook import SHARED, committed_seconds, progress_dir, read_record, sha256, write_atomically
from gqalib.run.resume import pack

QUICK = "tiny"  # the preset that a page which is opened runs
REAL = "smollm2"  # the preset whose executed notebooks are committed; the quick look's where it has none yet
AT_SIZE = "llama3-8b-shape"  # the preset that measures cost at real size
RECOVERY = "smollm2-gpu"  # the preset that prunes and distils a real model on a GPU
RESULTS = {"parameters kept %": 1, "backbone removed %": 1, "perplexity": 2, "speed-up": 2, "ceiling": 2}  # digits
STAYS = ("decode speed",)  # of shared progress: a speed is of one machine, and each measures its own
FILES = {"MB": 1, "times dense": 3, "± standard error": 3}
HEADLINE = {"accuracy": 1, "error": 1, "published": 1, "difference": 1}
TOKENS = {"tokens": 0, "minutes": 1, "times dense": 3, "± standard error": 3, "bought back %": 1}


def results_table(record: dict[str, Any]) -> pd.DataFrame:
    """Dense / v2 / v3 / v3 + LoRA, as 07_cost_analysis recorded it, in readable numbers."""
    return _rounded(pd.DataFrame(record["tables"]["results"]), RESULTS)


def frontier_table(record: dict[str, Any]) -> pd.DataFrame:
    """Perplexity relative to dense, methods down and fractions of the backbone removed across, from 10_frontier."""
    return frontier.as_table(pd.DataFrame(record["tables"]["frontier"])).reset_index()


def tokens_table(record: dict[str, Any]) -> pd.DataFrame:
    """What training buys back, by way and tokens, as 12_distillation recorded it; of models that were kept also
    perplexity over dense on the second text, by window."""
    table = pd.DataFrame(record["tables"]["tokens"])
    table = table.assign(minutes=table["seconds"] / 60)
    others = pd.DataFrame(record["tables"].get("other_text", []), columns=["text", "window", "model", "ratio"])
    digits = dict(TOKENS)
    for (text, window), part in others.groupby(["text", "window"]):
        table[f"{text}, {window}"] = table["model"].map(part.set_index("model")["ratio"])
        digits[f"{text}, {window}"] = 3
    return _rounded(table[["start", "way", *digits]], digits)


def headline_table(record: dict[str, Any]) -> pd.DataFrame:
    """The smallest model's answers beside those of one that was trained from scratch, as 12_distillation recorded
    them."""
    table = pd.DataFrame(record["tables"]["headline"], columns=["task", "examples", *HEADLINE])
    return _rounded(table, HEADLINE).rename(columns={"error": "± standard error"})


def files_table(record: dict[str, Any]) -> pd.DataFrame:
    """The .gguf files to which no other of at most their size is better, as 14_serving recorded them."""
    table = pd.DataFrame(record["tables"]["files"]).query("front").assign(MB=lambda found: found["bytes"] / 1e6)
    return _rounded(table[["model", "type", *FILES]], FILES)


def served_table(record: dict[str, Any]) -> pd.DataFrame:
    """What quantising, pruning and both do to a served model's times and throughput, from 14_serving's A/B test."""
    table = pd.DataFrame(record["tables"]["ab_steps"])
    table["reads"] = [f"{row.ratio:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f})" for row in table.itertuples()]
    return _wide(table, ["what"], "step", "reads").rename(columns={"what": "times what it was before"})


def _rounded(table: pd.DataFrame, digits: dict[str, int]) -> pd.DataFrame:
    """Numbers as words, with so many digits behind the point; a record has null for what there is not."""
    said = {n: ["–" if math.isnan(x) else f"{x:,.{d}f}" for x in table[n].astype(float)] for n, d in digits.items()}
    return table.assign(**said)


MAIN_TABLES = {  # by the record that they are of
    "07_cost_analysis": ("Results", results_table),
    "10_frontier": ("Perplexity over dense, by the part of the backbone removed", frontier_table),
    "12_distillation": ("Perplexity over dense after training, by way and tokens", tokens_table),
    "14_serving": ("The best files of their size", files_table),
}


def cost_table(record: dict[str, Any]) -> pd.DataFrame:
    """Speed-up (lowest–highest round) and ceiling of every model, batch size and context, as `at_size` recorded it."""
    table = pd.DataFrame(record["tables"]["speed"]).rename(columns={"batch_size": "batch"})
    table = table[table["model"] != "dense"]
    measured = "{speedup:.2f} ({speedup_low:.2f}–{speedup_high:.2f}) of {ceiling:.2f}"
    table["measured"] = [row["note"] or measured.format(**row) for row in table.to_dict("records")]
    return _wide(table, ["phase", "batch", "context"], "model", "measured")


def stages_table(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """What each stage took, as `at_size` recorded it, beside what it was expected to need."""
    rows = [{"layers": r["metrics"]["layers"]["value"], **row} for r in records for row in r["tables"]["stages"]]
    table = pd.DataFrame(rows)[["stage", "layers", "seconds", "expected_gb", "peak_gb"]]
    table = _rounded(table, {"seconds": 0, "expected_gb": 1, "peak_gb": 1})
    return table.rename(columns={"expected_gb": "GB expected", "peak_gb": "GB at its peak"})


def cost_block(results: Path) -> str:
    """README's words on speed at real size: the records' tables, or that there is none."""
    try:
        steps = ("speed", "pruning", "refit")
        speed, *stages = (read_record(results / AT_SIZE / f"at_size_{step}.json") for step in steps)
    except InputError:
        return "Speed at this size: not measured. `make at-size` on a GPU, then `make publish`, fills this in."
    parts = [_speed_block(speed), as_markdown(stages_table(stages))]
    with contextlib.suppress(InputError):
        parts.append(_speed_block(read_record(results / AT_SIZE / "at_size_in_turn.json")))
    return "\n\n".join(parts)


def _speed_block(record: dict[str, Any]) -> str:
    model, dtype = record["parameters"]["model"], record["parameters"]["dtype"]
    what = f"{model} with random weights in {dtype}, {record['machine']}"
    return f"{as_markdown(cost_table(record))}\n\nMeasured, times dense, *of* the ceiling: {what}."


def recovered_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Perplexity of every model on every text, as the step `recovery` of `at_size` recorded it in one run or more:
    dense as it is, of the others times dense."""
    table = _of_all(records, "models", ["model", "corpus", "window"])
    ratios = zip(table["perplexity"], table["ratio"], table["error"], table["fraction"].isna(), strict=True)
    table["reads"] = [f"{ppl:.2f}" if dense else f"{r:.3f} ± {error:.3f} ×" for ppl, r, error, dense in ratios]
    table["text"] = [f"{corpus}, {window}" for corpus, window in zip(table["corpus"], table["window"], strict=True)]
    names = {"parameters_kept_percent": "parameters kept %", "num_tokens": "tokens of distillation"}
    table = _rounded(table.fillna(dict.fromkeys(names, 0)), {"parameters_kept_percent": 1, "num_tokens": 0})
    return _wide(table.rename(columns=names), ["model", *names.values()], "text", "reads")


def _of_all(records: list[dict[str, Any]], name: str, rows: list[str]) -> pd.DataFrame:
    """A table of several runs, the weakest cut first; what is in two of them, dense, once."""
    table = pd.concat([pd.DataFrame(record["tables"][name]) for record in records]).drop_duplicates(rows)
    cut = table["model"].str.partition("-")[2].replace("", "0").astype(float)
    return table.iloc[cut.argsort(kind="stable")]


def _wide(table: pd.DataFrame, index: list[str], columns: str, values: str) -> pd.DataFrame:
    """A row per `index`, a column per value of `columns`, both in the order in which they come."""
    return table.pivot_table(values, index, columns, "first", sort=False).reset_index()


def recovery_block(results: Path) -> str:
    """README's words on a real model recovered on a GPU: the records' tables, or that there is none."""
    records = [read_record(path) for path in sorted(results.glob(f"{RECOVERY}*/at_size_recovery.json"))]
    records = [record for record in records if "tasks" in record["tables"]]  # else it was cut off at its first size
    if not records:
        return "A real model on a GPU: not measured."
    of = " and ".join(dict.fromkeys(f"{record['parameters']['model']}, {record['machine']}" for record in records))
    under = f"Perplexity on each text and window, below dense times dense: {of}. `wt2` is WikiText-2's test split."
    accuracies = "Accuracy in percent with its standard error:"
    answers = side_by_side(_of_all(records, "tasks", ["model", "task"])).T.rename_axis("model").reset_index()
    return "\n\n".join([as_markdown(recovered_table(records)), under, accuracies, as_markdown(answers)])


def publish(run_dir: Path, preset: str = QUICK, notebooks: Path = NOTEBOOKS, root: Path = REPOSITORY) -> None:
    """Copy a finished run of a plain preset into the repository: records, figures, README's tables and, unless it is
    `tiny`, what its long stages found.

    For `smollm2`, also copy the notebooks' outputs. For `tiny`, copy outputs only where `smollm2` has none. Words of a
    page may have changed since its run, code may not. Of `tiny` the whole series must be there, of another preset at
    least one notebook.

    Raises:
        InputError: a record is missing, or was made with overrides, another preset or, of a page, other code cells.
    """
    paths = numbered_notebooks(notebooks)
    paths = [path for path in paths if preset == QUICK or (run_dir / f"{path.stem}.json").exists()]
    records = {path: read_record(run_dir / f"{path.stem}.json") for path in paths}
    if not records:
        raise InputError(f"{run_dir} holds no record: run preset {preset} first")
    _check_plain(preset, list(records.values()))
    results = root / "data" / "results"
    pages = {path: _page_of(path, run_dir, record) for path, record in records.items()}
    (results / preset).mkdir(parents=True, exist_ok=True)  # from here on nothing is refused any more
    for path, record in records.items():
        name = f"{path.stem}.json"
        if pages[path]:
            write_atomically(path, nbformat.writes(pages[path]) + "\n")
        write_atomically(results / preset / name, (run_dir / name).read_text(encoding="utf-8"))
        _copy_figures(run_dir, record, root / "figures" / preset)
    if preset != QUICK:  # its point is that it measures anew, in minutes
        _pack_progress(run_dir, [*(path.stem for path in records), SHARED], progress_dir(results / preset))
    update_readme(root / "README.md", results, notebooks)


def _page_of(path: Path, run_dir: Path, record: dict[str, Any]) -> nbformat.NotebookNode | None:
    """A notebook with the outputs of this run, which it names; None where the page shows another preset's."""
    page, preset = nbformat.read(path, as_version=4), record["preset"]
    if preset != REAL and (preset != QUICK or f"of preset `{REAL}`" in page.cells[0].source):
        return None
    page = _page(page, nbformat.read(run_dir / path.name, as_version=4))
    page.cells[0].source = named(page.cells[0].source, record)
    return page


def _copy_figures(run_dir: Path, record: dict[str, Any], target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for stale in target.glob(f"{record['notebook'][:2]}_*"):
        stale.unlink()
    for artefact in record["artefacts"]:
        if artefact.startswith("figures/"):
            shutil.copyfile(run_dir / artefact, target / Path(artefact).name)


def _pack_progress(run_dir: Path, names: list[str], target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder := progress_dir(run_dir, name)).is_dir():
            pack(folder, target / f"{name}.tar.gz", STAYS)


def _check_plain(preset: str, records: list[dict[str, Any]]) -> None:
    for record in records:
        if record["overrides"] or record["seed"] or record["preset"] != preset:
            made_with = f"preset {record['preset']}, seed {record['seed']} and overrides {record['overrides']}"
            raise InputError(f"{record['notebook']} was made with {made_with}: publish a run of plain {preset}")


def update_readme(readme: Path, results: Path, notebooks: Path = NOTEBOOKS) -> None:
    """Rewrite README's blocks, `<!-- results -->` and so on, from the records in `results`, a folder per preset."""
    text = readme.read_text(encoding="utf-8")
    for name, block in readme_blocks(results, notebooks).items():
        marked = f"<!-- {name} -->\n{block}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, m=marked: m, text, flags=re.DOTALL)
    write_atomically(readme, text)


def readme_blocks(results: Path, notebooks: Path = NOTEBOOKS) -> dict[str, str]:
    """README's results table and map of the series, as Markdown, from records and the notebooks' titles."""
    rows = []
    for path in numbered_notebooks(notebooks):
        number, _, question = title(path).partition(" · ")
        times = (committed_seconds(path.stem, preset, results) for preset in (QUICK, REAL))
        rows.append([f"[{number}](notebooks/{path.name})", question, *map(_minutes, times)])
    columns = ["notebook", "question", *(f"minutes, `{preset}`" for preset in (QUICK, REAL))]
    return {
        "results": _block(results, "07_cost_analysis", results_table, partial(_results_said, results)),
        "frontier": _block(results, "10_frontier", frontier_table, _frontier_said),
        "tokens": _block(results, "12_distillation", tokens_table, _tokens_said),
        "headline": _block(results, "12_distillation", headline_table, _headline_said),
        "files": _block(results, "14_serving", files_table, _files_said),
        "served": _block(results, "14_serving", served_table, lambda _: "an A/B test; intervals of 95 %"),
        "cost": cost_block(results),
        "recovery": recovery_block(results),
        "series": as_markdown(pd.DataFrame(rows, columns=columns)),
    }


def _minutes(seconds: float | None) -> str:
    return "–" if not seconds else "< 0.1" if seconds < 3 else f"{seconds / 60:.1f}"


def _shown(results: Path, name: str) -> dict[str, Any] | None:
    """The record of a notebook that README shows: the real model's, or else the quick look's. Left out is one that read
    others than those beside it: it is to be run again."""
    paths = (results / preset / f"{name}.json" for preset in (REAL, QUICK))
    records = (read_record(path) for path in paths if path.exists())
    return next((record for record in records if _is_current(record, results / record["preset"])), None)


def _is_current(record: dict[str, Any], folder: Path) -> bool:
    paths = {folder / f"{name}.json": value for name, value in record["upstream"].items()}
    return all(path.exists() and sha256(path) == value for path, value in paths.items())


def _block(results: Path, name: str, table: Callable[[dict], pd.DataFrame], said: Callable[[dict], str]) -> str:
    """A table of the notebook's record below what is said of it."""
    if not (record := _shown(results, name)):
        return "Not measured."
    of = f"**{record['parameters']['model']}** (preset `{record['preset']}`)"
    return f"{of}, {said(record)}; {record['machine']}:\n\n{as_markdown(table(record))}"


def _results_said(results: Path, record: dict[str, Any]) -> str:
    p = read_record(results / record["preset"] / "01_baseline.json")["parameters"]
    windows = f"{p['evaluation']['num_tokens']:,} tokens in windows of {p['evaluation']['short_window']}"
    return f"{p['corpus']} test text, {windows}, seed {record['seed']}"


def _frontier_said(record: dict[str, Any]) -> str:
    p, drawn = record["parameters"]["frontier"], 1 + max(row["sample"] for row in record["tables"]["frontier"])
    samples = f"{drawn} sample{'s' * (drawn > 1)}" + ", of which mean and range" * (drawn > 1)
    calibration = f"calibration on {p['calibration']['num_examples']} windows, {samples}"
    return f"{p['test']['num_examples']} test windows; {calibration}; no training"


def _tokens_said(record: dict[str, Any]) -> str:
    return f"{record['parameters']['frontier']['test']['num_examples']} test windows; each row a run of its own"


def _headline_said(record: dict[str, Any]) -> str:
    run, size = record["tables"]["tokens"][-1], record["metrics"]["parameters_smallest"]["value"]
    learned = f"{run['tokens']:,} tokens in {run['seconds'] / 60:,.0f} minutes"
    return f"{size / 1e6:.1f} million parameters, {learned}; accuracy in percent"


def _files_said(record: dict[str, Any]) -> str:
    windows = record["parameters"]["frontier"]["test"]["num_examples"]
    return f"the best of {len(record['tables']['files'])} files at their size; {windows} test windows"


def title(path: Path) -> str:
    """The heading of a notebook's first cell; its name where there is none."""
    first = nbformat.read(path, as_version=4).cells[0].source.partition("\n")[0]
    return first.removeprefix("# ") if first.startswith("# ") else path.stem


def named(heading: str, record: dict[str, Any]) -> str:
    """A page's first cell, which says of what run the outputs are and how long it took: an opened page runs `tiny`."""
    p, commit = record["parameters"], record["git_commit"]
    code = f"code of `{commit[:7]}{commit[40:]}`" if commit else "code outside of a repository"
    said = f"of preset `{record['preset']}` ({p['model']}, text `{p['corpus']}`), {code}"
    said += f"; run without changes, the page uses `{QUICK}`, which is small" * (record["preset"] != QUICK)
    took = f"{_minutes(record['seconds'])} minutes for these outputs ({record['machine']}); README has other presets'"
    heading = re.sub(r"\| \*\*(Time|Outputs)\*\* .*\n", "", heading)
    rows = f"| **Time** | {took} |\n| **Outputs** | {said} |\n| **Reads** "
    return heading.replace("| **Reads** ", rows, 1)


def _page(notebook: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook with the outputs of its run, to be committed: no injected parameters or timings, cells counted 1 … n.

    Raises:
        InputError: the run's code cells are others.
    """
    cells, ran = ([cell for cell in nb.cells if cell.cell_type == "code"] for nb in (notebook, executed))
    ran = [cell for cell in ran if "injected-parameters" not in cell.metadata.get("tags", [])]
    if [cell.source for cell in cells] != [cell.source for cell in ran]:
        heading = notebook.cells[0].source.partition("\n")[0]
        raise InputError(f"the code of {heading!r} has changed since this run: run it again")
    for count, (cell, done) in enumerate(zip(cells, ran, strict=True), 1):
        cell.outputs, cell.execution_count = done.outputs, count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
    notebook.metadata = {k: notebook.metadata[k] for k in ("kernelspec",) if k in notebook.metadata}
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook
