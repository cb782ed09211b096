"""What people prefer: two anonymous answers side by side, a vote, a log of votes, and what a log can tell.

The log is JSONL, a line for each vote: `time`, `prompt`, `left` and `right` (which model stood where), `vote` (left,
right or tie), and `answers`, which tells the two texts from others (older lines have none).
"""

import hashlib
import html
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
from scipy.stats import binom, binomtest, norm

from gqalib.errors import InputError

VOTES = ("left", "tie", "right")
FIELDS = ("time", "prompt", "left", "right", "vote")
Vote = dict[str, str]


# ---------------------------------------------------------------- the log


def append(log: Path, vote: Vote) -> None:
    """One more line in a log, on the disk when this returns; what a crash has left of a line goes first, and a vote
    whose line has lost its end gets one."""
    with log.open("a+b") as file:
        file.seek(0)
        last = file.read().rpartition(b"\n")[2]
        file.write(b"\n") if _parsed(last) else file.truncate(file.tell() - len(last))
        file.write(json.dumps(vote, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_votes(log: Path) -> list[Vote]:
    """The votes of a log, none where there is no log yet; half a vote at its end is left out.

    Raises:
        InputError: another line is no vote.
    """
    lines = log.read_bytes().split(b"\n") if log.exists() else [b""]
    votes = []
    for number, line in enumerate(lines if _parsed(lines[-1]) else lines[:-1], 1):
        if not (vote := _parsed(line)):
            raise InputError(f"line {number} of {log} is no vote: correct it, or remove it")
        if vote["vote"] not in VOTES:
            raise InputError(f"line {number} of {log} votes {vote['vote']!r}: it can be {', '.join(VOTES)}")
        votes.append(vote)
    return votes


def _parsed(line: bytes) -> Vote | None:
    with suppress(ValueError, TypeError, KeyError):
        said = json.loads(line)
        vote = {name: said[name] for name in FIELDS}
        return vote | ({"answers": said["answers"]} if "answers" in said else {})
    return None


def short_hash(answers: Mapping[str, Sequence[str]], index: int) -> str:
    """What tells the models' answers to the prompt at `index` from others."""
    texts = {name: own[index] for name, own in answers.items()}
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:12]


def current(votes: Sequence[Vote], prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> list[Vote]:
    """The votes on these very answers, as a `Ballot` takes them; not those on what a model said before it was made
    anew, nor those whose line does not tell."""
    shown = [(prompt, short_hash(answers, index)) for index, prompt in enumerate(prompts)]
    return [vote for vote in votes if (vote["prompt"], vote.get("answers")) in shown]


# ---------------------------------------------------------------- the vote


class Ballot:
    """A widget that shows two answers to each prompt, asks which is better, and only then says whose they were.

    Args:
        answers: of exactly two models, to each prompt. log: where votes go. seed: of the sides; None draws anew.
    """

    def __init__(
        self, prompts: Sequence[str], answers: Mapping[str, Sequence[str]], log: Path, seed: int | None = None
    ) -> None:  # fmt: skip
        self.prompts, self.answers, self.log, self.position = list(prompts), answers, log, 0
        draw = random.Random(seed)
        self.sides = [draw.sample(list(answers), 2) for _ in self.prompts]  # left and right, for each prompt
        self.page, self.said = ipywidgets.HTML(), ipywidgets.HTML()
        self.buttons = [ipywidgets.Button(description=name) for name in VOTES]
        for button in self.buttons:
            button.on_click(lambda pressed: self.vote(pressed.description))
        self.widget = ipywidgets.VBox([self.page, ipywidgets.HBox(self.buttons), self.said])
        self._show()

    def vote(self, which: str) -> None:
        """Log a vote on what is shown, say who wrote what, and show the next pair."""
        left, right = self.sides[self.position]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        vote = {"time": now, "prompt": self.prompts[self.position], "left": left, "right": right, "vote": which}
        append(self.log, vote | {"answers": short_hash(self.answers, self.position)})
        self.position += 1
        self.said.value = f"{which}: left was {html.escape(left)}, right was {html.escape(right)}"
        self._show()

    def _show(self) -> None:
        done = self.position == len(self.prompts)
        for button in self.buttons:
            button.disabled = done
        self.page.value = "no more answers to compare" if done else self.pair(self.position)

    def pair(self, index: int) -> str:
        """The two answers to a prompt as an HTML table, without names; what a model wrote is shown, never run."""
        prompt, texts = self.prompts[index], [self.answers[name][index] for name in self.sides[index]]
        style = "width:50%;text-align:left;vertical-align:top;white-space:pre-wrap"
        said = "".join(f"<td style='{style}'>{html.escape(text)}</td>" for text in texts)
        heads = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("left", "right"))
        return f"<p><b>{html.escape(prompt)}</b></p><table><tr>{heads}</tr><tr>{said}</tr></table>"


# ---------------------------------------------------------------- what votes tell


def preference(votes: Sequence[Vote], first: str, second: str) -> dict[str, Any]:
    """How often `second` was preferred to `first`, among votes between these two; ties say nothing of the direction.
    Interval and p take votes for independent: one to a prompt, of those that are `current`.

    Returns:
        `votes`, `ties`, `for_first`, `for_second`, `share` (for second, of those that decided), its 95 % interval `low`
        and `high` (Wilson 1927), and `p` (exact binomial test of 1/2); the last four are NaN where nobody decided.
    """
    between = [vote for vote in votes if {vote["left"], vote["right"]} == {first, second}]
    chosen = [vote[vote["vote"]] for vote in between if vote["vote"] != "tie"]
    won, decided = chosen.count(second), len(chosen)
    counts = {"votes": len(between), "ties": len(between) - decided, "for_first": decided - won, "for_second": won}
    if not decided:
        return counts | dict.fromkeys(("share", "low", "high", "p"), math.nan)
    test = binomtest(won, decided)
    ends = test.proportion_ci(method="wilson")
    return counts | {"share": won / decided, "low": float(ends.low), "high": float(ends.high), "p": float(test.pvalue)}


def power(share: float, votes: int | np.ndarray, alpha: float = 0.05) -> float | np.ndarray:
    """How likely the exact two-sided test of so many deciding votes is to tell a true `share` from 1/2."""
    least = binom.ppf(alpha / 2, votes, 0.5) - 1  # the test rejects up to here: P(X <= least) < alpha / 2
    least += binom.cdf(least + 1, votes, 0.5) <= alpha / 2
    return binom.cdf(least, votes, share) + binom.sf(votes - least - 1, votes, share)


def votes_needed(share: float, wanted: float = 0.8, alpha: float = 0.05) -> float:
    """The least number of deciding votes, each on a prompt of its own, whose exact test has the power `wanted` against
    a true `share`; infinite for 1/2. It is looked for around the normal approximation: (z_(1-α/2) / 2 + z_wanted
    √(share (1 − share)))² / (share − 1/2)².

    Raises:
        InputError: share or wanted is no probability, or wanted is 1.
    """
    if not (0 <= share <= 1 and 0 < wanted < 1):
        raise InputError(f"share = {share} with power {wanted} cannot be: give probabilities, a power below 1")
    if share == 0.5:
        return math.inf
    spread = norm.ppf(1 - alpha / 2) / 2 + norm.ppf(wanted) * math.sqrt(share * (1 - share))
    about = (spread / (share - 0.5)) ** 2
    tried = np.arange(max(1, int(about / 2)), int(1.5 * about) + 20)
    return int(tried[power(share, tried, alpha) >= wanted][0])


def simulated(
    prompts: Sequence[str], first: str, second: str, share: float, ties: float, count: int, seed: int = 0
) -> list[Vote]:
    """Made-up votes, drawn with a stated preference: `second` wins a deciding vote with probability `share`. They show
    what the analysis does, and are evidence of nothing."""
    draw, votes = random.Random(seed), []
    for index in range(count):
        left, right = draw.sample([first, second], 2)
        winner = second if draw.random() < share else first
        vote = "tie" if draw.random() < ties else "left" if winner == left else "right"
        prompt = prompts[index % len(prompts)]
        votes.append({"time": "simulated", "prompt": prompt, "left": left, "right": right, "vote": vote})
    return votes
