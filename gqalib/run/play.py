"""A drawing that follows widgets, for a reader who has a notebook open."""

import os
from collections.abc import Callable

from IPython import get_ipython
from IPython.display import display

from gqalib.run.notebook import HELD


def play(draw: Callable[..., None], **controls) -> None:
    """Show some ipywidgets in a row and, below, what `draw` draws for their values, again at every change.

    A page that the runner or a test executes gets a line of text instead: a stored widget would not answer.

    Args:
        draw: is called with the value of each control under its name, and ends with `plt.show()`.
    """
    if not is_live():
        print("The controls appear here when you run this page in Jupyter; the drawing follows them.")
        return
    from ipywidgets import HBox, Layout, VBox, interactive_output

    row = HBox(list(controls.values()), layout=Layout(flex_flow="row wrap"))
    display(VBox([row, interactive_output(draw, controls)]))


def is_live() -> bool:
    """Whether a kernel runs this that neither the runner (`HELD`) nor nbval (`GQALIB_PRESET`) has started."""
    started = os.environ.get(HELD) or os.environ.get("GQALIB_PRESET")
    return hasattr(get_ipython(), "kernel") and not started
