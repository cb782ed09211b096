"""Two servers side by side: how fast they answer the same prompts, in turn and in random order, and how often two
models are right about the same questions. Any OpenAI-compatible server will do.

    rows = await in_pairs({"dense": url, "pruned": other}, prompts, num_new_tokens=32)
    paired(rows, "first_ms", "prompt", ["dense", "pruned"])
"""

import asyncio
import json
import math
import random
import re
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest, norm, t, ttest_rel
from torch import nn
from transformers import PreTrainedTokenizerBase

from gqalib.errors import InputError, one_sentence
from gqalib.run.notebook import machine
from gqalib.run.resume import NOT_KEPT, Progress
from gqalib.serve import cause, session
from gqalib.serve.server import Server, num_threads
from gqalib.stream import batches

CODE = "from gqalib.serve import compare"  # what speeds that are kept depend on
PACKAGES = ("xllamacpp", "openai")  # of servers and their clients; files are written without them
BACKGROUND = "A language model is"  # of a request that only the speed is wanted of
ALL_WORK = {"ignore_eos": True, "cache_prompt": False}  # llama.cpp: no answer ends early, no prompt is remembered
GUIDELLM = {  # what it calls our numbers
    "tokens_per_s": ("output_tokens_per_second", "mean"), "first_ms": ("time_to_first_token_ms", "median"),
    "token_ms": ("inter_token_latency_ms", "median"),
}  # fmt: skip
ERROR = re.compile(r"^([\w.]*Error: .+)")  # in what it says
LONGEST = 120  # seconds of a load by guidellm, which then ends by itself, whoever is still there
Urls = dict[str, str]  # of servers, without /v1, by name


def client_of(url: str):
    """The official asynchronous client of a server; a request that fails is not made again, which would be timed. Each
    has a connection of its own: one that has been idle may be closed by the server just when it is used again."""
    from openai import AsyncOpenAI

    alone = {"Connection": "close"}
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, default_headers=alone)


# ---------------------------------------------------------------- what is asked


async def answer(client, prompt: str, num_new_tokens: int) -> dict[str, Any]:
    """One greedy answer of exactly so many tokens, as it streams in: `first_ms`, the time to the first token;
    `token_ms`, the time of each later one; `tokens`; `text`.

    Raises:
        InputError: the server does not answer, or not with two tokens at least.
    """
    first, text, tokens = None, "", 0
    how = {"max_tokens": num_new_tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    with one_sentence(f"{client.base_url} does not answer", "start a server there, or give a shorter prompt"):
        start = time.perf_counter()
        async for part in await client.completions.create(model="any", prompt=prompt, extra_body=ALL_WORK, **how):
            first = first or time.perf_counter()
            text += part.choices[0].text if part.choices else ""
            tokens = part.usage.completion_tokens if part.usage else tokens
        end = time.perf_counter()
    if tokens < 2:
        raise InputError(f"{client.base_url} gave {tokens} tokens, too few to time: ask for more, or a shorter prompt")
    later = 1e3 * (end - first) / (tokens - 1)
    return {"first_ms": 1e3 * (first - start), "token_ms": later, "tokens": tokens, "text": text}


async def in_pairs(urls: Urls, prompts: Sequence[str], num_new_tokens: int, seed: int = 0) -> pd.DataFrame:
    """Each prompt is answered by every server, one after the other, prompts and servers in an order that `seed` draws.

    Returns:
        A row for each answer, in the order of asking: `prompt` (its index), `server`, and what `answer` gives.
    """
    draw, rows = random.Random(seed), []
    async with AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(client_of(url)) for name, url in urls.items()}
        for client in clients.values():
            await answer(client, BACKGROUND, 2)  # the first one of a server is slower
        for index in draw.sample(range(len(prompts)), len(prompts)):
            for name in draw.sample(list(clients), len(clients)):
                row = await answer(clients[name], prompts[index], num_new_tokens)
                rows.append({"prompt": index, "server": name} | row)
    return pd.DataFrame(rows)


async def under_load(
    urls: Urls, prompts: Sequence[str], num_new_tokens: int, at_once: Sequence[int] = (1, 2, 4), rounds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """All prompts to one server, so many of them at a time; in each round every server has its turn, in random order.

    Returns:
        A row for each turn: `at_once`, `round`, `server`, `tokens_per_s` of all its answers together.
    """
    draw, rows = random.Random(seed), []
    for number in range(rounds):
        for size in draw.sample(list(at_once), len(at_once)):
            for name in draw.sample(list(urls), len(urls)):
                speed = await _throughput(urls[name], prompts, num_new_tokens, size)
                rows.append({"at_once": size, "round": number, "server": name, "tokens_per_s": speed})
    return pd.DataFrame(rows)


async def _throughput(url: str, prompts: Sequence[str], num_new_tokens: int, at_once: int) -> float:
    gate = asyncio.Semaphore(at_once)

    async def one(client, prompt: str) -> int:
        async with gate:
            return (await answer(client, prompt, num_new_tokens))["tokens"]

    async with client_of(url) as client:
        start = time.perf_counter()
        asked = [asyncio.create_task(one(client, prompt)) for prompt in prompts]
        try:
            return sum(await asyncio.gather(*asked)) / (time.perf_counter() - start)
        finally:
            for each in asked:
                each.cancel()  # where one has failed; a TaskGroup would do so and raise a group of errors


def guidellm(
    program: str, url: str, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], num_new_tokens: int,
    at_once: int,
) -> dict[str, float]:  # fmt: skip
    """What guidellm finds, which lives in an environment of its own, when it asks for the same answers, so many at a
    time: `tokens_per_s` of all of them together, and medians over them, `first_ms` and `token_ms`.

    Raises:
        InputError: it ends without a result, or not at all.
    """
    asked = [{"prompt": prompt, "output_tokens_count": num_new_tokens} for prompt in prompts]
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        data, out = Path(folder) / "prompts.jsonl", Path(folder) / "found.json"
        data.write_text("".join(json.dumps(line) + "\n" for line in asked), encoding="utf-8")
        options = _guidellm_options(url, Path(folder), data, out, len(asked), at_once)
        unended = one_sentence(f"{program} does not come to an end", "see whether the server answers")
        with unended, session([program, "run", *options]) as (process, log):
            process.wait(2 * LONGEST)
            said = cause(log, ERROR)
        if not out.exists():
            raise InputError(f"{program} ended without a result: {said or 'nothing said'}")
        found = json.loads(out.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    return {name: found[of]["successful"][which] for name, (of, which) in GUIDELLM.items()}


def _guidellm_options(url: str, tokenizer: Path, data: Path, out: Path, num_requests: int, at_once: int) -> list[str]:
    body = ALL_WORK | {"temperature": 0}
    backend = {"kind": "openai_http", "target": url, "request_format": "/v1/completions", "extras": {"body": body}}
    return [
        "--disable-console", "--backend", json.dumps(backend), "--profile", f"kind=concurrent,streams={at_once}",
        "--constraint", f"kind=max_duration,seconds={LONGEST}", "--constraint",
        f"kind=max_requests,count={num_requests}", "--data", f"kind=json_file,path={data}", "--tokenizer",
        f"kind=huggingface_auto,model={tokenizer}", "--output", f"kind=json,path={out}",
    ]  # fmt: skip


def decode_speed(file: Path, num_new_tokens: int = 32) -> float:
    """Tokens per second that llama.cpp writes with a .gguf file, one sequence at a time, by its own clock."""
    from openai import OpenAI

    how = {"model": "any", "prompt": BACKGROUND, "temperature": 0, "extra_body": ALL_WORK}
    with Server(file) as server, OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        ask = client.completions.create
        ask(max_tokens=2, **how)  # the first one of a server is slower
        return ask(max_tokens=num_new_tokens, **how).timings["predicted_per_second"]


def decode_speeds(
    files: Sequence[Path], num_new_tokens: int = 32, rounds: int = 4, seed: int = 0, progress: Progress = NOT_KEPT
) -> pd.DataFrame:
    """`decode_speed` of many files; in each round every file has its turn, in random order, so that what else the
    machine does falls on all of them alike.

    Args:
        files: told apart by the names of their folders, as those of `quantised.rows_of` are. progress: keeps each turn,
            for this machine with as many notebooks at a time, the server's threads and its version.

    Returns:
        A row for each file: `tokens/s`, the median over the rounds; the `slowest` and the `fastest` turn.
    """
    draw, speeds = random.Random(seed), [[] for _ in files]
    measured_on = [machine("cpu"), num_threads(), version("xllamacpp")]
    for number in range(rounds):
        for index in draw.sample(range(len(files)), len(files)):
            kept = progress.of(files[index].parent.name, num_new_tokens, number, seed, measured_on)
            speeds[index].append(kept.once("speed", partial(decode_speed, files[index], num_new_tokens)))
    return pd.DataFrame([{"tokens/s": median(own), "slowest": min(own), "fastest": max(own)} for own in speeds])


# ---------------------------------------------------------------- what it shows


def paired(rows: pd.DataFrame, what: str, by: str, names: Sequence[str]) -> dict[str, Any]:
    """The second of two servers beside the first over the same pairs, with 95 % intervals of Student's t.

    Args:
        rows: of `in_pairs` or `under_load`. what: the column that is compared. by: the column whose equal values make a
            pair. names: the two servers.

    Returns:
        `pairs`; `first` and `second`, the means; `difference`, with `low` and `high`; `ratio`, the geometric mean of
        the pairs' ratios, with `ratio_low` and `ratio_high`.

    Raises:
        InputError: there are fewer than two pairs.
    """
    wide = rows.pivot(index=by, columns="server", values=what)[list(names)].dropna()
    if len(wide) < 2:
        raise InputError(f"{len(wide)} pairs of answers show nothing: give at least two prompts")
    first, second = wide.to_numpy().T
    (difference, *ends), ratio = _mean(second, first), np.exp(_mean(np.log(second), np.log(first)))
    found = {"pairs": len(wide), "first": first.mean(), "second": second.mean()}
    found |= {"difference": difference, "low": ends[0], "high": ends[1]}
    return found | dict(zip(("ratio", "ratio_low", "ratio_high"), ratio.tolist(), strict=True))


def _mean(second: np.ndarray, first: np.ndarray) -> tuple[float, float, float]:
    """Mean paired difference and the ends of its interval."""
    interval = ttest_rel(second, first).confidence_interval()
    return float((second - first).mean()), float(interval.low), float(interval.high)


def share(rows: pd.DataFrame, what: str, by: str, names: Sequence[str]) -> dict[str, float]:
    """How much of the change from the first of three servers to the last one the middle one has made already, on a log
    scale: the mean of log(middle / first) over that of log(last / first), over the pairs of `paired`.

    Returns:
        `share`, with `low` and `high`, the ends of its 95 % interval by the delta method and Student's t. It says
        nothing where first and last are not told apart.
    """
    first, middle, last = np.log(rows.pivot(index=by, columns="server", values=what)[list(names)].dropna()).to_numpy().T
    part, whole = middle - first, last - first
    found = part.mean() / whole.mean()
    error = (part - found * whole).std(ddof=1) / math.sqrt(len(whole)) / abs(whole.mean())
    reach = t.ppf(0.975, len(whole) - 1) * error
    return {"share": float(found), "low": float(found - reach), "high": float(found + reach)}


def mcnemar(first: Sequence[int], second: Sequence[int]) -> dict[str, Any]:
    """The exact test of McNemar (1947) on answers to the same questions, 1 for a right one: p is that of `only_second`
    heads in as many throws of a fair coin as there are questions on which one is right and the other wrong.

    The 95 % interval is Bonett and Price's (2012) adjusted Wald, which Fagerland, Lydersen and Laake (2014) recommend:
    with one more example on either side d ± 1.96 √((p₁ + p₂ − d²) / (n + 2)), d = p₂ − p₁.

    Returns:
        `examples`, `both`, `only_first`, `only_second`, `neither`, `difference` (second less first, in percentage
        points of all examples) with `low` and `high`, `p`.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    lost, won = int((first & ~second).sum()), int((~first & second).sum())
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    counts = {"examples": len(first), "both": both, "only_first": lost, "only_second": won, "neither": neither}
    p = binomtest(won, won + lost).pvalue if won + lost else 1.0
    low, high = _bonett_price(lost, won, len(first))
    return counts | {"difference": 100 * (won - lost) / len(first), "low": low, "high": high, "p": float(p)}


def _bonett_price(lost: int, won: int, count: int) -> tuple[float, float]:
    """The ends of the interval, in percentage points."""
    difference, discordant = (won - lost) / (count + 2), (won + lost + 2) / (count + 2)
    reach = norm.ppf(0.975) * math.sqrt((discordant - difference**2) / (count + 2))
    return max(-100.0, 100 * (difference - reach)), min(100.0, 100 * (difference + reach))


def compared_answers(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """`mcnemar` of two models for each task and for `all` examples together; rows of `tasks.score_tasks`. Of a written
    answer that is partly right, the exact match counts."""
    both = first.merge(second, on=["task", "example"], suffixes=("_first", "_second"), validate="one_to_one")
    for who in ("first", "second") if "exact_first" in both else ():
        both[f"right_{who}"] = both[f"exact_{who}"].fillna(both[f"right_{who}"])
    groups = [*both.groupby("task", sort=False), ("all", both)]
    return pd.DataFrame([{"task": name} | mcnemar(rows["right_first"], rows["right_second"]) for name, rows in groups])


@torch.no_grad()
def last_token_right(model: nn.Module, windows: torch.Tensor) -> list[int]:
    """For each window [count, length]: 1 if its last token is the most likely one after the others, else 0."""
    right = []
    for rows in batches(windows):
        ids = windows[rows].to(model.device)
        logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=1).logits[:, -1]
        right += (logits.argmax(-1) == ids[:, -1]).int().tolist()
    return right
