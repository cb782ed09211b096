"""A saved folder in vLLM, in an environment of vLLM's own: the plugin, and a check of the numbers that it serves.

    python -m gqalib.serve.vllm FOLDER [--dtype bfloat16] [options of vLLM's server]

starts the server on the folder, asks it for the log-probabilities of a text's tokens, and compares them with
transformers'. Of gqalib it needs the model's own file only: vLLM pins other versions of torch and transformers.
"""

import argparse
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from statistics import fmean
from urllib.request import Request

from gqalib.errors import InputError, one_sentence
from gqalib.model.names import check_model
from gqalib.serve import HOST, OPENER, cause, session

TOKENS = 128  # of the text, or as many as the model takes
TOLERANCE = 1e-4  # nats, of the mean difference in float32; rounding to dtype comes on top
# in vLLM's log; the second is pydantic's
ERROR = re.compile(r"^(?:\(.+?\) )?(?:ERROR .+?\] |\s*)(\w+Error: .+|Value error, .+)")
PR_SET_PDEATHSIG = 1  # of Linux: the signal that follows the end of the parent
START, PATIENCE = 600, 30  # seconds that the server may take to come up, and for an answer


def register() -> None:
    """What vLLM calls in each of its processes: it then knows the class, and runs no code out of the folder."""
    from vllm import ModelRegistry

    from gqalib.model.modeling_gqa_llama import GqaLlamaForCausalLM  # registers itself with transformers

    backend = "vllm.model_executor.models.transformers:TransformersForCausalLM"
    ModelRegistry.register_model(GqaLlamaForCausalLM.__name__, backend)


@contextmanager
def server(folder: str, dtype: str, options: list[str]) -> Iterator[str]:
    """The URL of vLLM's OpenAI-compatible server, on a free port here, in processes that end with the block.

    Raises:
        InputError: it does not come up, or gives no answer in the block; with the first error that it logged.
    """
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", dtype]
    command += ["--enforce-eager", *options, "--host", HOST, "--port", str(port)]
    environment = {"TORCHDYNAMO_DISABLE": "1"} | os.environ  # compiling what reads log-probabilities takes minutes
    with session(command, env=environment, preexec_fn=_end_with_parent) as (process, log):
        try:
            _wait(process, url := f"http://{HOST}:{port}")
            yield url
        except (OSError, HTTPException) as error:  # no answer, or one that says no
            why = f"vLLM does not serve {folder} ({cause(log, ERROR) or 'it said nothing'})"
            raise InputError(f"{why}: see the limits in README, Serve with vLLM") from error


def _end_with_parent() -> None:
    """vLLM, which runs on Linux alone, is told to end when this process is gone, however it went."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + START
    while process.poll() is None and time.monotonic() < deadline:
        try:
            return OPENER.open(f"{url}/health", timeout=PATIENCE).close()
        except OSError:
            time.sleep(1)
    raise TimeoutError


def served(url: str, model: str, tokens: list[int]) -> list[float]:
    """Log-probability of each token but the first, in nats, as the server at `url` says it.

    Raises:
        InputError: it says something else.
    """
    body = {"model": model, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with OPENER.open(request, timeout=START) as answer:
        said = answer.read()
    with one_sentence(f"{url} does not say log-probabilities of the prompt", "take the vLLM that README names"):
        found = json.loads(said)["choices"][0]["prompt_logprobs"]
        return [found[i][str(tokens[i])]["logprob"] for i in range(1, len(tokens))]


def expected(folder: str, dtype: str) -> tuple[list[int], list[float], float]:
    """The tokens of a text, the log-probability of each but the first by transformers in float32, in nats, and how far
    transformers in `dtype` is from it on average."""
    from transformers import AutoConfig, AutoTokenizer

    from gqalib.model import modeling_gqa_llama  # noqa: F401  (registers itself with transformers)

    length = min(TOKENS, AutoConfig.from_pretrained(folder).max_position_embeddings - 1)  # the server adds a token
    tokens = AutoTokenizer.from_pretrained(folder)(json.__doc__)["input_ids"][:length]
    exact = by_transformers(folder, tokens, "float32")
    rounding = 0 if dtype == "float32" else fmean(_apart(by_transformers(folder, tokens, dtype), exact))
    return tokens, exact, rounding


def by_transformers(folder: str, tokens: list[int], dtype: str) -> list[float]:
    """Log-probability of each token but the first, in nats; the weights and all products in `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        said = model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
    return said.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def compare(theirs: list[float], exact: list[float], rounding: float) -> tuple[bool, str]:
    """Whether the server is as near to transformers as rounding allows, and a line with the differences in nats."""
    apart = _apart(theirs, exact)
    equal = fmean(apart) < TOLERANCE + 2 * rounding
    found = f"at most {max(apart):.1e} nats from transformers in float32, {fmean(apart):.1e} on average"
    verdict = "equal" if equal else "NOT EQUAL"
    return equal, f"{len(apart)} tokens: {found}, where rounding makes {rounding:.1e}: {verdict}"


def _apart(these: list[float], those: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(these, those, strict=True)]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 equal, 1 not, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m gqalib.serve.vllm", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a saved model, pruned or not; other options are vLLM's")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    asked, options = parser.parse_known_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without the server's end
    try:
        folder = check_model(asked.folder)
        if not Path(folder, "config.json").is_file():
            raise InputError(f"{folder} is no folder of a model: save it to one first, vLLM is checked on that")
        tokens, exact, rounding = expected(folder, asked.dtype)
        with server(folder, asked.dtype, options) as url:
            equal, line = compare(served(url, folder, tokens), exact, rounding)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(line)
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
