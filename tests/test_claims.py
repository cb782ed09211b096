import pandas as pd
import pytest

from gqalib.claims import CLAIMS, KINDS, Claim, Measured, how_far, paragraph, said_of, stands_on, verdicts
from gqalib.run.checks import NOTEBOOKS, reads

WHERE = ("02_second", "x"), "A note."
RATIO = Claim("x: 2 → 4", "ratio", "ratio", 0, 2, "× dense", *WHERE)
COUNTED = Claim("5× faster", "ceiling", "ceiling", 5, float("inf"), "×", *WHERE, decided_by="counting")
SPEED = Claim("5× faster", "decoding", "decode", 5, float("inf"), "×", *WHERE, no_effect=1)
BILL = Claim("pays", "bill", "bill", 1, 2, "×", *WHERE, decided_by="nothing", no_effect=0)


@pytest.mark.parametrize(
    ("claim", "found", "verdict", "shown"),
    [
        (RATIO, (1.5,), "reproduced in form", "1.5 × dense"),
        (RATIO, (2.5,), "not reproduced here", "2.5 × dense"),
        (RATIO, None, "not testable on this model", "–"),
        (RATIO, (1.9, 1.7, 2.1), "not decided: the range reaches beyond what is claimed", "1.9 (1.7 to 2.1) × dense"),
        (COUNTED, (1.2,), "refuted", "1.2 ×"),
        (COUNTED, (6.0,), "reproduced in form", "6 ×"),
        (SPEED, (2.4, 2.3, 2.5), "not reproduced here", "2.4 (2.3 to 2.5) ×"),
        (SPEED, (6.0, 1.0, 7.0), "not shown: the range reaches 1, which is no effect", "6 (1 to 7) ×"),
        (SPEED, (1.01, 0.98, 1.03), "not reproduced here", "1.01 (0.98 to 1.03) ×"),
        (SPEED, (5.5, 5.0, 6.0), "reproduced in form", "5.5 (5 to 6) ×"),
        (SPEED, (0.8, 0.7, 0.9), "not reproduced here", "0.8 (0.7 to 0.9) ×"),
        (BILL, (1.5,), "not testable here: it takes a served model and its bill", "1.5 ×"),
        (BILL, (977.0, -3.0, 2000.0), "not shown: the range reaches 0, which is no effect", "977 (-3 to 2,000) ×"),
    ],
)
def test_verdicts(claim, found, verdict, shown):
    row = verdicts({claim.key: Measured(*found)} if found else {}, (claim,)).iloc[0]
    assert (row["verdict"], row["measured"]) == (verdict, shown)
    assert any(verdict.startswith(kind) for kind in KINDS)


def test_ranges_in_words():
    exactly = Claim("fails", "fails", "fails", 1, 1, "", *WHERE)
    claimed = verdicts({}, (RATIO, COUNTED, BILL, exactly))["claimed"].tolist()
    assert claimed == ["at most 2 × dense", "at least 5 ×", "1 to 2 ×", "1"]


def test_every_claim_is_another_one():
    assert len({claim.text for claim in CLAIMS}) == len({claim.key for claim in CLAIMS}) == len(CLAIMS)
    assert {claim.topic for claim in CLAIMS} == {"quality", "speed", "freezing", "money"}


@pytest.mark.parametrize("claim", CLAIMS, ids=[claim.key for claim in CLAIMS])
def test_every_claim_stands_on_a_cell_below_a_heading(claim):
    name, code = claim.source
    assert code in (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8").replace('\\"', '"')
    assert stands_on(claim, NOTEBOOKS).startswith(f"[{name[:2]}, section ")
    assert name in reads(NOTEBOOKS / "08_claims.ipynb")


def test_where_a_claim_stands(tmp_path):
    cells = [("markdown", "# 02 · T"), ("code", "y"), ("markdown", "## 3. Is *it* so?\n\nYes."), ("code", "x = 1")]
    cells = [{"cell_type": kind, "source": source.splitlines(keepends=True)} for kind, source in cells]
    (tmp_path / "02_second.ipynb").write_text(pd.Series({"cells": cells}).to_json())
    assert stands_on(RATIO, tmp_path) == "[02, section 3](02_second.ipynb#3.-Is-it-so%3F)"
    other = Claim(*("x",) * 3, 0, 1, "", ("02_second", "gone"), "")
    assert stands_on(other, tmp_path) == "[02](02_second.ipynb#02-%C2%B7-T)"


def test_a_paragraph_follows_its_row():
    rows = verdicts({"ratio": Measured(2.5)}, (RATIO,)).to_dict("records")
    assert paragraph(RATIO, rows[0], "[02](x)") == (
        "**x: 2 → 4: not reproduced here.** We tested: ratio. The claim asks for at most 2 × dense; "
        "we measured 2.5 × dense ([02](x)). A note."
    )
    assert "; nothing was measured. A note." in paragraph(RATIO, verdicts({}, (RATIO,)).to_dict("records")[0])


def test_how_far():
    models = pd.DataFrame(
        [("none", 1.04, 20), ("none", 1.2, 40), ("none", 1.06, 30)]
        + [("logits", 1.04, 60), ("logits", 1.05, 60), ("logits", 3.0, 90)],
        columns=["recovery", "ratio", "backbone_removed_percent"],
    ).assign(parameters_kept_percent=lambda rows: 100 - rows["backbone_removed_percent"], error=0.02)
    found = how_far(models, [1.01, 1.05, 1.25])
    table = found.set_index(["target", "recovery"])["backbone_removed_percent"]
    assert table.to_dict() == {(1.05, "none"): 20, (1.05, "logits"): 60, (1.25, "none"): 40, (1.25, "logits"): 60}
    said = [said_of(row) for row in found.itertuples()]
    assert said[0] == "20 % (untrained: 1.04 ± 0.02, not shown to be within)"
    assert said[-1] == "60 % (logits: 1.04 ± 0.02)"
    assert how_far(models, [1.0]).empty
