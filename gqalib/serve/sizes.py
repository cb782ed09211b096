"""What the files of `quantised` come to by size: the best pruned file of each size, and a drawing of all files.

Nothing here makes a file, so files that are kept outlive a change of these lines.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from gqalib import figures
from gqalib.measure.perplexity import ratio_with_error, told_apart
from gqalib.serve.quantised import KINDS, Rows

AXES = {"bytes": ("file (MB)", 1e6), "tokens/s": ("tokens per second, one sequence", 1)}
NEAR = 0.015  # of an axis: points that are nearer hide each other where their bars overlap
MARKER = 0.017  # half a marker's height, of its perplexity


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
        lines += [{"about": equal[0]["bytes"] / 1e6} | _beside(row, best) for row in equal]
    return pd.DataFrame(lines)


def _beside(row: dict, best: dict) -> dict:
    ratio, error = ratio_with_error(row["losses"], best["losses"])
    name, other = (f"{each['model']} {each['type']}" for each in (row, best))
    verdict = "best" if row is best else told_apart(ratio, error)
    shown = {"file": name, "bytes": row["bytes"], "best": other, "times best": ratio, "± error": error}
    return shown | {"verdict": verdict}


def verdict(found: pd.DataFrame) -> list[str]:
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
    """Perplexity over one of `AXES`, a colour per model (hollow: the second one of it), a marker per type, bars of two
    standard errors.

    Over size the front is a line, and a point that another would hide stands to the right of it. Over speed, bars go
    from the slowest to the fastest turn, and no point is moved.

    Args:
        table: of `quantised.table`; over speed with `slowest` and `fastest`. The legend is left to the caller.
    """
    (label, unit), seen = AXES[across], []
    x = table[across] / unit
    shown = x if across == "tokens/s" else _apart(x, table["times dense"], 2 * table["± standard error"])
    for name, rows in table.groupby("model", sort=False):
        color = figures.COLORS[figures.role_of(name)]
        style = {"color": color, "mfc": "white" if color in seen else color}
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
