import pandas as pd
import pytest

from gqalib.claims import CLAIMS, Claim, how_far, verdicts

MEASURED = Claim("x: 2 → 4", "ratio", "ratio", 0, 2, "× dense")
COUNTED = Claim("5× faster", "ceiling", "ceiling", 5, float("inf"), "×", "counting")
BILL = Claim("pays", "bill", "bill", 1, 2, "×", "nothing")


@pytest.mark.parametrize(
    ("claim", "value", "verdict", "shown"),
    [
        (MEASURED, 1.5, "reproduced in form", "1.5 × dense"),
        (MEASURED, 2.5, "not reproduced here", "2.5 × dense"),
        (MEASURED, None, "not testable on this model", "–"),
        (COUNTED, 1.2, "refuted", "1.2 ×"),
        (COUNTED, 6.0, "reproduced in form", "6 ×"),
        (BILL, 1.5, "not testable here: it takes a served model and its bill", "1.5 ×"),
    ],
)
def test_verdicts(claim, value, verdict, shown):
    row = verdicts({} if value is None else {claim.key: value}, (claim,)).iloc[0]
    assert (row["verdict"], row["measured"]) == (verdict, shown)


def test_ranges_in_words():
    assert verdicts({}, (MEASURED, COUNTED, BILL))["claimed"].tolist() == [
        "at most 2 × dense",
        "at least 5 ×",
        "1 to 2 ×",
    ]


def test_every_claim_is_another_one():
    assert len({claim.text for claim in CLAIMS}) == len({claim.key for claim in CLAIMS}) == len(CLAIMS)


def test_how_far():
    models = pd.DataFrame(
        [("none", 1.04, 20), ("none", 1.2, 40), ("none", 1.06, 30), ("logits", 1.04, 60), ("logits", 3.0, 90)],
        columns=["recovery", "ratio", "backbone_removed_percent"],
    ).assign(parameters_kept_percent=lambda rows: 100 - rows["backbone_removed_percent"])
    table = how_far(models, [1.01, 1.05, 1.25]).set_index(["target", "recovery"])["backbone_removed_percent"]
    assert table.to_dict() == {(1.05, "none"): 20, (1.05, "logits"): 60, (1.25, "none"): 40, (1.25, "logits"): 60}
    assert how_far(models, [1.0]).empty
