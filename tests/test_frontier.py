"""Every method through one door: budgets, copies, what cannot be done, and the tables."""

import json
import math
from contextlib import nullcontext

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import small_model
from matplotlib.text import Text

from gqalib import InputError, figures
from gqalib.measure import frontier
from gqalib.measure.perplexity import window_losses
from gqalib.model import shapes


@pytest.fixture
def text():
    return torch.randint(1, 61, (8, 32), generator=torch.Generator().manual_seed(2))


def rows_of(method, fraction, ratios, **more):
    """Made-up results, one row per sample; four windows, each as bad as the others."""
    return [
        {
            "method": method, "fraction": fraction, "sample": sample, "note": "", "ratio": ratio,
            "losses": [math.log(ratio)] * 4,
            "backbone_removed_percent": 100 * fraction, **more,
        }
        for sample, ratio in enumerate(ratios)
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(frontier.METHODS))
def test_every_method_meets_its_budget_and_leaves_the_dense_model(name, text, windows, logits_of):
    dense = small_model()
    before, weights = logits_of(dense), [p.clone() for p in dense.parameters()]
    fraction = 1 / 3 if name in frontier.DEPTH else 0.25  # one of three layers
    row = frontier.try_method(name, dense, text, fraction, windows, window_losses(dense, windows))
    assert row["note"] == "" and row["method"] == name and row["fraction"] == fraction
    channel = 100 * 3 * 32 / shapes.count_parameters(dense)["backbone"]
    assert row["backbone_removed_percent"] == pytest.approx(100 * fraction, abs=channel)
    assert row["ratio"] == pytest.approx(row["perplexity"] / window_losses(dense, windows).mean().exp().item())
    assert row["error"] > 0 and row["seconds"] > 0 and row["peak_mib"] >= 0 and len(row["losses"]) == len(windows)
    assert torch.equal(logits_of(dense), before) and all(map(torch.equal, dense.parameters(), weights))
    assert all(p.grad is None and p.requires_grad for p in dense.parameters())


def test_what_cannot_be_done_is_a_row_with_the_sentence(text, windows):
    rows = frontier.frontier(small_model(), [text], windows, [0.98], ["ShortGPT", "random"])
    assert rows["ratio"].isna().all() and rows["perplexity"].isna().all()
    assert rows["note"].str.contains("lower the fraction").all()
    assert frontier.as_table(rows).to_numpy().tolist() == [["–"], ["–"]]


def test_a_method_off_the_budget_is_found_out(text, windows, monkeypatch):
    monkeypatch.setitem(
        frontier.METHODS, "lazy", lambda model, windows, fraction: frontier.controls.random(model, windows, 0.1)
    )
    row = frontier.frontier(small_model(), [text], windows, [0.4], ["lazy"]).iloc[0]
    assert "where 40.00% was asked" in row["note"] and math.isnan(row["ratio"])
    dense = small_model()
    with pytest.raises(InputError, match="lower the fraction"):
        frontier.check_budget(dense, dense, 0.1)


@pytest.mark.parametrize("name", list(frontier.PREPARATIONS))
def test_a_preparation_changes_the_seconds_only(name, text, windows, logits_of):
    dense, fraction = small_model(), 1 / 3 if name in frontier.DEPTH else 0.25
    prepared, reference = frontier.prepare(name, dense, text), window_losses(dense, windows)
    alone = frontier.try_method(name, dense, text, fraction, windows, reference)
    row = frontier.try_method(name, dense, text, fraction, windows, reference, prepared)
    assert row["losses"] == alone["losses"] and row["seconds"] > prepared.used.seconds > 0
    assert frontier.prepare("random", dense, text) is None


@pytest.mark.filterwarnings("ignore")
def test_widths_are_multiples(text, windows, monkeypatch):
    """Of the own methods and of the peers alike, on 24 channels, which are none."""
    monkeypatch.setattr(frontier, "describe", lambda model, *_: {"widths": shapes.layer_shapes(model).iloc[:, 2]})
    monkeypatch.setattr(frontier, "measured", lambda *places: nullcontext(frontier.Used()))
    names = [name for name in frontier.METHODS if name not in frontier.NO_MULTIPLE]
    rows = frontier.frontier(small_model(), [text], windows, [0.25], names, multiple=5)
    assert len(names) == 13 and (rows["note"] == "").all()
    assert all(width in (5, 10, 15, 20) for widths in rows["widths"] for width in widths)


def test_rows_of_all_samples(text, windows):
    rows = frontier.frontier(
        small_model(), [text, text + 0, text.flip(0)], windows, [0.2, 0.4], ["magnitude", "Wanda-sp"]
    )
    assert rows.groupby(["method", "fraction"])["sample"].apply(list).tolist() == [[0, 1, 2]] * 4
    same = rows[rows["method"] == "magnitude"].groupby("fraction")["ratio"].nunique()
    assert (same == 1).all()  # it reads no text


def test_table_from_a_record():
    rows = (
        rows_of("a", 0.5, [1.5])
        + rows_of("a", 0.25, [1.25])
        + rows_of("b", 0.25, [math.inf])
        + rows_of("b", 0.5, [12.34])
    )
    rows += rows_of("c", 0.5, [1234.5], backbone_removed_percent=40.0)
    rows += [{"method": "c", "fraction": 0.25, "sample": 0, "note": "no", "ratio": math.nan, "losses": None}]
    recorded = pd.DataFrame(json.loads(pd.DataFrame(rows).drop(columns="losses").to_json(orient="records")))
    table = frontier.as_table(recorded)
    assert list(table.columns) == ["25 %", "50 %"] and list(table.index) == ["a", "b", "c"]
    assert table.to_numpy().tolist() == [["1.25", "1.50"], ["∞", "12.3"], ["–", "1,234 at 40 %"]]


def test_table_of_several_samples():
    table = frontier.as_table(pd.DataFrame(rows_of("a", 0.5, [1.5, 1.7, 1.6]) + rows_of("b", 0.5, [2.0, 2.0, 2.0])))
    assert table["50 %"].tolist() == ["1.60 (1.50–1.70)", "2.00"]


def test_the_best_peer_is_one_that_removed_enough():
    rows = (
        rows_of("own", 0.5, [1.2]) + rows_of("p", 0.5, [1.5]) + rows_of("q", 0.5, [1.1], backbone_removed_percent=40.0)
    )
    rows += rows_of("own", 0.7, [2.0]) + rows_of("p", 0.7, [1.6]) + rows_of("q", 0.7, [4.0])
    rows += rows_of("p", 0.9, [5.0])
    result = frontier.against_peers(pd.DataFrame(rows), "own", ["p", "q"]).set_index("fraction")
    assert result["verdict"].tolist() == ["ahead", "behind", "no comparison"]
    assert result["peer"].tolist() == ["p", "p", "p"]
    assert result["times"][0.5] == pytest.approx(0.8) and result["best"][0.7] == pytest.approx(1.6)


def test_a_peer_that_broke_in_one_sample_of_a_record_is_not_the_best():
    """A record has null for an infinite ratio; and only samples that both methods have are paired."""
    rows = rows_of("own", 0.5, [1.2, 1.2, 2.4]) + rows_of("p", 0.5, [1.5, 1.5])
    rows += rows_of("q", 0.5, [1.1, 1.1, math.inf])
    rows[-1]["ratio"] = None
    result = frontier.against_peers(pd.DataFrame(rows), "own", ["p", "q"]).iloc[0]
    assert result["peer"] == "p" and result["times"] == pytest.approx(0.8)


def test_both_ratios_are_of_the_samples_that_are_compared():
    """A second sample that only the own method has read, with a bad result, makes no line contradict itself."""
    rows = rows_of("own", 0.5, [2.0, 2.9]) + rows_of("p", 0.5, [2.3])
    result = frontier.against_peers(pd.DataFrame(rows), "own", ["p"]).iloc[0]
    assert result["own"] / result["best"] == pytest.approx(result["times"]) and result["own"] == pytest.approx(2)


def test_not_told_apart():
    own, peer = rows_of("own", 0.5, [1.0]), rows_of("p", 0.5, [1.0])
    own[0]["losses"], peer[0]["losses"] = [1.0, 2.0, 3.0, 4.0], [1.2, 1.9, 3.1, 3.9]
    assert frontier.against_peers(pd.DataFrame(own + peer), "own", ["p"])["verdict"].item() == "not told apart"


def test_names_at_the_edge_do_not_cover_each_other():
    ax = plt.subplots()[1]
    ax.set(xlim=(0, 1), ylim=(1, 100), yscale="log")
    ends = {"good": (1.0, 2.0), "as good": (1.0, 2.1), "bad": (0.5, 90.0)}
    figures.names_at_the_edge(ax, ends, dict.fromkeys(ends, "black"))
    ax.figure.canvas.draw()
    boxes = {text.get_text(): Text.get_window_extent(text) for text in ax.texts}  # without the thin line
    assert boxes["good"].y1 <= boxes["as good"].y0 < boxes["as good"].y1 <= boxes["bad"].y0
    assert all(box.x0 >= ax.bbox.x1 for box in boxes.values())
    plt.close("all")
