"""What notebooks say of models beside perplexity on the preset's own text: downstream tasks, a second text, what they
write. Section `answers` of a preset asks for it; where it asks for nothing, each function says so and fetches nothing.

Models are given by name, the dense one first: each a model, or a folder or function that gives it when its turn comes.
"""

import contextlib
import copy
import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from IPython.display import display
from ipywidgets import Button, Layout, Output, Text, VBox
from torch import nn
from transformers import PreTrainedTokenizerBase

from gqalib.device import bf16_is_fast
from gqalib.errors import InputError
from gqalib.measure import tasks
from gqalib.measure.perplexity import SURE, exponential, ratio_with_error, told_apart, window_losses
from gqalib.model.load import load_model
from gqalib.run.corpora import BY_PATH, corpus_path, evaluation_windows
from gqalib.run.notebook import COMMITTED, Notebook, read_record
from gqalib.run.play import is_live

Models = dict[str, "nn.Module | str | Path | Callable[[], nn.Module]"]
Rows = dict[str, pd.DataFrame]  # of `tasks.score_tasks`, by model
CODE = "from gqalib.measure import perplexity, tasks"  # what the numbers that are kept depend on
FEW = 50  # sequences of three words, of which no share of repeats is given
HOW_TO_GET = "README says which files go there, and nothing else needs them"


def _each(nb: Notebook, models: Models) -> Iterator[tuple[str, nn.Module]]:
    for name, model in models.items():
        if isinstance(model, str | Path):
            model = load_model(model, nb.preset.dtype, nb.preset.device)
        yield name, model if isinstance(model, nn.Module) else model()


# ---------------------------------------------------------------- tasks


def read_tasks(nb: Notebook, models: Models, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Every example of the preset's tasks as each model reads it; nothing where there are no tasks.

    A copy in bfloat16 reads where that is fast. What a model said is kept for all notebooks of the run.
    """
    asked = nb.preset.answers
    if not asked.tasks:
        print("this preset scores no tasks")
        return {}
    names, kept, rows = tasks.check_tasks(asked.tasks), nb.shared_progress("tasks", CODE), {}
    for name, model in _each(nb, models):
        fast = bf16_is_fast(model.device)
        progress = kept.of(model, names, asked.limit, fast, version("lm-eval"))
        score = partial(_score, model, tokenizer, names, asked.limit, fast)
        rows[name] = pd.DataFrame(progress.once("examples", score))
    return rows


def tasks_asked(nb: Notebook) -> list[str]:
    """The tasks of sections `answers` and `tasks_in_depth`; none where the latter names none.

    Raises:
        InputError: as `tasks.check_tasks`.
    """
    asked = nb.preset.tasks_in_depth
    more = [name for name in tasks.check_tasks(asked.names, asked.run_code) if name in tasks.MORE]
    return tasks.check_tasks(nb.preset.answers.tasks) + more if more else []


def read_in_depth(nb: Notebook, models: Models, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Every example of `tasks_asked`, kept task by task. Those of `answers` are as `read_tasks` has them, but for tasks
    of which `tasks_in_depth.limits` asks more."""
    asked, names = nb.preset.tasks_in_depth, tasks_asked(nb)
    limits = {task: asked.limits.get(task, asked.limit) for task in names if task in tasks.MORE or task in asked.limits}
    rows = read_tasks(nb, models, tokenizer)
    for name, model in _each(nb, models):
        parts = dict(iter(rows[name].groupby("task"))) if name in rows else {}
        parts |= read_examples(nb, model, tokenizer, limits, asked.run_code)
        rows[name] = pd.concat([parts[task] for task in names], ignore_index=True)
    return rows


def read_examples(
    nb: Notebook, model: nn.Module, tokenizer: PreTrainedTokenizerBase, limits: Mapping[str, int | None],
    run_code: bool = False,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """So many examples of each task (None: all) as a model reads them, by task; kept for all notebooks of the run."""
    kept, fast = nb.shared_progress("more tasks", CODE), bf16_is_fast(model.device)
    progress = {limit: kept.of(model, limit, fast, version("lm-eval")) for limit in set(limits.values())}
    found = {}
    for task, limit in limits.items():
        score = partial(_score, model, tokenizer, [task], limit, fast, run_code)
        found[task] = pd.DataFrame(progress[limit].once(task, score))
    return found


def _score(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, names: list[str], limit: int | None, fast: bool,
    run_code: bool = False,
) -> dict[str, list]:  # fmt: skip
    if fast and model.dtype != torch.bfloat16:
        model = copy.deepcopy(model).to(torch.bfloat16)
    at_once = 16 if model.device.type == "cpu" else 64
    with contextlib.redirect_stderr(io.StringIO()):  # a page has no use for lm-eval's progress bars
        return tasks.score_tasks(model, tokenizer, names, limit, at_once, run_code).to_dict("list")


def task_table(rows: Rows) -> pd.DataFrame:
    """`tasks.summary` of each model, one below the other, with its paired differences to the first; column `model`.

    The row of the mean also has `kept` and `kept_error`, of `above_chance_kept`.
    """
    dense, parts = next(iter(rows.values())), []
    for name, found in rows.items():
        part = tasks.summary(found, None if found is dense else dense).assign(model=name)
        part.loc[part["task"] == "mean", ["kept", "kept_error"]] = above_chance_kept(found, dense)[:2]
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def side_by_side(table: pd.DataFrame, what: str = "accuracy") -> pd.DataFrame:
    """A column of `task_table` ± its standard error, tasks down, models across; accuracy beside chance."""
    digits = 3 if what.startswith("nats") else 1
    values, errors = table[what], table["error" if what == "accuracy" else f"{what}_error"]
    cells = [f"{value:.{digits}f} ± {error:.{digits}f}" for value, error in zip(values, errors, strict=True)]
    order = {column: table.loc[values.notna(), column].unique() for column in ("task", "model")}
    wide = table.assign(cell=cells).pivot(index="task", columns="model", values="cell")
    wide = wide.loc[order["task"], order["model"]].rename_axis(columns=None)
    if what == "accuracy":
        wide.insert(0, "chance", table.groupby("task")["chance"].first().round(1))
    return wide


def above_chance_kept(
    rows: pd.DataFrame, dense: pd.DataFrame, start: pd.DataFrame | None = None
) -> tuple[float, float, list[str]]:
    """The share of what is above chance that a model keeps of the dense one's, in percent: the mean over tasks of
    (a − c) / (d − c), with accuracies a and d and chance c.

    Only tasks on which the dense model is above chance by more than `SURE` errors count: where it guesses, there is
    nothing to keep, and the quotient could be anything. That choice flatters the dense model a little.

    Args:
        start: the same examples read by another model: then how much more is kept than by that one.

    Returns:
        The share, its standard error, the tasks that count; NaN where none does.
    """
    found = {}
    for name, group in rows.groupby("task", sort=False):
        chance = tasks.CHANCE[name]
        own, reference = (_right(frame, name, group["example"]) for frame in (group, dense))
        own = own - (chance if start is None else _right(start, name, group["example"]))
        reference, samples = reference - chance, tasks.independent(group)
        if reference.mean() > SURE * tasks.standard_error(reference, samples):
            r = own.mean() / reference.mean()  # its error by the delta method, of paired examples
            found[name] = r, tasks.standard_error(own - r * reference, samples) / reference.mean()
    if not found:
        return math.nan, math.nan, []
    shares, errors = zip(*found.values(), strict=True)
    return 100 * sum(shares) / len(found), 100 * math.hypot(*errors) / len(found), list(found)


def nats_change(rows: pd.DataFrame, other: pd.DataFrame, names: Sequence[str]) -> tuple[float, float]:
    """How much likelier the right answers are than to another model, in nats per byte: the mean over these tasks and
    its paired error; NaN where no task has any. Name tasks on which the dense model is above chance: on others it shows
    how a form of answer is liked, such as the letters of MMLU, and not what is known."""
    scored = rows[rows["task"].isin(names)].dropna(subset="nats")
    if scored.empty:
        return math.nan, math.nan
    mean = tasks.summary(scored, other).iloc[-1]
    return mean["nats_difference"], mean["nats_difference_error"]


def _right(rows: pd.DataFrame, name: str, examples: pd.Series) -> np.ndarray:
    return rows[rows["task"] == name].set_index("example")["right"].loc[examples].to_numpy()


def verdict(rows: Rows) -> list[str]:
    """What the numbers show, in lines to print: the first model against chance, the others against the first."""
    (first, dense), *others = rows.items()
    table = tasks.summary(dense)
    known = _named(table, table["accuracy"] - table["chance"] > SURE * table["error"])
    lines, errors = [f"{first}: above chance by more than {SURE} errors on {known}"], []
    for name, found in others:
        table = tasks.summary(found, dense)
        gap, error = table["difference"], SURE * table["difference_error"]
        below, above = _named(table, gap < -error), _named(table, gap > error)
        lines += [f"{name}: below {first} on {below}; above it on {above}", f"    {_kept(found, dense)}"]
        errors.append(error)
    if errors:
        widest = pd.concat(errors, axis=1).max(axis=1)
        least = f"up to {widest.iloc[:-1].max():.1f} points on a single task, {widest.iloc[-1]:.1f} for the mean"
        lines.append(f"two standard errors of a difference: {least}")
    return lines


def _kept(rows: pd.DataFrame, dense: pd.DataFrame) -> str:
    share, error, names = above_chance_kept(rows, dense)
    if not names:
        return "there is nothing above chance to keep"
    counted, nats = f"{len(names)} of {rows['task'].nunique()} tasks", nats_change(rows, dense, names)
    kept = f"keeps {share:.0f} ± {error:.0f} % of what is above chance on {counted}"
    return kept + "; right answers there: {:+.3f} ± {:.3f} nats per byte".format(*nats)


def _named(table: pd.DataFrame, chosen: pd.Series) -> str:
    return ", ".join(table.loc[chosen, "task"]) or "nothing"


# ---------------------------------------------------------------- groups of tasks

GROUPS = {  # ours: no task measures one thing alone
    "arc_easy": ("facts", "school science; nothing in the prompt gives the answer away"),
    "openbookqa": ("facts", "an elementary fact, applied; the open book is not shown"),
    "mmlu_continuation": ("facts", "examinations in 57 subjects, the answer in words"),
    "mmlu": ("facts", "the same questions, the answer as a letter: a small model may miss the form of it"),
    "arc_challenge": ("reasoning", "school science that looking up and counting words did not answer"),
    "boolq": ("reasoning", "yes or no, to be concluded from a passage"),
    "piqa": ("reasoning", "which of two ways to do something works"),
    "hellaswag": ("reasoning", "which of four ends can follow"),
    "winogrande": ("reasoning", "whom a pronoun means, where grammar does not tell"),
    "humaneval": ("reasoning", "a program from its description; its tests are run"),
    "lambada": ("form", "the last word of a passage that determines it: language, followed over some sentences"),
    "sciq": ("form", "the answer stands in the passage of the prompt: to be found again"),
    "squad": ("form", "the answer stands in the passage: to be copied out, and no more"),
}


def group_table(rows: Rows, starts: Mapping[str, str] = MappingProxyType({})) -> pd.DataFrame:
    """The groups of `GROUPS`, model by model.

    Args:
        starts: for a recovered model the one that it was trained from.

    Returns:
        Per model and group `kept` with its error and the `tasks` that count, see `above_chance_kept`; `nats`, of
        `nats_change` on these tasks, with its error; with a start also `back`, how much more is kept than by it, with
        its paired error.
    """
    dense, lines = next(iter(rows.values())), []
    for name, found in rows.items():
        for group, part in found.groupby(found["task"].map(lambda task: GROUPS[task][0])):
            kept, error, counted = above_chance_kept(part, dense)
            line = {"model": name, "group": group, "kept": kept, "kept_error": error, "tasks": ", ".join(counted)}
            line["nats"], line["nats_error"] = nats_change(part, dense, counted)
            if name in starts:
                line["back"], line["back_error"], _ = above_chance_kept(part, dense, rows[starts[name]])
            lines.append(line)
    return pd.DataFrame(lines)


def goes_first(table: pd.DataFrame, model: str) -> str:
    """Which group a model has lost most of, as a line to print: by the difference to the next, whose error is that of
    independent examples."""
    part = table[(table["model"] == model) & table["kept"].notna()].sort_values("kept")
    said = ", ".join(f"{row.group} {row.kept:.0f} ± {row.kept_error:.0f} %" for row in part.itertuples())
    if len(part) < 2:
        return f"{model} keeps {said or 'nothing that counts'}: there is nothing to compare"
    least, after = part.iloc[0], part.iloc[1]
    gap, error = after["kept"] - least["kept"], math.hypot(least["kept_error"], after["kept_error"])
    shown = f"{least['group']} has gone first" if gap > SURE * error else "not told apart"
    return f"{model} keeps {said}: {shown} ({gap:.0f} ± {error:.0f} points behind {after['group']})"


# ---------------------------------------------------------------- another text


def other_text(
    nb: Notebook, models: Models, tokenizer: PreTrainedTokenizerBase, starts: Mapping[str, str] = MappingProxyType({})
) -> pd.DataFrame | None:
    """Perplexity on the test split of `answers.other_text`, at both windows of `evaluation`; None where none is asked,
    or where its files are missing.

    Args:
        starts: what some models were made from; how each stands against its start is printed.

    Returns:
        A row per model and window, recorded as table `other_text`: `perplexity` with the standard error over windows,
        and its `ratio` to the first model's with the paired `ratio_error`. `text` is the corpus without its path.
    """
    corpus, ev = nb.preset.answers.other_text, nb.preset.evaluation
    missing = corpus.startswith(BY_PATH) and not corpus_path(corpus).exists()
    if not corpus or missing:
        print(f"{corpus} is not here: {HOW_TO_GET}" if missing else "this preset reads no other text")
        return None
    kept, seen, rows = nb.shared_progress("other text", CODE), {}, []
    for name, model in _each(nb, models):
        longest = model.config.max_position_embeddings
        for length in sorted({min(ev.short_window, longest), min(ev.long_window, longest)}):
            windows = evaluation_windows(corpus, "test", tokenizer, length, ev.num_tokens)
            losses = kept.of(model, windows).once("losses", lambda: {"losses": window_losses(model, windows)})["losses"]
            text = {"text": Path(corpus.split(":")[-1]).name, "window": length, "test_tokens": windows.numel()}
            seen.setdefault(length, {})[name] = losses
            rows.append(text | {"model": name} | _quality(losses, seen[length][next(iter(models))]))
    table = pd.DataFrame(rows).sort_values("window", kind="stable", ignore_index=True)
    nb.table("other_text", table)
    for (length, losses), (name, start) in itertools.product(seen.items(), starts.items()):
        ratio, error = ratio_with_error(losses[name], losses[start])
        how = f"{ratio:.3f} ± {error:.3f} times its perplexity, {told_apart(ratio, error)}"
        print(f"{name} against {start}, windows of {length}: {how}")
    return table.round(3)


def _quality(losses: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    value, (ratio, ratio_error) = exponential(losses.mean().item()), ratio_with_error(losses, reference)
    error = value * losses.std().item() / len(losses) ** 0.5
    return {"perplexity": value, "error": error, "ratio": ratio, "ratio_error": ratio_error}


# ---------------------------------------------------------------- what they write


def continued(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, num_new_tokens: int) -> str:
    """What a model says to a prompt, greedily: as an assistant if its tokenizer has a chat template, else as a
    continuation. It may end before `num_new_tokens`."""
    if tokenizer.chat_template:
        said = [{"role": "user", "content": prompt}]
        given = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    given = given.to(model.device)
    how = {"max_new_tokens": num_new_tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    ids = model.generate(**given, **how)[0, given["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def written(nb: Notebook, models: Models, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print what each model says to the preset's prompts, prompt by prompt; recorded as table `written`."""
    asked = nb.preset.answers
    if not asked.prompts:
        print("this preset has no prompts")
        return
    rows = [
        {"prompt": prompt, "model": name, "text": continued(model, tokenizer, prompt, asked.num_new_tokens)}
        for name, model in _each(nb, models)
        for prompt in asked.prompts
    ]
    nb.table("written", pd.DataFrame(rows))
    for prompt in asked.prompts:
        print(f"━━ {prompt}")
        print(*(f"── {row['model']}\n{row['text']}\n" for row in rows if row["prompt"] == prompt), sep="\n")
    texts = pd.DataFrame(rows).groupby("model", sort=False)["text"]
    said = ", ".join(f"{name} {different_trigrams(list(found))}" for name, found in texts)
    print(f"sequences of three words that are not repeats of an earlier one: {said}")


def different_trigrams(texts: Sequence[str]) -> str:
    """How many of all sequences of three words differ from each other (distinct-3, Li et al. 2016): few where a model
    repeats itself. Short texts repeat little, so from fewer than `FEW` there is no share."""
    words = [text.split() for text in texts]
    found = [trigram for text in words for trigram in zip(text, text[1:], text[2:], strict=False)]
    share = f"{100 * len(set(found)) / len(found):.0f} %" if len(found) >= FEW else "too few"
    return f"{share} of {len(found)}"


def kept_text(nb: Notebook, model: str) -> str:
    """What a model of notebook 12 wrote to the prompts in this preset's committed run; a sentence if none is kept."""
    rows, preset = [], nb.parameters["name"]
    with contextlib.suppress(InputError):
        rows = read_record(COMMITTED / preset / "12_distillation.json")["tables"].get("written", [])
    texts = [f"━━ {row['prompt']}\n{row['text']}" for row in rows if row["model"] == model]
    return "\n".join(texts) or f"no text of {model} is kept for preset {preset}"


def typed(nb: Notebook, models: Models, tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """A line to type a prompt in, which begins with `prompt`, and a button at which all models answer it, one in memory
    at a time. A page that nobody holds open gets a line of text instead."""
    if not is_live():
        print("A line to type a prompt in appears here when you run this page in Jupyter.")
        return
    line, answers = Text(value=prompt, layout=Layout(width="90%")), Output()

    def answer(_: Button) -> None:
        answers.clear_output()
        with answers:
            for name, model in _each(nb, models) if line.value else ():
                said = continued(model, tokenizer, line.value, nb.preset.answers.num_new_tokens)
                print(f"── {name}\n{said}\n")

    button = Button(description="continue")
    button.on_click(answer)
    display(VBox([line, button, answers]))
