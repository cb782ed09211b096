"""The founding document's claims as data, and what the records say of them.

Its numbers are for Llama-3-8B-Instruct (dense perplexity 19.66). On another model a claim can only be tested *in form*:
as a ratio to that model's own dense perplexity. A claim that counting or one counterexample decides can be refuted; one
about a model that is not at hand can only fail to be reproduced.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd

from gqalib.measure.perplexity import SURE

DENSE = 19.66
REFUTES = ("counting", "counterexample")
KINDS = ("reproduced", "not reproduced", "refuted", "not shown", "not decided", "not testable")  # of verdicts


class Measured(NamedTuple):
    """A value, and from where to where it may lie: the lowest and highest round, or two standard errors each way."""

    value: float
    low: float | None = None
    high: float | None = None

    def reach(self) -> tuple[float, float]:
        return (self.value if self.low is None else self.low), (self.value if self.high is None else self.high)


@dataclass(frozen=True)
class Claim:
    """One claim, what stands for it here, and the range in which the value called `key` must lie.

    Args:
        source: the notebook that the value stands in, and what its cell of code has in it.
        note: what the test can say and what it cannot, whatever the value is.
        topic: quality, speed, freezing or money.
        decided_by: measurement, counting, a counterexample, or nothing: what no run of the workbook can show.
        no_effect: the value that means nothing happened; a range that reaches it shows no effect.
    """

    text: str
    tested: str
    key: str
    low: float
    high: float
    unit: str
    source: tuple[str, str]
    note: str
    topic: str = "quality"
    decided_by: str = "measurement"
    no_effect: float | None = None


CLAIMS = (
    Claim("v2: 19.66 → 718,107", "perplexity of v2", "ratio_v2", 10, math.inf, "× dense",
          ("02_v2_failure", 'nb.table("controls"'),
          "The factor depends on the model; that v2 breaks it is what is tested. Section 4 of 02 separates the causes. "
          "One of them, the MLP by magnitude, is our assumption."),
    Claim("v2 + LoRA: 159.85", "perplexity of v2 after v3's budget of LoRA", "ratio_v2_lora", 2, 159.85 / DENSE,
          "× dense", ("06_lora_recovery", 'nb.metric(f"ratio_{'),
          "The result depends on how many tokens LoRA reads. A small preset gives it few, and v2 has far to go."),
    Claim("v3: 19.66 → 37.82", "perplexity, 84.64 % of all parameters kept, one shot",
          "ratio_kept_reading", 0, 37.82 / DENSE, "× dense", ("05_full_prune", 'nb.table("one_shot"'),
          "The document gives 84.64 % once as the part removed and once as the part kept. This one removes little."),
    Claim("the same, read literally", "perplexity, 84.64 % of all parameters removed, one shot",
          "ratio_removed_reading", 0, 37.82 / DENSE, "× dense", ("05_full_prune", 'nb.table("one_shot"'),
          "8.03 billion parameters cut to 1.23 billion, as the document writes elsewhere, is this reading."),
    Claim("20–25 after LoRA", "perplexity of v3 + LoRA", "ratio_v3_lora", 0, 25 / DENSE, "× dense",
          ("06_lora_recovery", 'nb.metric(f"ratio_{'),
          "The document calls this expected in one place and reached in another. The v3 of this run removes the "
          "preset's mean rate of the backbone, which is far less than 84.64 %."),
    Claim("one layer: 19.66 → 19.62", "change, a middle layer, a quarter of its groups, at least one",
          "change_single_layer", -math.inf, 1, "%", ("03_single_layer_gqa", 'nb.metric("change_single_layer"'),
          "A middle layer is easy: notebook 03 shows that a random group often costs as little, and that a layer near "
          "the front can cost far more."),
    Claim("five layers: 19.66 → 19.89", "change, a quarter of their groups, at least one of each",
          "change_five_layers", -math.inf, 2, "%",
          ("04_multi_layer_freezing", 'nb.metric("change_five_layers"'),
          "Only attention is cut here, as in the document's own test."),
    Claim("MLP: magnitude 10,651, Taylor 37.82", "perplexity, magnitude ÷ Taylor", "mlp_magnitude", 2, math.inf, "×",
          ("05_full_prune", 'nb.table("ablation"'),
          "The only difference is the score that chooses channels. The error is paired over the test windows.",
          no_effect=1),
    Claim("5–6× faster, 84.64 % kept", "ceiling of Llama-3-8B from its bytes",
          "ceiling_kept_reading", 5, math.inf, "×", ("07_cost_analysis", 'nb.metric("ceiling_kept_reading"'),
          "The ceiling is counted from the real shape. A narrower matrix may be read somewhat faster (07, section 7), "
          "but not four times.", "speed", "counting"),
    Claim("5–6× faster, 84.64 % removed", "decoding, smallest batch, this model", "decode_removed_reading", 5, math.inf,
          "×", ("07_cost_analysis", 'nb.table("speed", table)'),
          "Speed depends on shapes alone, so random weights are enough. A small model spends much of its time on "
          "starting operations, and one with a large embedding cannot be cut so far.",
          "speed", no_effect=1),
    Claim("5–6× faster, 84.64 % removed, at its size", "decoding one sequence, Llama-3-8B's shape",
          "decode_removed_at_size", 5, math.inf, "×", ("07_cost_analysis", 'at_size["tables"]["speed"]'),
          "This is the claim at its own size on a GPU. Larger batches, longer contexts and prompts are in the figure "
          "of the same section, and some of them come much nearer to their ceilings. On a processor, in a table there, "
          "decoding passes 5 ×: there the claim holds, for speed alone.", "speed", no_effect=1),
    Claim("5–6× faster, 84.64 % kept, at its size", "decoding one sequence, Llama-3-8B's shape",
          "decode_kept_at_size", 5, math.inf, "×", ("07_cost_analysis", 'at_size["tables"]["speed"]'),
          "Counting has already decided this reading; the measurement stays near the ceiling or below it.",
          "speed", no_effect=1),
    Claim("84.64 % removed with rates of 15–50 %", "backbone of Llama-3-8B that must go",
          "backbone_to_remove", 15, 50, "%", ("07_cost_analysis", 'nb.metric("backbone_to_remove"'),
          "Embedding and norms cannot go, so attention and MLP have to lose more than 84.64 %. No rate of 15 to 50 % "
          "in each layer adds up to that.", "quality", "counting"),
    Claim("backward meets a shape mismatch", "a weight's `.data` replaced, its old gradient kept: 1 if backward fails",
          "stale_gradient_fails", 1, 1, "", ("04_multi_layer_freezing", 'nb.metric("stale_gradient_fails"'),
          "The error is real. It comes from the old gradient, which has the old shape and is still on the weight.",
          "freezing"),
    Claim("pruned layers must be frozen to avoid it", "the old gradient cleared, or a new Parameter, and nothing "
          "frozen: 1 if backward fails", "freezing_needed", 1, 1, "",
          ("04_multi_layer_freezing", 'nb.metric("freezing_needed"'),
          "Freezing does hide the error, as a frozen weight gets no gradient. But one pruned model whose backward runs "
          "with nothing frozen shows that it is not needed; section 2 of 04 adds that the gradients are the same. "
          "Freezing saves memory and time.", "freezing", "counterexample"),
    Claim("pays 110–220 times a month", "saving of a month ÷ investment", "monthly_return", 110, 220, "×",
          ("07_cost_analysis", "def monthly_return"),
          "The number is an illustration: a price per hour, a number of tokens and this machine's speed-up. Where the "
          "range of the speed-up reaches 1, that of the saving reaches 0.", "money", "nothing", no_effect=0),
)  # fmt: skip


def verdicts(measured: dict[str, Measured], claims: tuple[Claim, ...] = CLAIMS) -> pd.DataFrame:
    """A row per claim: `claim`, `tested`, `claimed`, `measured` with its range, `verdict` (no value: not testable)."""
    rows = []
    for claim in claims:
        found = measured.get(claim.key)
        words = "–" if found is None else f"{_with_reach(found)} {claim.unit}".strip()
        row = {"claim": claim.text, "tested": claim.tested, "claimed": f"{_range(claim)} {claim.unit}".strip()}
        rows.append(row | {"measured": words, "verdict": _verdict(claim, found)})
    return pd.DataFrame(rows)


def _verdict(claim: Claim, found: Measured | None) -> str:
    if found is None:
        return "not testable on this model"
    low, high = found.reach()
    missed = claim.decided_by != "nothing" and (high < claim.low or claim.high < low)
    if not missed and low < high and claim.no_effect is not None and low <= claim.no_effect <= high:
        return f"not shown: the range reaches {claim.no_effect:g}, which is no effect"
    if claim.decided_by == "nothing":
        return "not testable here: it takes a served model and its bill"
    if claim.low <= low and high <= claim.high:
        return "reproduced in form"
    if low <= claim.high and claim.low <= high:
        return "not decided: the range reaches beyond what is claimed"
    return "refuted" if claim.decided_by in REFUTES else "not reproduced here"


def _range(claim: Claim) -> str:
    if claim.high == math.inf:
        return f"at least {_number(claim.low)}"
    if claim.low in (0, -math.inf):
        return f"at most {_number(claim.high)}"
    return _number(claim.low) if claim.low == claim.high else f"{_number(claim.low)} to {_number(claim.high)}"


def _with_reach(found: Measured) -> str:
    low, high = found.reach()
    return _number(found.value) + (f" ({_number(low)} to {_number(high)})" if low < high else "")


def _number(value: float) -> str:
    return f"{value:.0e}" if 0 < abs(value) < 0.005 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def paragraph(claim: Claim, row: dict[str, str], link: str = "") -> str:
    """What a row of `verdicts` says, in sentences, as Markdown."""
    was = f"we measured {row['measured']}" if row["measured"] != "–" else "nothing was measured"
    where = f" ({link})" if link else ""
    tested = f"We tested: {claim.tested}. The claim asks for {row['claimed']}; {was}{where}."
    return f"**{claim.text}: {row['verdict']}.** {tested} {claim.note}"


def stands_on(claim: Claim, notebooks: Path) -> str:
    """A link, in Markdown, to the section of the notebook whose cell of code computes the claim's value."""
    name, code = claim.source
    title = re.sub(r"[*`]", "", _heading_above(notebooks / f"{name}.ipynb", code))
    number = re.match(r"(\d+)\. ", title)
    words = f"{name[:2]}, section {number[1]}" if number else name[:2]
    return f"[{words}]({name}.ipynb#{quote(title.replace(' ', '-'), safe='')})"


def _heading_above(path: Path, code: str) -> str:
    """The last heading above the cell of code that has these words in it; the notebook's title if no cell has."""
    headings = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and code in source:
            return headings[-1]
        headings += re.findall(r"^##? (.*)", source, re.MULTILINE) if cell["cell_type"] == "markdown" else []
    return headings[0]


def how_far(models: pd.DataFrame, targets: Sequence[float]) -> pd.DataFrame:
    """The question that the founding document should have asked: how much can go at a given perplexity?

    Args:
        models: one row per model that was measured: `recovery` (how it was trained; none), `ratio` (perplexity relative
            to dense) and its `error`, `backbone_removed_percent`, `parameters_kept_percent`.
        targets: ratios.

    Returns:
        For each target and recovery the smallest model within the target, of several of that size the best: its row,
        and `target`. Nothing where none is.
    """
    by_size = models.sort_values(["backbone_removed_percent", "ratio"], ascending=[True, False])
    within = pd.concat([by_size[by_size["ratio"] <= target].assign(target=target) for target in targets])
    smallest = within.groupby(["target", "recovery"], sort=False, as_index=False).last(skipna=False)
    return smallest[["target", "recovery", "ratio", "error", "backbone_removed_percent", "parameters_kept_percent"]]


def said_of(row: Any) -> str:
    """A row of `how_far` in words; a ratio that is nearer to its target than two errors is not shown to be within."""
    kind = "untrained" if row.recovery == "none" else row.recovery
    unsure = "" if row.ratio + SURE * row.error <= row.target else ", not shown to be within"
    return f"{row.backbone_removed_percent:.0f} % ({kind}: {row.ratio:.2f} ± {row.error:.2f}{unsure})"
