"""vLLM without vLLM: the plugin that it would load, and the check against a server that stands in for its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import is_running, small_model

from gqalib.model import surgery
from gqalib.model.load import load_model, save_model
from gqalib.serve import vllm

REPOSITORY = Path(__file__).parents[1]
LIGHT = {"errors", "model", "model.modeling_gqa_llama", "model.names", "serve", "serve.vllm"}
SERVER = """
import argparse, json, os
from http.server import BaseHTTPRequestHandler, HTTPServer

parser = argparse.ArgumentParser()
for name in ("model", "dtype", "host", "port"):
    parser.add_argument("--" + name, required=True)
parser.add_argument("--enforce-eager", action="store_true", required=True)
parser.add_argument("--fail")
parser.add_argument("--refuse")
parser.add_argument("--reply")
options = parser.parse_args()
warning = "WARNING 11-27 01:08:08 [a.py:255] this can cause errors like `OSError: [Errno 24]`"
print("(APIServer pid=1)", warning, flush=True)
open(os.environ["PID"], "w").write(str(os.getpid()))
if options.fail:
    raise ValueError(options.fail)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == options.model
        if options.refuse:
            print("(Worker pid=2) ERROR 11-27 01:08:08 [b.py:1] RuntimeError:", options.refuse, flush=True)
            return self.send_error(500)
        if options.reply:
            return self.wfile.write(options.reply.encode())
        said = json.loads(os.environ["SAID"])
        found = [None, *({str(t): {"logprob": p}} for t, p in zip(asked["prompt"][1:], said, strict=True))]
        self.answer({"choices": [{"prompt_logprobs": found}]})

    def answer(self, data):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())


HTTPServer((options.host, int(options.port)), Handler).serve_forever()
"""


@pytest.fixture
def folder(tokenizer, tmp_path):
    model = small_model()
    surgery.keep_groups(model, 0, [1])
    save_model(model, tokenizer, tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package `vllm` whose server says what the variable SAID holds; gives the file with its process id."""
    place = tmp_path / "packages" / "vllm" / "entrypoints" / "openai"
    place.mkdir(parents=True)
    (place / "api_server.py").write_text(SERVER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "packages"), str(REPOSITORY)]))
    monkeypatch.setenv("PID", str(tmp_path / "pid"))
    return tmp_path / "pid"


def ended(pid: Path) -> bool:
    return not is_running(int(pid.read_text()))


def test_the_plugin_registers_and_stays_light():
    """Found as vLLM finds it, before torch; then with the model's own file, and nothing else of the library."""
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        (plugin,) = tomllib.load(file)["project"]["entry-points"]["vllm.general_plugins"].items()
    script = f"""
import sys, types
from importlib.metadata import EntryPoint
register = EntryPoint(*{plugin!r}, "vllm.general_plugins").load()
assert "torch" not in sys.modules
known = {{}}
sys.modules["vllm"] = types.SimpleNamespace(ModelRegistry=types.SimpleNamespace(register_model=known.__setitem__))
register(), register()
assert known == {{"GqaLlamaForCausalLM": "vllm.model_executor.models.transformers:TransformersForCausalLM"}}
from transformers import CONFIG_MAPPING
assert CONFIG_MAPPING["gqa_llama"].__name__ == "GqaLlamaConfig"
print(*(name.partition(".")[2] for name in sys.modules if name.startswith("gqalib.")))"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == LIGHT


@pytest.mark.parametrize(("off", "status", "verdict"), [(0, 0, "equal"), (1e-3, 1, "NOT EQUAL")])
def test_what_the_server_says_is_compared(off, status, verdict, folder, stand_in, monkeypatch, capsys):
    tokens, exact, rounding = vllm.expected(folder, "float32")
    assert len(tokens) == 63 and rounding == 0  # the model takes 64, and one is added
    monkeypatch.setenv("SAID", json.dumps([value + off for value in exact]))
    assert vllm.main([folder]) == status
    distance = f"at most {off:.1e} nats from transformers in float32, {off:.1e} on average"
    assert capsys.readouterr().out == f"62 tokens: {distance}, where rounding makes 0.0e+00: {verdict}\n"
    assert ended(stand_in)


def test_rounding_is_allowed_for(folder):
    tokens, exact, rounding = vllm.expected(folder, "bfloat16")
    assert 1e-3 < rounding < 1
    assert vllm.compare(vllm.by_transformers(folder, tokens, "bfloat16"), exact, rounding)[0]
    assert not vllm.compare([value + 3 * rounding for value in exact], exact, rounding)[0]


def test_log_probabilities_are_those_of_the_next_tokens(folder):
    tokens, exact, _ = vllm.expected(folder, "float32")
    said = load_model(folder, device="cpu")(torch.tensor([tokens])).logits[0].detach().log_softmax(-1)
    assert exact == pytest.approx([float(said[i, tokens[i + 1]]) for i in range(62)], abs=1e-5)


@pytest.mark.parametrize(("option", "kind"), [("--fail", "ValueError"), ("--refuse", "RuntimeError")])
def test_a_server_that_does_not_come_up_or_answer(option, kind, folder, stand_in, capsys):
    """It is ended, and the error that it logged is said; not what a warning mentions."""
    assert vllm.main([folder, option, "no such thing"]) == 2
    said = capsys.readouterr().err
    assert (
        said
        == f"error: vLLM does not serve {folder} ({kind}: no such thing): see the limits in README, Serve with vLLM\n"
    )
    assert ended(stand_in)


@pytest.mark.parametrize(
    ("reply", "says"),
    [("what?\r\n", "vLLM does not serve .*: see"), ("HTTP/1.0 200 OK\r\n\r\n{}", "does not say .*'choices'.: take")],
    ids=["no HTTP", "no log-probabilities"],
)
def test_a_server_that_says_something_else(reply, says, folder, stand_in, capsys):
    assert vllm.main([folder, "--reply", reply]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(says, said) and ended(stand_in)


def test_a_check_that_is_ended_ends_the_server(folder, stand_in, monkeypatch):
    monkeypatch.setattr(vllm, "served", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        vllm.main([folder])
    signal.signal(signal.SIGTERM, before)
    assert ended(stand_in)


def test_a_check_that_is_killed_ends_the_server(folder, stand_in):
    script = "from gqalib.serve import vllm; vllm.served = lambda *_: print(1, flush=True) or input(); "
    script += f"vllm.main([{folder!r}])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as check:
        assert check.stdout.readline() and not ended(stand_in)
        check.kill()
    deadline = time.monotonic() + 10
    while not ended(stand_in) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended(stand_in)


def test_what_is_no_folder_of_a_model(capsys, tmp_path):
    assert vllm.main(["nowhere"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert vllm.main(["shape:tiny"]) == 2
    assert "shape:tiny is no folder of a model" in capsys.readouterr().err
