"""Drawings: what they show is what they were given."""

import math

import matplotlib.pyplot as plt

from gqalib import figures


def test_dots_of_perplexities_have_two_errors_and_say_what_is_no_number():
    fig, ax = plt.subplots()
    figures.perplexity_dots(ax, ["v3", "v2", "broken", "huge"], [20.0, 1000.0, math.nan, math.inf], 15.0, [1, 0, 0, 0])
    assert [text.get_text() for text in ax.texts] == ["20.0", "1,000.0", "does not run", "beyond any number"]
    (reach,) = [bar.get_segments() for bar in ax.collections]
    assert [x for x, _ in reach[0]] == [18, 22]
    assert ax.get_xlim()[0] < 15 and ax.get_xlim()[1] > 1000 and ax.get_xscale() == "log"
    plt.close(fig)
