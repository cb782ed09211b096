"""What the files of `quantised` come to: size against perplexity, whether pruning or quantising is the better way to a
size, the best pruned file of each size, and a drawing of all files.

Nothing here makes a file, so files that are kept outlive a change of these lines.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from gqalib import figures
from gqalib.measure.perplexity import ratio_with_error, told_apart
from gqalib.serve.quantised import KINDS, Rows

AXES = {"bytes": ("file (MB)", 1e6), "tokens/s": ("tokens per second, one sequence", 1)}
HALVES = [{"fillstyle": half, "markerfacecoloralt": "white"} for half in ("left", "right", "top", "bottom")]
LOOKS = [{}, {"mfc": "white"}, *HALVES]  # of models of the same kind
NEAR = 0.015  # of an axis: points that are nearer hide each other where their bars overlap
MARKER = 0.017  # half a marker's height, of its perplexity


def table(rows: Rows, dense: torch.Tensor) -> pd.DataFrame:
    """A line for each file: `model`, `type`, `bytes`, `times dense` (perplexity relative to the model whose losses
    `dense` are) with its paired `± standard error`, and `front`: no other file is as small and as good."""
    found = pd.DataFrame(rows, columns=["model", "type", "bytes"])
    found[["times dense", "± standard error"]] = [ratio_with_error(row["losses"], dense) for row in rows]
    return found.assign(front=on_front(found["bytes"], found["times dense"]))


def on_front(size: pd.Series, damage: pd.Series) -> list[bool]:
    """Which points no other point beats: none is at most as large and at most as bad, and better in one of the two."""
    points = list(zip(size, damage, strict=True))
    return [not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points) for x, y in points]


def prune_or_quantise(rows: Rows, dense: str = "dense") -> pd.DataFrame:
    """Every file of a pruned model beside the best file of the model `dense` that is no larger.

    Returns:
        A line for each pruned file: `file`, `bytes`, `way` (prune, both), `rival`, `rival bytes`, `times rival` with
        the paired `± error`, and `verdict`: better or worse than the rival, not told apart from it, or no rival.
    """
    rivals = [row for row in rows if row["model"] == dense]
    lines = []
    for row in (row for row in rows if row["model"] != dense):
        line = {"file": _name(row), "bytes": row["bytes"], "way": "both" if row["type"] in KINDS[1:] else "prune"}
        line |= {"rival": None, "verdict": "no rival"}
        if smaller := [rival for rival in rivals if rival["bytes"] <= row["bytes"]]:
            rival = min(smaller, key=lambda rival: rival["losses"].mean())
            line |= {"rival bytes": rival["bytes"]} | _beside(row, rival, "rival")
        lines.append(line)
    return pd.DataFrame(lines)


def _name(row: dict) -> str:
    return f"{row['model']} {row['type']}"


def _beside(row: dict, other: dict, word: str) -> dict:
    """A file beside another one, in columns that `word` names."""
    ratio, error = ratio_with_error(row["losses"], other["losses"])
    return {word: _name(other), f"times {word}": ratio, "± error": error, "verdict": told_apart(ratio, error)}


def verdict_on_rivals(beside: pd.DataFrame) -> list[str]:
    """What `prune_or_quantise` comes to, in lines to print."""
    lines = []
    for way, words in (("prune", "pruned only"), ("both", "pruned and quantised")):
        part = beside[beside["way"] == way]
        counts = part["verdict"].value_counts().reindex(["better", "worse", "not told apart", "no rival"], fill_value=0)
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        lines.append(f"{len(part)} files {words}, each beside the best dense file that is no larger: {said}")
    return [*lines, f"for the same file size: {_advice(beside)}"]


def _advice(beside: pd.DataFrame) -> str:
    files = {verdict: rows["file"].tolist() for verdict, rows in beside.groupby("verdict")}
    lost, open_ = files.get("worse", []), files.get("not told apart", [])
    if won := files.get("better"):
        said = f"better than any dense file that is no larger: {', '.join(won)}; for other sizes the front decides"
    elif lost:
        said = "quantise, do not prune" + (f" ({', '.join(open_)}: not told apart)" if open_ else "")
    else:
        said = "pruning and quantising are not told apart"
    alone = beside.loc[beside["verdict"] == "no rival", "bytes"]
    least = f"; in these types, only pruned files weigh {alone.max() / 1e6:.1f} MB or less"
    return said + (least if len(alone) else "")


def at_equal_size(rows: Rows, within: float = 0.05) -> pd.DataFrame:
    """The files of all models but `dense`, each beside the best one of about its size.

    Sizes are about equal where no file is larger than the smallest one by more than the share `within`.

    Returns:
        A line for each file, small ones first: `about` (MB of the smallest file of its size), `file`, `bytes`, `best`,
        `times best` (perplexities) with the paired `± error`, and `verdict`: best, worse, or not told apart.
    """
    sizes: list[Rows] = []
    for row in sorted((row for row in rows if row["model"] != "dense"), key=lambda row: row["bytes"]):
        if not sizes or row["bytes"] > (1 + within) * sizes[-1][0]["bytes"]:
            sizes.append([])
        sizes[-1].append(row)
    lines = []
    for equal in sizes:
        best = min(equal, key=lambda row: row["losses"].mean())
        for row in equal:
            line = {"about": equal[0]["bytes"] / 1e6, "file": _name(row), "bytes": row["bytes"]}
            lines.append(line | _beside(row, best, "best") | ({"verdict": "best"} if row is best else {}))
    return pd.DataFrame(lines)


def verdict_on_sizes(found: pd.DataFrame) -> list[str]:
    """What `at_equal_size` comes to, a line for each size."""
    lines = []
    for about, equal in found.groupby("about"):
        files = {words: ", ".join(part["file"]) for words, part in equal.groupby("verdict")}
        others = [f"{words}: {files[words]}" for words in ("not told apart", "worse") if words in files]
        best = f"{files['best']} is best" if others else f"only {files['best']}"
        lines.append("; ".join([f"about {about:.{1 if about > 10 else 3}f} MB: {best}", *others]))
    return lines


# ---------------------------------------------------------------- the drawing


def dots(ax: plt.Axes, table: pd.DataFrame, across: str) -> None:
    """Perplexity over one of `AXES`, a colour per kind of model (`LOOKS` tells six of a kind apart), a marker
    per type, bars of two standard errors.

    Over size the front is a line, and a point that another would hide stands to the right of it. Over speed, bars go
    from the slowest to the fastest turn, and no point is moved.

    Args:
        table: of `table`; over speed with `slowest` and `fastest`. The legend is left to the caller.
    """
    (label, unit), seen = AXES[across], []
    x = table[across] / unit
    shown = x if across == "tokens/s" else _apart(x, table["times dense"], 2 * table["± standard error"])
    for name, rows in table.groupby("model", sort=False):
        color = figures.COLORS[figures.role_of(name)]
        style = {"color": color, **LOOKS[seen.count(color) % len(LOOKS)]}
        for row in rows.itertuples():
            low_high = [[x[row.Index] - row.slowest], [row.fastest - x[row.Index]]] if across == "tokens/s" else None
            error, marker = 2 * table.loc[row.Index, "± standard error"], "osD^"[KINDS.index(row.type)]
            place = shown[row.Index], table.loc[row.Index, "times dense"]
            ax.errorbar(*place, error, low_high, marker=marker, ls="", capsize=2, lw=1, **style)
        ax.plot([], [], "o", label=name, **style)
        seen.append(color)
    _finish(ax, table, across, label)


def _apart(x: pd.Series, y: pd.Series, error: pd.Series) -> pd.Series:
    """Places across, moved right where a point and its bar would cover an earlier one."""
    reach, placed, near = error.clip(lower=MARKER * y), {}, NEAR * (x.max() - x.min() or 1)
    for index, place in x.items():
        covers = [at for at in placed if abs(y[index] - y[at]) < reach[index] + reach[at]]
        while any(abs(place - placed[at]) < 0.99 * near for at in covers):
            place += near
        placed[index] = place
    return pd.Series(placed)


def _finish(ax: plt.Axes, table: pd.DataFrame, across: str, label: str) -> None:
    """The types' legend, the front, and axes that can be read."""
    for kind in table["type"].unique():
        ax.plot([], [], "osD^"[KINDS.index(kind)], color="none", mec=figures.COLORS["dense"], label=kind)
    if across == "bytes":
        front = table[table["front"]].sort_values("bytes")
        ax.step(front["bytes"] / 1e6, front["times dense"], where="post", color=figures.COLORS["other"], lw=1, zorder=0)
        ax.set(ylabel="perplexity (× dense, ± 2 errors, log scale)")
    ax.set(xlabel=label, yscale="log")
    high = np.nanmax(table["times dense"] + 2 * table["± standard error"])
    # steps within a power of ten: 9.8 and 9.9 are 0.98 and 0.99, in the one below
    small = (1, 1.02, 1.05, 1.1, 1.2, 1.5) if high > 1.05 else (1, 1.01, 1.02, 1.03, 1.04, 9.8, 9.9)
    figures.readable_log_axis(ax.yaxis, (1, 1.2, 1.5, 2, 3, 5) if high > 1.5 else small)
