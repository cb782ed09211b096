"""One style, and the drawings that more than one cell needs. Colours mean the same in every figure."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.collections import Collection, PathCollection
from matplotlib.colors import SymLogNorm
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gqalib.measure.perplexity import in_products, token_losses

# Also apart in greyscale: from dark to light. Markers say the same for lines.
COLORS = {
    "dense": "#222222", "v2": "#b2182b", "v3": "#2166ac", "refit": "#762a83", "recovered": "#5aae61",
    "other": "#a0a0a0",
}  # fmt: skip
COLUMN_WIDTH, TEXT_WIDTH, LEAST_PANEL = 3.25, 6.75, 1.2  # inches; a page of two columns
MARKERS = {"dense": "o", "v2": "X", "v3": "s", "refit": "P", "recovered": "^", "other": "D"}


def use_style() -> None:
    """What every figure of the workbook shares."""
    plt.rcParams.update({
        "figure.figsize": (8, 3.6), "figure.dpi": 100, "savefig.dpi": 150, "savefig.bbox": "tight",
        "figure.constrained_layout.use": True,
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
        "axes.axisbelow": True, "image.cmap": "viridis", "image.aspect": "auto",
        "svg.hashsalt": "gqalib", "pdf.fonttype": 42, "legend.frameon": False,
    })  # fmt: skip


def save_for_paper(fig: plt.Figure, path: Path) -> None:
    """A PDF as wide as a column, letters of 7 points, or as a page's text where panels would be below `LEAST_PANEL`."""
    with _resized(fig, COLUMN_WIDTH, 0.7):
        fig.draw_without_rendering()
        if min(ax.get_window_extent().width for ax in fig.axes if ax.get_subplotspec()) > LEAST_PANEL * fig.dpi:
            return fig.savefig(path)
    with _resized(fig, TEXT_WIDTH, min(1, TEXT_WIDTH / fig.get_size_inches()[0])):
        fig.savefig(path)


@contextmanager
def _resized(fig: plt.Figure, width: float, factor: float) -> Iterator[None]:
    """Inside, a figure has this width in inches; its height, letters, lines and dots are `factor` times theirs."""
    size, lines, groups = fig.get_size_inches(), fig.findobj(Line2D), fig.findobj(Collection)
    points = plt.rcParams["font.size"]  # of ticks that are only made when it is drawn
    sizes = [(lambda size, ax=ax: ax.tick_params(which="both", labelsize=size), points) for ax in fig.axes]
    sizes += [(text.set_fontsize, text.get_fontsize()) for text in fig.findobj(Text)]
    sizes += [(artist.set_linewidth, artist.get_linewidth()) for artist in lines + groups]
    sizes += [(line.set_markersize, line.get_markersize()) for line in lines]
    sizes += [(dots.set_sizes, dots.get_sizes()) for dots in fig.findobj(PathCollection)]
    fig.set_size_inches(width, size[1] * factor)
    for set_size, value in sizes:
        set_size(np.multiply(value, factor))
    try:
        yield
    finally:
        fig.set_size_inches(size)
        for set_size, value in sizes:
            set_size(value)


def draw_gqa_layout(ax: plt.Axes, num_attention_heads: int, num_key_value_heads: int) -> None:
    """Query heads above, the KV head that each band of them reads below."""
    size = num_attention_heads // num_key_value_heads
    between = " " if size > 1 else "\n"  # a narrow box has no room for both names side by side
    for head in range(num_attention_heads):
        shade = plt.cm.Greys(0.25 if (head // size) % 2 else 0.5)
        ax.add_patch(plt.Rectangle((head, 1), 0.9, 0.7, color=shade))
        ax.text(head + 0.45, 1.35, f"Q{head}", ha="center", va="center", fontsize=7)
        ax.plot([head + 0.45, (head // size + 0.5) * size - 0.05], [1, 0.7], color="#888888", lw=0.7)
    for kv in range(num_key_value_heads):
        ax.add_patch(plt.Rectangle((kv * size, 0), size - 0.1, 0.7, color=plt.cm.Greys(0.25 if kv % 2 else 0.5)))
        ax.text((kv + 0.5) * size - 0.05, 0.35, f"K{kv}{between}V{kv}", ha="center", va="center", fontsize=8)
    ax.set(xlim=(-0.2, num_attention_heads), ylim=(-0.1, 1.8))
    ax.axis("off")


def draw_pairing(ax: plt.Axes, pairs: Sequence[tuple[int, int, int]], num_heads: int, num_kv_heads: int) -> None:
    """Which KV head each query head reads (filled) and which is its own (ring); `pairs` from `v2.pairing`.

    A grey row is a KV head that nobody reads any more. All labels are always there: one legend serves several panels.
    """
    heads, read, own = np.array(pairs).T
    right, ring = read == own, {"facecolors": "none", "edgecolors": COLORS["dense"], "linewidths": 0.9}
    for gone in sorted(set(range(num_kv_heads)) - set(read.tolist())):
        ax.axhspan(gone - 0.5, gone + 0.5, color=COLORS["other"], alpha=0.3, lw=0)
    ax.scatter(heads[right], read[right], marker="s", s=26, color=COLORS["v3"], label="reads its own KV head")
    ax.scatter(heads[~right], read[~right], marker="X", s=30, color=COLORS["v2"], label="reads another's")
    ax.scatter(heads, own, marker="o", s=62, label="its own KV head", **ring)
    ax.scatter([], [], marker="s", s=90, color=COLORS["other"], alpha=0.3, lw=0, label="removed KV head")
    ax.set(xlim=(-0.7, num_heads - 0.3), ylim=(num_kv_heads - 0.5, -0.5), ylabel="KV head")
    _whole_numbers(ax)


def _whole_numbers(ax: plt.Axes) -> None:
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def heatmap(ax: plt.Axes, values: np.ndarray, label: str, change: bool = False) -> None:
    """Values [layers, units], layers from left to right, NaN left blank; a `change` has two colours around zero.

    Changes of layers differ by orders of magnitude, so beyond ±1 their scale is logarithmic.
    """
    limit = np.nanmax(np.abs(values), initial=2.0)
    norm = SymLogNorm(linthresh=1, vmin=-limit, vmax=limit) if change else None
    colours = "RdBu_r" if change else "viridis"
    image = ax.imshow(values.T, origin="lower", cmap=colours, norm=norm, interpolation="nearest")
    ax.grid(False)
    ax.set_xlabel("layer")
    _whole_numbers(ax)
    bar = ax.figure.colorbar(image, ax=ax, label=label)
    if change:
        steps = [step for step in (1, 10, 100, 1000) if step <= limit]
        bar.set_ticks([*(-step for step in reversed(steps)), 0, *steps])
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+,.0f}" if value else "0"))
        bar.ax.minorticks_off()


def perplexity_dots(
    ax: plt.Axes, names: Sequence[str], values: Sequence[float], dense: float, errors: Sequence[float]
) -> None:
    """A dot per model on a logarithmic axis, models down, with two standard errors each way, its value beside it, and
    the dense model as a dashed line."""
    reach = 2 * np.nan_to_num(np.array(errors, dtype=float))  # one window has no error
    finite = np.isfinite(np.array(values, dtype=float))
    drawn = np.where(finite, values, dense)
    for position, (name, value, place, error) in enumerate(zip(names, values, drawn, reach, strict=True)):
        role = role_of(name)
        number = f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
        text = number if finite[position] else "does not run" if np.isnan(value) else "beyond any number"
        style = {"color": COLORS[role], "marker": MARKERS[role] if finite[position] else "", "ms": 6}
        ax.errorbar(place, -position, xerr=error or None, capsize=3, lw=1.2, **style)
        beside = {"xytext": (8, 0), "textcoords": "offset points"}
        ax.annotate(text, (place + error, -position), va="center", fontsize=9, **beside)
    ax.axvline(dense, color=COLORS["dense"], lw=1, ls="--")
    ax.set_yticks(-np.arange(len(values)), names)
    low, high = min(np.maximum(drawn - reach, drawn / 5).min(), dense), max((drawn + reach).max(), dense)
    limits = low / max(1.1, (high / low) ** 0.03), high * max(1.15, (high / low) ** 0.2)  # room for dots and numbers
    ax.set(xlabel="perplexity (log scale)", xscale="log", xlim=limits)
    steps = (1,) if high > 200 * low else (1, 2, 5) if high > 4 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
    readable_log_axis(ax.xaxis, steps)
    if high > 1e4 * low:  # a number at every second power of ten
        ax.xaxis.set_major_locator(LogLocator(base=100))
        ax.xaxis.set_minor_locator(LogLocator(subs=(1,), numticks=99))


def speedup_dots(ax: plt.Axes, table: pd.DataFrame, phase: str) -> None:
    """Measured speed-up at every batch size and context: a dot per model with the rounds' range, a dash per ceiling.

    `table` from `speed.beside_ceilings`; its first model is the one that the others are compared with.
    """
    rows = table[table["phase"] == phase]
    points = sorted(rows[["batch_size", "context"]].drop_duplicates().itertuples(index=False, name=None))
    names = [name for name in rows["model"].unique() if name != rows["model"].iloc[0]]
    width = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        own = rows[rows["model"] == name].set_index(["batch_size", "context"]).reindex(points)
        x = np.arange(len(points)) + (index - (len(names) - 1) / 2) * width
        reach = [own["speedup"] - own["speedup_low"], own["speedup_high"] - own["speedup"]]
        style = {"marker": MARKERS[role := role_of(name)], "color": COLORS[role], "ms": 6, "capsize": 2}
        if role == "other":  # models without a colour of their own: darker and darker
            style |= {"marker": "^oD"[index % 3], "color": str(0.65 - 0.4 * index / len(names))}
        ax.errorbar(x, own["speedup"], reach, ls="", lw=1, label=name, **style)
        dash = {"marker": "_", "s": 1500 * width / len(points), "color": COLORS["dense"], "lw": 2}
        ax.scatter(x, own["ceiling"].where(own["speedup"].notna()), label=None if index else "ceiling", **dash)
        for place in x[own["speedup"].isna()]:
            ax.text(place, 1.03, "not measured", rotation=90, ha="center", va="bottom", fontsize=8)
    ax.axhline(1, color=COLORS["dense"], lw=0.8)
    ax.set_xticks(range(len(points)), [f"{size} × {context:,}" for size, context in points])
    ax.set_title(phase, loc="left")
    ax.set(xlabel="sequences × tokens", ylabel="speed-up over dense (×, log scale)", yscale="log")
    far = rows["ceiling"].max() > 2 or rows["speedup_low"].min() < 0.7
    readable_log_axis(ax.yaxis, steps=(1, 1.5, 2, 3, 5, 7) if far else (1, 1.1, 1.2, 1.3, 1.5, 2, 5, 7, 8, 9))
    ax.grid(axis="x", visible=False)


def task_dots(ax: plt.Axes, table: pd.DataFrame) -> None:
    """Accuracy on each task, tasks down, a dot per model with two standard errors, a dash where guessing stands.

    `table` is of `report_card.task_table`; every second model of a colour is hollow, and after two the marker changes.
    """
    names, places = table["model"].unique(), {task: -i for i, task in enumerate(table["task"].unique())}
    seen: list[str] = []
    for index, name in enumerate(names):
        rows, role = table[table["model"] == name], role_of(name)
        y = rows["task"].map(places) + 0.6 * (0.5 - (index + 0.5) / len(names))
        pair, hollow = divmod(seen.count(role), 2)
        style = {"color": COLORS[role], "marker": (MARKERS[role], *"v<>*d")[pair % 6], "ms": 6}
        style |= {"mfc": "white"} if hollow else {}
        ax.errorbar(rows["accuracy"], y, xerr=2 * rows["error"], ls="", capsize=2, lw=1, label=name, **style)
        seen.append(role)
    chance = table.groupby("task", sort=False)["chance"].first()
    y = chance.index.map(places)
    ax.vlines(chance, y - 0.4, y + 0.4, color=COLORS["dense"], ls=":", label="chance")
    ax.set_yticks(list(places.values()), list(places))
    ax.set(xlabel="accuracy (%, ± 2 standard errors)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def frontier_lines(
    ax: plt.Axes, lines: pd.DataFrame, styles: Mapping[str, dict[str, object]], named: Sequence[str]
) -> None:
    """Perplexity over dense by what is left, a line for each method. `named` ones have their names at the right edge;
    those that end above the frame stand on top of it, with their last value.

    Args:
        lines: method, parameters_kept_percent, ratio and its `reach`, sizes in order. styles: of `errorbar`.
    """
    for name, line in lines.groupby("method"):
        ax.errorbar(line["parameters_kept_percent"], line["ratio"], line["reach"], **styles[name])
    ax.axhline(1, color=COLORS["dense"], ls="--", lw=1)
    ax.set(xlabel="parameters kept (% of all)", ylabel="perplexity / dense (log scale)", yscale="log")
    readable_log_axis(ax.yaxis)
    ax.invert_xaxis()
    ends = lines.groupby("method")[["parameters_kept_percent", "ratio"]].last().loc[list(named)]
    top = min(ax.get_ylim()[1], 2 * ends["ratio"].drop("random", errors="ignore").max())  # random may be far above all
    ax.set_ylim(0.95 * min(1, (lines["ratio"] - lines["reach"]).min()), top)
    inside = ends[ends["ratio"] <= top]
    above = [f"↑ {name} ({ratio:,.0f})" for name, ratio in ends["ratio"].drop(inside.index).items()]
    ax.text(1.03, 1.02, "\n".join(above), transform=ax.transAxes, color="0.5")
    places = dict(zip(inside.index, inside.to_numpy().tolist(), strict=True))
    names_at_the_edge(ax, places, {name: styles[name]["color"] for name in places})


def valued_dots(ax: plt.Axes, values: Sequence[float], labels: Sequence[str], colours: Sequence[str]) -> None:
    """A dot for each label, from below, its value beside it."""
    ax.scatter(values, range(len(labels)), color=colours, s=36)
    for place, value in enumerate(values):
        text = f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
        ax.annotate(text, (value, place), (7, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_yticks(range(len(labels)), labels)


def names_at_the_edge(ax: plt.Axes, ends: Mapping[str, tuple[float, float]], colors: Mapping[str, str]) -> None:
    """The names of lines right of the axes, each as high as its line ends, moved up where it would cover the one below.

    Args:
        ends: the last point of each line, in data. colors: of the names.
    """
    ax.figure.canvas.draw()  # only now is it known where the points are
    line_height, last = 1.8 * plt.rcParams["font.size"] * ax.figure.dpi / 72, -np.inf
    bottom, height = ax.bbox.y0, ax.bbox.height
    for name in sorted(ends, key=lambda name: ends[name][1]):
        last = max(last + line_height, ax.transData.transform(ends[name])[1])
        place, thin = (1.03, (last - bottom) / height), {"arrowstyle": "-", "color": colors[name], "lw": 0.5}
        how = {"textcoords": "axes fraction", "va": "center", "color": colors[name], "arrowprops": thin}
        ax.annotate(name, ends[name], place, **how)


def readable_log_axis(axis, steps: Sequence[int] = (1, 2, 5)) -> None:
    """Plain numbers at 1, 2 and 5 times the powers of ten (or at other `steps`) instead of exponents."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:,.10g}")
    axis.set_minor_formatter(NullFormatter())


def stretch_around_zero(axis, linear_up_to: float) -> None:
    """Linear up to a value, logarithmic beyond, with plain numbers: for changes of which one dwarfs the others."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("symlog", linthresh=linear_up_to)
    axis.set_major_formatter("{x:,.10g}")
    axis.axes.autoscale(axis=axis.axis_name)  # lines drawn before fixed the limits of a linear axis


def role_of(name: str) -> str:
    """What a model is in `COLORS`, by its name."""
    if "LoRA" in name or name.startswith(("distilled", "literal", "long-")):
        return "recovered"
    role = next((role for role in ("dense", "v2", "v3", "refit") if name.startswith(role)), None)
    return role or ("v3" if name.startswith("founding") or name.lower().endswith("taylor") else "other")


@torch.no_grad()
def loss_by_position(model: torch.nn.Module, windows: torch.Tensor) -> np.ndarray:
    """Mean −log p in nats of the 2nd, 3rd, … token of a window, [length − 1]; the windows go through at once."""
    input_ids = windows.to(model.device)
    with in_products(model):
        logits = model(input_ids=input_ids, use_cache=False).logits
    return token_losses(logits, input_ids).view(len(input_ids), -1).double().mean(0).cpu().numpy()


def as_markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, in which cells may have links."""
    rows = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
