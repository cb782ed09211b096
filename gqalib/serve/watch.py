"""A server watched by its own metrics: sampled into a table, drawn, and held against the rules of `alerts.yaml`."""

import re
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self

import matplotlib.pyplot as plt
import pandas as pd
import yaml
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gqalib.errors import one_sentence
from gqalib.figures import COLORS
from gqalib.run.play import is_live
from gqalib.serve import CONTEXT
from gqalib.serve.server import read_description, read_metrics

RULES = Path(__file__).with_name("alerts.yaml")
RATE = re.compile(r"rate\((\w+)\[(\w+)\]\)")


class Watch:
    """`with Watch(server.url) as watch:` reads the metrics again and again while something else happens.

    An open notebook shows meanwhile what `draw` shows afterwards.

    Args:
        url: of a llama.cpp server, without /v1. every: seconds between two readings.

    Raises:
        InputError: nothing answers there at the beginning.
    """

    def __init__(self, url: str, every: float = 1.0) -> None:
        self.url, self.every, self.context = url, every, CONTEXT
        self._rows: dict[pd.Timestamp, dict[str, float]] = {}
        self._end, self._thread = Event(), Thread(target=self._go_on, daemon=True)

    @property
    def samples(self) -> pd.DataFrame:
        """A row for each reading, by its time: `up` (1, or 0 where nothing answered), and all metrics;
        `attrs["context"]` has the tokens that a request may have."""
        samples = pd.DataFrame.from_dict(self._rows.copy(), orient="index")
        samples.attrs["context"] = self.context
        return samples

    def __enter__(self) -> Self:
        with one_sentence(f"no metrics at {self.url}", "start a server, and give its URL without /v1"):
            self._rows[pd.Timestamp.now()] = {"up": 1.0} | read_metrics(self.url)
            self.context = read_description(self.url).get("n_ctx", CONTEXT)  # older servers do not say
        self._page = display(Figure(), display_id=True) if is_live() else None
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _go_on(self) -> None:
        ended = False
        while not ended:  # the last reading is that of the end
            ended, row = self._end.wait(self.every), {"up": 0.0}
            with suppress(OSError, HTTPException, ValueError):  # as Prometheus has it: then there are no other metrics
                row = {"up": 1.0} | read_metrics(self.url)
            self._rows[pd.Timestamp.now()] = row
            if self._page:
                figure = Figure(figsize=(8, 3), layout="constrained")  # not pyplot's, which is the notebook's
                draw(figure.subplots(1, 2), self.samples)
                self._page.update(figure)


def tokens_per_second(samples: pd.DataFrame) -> pd.Series:
    """Tokens of all answers per second, from one sample to the next.

    They are counted by the requests of each decoding step: `tokens_predicted_total` moves only when an answer is
    complete. A step that reads a prompt of up to 2048 tokens yields an answer's first token; of a longer one, each
    further step counts a token too many. Both factors are printed with six digits: a mean below ten is off by up to
    5e-6, which comes to a token only after some 100,000 steps, and to more later.
    """
    steps = samples["n_decode_total"] * samples["n_busy_slots_per_decode"]
    return steps.diff() / samples.index.to_series().diff().dt.total_seconds()


def draw(axes: Sequence[plt.Axes], samples: pd.DataFrame, color: str = COLORS["recovered"]) -> None:
    """Tokens per second, and requests answered and waiting, in the colour of the model that is served; red while a rule
    fires, which the title names."""
    speed, requests = axes
    seconds = (samples.index - samples.index[0]).total_seconds()
    speed.plot(seconds, tokens_per_second(samples), color=color)
    speed.set(ylabel="tokens per second", xlabel="seconds", ylim=(0, None))
    for name, style, shade in (("processing", "-", color), ("deferred", "--", COLORS["other"])):
        requests.step(seconds, samples[f"requests_{name}"], style, where="post", color=shade, label=name)
    requests.set(ylabel="requests", xlabel="seconds", ylim=(0, None))
    requests.yaxis.set_major_locator(MaxNLocator(integer=True))
    requests.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)  # above: lines go everywhere
    firing, red = alerts(samples), {"color": "red", "alpha": 0.15, "lw": 0}
    for ax in axes:
        ax.fill_between(seconds, 0, firing.any(axis=1), transform=ax.get_xaxis_transform(), **red)
    requests.set_title(", ".join(firing.columns[firing.any()]), loc="left")


# ---------------------------------------------------------------- the rules


def read_rules(context: int = CONTEXT) -> list[dict[str, Any]]:
    """The alerting rules of `RULES`, of all its groups, for a server that is started with `--ctx context`."""
    nearly = (str(9 * tokens // 10) for tokens in (CONTEXT, context))
    text = RULES.read_text(encoding="utf-8").replace(*nearly)
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def alerts(samples: pd.DataFrame) -> pd.DataFrame:
    """Whether each rule of `RULES` (a column) fires at each sample (a row).

    Requests may have as many tokens as the samples' `attrs["context"]` says, or else the default. Of PromQL this knows
    names, `rate`, arithmetic, comparisons, `and` and `or`; a server's samples are one job, so labels are not looked at.
    """
    context = samples.attrs.get("context", CONTEXT)
    return pd.DataFrame({rule["alert"]: _fires(samples, **rule) for rule in read_rules(context)})


def _fires(samples: pd.DataFrame, expr: str, **rule: Any) -> pd.Series:
    """A rule fires when its condition has held at every sample for as long as its `for`."""
    expr = re.sub(r"llamacpp:|\{.*?\}", "", expr)
    rates = {f"{name}_in_{span}": _rate(samples[name], span) for name, span in RATE.findall(expr)}
    holds = samples.assign(**rates).eval(RATE.sub(r"\1_in_\2", expr))
    time = samples.index.to_series()
    since = time.where(holds & ~holds.shift(fill_value=False)).ffill()
    return holds & (time - since >= pd.Timedelta(rule.get("for", "0s")))


def _rate(counter: pd.Series, span: str) -> pd.Series:
    """What a counter gained per second of the last `span`; one that fell has started again at 0."""
    gained, span = counter.diff(), pd.Timedelta(span)
    return gained.mask(gained < 0, counter).rolling(span).sum() / span.total_seconds()
