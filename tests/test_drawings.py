"""The drawings of the first notebooks: the pairing map and its legend, dots with errors, and widgets that follow."""

import math
from types import SimpleNamespace

import ipywidgets
import matplotlib.pyplot as plt
import pytest

from gqalib import figures
from gqalib.peers import v2
from gqalib.run import play


@pytest.fixture
def ax():
    yield plt.subplots()[1]
    plt.close("all")


def test_a_pairing_map_can_always_have_its_whole_legend(ax):
    figures.draw_pairing(ax, v2.pairing(range(4), range(2), 2), 4, 2)
    assert len(ax.get_legend_handles_labels()[1]) == 4 and not ax.patches


def test_a_removed_kv_head_is_a_grey_row(ax):
    figures.draw_pairing(ax, v2.pairing([2, 3, 4, 5], [1, 2], 2), 6, 3)
    assert [patch.get_y() for patch in ax.patches] == [-0.5]


@pytest.mark.parametrize(("kv_heads", "label"), [(4, "K3\nV3"), (2, "K1 V1"), (1, "K0 V0")])
def test_names_of_kv_heads_fit_their_boxes(ax, kv_heads, label):
    figures.draw_gqa_layout(ax, 4, kv_heads)
    assert ax.texts[-1].get_text() == label and len(ax.texts) == 4 + kv_heads


def test_dots_of_perplexities_have_two_errors_and_say_what_is_no_number():
    fig, ax = plt.subplots()
    figures.perplexity_dots(ax, ["v3", "v2", "broken", "huge"], [20.0, 1000.0, math.nan, math.inf], 15.0, [1, 0, 0, 0])
    assert [text.get_text() for text in ax.texts] == ["20.0", "1,000", "does not run", "beyond any number"]
    (reach,) = [bar.get_segments() for bar in ax.collections]
    assert [x for x, _ in reach[0]] == [18, 22]
    assert ax.get_xlim()[0] < 15 and ax.get_xlim()[1] > 1000 and ax.get_xscale() == "log"
    plt.close(fig)


def test_dots_of_one_window_have_no_errors():
    fig, ax = plt.subplots()
    figures.perplexity_dots(ax, ["dense", "v3"], [10.0, 20.0], 10.0, [math.nan, math.nan])
    assert len(ax.texts) == 2 and not ax.collections and 20 < ax.get_xlim()[1] < 100
    plt.close(fig)


def test_numbers_of_a_wide_axis_do_not_collide():
    fig, ax = plt.subplots()
    figures.perplexity_dots(ax, ["v3", "v2"], [100.0, 3.9e6], 44.6, [0, 0])
    fig.canvas.draw()
    low, high = ax.get_xlim()
    numbers, between = ([x for x in ax.get_xticks(minor=minor) if low <= x <= high] for minor in (False, True))
    assert numbers == [100, 10_000, 1_000_000] and between == [1000, 100_000, 10_000_000]
    plt.close(fig)


def test_marks_fill_an_axis_that_was_stretched_later(ax):
    ax.axhline(0)
    ax.plot([0, 1, 2], [-0.2, 3, 1100], "o")
    figures.stretch_around_zero(ax.yaxis, linear_up_to=1)
    low, high = ax.get_ylim()
    assert -1 < low < -0.2 and 1100 < high < 3000


def test_a_widget_is_for_a_reader_alone(monkeypatch, capsys):
    shown, drawn, tick = [], [], ipywidgets.Checkbox(False)
    monkeypatch.setattr(play, "display", shown.append)
    monkeypatch.delenv("GQALIB_PRESET", raising=False)
    play.play(lambda **values: drawn.append(values), KV0=tick)
    assert not shown and "Jupyter" in capsys.readouterr().out  # no kernel
    monkeypatch.setattr(play, "get_ipython", lambda: SimpleNamespace(kernel=True))
    monkeypatch.setenv(play.HELD, "somewhere")
    play.play(lambda **values: drawn.append(values), KV0=tick)
    assert not shown  # the runner's
    monkeypatch.delenv(play.HELD)
    play.play(lambda **values: drawn.append(values), KV0=tick)
    tick.value = True
    assert len(shown) == 1 and drawn == [{"KV0": False}, {"KV0": True}]
