"""The founding document's claims as data, and what the records say of them.

Its numbers are for Llama-3-8B-Instruct (dense perplexity 19.66). On another model a claim can only be tested *in form*:
as a ratio to that model's own dense perplexity. A claim that counting alone decides can be refuted; one about a model
that is not at hand can only fail to be reproduced.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

DENSE = 19.66


@dataclass(frozen=True)
class Claim:
    """One claim, what stands for it here, and the range in which the value called `key` must lie."""

    text: str
    tested: str
    key: str
    low: float
    high: float
    unit: str
    decided_by: str = "measurement"  # or counting, or nothing: what no run of the workbook can show


CLAIMS = (
    Claim("v2: 19.66 → 718,107", "perplexity of v2", "v2", 10, math.inf, "× dense"),
    Claim("v2 + LoRA: 159.85", "perplexity of v2 after v3's budget", "v2_lora", 2, 159.85 / DENSE, "× dense"),
    Claim("v3: 19.66 → 37.82", "perplexity, 84.64 % of all parameters kept",
          "ratio_kept_reading", 0, 37.82 / DENSE, "× dense"),
    Claim("the same, read literally", "perplexity, 84.64 % of all parameters removed",
          "ratio_removed_reading", 0, 37.82 / DENSE, "× dense"),
    Claim("20–25 after LoRA", "perplexity of v3 + LoRA", "v3_lora", 0, 25 / DENSE, "× dense"),
    Claim("one layer: 19.66 → 19.62", "change, a middle layer, a quarter of its groups",
          "change_single_layer", -math.inf, 1, "%"),
    Claim("five layers: 19.66 → 19.89", "change, a quarter of their groups", "change_five_layers", -math.inf, 2, "%"),
    Claim("MLP: magnitude 10,651, Taylor 37.82", "perplexity, magnitude ÷ Taylor", "mlp_magnitude", 2, math.inf, "×"),
    Claim("5–6× faster, 84.64 % kept", "ceiling of Llama-3-8B from its bytes",
          "ceiling_kept_reading", 5, math.inf, "×", "counting"),
    Claim("5–6× faster, 84.64 % removed", "decoding, smallest batch", "decode_removed_reading", 5, math.inf, "×"),
    Claim("5–6× faster, 84.64 % removed, at its size", "decoding one sequence, Llama-3-8B's shape",
          "decode_removed_at_size", 5, math.inf, "×"),
    Claim("5–6× faster, 84.64 % kept, at its size", "decoding one sequence, Llama-3-8B's shape",
          "decode_kept_at_size", 5, math.inf, "×"),
    Claim("84.64 % removed with rates of 15–50 %", "backbone of Llama-3-8B that must go",
          "backbone_to_remove", 15, 50, "%", "counting"),
    Claim("freezing avoids a shape mismatch", "gradients, frozen ÷ unfrozen − 1 (04)",
          "frozen_gradient_difference", 1e-3, math.inf, "", "counting"),
    Claim("pays 110–220 times a month", "saving of a month ÷ investment (section 9)",
          "monthly_return", 110, 220, "×", "nothing"),
)  # fmt: skip


def verdicts(measured: dict[str, float], claims: tuple[Claim, ...] = CLAIMS) -> pd.DataFrame:
    """One row per claim: `claim`, `tested`, `claimed`, `measured`, `verdict`; a value that is missing cannot be
    tested."""
    return pd.DataFrame([_row(claim, measured.get(claim.key)) for claim in claims])


def _row(claim: Claim, value: float | None) -> dict[str, str]:
    return {
        "claim": claim.text,
        "tested": claim.tested,
        "claimed": f"{_range(claim)} {claim.unit}".strip(),
        "measured": "–" if value is None else f"{_number(value)} {claim.unit}".strip(),
        "verdict": _verdict(claim, value),
    }


def _verdict(claim: Claim, value: float | None) -> str:
    if value is None:
        return "not testable on this model"
    if claim.decided_by == "nothing":
        return "not testable here: it takes a served model and its bill"
    if claim.low <= value <= claim.high:
        return "reproduced in form"
    return "refuted" if claim.decided_by == "counting" else "not reproduced here"


def _range(claim: Claim) -> str:
    if claim.high == math.inf:
        return f"at least {_number(claim.low)}"
    if claim.low in (0, -math.inf):
        return f"at most {_number(claim.high)}"
    return f"{_number(claim.low)} to {_number(claim.high)}"


def _number(value: float) -> str:
    return f"{value:.0e}" if 0 < abs(value) < 0.005 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def how_far(models: pd.DataFrame, targets: Sequence[float]) -> pd.DataFrame:
    """The question that the founding document should have asked: how much can go at a given perplexity?

    Args:
        models: one row per model that was measured: `recovery` (how it was trained, or not), `ratio` (perplexity
            relative to dense), `backbone_removed_percent`, `parameters_kept_percent`.
        targets: ratios.

    Returns:
        For each target and recovery the smallest model within the target: its row, and `target`. Nothing where none is.
    """
    rows = []
    for target in targets:
        within = models[models["ratio"] <= target].sort_values("backbone_removed_percent")
        rows += [group.tail(1).assign(target=target) for _, group in within.groupby("recovery", sort=False)]
    columns = ["target", "recovery", "ratio", "backbone_removed_percent", "parameters_kept_percent"]
    return pd.concat(rows, ignore_index=True)[columns] if rows else pd.DataFrame(columns=columns)
