"""A .gguf file behind an OpenAI-compatible server on this machine: llama.cpp's own, by xllamacpp.

It runs in a process of its own, so that a notebook's interrupt or crash does not touch it, and ends when the standard
input that we hold open for it closes: when `with` closes it, or when this process is gone, however it went.
"""

import json
import os
import re
import select
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

from gqalib.errors import InputError, one_sentence
from gqalib.serve import HOST, OPENER, cause, check_serve, session

GREETING = """\
{name}: {n_params:,} parameters, {size:,} bytes, mostly {ftype}; {parallel} requests at a time, of {n_ctx:,} tokens each
{url} is a page to chat on, {url}/v1 for OpenAI clients, {url}/metrics for Prometheus; Ctrl-C ends it

curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 40}}'

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="none")
client.chat.completions.create(model="{name}", messages=[{{"role": "user", "content": "Hello"}}])"""
ERROR = re.compile(r" E .*?: (.*)")  # in llama.cpp's log
START, PATIENCE = 600, 10  # seconds that the server may take to load the model, and for a request of ours


class Server:
    """`with Server("model.gguf") as server:` serves the file at `server.url` (OpenAI clients add `/v1`) until the end.

    Args:
        port: where it listens; 0 takes a free one.
        context: tokens of a request with its answer; by default 2048, or fewer if the model was trained for fewer.
        parallel: requests that are answered at a time, each with a KV cache of its own; others wait.

    Raises:
        InputError: as `check_serve`; or the server does not come up, with its first error.
    """

    def __init__(self, file: str | Path, port: int = 0, context: int | None = None, parallel: int = 1) -> None:
        self.file, context = check_serve(file, port, context, parallel)
        self.options = {
            "model": str(self.file), "port": port, "context": context * parallel, "parallel": parallel,
            "threads": num_threads(),
        }  # fmt: skip
        self.url, self._process = "", None

    def __enter__(self) -> Self:
        for name in ("NO_PROXY", "no_proxy"):  # a proxy does not reach this machine: for all clients of this process
            os.environ[name] = ",".join(dict.fromkeys(filter(None, [*os.environ.get(name, "").split(","), HOST])))
        command = [sys.executable, "-m", __name__, json.dumps(self.options)]
        with ExitStack() as stack:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._process, self._log = stack.enter_context(session(command, **pipes))  # interrupts are ours
            stack.enter_context(self._process.stdout), stack.enter_context(self._process.stdin)
            self._wait_until_it_answers()
            self._end = stack.pop_all()
        return self

    def _wait_until_it_answers(self) -> None:
        if not select.select([self._process.stdout], [], [], START)[0]:
            raise InputError(f"{self.file} is not loaded after {START} seconds: see what else this machine is doing, "
                             "and try again")  # fmt: skip
        self.url = self._process.stdout.readline().strip()  # when the model is loaded, or the process has ended
        if not self.url:
            why = cause(self._log, ERROR) or f"it ended with status {self._process.wait()} and said nothing"
            raise InputError(f"{self.file} is not served ({why}): give a file that `python -m gqalib export` wrote, or "
                             "less --ctx or --parallel")  # fmt: skip
        with one_sentence(f"{self.url} does not answer", "see what else this machine is doing, and try again"):
            _get(f"{self.url}/health")

    def __exit__(self, *_: object) -> None:
        """End the process; requests under way are dropped."""
        self._end.close()

    def wait(self) -> str:
        """How the server has ended, when it has by itself: its exit status, and the last line of its log."""
        return f"status {self._process.wait()}, last said: {cause(self._log) or 'nothing'}"  # errors are requests'

    def metrics(self) -> dict[str, float]:
        """The server's Prometheus metrics by their names, as of now."""
        return read_metrics(self.url)

    def describe(self) -> dict[str, Any]:
        """`read_description` of this server."""
        return read_description(self.url)

    def greeting(self) -> str:
        """What is served, where, and how to call it."""
        return GREETING.format(name=self.file.name, url=self.url, **self.options | self.describe())


def num_threads() -> int:
    """How many threads a server has that this process starts."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int((os.environ.get("OMP_NUM_THREADS") or str(allowed)).split(",")[0])  # OpenMP's may be of nested regions


def read_metrics(url: str) -> dict[str, float]:
    """The Prometheus metrics of the llama.cpp server at a URL, by their names without `llamacpp:`.

    `prompt_tokens_seconds` and `predicted_tokens_seconds` are averages since they were last read, by anybody.
    """
    lines = [line for line in _get(f"{url}/metrics").splitlines() if not line.startswith("#")]  # the parser renames
    families = text_string_to_metric_families("\n".join(lines) + "\n")  # counters whose names do not end in _total
    return {sample.name.removeprefix("llamacpp:"): sample.value for family in families for sample in family.samples}


def read_description(url: str) -> dict[str, Any]:
    """What the llama.cpp server at a URL says of its model: n_params, size (bytes), ftype, n_ctx (of a request),
    n_ctx_train, …"""
    return json.loads(_get(f"{url}/v1/models"))["data"][0]["meta"]


def _get(url: str) -> str:
    with OPENER.open(url, timeout=PATIENCE) as answer:
        return answer.read().decode()


# ---------------------------------------------------------------- in the server's process


def _serve(model: str, port: int, context: int, parallel: int, threads: int) -> None:
    """Load the model, print the address, and stay until standard input closes; light: no torch."""
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path, params.model_alias = model, {Path(model).name}
    params.hostnames, params.port = [HOST], port
    params.n_ctx, params.n_parallel = context, parallel  # the context is shared out among the requests
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds more
    params.cache_ram_mib = 0  # prompts of the past are kept with their requests' caches, not beside them
    params.endpoint_metrics, params.cors_origins = True, HOST  # other web pages may not read its answers
    params.verbosity = 1  # errors
    server = llama.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # its own end would wait for the requests under way


if __name__ == "__main__":
    _serve(**json.loads(sys.argv[1]))
