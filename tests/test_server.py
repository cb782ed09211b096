"""A served model, asked by the official client: its answers, its metrics, its end; and what is refused before."""

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from conftest import is_gone, is_running, small_model
from gguf import GGUFReader
from matplotlib.figure import Figure
from openai import OpenAI
from test_export import MODELS, SHAPE, byte_tokenizer, piece_tokenizer, uneven

from gqalib import serve
from gqalib.errors import InputError
from gqalib.model import deci
from gqalib.model.load import load_model, load_tokenizer, save_model
from gqalib.run.cli import main
from gqalib.serve import CONTEXT, export, vocabulary, watch
from gqalib.serve.server import Server, num_threads

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
TEXT = "the 123rd of the 12 and the other"
READABLE = {"grammar": "root ::= [ -~]+"}  # a random model chooses bytes that are no characters
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True} | READABLE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "pruned"
    model = uneven(small_model(**SHAPE | {"max_position_embeddings": 256}))
    save_model(model, byte_tokenizer(chat_template=TEMPLATE), folder)
    return folder


@pytest.fixture(scope="module")
def file(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "read_corpus", lambda *_: iter([TEXT]))
        export.export(str(folder), folder.parent / "a.gguf", "f16")
    return folder.parent / "a.gguf"


@pytest.fixture(scope="module")
def server(file):
    with Server(file, parallel=2, context=256) as server:
        yield server


@pytest.fixture
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# ---------------------------------------------------------------- answers


def assert_says_the_same(client, folder, atol, model=None):
    """The log-probabilities of all 300 tokens, after prompts of several lengths, are transformers'."""
    model, tokenizer = model or load_model(str(folder), device="cpu"), load_tokenizer(str(folder))
    for length in (1, 4, 33):
        prompt = TEXT[:length]
        with torch.no_grad():
            ours = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].log_softmax(-1)
        answer = client.completions.create(model="any", prompt=prompt, max_tokens=1, logprobs=300, extra_body=READABLE)
        theirs = {each["id"]: each["logprob"] for each in answer.choices[0].logprobs.content[0]["top_logprobs"]}
        assert theirs.keys() == set(range(300)) and ours.max() - ours.min() > 2
        torch.testing.assert_close(torch.tensor([theirs[i] for i in range(300)]), ours, atol=atol, rtol=0)


def test_log_probabilities_are_those_of_transformers(folder, client):
    """Weights and products are in f16 there."""
    assert_says_the_same(client, folder, atol=0.005)


@pytest.mark.parametrize("kind", ["q8_0", "q5_0", "q4_0"])
def test_small_types_are_read_as_llama_cpp_reads_them(kind, folder, tmp_path, monkeypatch):
    """It rounds activations to 8 bits, too: 0.03 nats at most here, in each type. From the model before it was stored,
    q8_0 is 0.04 to 0.06 away, which says little; q5_0 0.19 to 0.28; q4_0 0.39 to 0.52."""
    monkeypatch.setattr(vocabulary, "read_corpus", lambda *_: iter([TEXT]))
    export.export(str(folder), tmp_path / "a.gguf", kind)
    with Server(tmp_path / "a.gguf") as server, OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert_says_the_same(client, folder, 0.06, deci.read_model(tmp_path / "a.gguf"))
        if kind != "q8_0":
            with pytest.raises(AssertionError, match="not close"):
                assert_says_the_same(client, folder, 0.06)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_runs_there(name, tmp_path, monkeypatch):
    """Uneven layers, untied embeddings, biases, layers without attention, Llama 3's rope; f32 but for the cache."""
    monkeypatch.setattr(vocabulary, "read_corpus", lambda *_: iter([TEXT]))
    save_model(MODELS[name](), byte_tokenizer(), tmp_path / "model")
    export.export(str(tmp_path / "model"), tmp_path / "a.gguf", "f32")
    with Server(tmp_path / "a.gguf") as server, OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert_says_the_same(client, tmp_path / "model", atol=0.002)


@pytest.mark.parametrize("kind", [*deci.PRE_TOKENIZERS, "pieces"])
def test_tokens_are_those_of_transformers(kind, tmp_path, monkeypatch):
    tokenizer = piece_tokenizer() if kind == "pieces" else byte_tokenizer(kind)
    monkeypatch.setattr(vocabulary, "read_corpus", lambda *_: iter([TEXT]))
    save_model(small_model(**SHAPE), tokenizer, tmp_path / "model")
    export.export(str(tmp_path / "model"), tmp_path / "a.gguf")
    with Server(tmp_path / "a.gguf") as server:
        for text in (vocabulary.SELDOM, TEXT, f" the{tokenizer.eos_token}the  12", ""):
            asked = {"content": text, "add_special": True, "parse_special": True}
            assert httpx.post(f"{server.url}/tokenize", json=asked).json()["tokens"] == tokenizer(text)["input_ids"]


def test_a_completion_and_a_streamed_chat(server, client):
    """The stream's parts are together what comes at once; the metrics count each token."""
    before = server.metrics()
    answer = client.completions.create(model="any", prompt=TEXT, max_tokens=12, **GREEDY)
    messages = [{"role": "user", "content": "the 12"}]
    whole = client.chat.completions.create(model="any", messages=messages, max_tokens=12, **GREEDY)
    stream = client.chat.completions.create(model="any", messages=messages, max_tokens=12, stream=True, **GREEDY)
    parts = [part.choices[0].delta.content for part in stream]
    assert len(answer.choices[0].text) == 12 and answer.model == "a.gguf"
    assert len(parts) > 12 and "".join(filter(None, parts)) == whole.choices[0].message.content
    gained = {name: value - before[name] for name, value in server.metrics().items()}
    assert gained["tokens_predicted_total"] == 3 * 12
    read = answer.usage.prompt_tokens + 2 * whole.usage.prompt_tokens
    assert gained["prompt_tokens_total"] + gained["prompt_tokens_cached_total"] == read


def test_what_is_served(server, file):
    """As many parameters as the file has, the embeddings once; and a call that works as it stands."""
    count = sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    greeting = server.greeting()
    assert f"a.gguf: {count:,} parameters" in greeting and "2 requests at a time, of 256 tokens each" in greeting
    shown = {}
    exec("answer = ".join(re.split("(?=client.chat)", greeting[greeting.index("from openai") :])), shown)  # noqa: S102
    assert len(shown["answer"].choices) == 1


# ---------------------------------------------------------------- its end


@pytest.fixture
def command(file):
    """`python -m gqalib serve`, its process, URL and server's process."""
    line = [sys.executable, "-m", "gqalib", "serve", "--model", str(file), "--port", "0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        said = [process.stdout.readline() for _ in range(2)]
        yield process, said[1].split()[0], psutil.Process(process.pid).children()[0].pid
        process.kill()


@pytest.mark.parametrize(("how", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, -9)])
def test_no_process_is_left(how, status, command):
    """Whatever ends the command, also in the middle of an answer."""
    process, url, server = command
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="any", prompt="the", max_tokens=200, stream=True, **GREEDY)
        next(iter(stream))
        process.send_signal(how)
        assert process.wait(10) == status and is_gone(server)


def test_a_server_that_ends_by_itself(command):
    process, _, server = command
    os.kill(server, signal.SIGKILL)
    assert process.wait(10) == 2


def test_how_a_server_has_ended_by_itself(file):
    """Not that of a request which it refused before."""
    with Server(file) as server:
        server._log.write(b"0.00.130.274 E srv    send_error: task id = 0, error: too long\nout of memory\n")
        os.kill(server._process.pid, signal.SIGKILL)
        assert server.wait() == "status -9, last said: out of memory"


@pytest.mark.parametrize(
    ("does", "says"), [("exit 7", "it ended with status 7 and said nothing"), ("exec sleep 60", "not loaded after 3 s")]
)
def test_a_server_that_says_nothing(does, says, file, tmp_path, monkeypatch):
    """Killed for memory, say: then its exit status is all that is known."""
    (tmp_path / "python").write_text(f"#!/bin/sh\n{does}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("gqalib.serve.server.sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr("gqalib.serve.server.START", 3)
    with pytest.raises(InputError, match=says), Server(file):
        pass


def test_an_interrupt_while_the_model_is_loaded(file, monkeypatch, capsys):
    """Says nothing of notebooks."""
    monkeypatch.setattr(Server, "_wait_until_it_answers", lambda *_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("gqalib.run.cli.signal.signal", lambda *_: None)
    assert main(["serve", "--model", str(file), "--port", "0"]) == 0
    assert capsys.readouterr().err == ""


def test_with_ends_the_server(file):
    with pytest.raises(ZeroDivisionError), Server(file) as server:
        assert is_running(server._process.pid) and os.getsid(server._process.pid) != os.getsid(
            0
        )  # an interrupt is not its
        _ = 1 / 0
    assert not is_running(server._process.pid)


# ---------------------------------------------------------------- refusals


def refused(says, *arguments, capsys):
    assert main(["serve", "--model", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and re.search(says, said), said


def test_bad_input(folder, file, tmp_path, capsys):
    refused(
        f"is a folder: run `python -m gqalib export --model {folder} --out pruned.gguf` first", folder, capsys=capsys
    )
    refused("nowhere.gguf does not exist", tmp_path / "nowhere.gguf", capsys=capsys)
    refused("test_server.py is no .gguf file", __file__, capsys=capsys)
    (tmp_path / "text.gguf").write_text("GGUF or not")
    refused("text.gguf holds no language model", tmp_path / "text.gguf", capsys=capsys)
    refused("was trained for up to 256 tokens", file, "--ctx", 257, capsys=capsys)
    refused("--ctx 0 cannot be", file, "--ctx", 0, capsys=capsys)
    refused("--parallel 0 cannot be", file, "--parallel", 0, capsys=capsys)
    refused("--port 65536 cannot be", file, "--port", 65536, capsys=capsys)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(f"--port {port} cannot be had .Address already in use", file, "--port", port, capsys=capsys)


def test_refusals_import_nothing_heavy():
    code = "import sys; from gqalib.run.cli import main; main(['serve', '--model', 'no.gguf']);"
    code += "print({'torch', 'transformers', 'xllamacpp', 'pandas', 'gguf'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_without_xllamacpp(file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    refused("serve needs xllamacpp, which is not installed", file, capsys=capsys)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.replace(b"deci", b"dexi"), "unknown model architecture: 'dexi'"),
        (lambda data: data.replace(b"blk.1.attn_q.w", b"blk.1.attn_x.w"), "tensor 'blk.1.attn_q.weight' not found"),
        (lambda data: data[: len(data) // 2], "data is not within the file bounds, model is corrupted or incomplete"),
    ],
    ids=["architecture", "tensor", "half"],
)
def test_files_that_do_not_come_up(change, says, file, tmp_path):
    (tmp_path / "b.gguf").write_bytes(change(file.read_bytes()))
    server = Server(tmp_path / "b.gguf")
    with pytest.raises(InputError, match=f"b.gguf is not served .error loading model: .*{says}.: give") as raised:
        server.__enter__()
    assert "\n" not in str(raised.value) and not is_running(server._process.pid)


# ---------------------------------------------------------------- watching


def test_watch(server, client):
    """The samples are the server's metrics; tokens are counted while an answer is on its way."""
    with watch.Watch(server.url, every=0.01) as seen:
        for _ in range(3):
            client.completions.create(model="any", prompt="the", max_tokens=240, **GREEDY)
    samples = seen.samples
    tokens = samples["tokens_predicted_total"].iloc[-1] - samples["tokens_predicted_total"].iloc[0]
    seconds = samples.index.to_series().diff().dt.total_seconds()
    assert tokens == 720 == pytest.approx((watch.tokens_per_second(samples) * seconds).sum(), rel=1e-3)
    assert len(samples) > 3 and samples["requests_processing"].max() == 1 and (samples["up"] == 1).all()
    axes = Figure().subplots(1, 2)
    watch.draw(axes, samples)
    assert axes[0].lines[0].get_ydata()[-1] == watch.tokens_per_second(samples).iloc[-1]
    assert watch.alerts(samples)["ContextNearlyFull"].iloc[-1]  # of the 256 that are served


def test_half_a_page_of_metrics_is_no_reading(server, monkeypatch):
    """Nor the end of the watch."""
    with watch.Watch(server.url, every=0.01) as seen:
        monkeypatch.setattr("gqalib.serve.server._get", lambda _: "llamacpp:n_decode_total 12\nllamacpp:n_tok")
        while len(seen.samples) < 4:
            seen._thread.join(0.05)
            assert seen._thread.is_alive()
    assert (seen.samples["up"].iloc[-2:] == 0).all()


def test_an_open_notebook_sees_it_live(server, monkeypatch):
    shown = []
    monkeypatch.setattr(watch, "is_live", lambda: True)
    monkeypatch.setattr(watch, "display", lambda *_, **__: SimpleNamespace(update=shown.append))
    with watch.Watch(server.url, every=60) as seen:
        assert shown == []
    assert len(shown[0].axes[0].lines[0].get_ydata()) == len(seen.samples) == 2


def test_more_requests_than_slots_wait(server, client):
    ask = functools.partial(client.completions.create, model="any", prompt="the", max_tokens=200, **GREEDY)
    with ThreadPoolExecutor(5) as pool, watch.Watch(server.url, every=0.01) as seen:
        list(pool.map(lambda _: ask(), range(5)))
    assert seen.samples["requests_processing"].max() == 2 and 1 <= seen.samples["requests_deferred"].max() <= 3


def test_nothing_to_watch():
    with (
        pytest.raises(InputError, match="no metrics at http://127.0.0.1:9 .*: start a server"),
        watch.Watch("http://127.0.0.1:9"),
    ):
        pass


@pytest.fixture
def samples(server):
    """Forty minutes of an idle server, a sample each 15 seconds."""
    row = {"up": 1.0} | server.metrics()
    times = pd.date_range("2026-01-01", periods=161, freq="15s")
    return pd.DataFrame([row] * len(times), index=times).astype(float)


def first(fires: pd.Series) -> int:
    """The first sample at which a rule fires."""
    return int(fires.to_numpy().argmax())


def test_an_idle_server_is_no_alarm(samples):
    assert not watch.alerts(samples).to_numpy().any()


def test_a_server_that_is_down(samples):
    samples.loc[samples.index[20:], samples.columns != "up"] = float("nan")
    samples.loc[samples.index[20:], "up"] = 0
    fires = watch.alerts(samples)
    assert first(fires["ServerDown"]) == 24 and fires["ServerDown"][24:].all()
    assert not fires.drop(columns="ServerDown").to_numpy().any()
    axes = Figure().subplots(1, 2)
    watch.draw(axes, samples)
    assert axes[1].get_title(loc="left") == "ServerDown"


def test_requests_that_wait(samples):
    """For three samples, which is not long enough; then for five."""
    samples.iloc[[20, 21, 22, 30, 31, 32, 33, 34], samples.columns.get_loc("requests_deferred")] = 2
    fires = watch.alerts(samples)["RequestsWaiting"]
    assert fires.sum() == 1 and first(fires) == 34


def test_slow_answers(samples):
    """20 tokens per second, from sample 80 on 4: the mean of five minutes falls below 5 near their end."""
    speed = np.where(np.arange(161) < 80, 20, 4)
    samples["tokens_predicted_total"] = (speed * 10.0).cumsum()
    samples["tokens_predicted_seconds_total"] = np.full(161, 10.0).cumsum()
    fires = watch.alerts(samples)["SlowAnswers"]
    means = pd.Series(speed).rolling(20).mean()
    assert first(fires) == first(means < 5) + 4 and fires[-20:].all()
    counters = ["tokens_predicted_total", "tokens_predicted_seconds_total"]
    samples.loc[samples.index[150:], counters] -= samples[counters].iloc[149]  # started again
    assert watch.alerts(samples)["SlowAnswers"].equals(fires)


@pytest.mark.parametrize("total", [2e3, 2e6, 2e7, 2e8])
def test_a_light_load_is_no_alarm(total, samples):
    """Ten tokens a minute at 20 per second, on counters that are printed with six digits, as all are; but a server
    that writes all the time, 4 tokens per second to each of ten requests, is slow."""
    steps = np.arange(161)
    for seconds, tokens, slow in ((0.5 * (steps // 4), 10 * (steps // 4), False), (150.0 * steps, 600 * steps, True)):
        samples["tokens_predicted_total"] = [float(f"{count:.6g}") for count in total + tokens]
        samples["tokens_predicted_seconds_total"] = [float(f"{time:.6g}") for time in total / 20 + seconds]
        assert watch.alerts(samples)["SlowAnswers"][30:].eq(slow).all()


@pytest.mark.parametrize("context", [CONTEXT, 256])
def test_a_long_request(context, samples):
    samples.attrs["context"] = context
    samples.loc[samples.index[7:], "n_tokens_max"] = 0.9 * context + 1
    samples.loc[samples.index[:7], "n_tokens_max"] = 0.9 * context - 1
    assert first(watch.alerts(samples)["ContextNearlyFull"]) == 7


def test_rules_of_a_context():
    """Those of the default are the file's own; of another one, a single number differs."""
    (group,) = yaml.safe_load(watch.RULES.read_text())["groups"]
    assert watch.read_rules() == group["rules"]
    (rule,) = [rule for rule in watch.read_rules(256) if rule not in group["rules"]]
    assert rule["expr"] == "llamacpp:n_tokens_max > 230"


def test_rules_are_prometheus_rules(server):
    """Of its grammar: comparisons of metrics that the server has, or of ratios of their rates, with a number or a
    multiple of a metric; one of them, or two that must both hold."""
    metrics = {f"llamacpp:{name}" for name in server.metrics()} | {'up{job="gqalib"}'}
    rules = watch.read_rules()
    assert [set(group) for group in yaml.safe_load(watch.RULES.read_text())["groups"]] == [{"name", "rules"}]
    for rule in rules:
        assert {"alert", "expr"} < rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"[a-zA-Z_]\w*", rule["alert"]) and re.fullmatch(r"\d+[smhd]", rule.get("for", "0s"))
        term = r"(?:rate\(([\w:]+)\[\d+[smhd]\]\)|([\w:]+(?:{\w+=\"\w+\"})?))"
        comparison = rf"{term}(?: / {term})? (?:<|>|<=|>=|==|!=) [\d.]+(?:e-\d+)?(?: \* {term})?"
        found = re.fullmatch(rf"{comparison}(?: and {comparison})?", rule["expr"])
        assert found and set(filter(None, found.groups())) <= metrics, rule["expr"]


def test_a_second_interrupt_leaves_nothing_behind():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            with serve.session(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"]) as (process, log):
                while not log.seek(0) and not log.read():
                    time.sleep(0.01)
                signal.setitimer(signal.ITIMER_REAL, 0.3)
                raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGALRM, before)
    assert is_gone(process.pid)


@pytest.mark.parametrize(("asked", "count"), [("", 1), ("3", 3), ("4,2", 4)])
def test_a_server_has_the_cores_that_are_its_own(asked, count, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert num_threads() == count


def test_a_proxy_does_not_come_between_a_server_and_its_clients(file, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("no_proxy", "elsewhere"), monkeypatch.delenv("NO_PROXY", raising=False)
    with Server(file) as running, OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        assert client.models.list().data[0].id == file.name
    assert os.environ["no_proxy"] == "elsewhere,127.0.0.1"
