"""The decision guide on made-up records: what it recommends follows from them alone."""

import builtins
import json

import matplotlib.pyplot as plt
import pytest

from gqalib.measure.frontier import OWN
from gqalib.run.notebook import NOTEBOOKS, Notebook


def row(method, fraction, ratio, seconds, note=""):
    return {"method": method, "fraction": fraction, "ratio": ratio, "seconds": seconds, "note": note, "error": 0.01,
            "peak_mib": 100.0, "backbone_removed_percent": 100 * fraction - 2 * (method == "ShortGPT"),
            "parameters_kept_percent": 100 - 80 * fraction}  # fmt: skip


FRONTIER = [row(OWN, 0.25, 1.10, 20), row("FLAP", 0.25, 1.12, 2), row("ShortGPT", 0.25, 1.05, 0.1)]
FRONTIER += [row(OWN, 0.5, 1.5, 20), row("FLAP", 0.5, 2.5, 2), row("OSSCAR", 0.5, None, None, "cannot")]
NEAR = {"ratio": 1.2, "error": 0.01}
START = {"backbone_removed_percent": 50.0, "times dense": 1.5}
RUN = {"start": "refitted-50", "times dense": 1.2, "± standard error": 0.1, "seconds": 9.0}
RUN |= {"way": "logits", "model": "long-50"}
QUARTER = {"start": "refitted-25", "times dense": 1.3, "model": "distilled-25", "tokens": 500}
RECORDS = {
    "10_frontier": {"frontier": FRONTIER, "other_text": [{"method": OWN, "times": 1.1, "± standard error": 0.01}]},
    "11_search": {
        "plans": [{"plan": "uniform", "times dense": 1.7, "± standard error": 0.02}],
        "how_far": [{"target": target, "backbone_removed_percent": 31.0} for target in (1.01, 1.25, 1.92)],
    },
    "12_distillation": {
        "starts": [START | {"start": "founding-50"}, START | {"start": "refitted-50"},
                   {"start": "refitted-25", "backbone_removed_percent": 25.0, "times dense": 1.4}],
        "tokens": [RUN | {"tokens": 100, "times dense": 1.9}, RUN | {"tokens": 1000}, RUN | QUARTER],
        "other_text": [{"model": model, "window": 2048, "ratio": ratio}
                       for model, ratio in (("refitted-50", 2.0), ("long-50", 1.8), ("distilled-25", 1.6))],
        "stages": [{"stage": "starts", "expected_gb": 9.0}, {"stage": "more tokens", "expected_gb": 2.0}],
        "how_far": [{"target": 1.25, "recovery": way, "backbone_removed_percent": part, **NEAR}
                    for way, part in (("none", 25.0), ("logits of the dense model", 50.0))],
    },
    "14_serving": {"prune_or_quantise": [{"file": "v3 q4_0", "way": "both", "verdict": "no rival", "bytes": 3e6}]},
    "07_cost_analysis": {"speed": [{"model": "v3", "phase": "decode", "speedup": x, "ceiling": 1.5} for x in (1.1, 1.3)]},
}  # fmt: skip


@pytest.mark.parametrize(("after", "said"), [(1.2, "helps"), (1.4, "is not shown to help"), (1.8, "hurts")])
def test_guide(after, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Notebook, "figure", lambda self, fig, *_: plt.close(fig))
    monkeypatch.setattr(Notebook, "upstream", lambda self, name: {"tables": RECORDS[name]})
    monkeypatch.setattr(builtins, "display", lambda *_: None, raising=False)
    monkeypatch.setitem(RECORDS["12_distillation"]["tokens"][1], "times dense", after)
    names = {}
    for cell in json.loads((NOTEBOOKS / "15_decision_guide.ipynb").read_text(encoding="utf-8"))["cells"]:
        exec("".join(cell["source"]) if cell["cell_type"] == "code" else "", names)
        names |= {"run_dir": str(tmp_path)} if "parameters" in cell["metadata"].get("tags", []) else {}
    out = capsys.readouterr().out
    assert f"remove 25 %: {OWN}, 1.10 × dense in 20 s; in a hurry FLAP, 1.12 × in 2.0 s\n" in out
    assert f"remove 50 %: {OWN}, 1.50 × dense in 20 s\n" in out  # nothing else is near
    assert f"train 1,000 tokens (logits) after {OWN} at 50.0 %: {said} (1.50 → {after:.2f} × dense, 9 s)" in out
    assert "training needs 2.00 GB at most" in out
    assert "; in these types, only pruned files weigh 3.0 MB or less\n" in out
    assert "decode of v3: 1.10 to 1.30 times as fast as dense, where its size allows 1.50 to 1.50 (07)" in out
    assert names["nb"].metrics["removed_at_1.25"]["value"] == 50
    learned = "25 % (untrained: 1.10 ± 0.01); 50 % (logits of the dense model: 1.20 ± 0.01)"
    assert f"1.25 × dense: this much of the backbone can go: {learned}\n" in out
    assert "at most 1.92 × dense: this much of the backbone can go: 50 % (untrained: 1.50 ± 0.01); " in out  # 10's
    assert "at most 1.01 × dense: this much of the backbone can go: no measured model\n" in out
    assert "rates by another plan, × dense: uniform 1.70 ± 0.02\n" in out and f"to be worse for it: {OWN}\n" in out
    another = "on the second text the trained sizes stand in another order, the best first: 25 %, 50 %\n"
    assert (another in out) == (after < QUARTER["times dense"])  # there the quarter is ahead
