"""Files of a model in every type, two servers compared, votes counted: on hand-made numbers and a made-up server."""

import asyncio
import json
import math
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import is_gone, small_model
from test_export import IDS, SHAPE, byte_tokenizer

from gqalib import figures
from gqalib.errors import InputError
from gqalib.measure.perplexity import window_losses
from gqalib.model import deci, surgery
from gqalib.model.load import load_tokenizer
from gqalib.run.resume import Progress
from gqalib.serve import compare, export, feedback, quantised, sizes

# ---------------------------------------------------------------- files


@pytest.fixture
def fields():
    tokenizer = byte_tokenizer()
    tokenizer.num_rows = SHAPE["vocab_size"]
    return quantised.vocabulary(tokenizer)


def test_rows_are_of_the_file_as_it_is_read_back_and_are_kept(tmp_path, fields, monkeypatch):
    model, windows = small_model(**SHAPE), IDS.view(4, 10)
    progress = Progress(tmp_path / "kept", {})
    rows = quantised.rows_of("dense", model, fields, windows, progress)
    assert [row["type"] for row in rows] == list(quantised.KINDS)
    for row in rows:
        assert row["bytes"] == row["file"].stat().st_size
        assert torch.equal(row["losses"], window_losses(deci.read_model(row["file"]), windows))
    errors = [(row["losses"] - window_losses(model, windows)).abs().max() for row in rows]
    assert 0 < errors[0] < errors[1] < errors[3]
    monkeypatch.setattr(quantised, "_measured", lambda *_: pytest.fail("it was kept"))
    rows[1]["file"].unlink()  # a file that is gone is written again, and not read
    again = quantised.rows_of("dense", model, fields, windows, progress)
    assert [row["bytes"] for row in again] == [row["bytes"] for row in rows] and rows[1]["file"].exists()


def test_nothing_half_written(tmp_path, fields, monkeypatch):
    def fails(file, *_):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_model", fails)
    with pytest.raises(KeyboardInterrupt):
        quantised.rows_of("dense", small_model(**SHAPE), fields, IDS, Progress(tmp_path / "kept", {}))
    assert not list(tmp_path.rglob("*.gguf"))


def test_words_that_llama_cpp_does_not_know_become_bytes(capsys):
    found = quantised.vocabulary(load_tokenizer("shape:tiny"))
    assert len(found["token_list"]) == 512 and found["tokenizer_pre"] == "gpt-2"
    assert "this WordLevel tokenizer has no name" in capsys.readouterr().out


def made_rows(**losses):
    """Files of 100 and less bytes; the losses of four windows each."""
    sizes = {"f16": 100, "q8_0": 60, "q5_0": 40, "q4_0": 30}
    rows = []
    for name, mean in losses.items():
        model, kind = name.split("_", 1)
        size = sizes[kind] * (1 if model == "dense" else 0.5)
        rows.append({"model": model, "type": kind, "bytes": size, "losses": torch.tensor([1.0, 2.0, 3.0, 4.1]) + mean})
    return rows


def test_prune_or_quantise():
    rows = made_rows(dense_f16=0, dense_q8_0=0.01, dense_q4_0=0.2, pruned_f16=0.1, pruned_q8_0=0.11, pruned_q4_0=0.1)
    rows[3]["losses"] += torch.tensor([0.01, -0.01, 0.01, -0.01])  # else the paired error would be nothing
    found = sizes.prune_or_quantise(rows)
    assert found["way"].tolist() == ["prune", "both", "both"]
    # 50 bytes beside dense q4_0 of 30; 30 beside the same; 15: no dense file is as small
    assert found["rival"].tolist()[:2] == ["dense q4_0"] * 2 and found["verdict"].tolist() == [
        "better",
        "better",
        "no rival",
    ]
    assert found["times rival"][0] == pytest.approx(math.exp(-0.1)) and found["± error"][0] > 0
    assert sizes.verdict_on_rivals(found)[-1] == (
        "for the same file size: better than any dense file that is no larger: pruned f16, pruned q8_0;"
        " for other sizes the front decides; in these types, only pruned files weigh 0.0 MB or less"
    )
    worse = sizes.prune_or_quantise(made_rows(dense_q8_0=0.01, dense_q4_0=0.02, pruned_f16=0.1, pruned_q4_0=1))
    first = sizes.verdict_on_rivals(worse)[0]
    assert "1 files pruned only, each beside the best dense file that is no larger: 1 worse" in first
    assert sizes.verdict_on_rivals(worse)[-1].endswith(
        "quantise, do not prune; in these types, only pruned files weigh 0.0 MB or less"
    )
    mixed = sizes.prune_or_quantise(made_rows(dense_q4_0=0.1, pruned_f16=0.1, pruned_q8_0=0.2))
    assert sizes.verdict_on_rivals(mixed)[-1].endswith("quantise, do not prune (pruned f16: not told apart)")
    same = sizes.prune_or_quantise(made_rows(dense_q4_0=0.1, pruned_f16=0.1))
    assert same["verdict"].tolist() == ["not told apart"]
    assert sizes.verdict_on_rivals(same)[-1] == "for the same file size: pruning and quantising are not told apart"


def test_front():
    assert sizes.on_front([1, 2, 3, 2, 1], [3, 2, 2, 1, 3]) == [True, False, False, True, True]


def test_table_and_figure():
    rows = made_rows(dense_f16=0, dense_q4_0=0.2, v3_f16=0.1, v3_q4_0=0.5)
    table = sizes.table(rows, rows[0]["losses"])
    assert table["times dense"].tolist() == pytest.approx(np.exp([0, 0.2, 0.1, 0.5]))
    assert table["front"].tolist() == [True, True, True, True]
    fig, axes = plt.subplots(1, 2)
    for ax, across in zip(axes, sizes.AXES, strict=True):
        sizes.dots(ax, table.assign(**{"tokens/s": [10.0, 20.0, 15.0, 30.0], "slowest": 9.0, "fastest": 31.0}), across)
        assert ax.get_legend_handles_labels()[1] == ["dense", "v3", "f16", "q4_0"]
        assert ax.get_xlabel() == sizes.AXES[across][0]
    fig.canvas.draw()
    plt.close(fig)


def test_models_of_a_kind_are_told_apart_in_the_figure():
    losses = {"distilled-25_f16": 0.1, "distilled-50_f16": 0.5, "long-25_f16": 0.05, "long-50_f16": 0.3}
    fig, ax = plt.subplots()
    sizes.dots(ax, sizes.table(made_rows(dense_f16=0, **losses), torch.zeros(4)), "bytes")
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    dots = [handles[name.removesuffix("_f16")] for name in losses]
    assert len({dot.get_color() for dot in dots}) == 1
    assert len({(dot.get_markerfacecolor(), dot.get_fillstyle()) for dot in dots}) == 4
    plt.close(fig)


def test_pruned_files_at_equal_size():
    """Sizes 50 (two models, one better), 30 (one file) and 15, 15.6 (nearly the same)."""
    rows = made_rows(dense_f16=0, v3_f16=0.5, refitted_f16=0.1, v3_q8_0=0.6, v3_q4_0=0.9, refitted_q4_0=0.91)
    rows[-1] |= {"bytes": 15.6, "losses": rows[-1]["losses"] + torch.tensor([0.1, -0.1, 0.1, -0.1])}
    found = sizes.at_equal_size(rows)
    assert found["file"].tolist() == ["v3 q4_0", "refitted q4_0", "v3 q8_0", "v3 f16", "refitted f16"]
    assert found["verdict"].tolist() == ["best", "not told apart", "best", "worse", "best"]
    assert found["times best"].tolist() == pytest.approx([1, math.exp(0.01), 1, math.exp(0.4), 1])
    lines = sizes.verdict_on_sizes(found)
    assert lines[0] == "about 0.000 MB: v3 q4_0 is best; not told apart: refitted q4_0"
    assert lines[1].endswith("only v3 q8_0") and lines[2].endswith("refitted f16 is best; worse: v3 f16")
    assert len(sizes.at_equal_size(rows, within=0.01)["about"].unique()) == 4


@pytest.fixture
def drawn():
    """Two kinds of the same size that are nearly as good, another one that is not; all as fast as each other."""
    losses = {"dense": 0, "v3": 1.5, "refitted-25": 0.5, "distilled-25": 0.49, "distilled-50": 0.8}
    table = sizes.table(made_rows(**{f"{name}_f16": loss for name, loss in losses.items()}), torch.zeros(4))
    table["± standard error"] = 0.05
    table = table.assign(**{"tokens/s": 10.0, "slowest": 9.0, "fastest": 12.0})
    fig, axes = plt.subplots(1, 2)
    for ax, across in zip(axes, sizes.AXES, strict=True):
        sizes.dots(ax, table, across)
        assert ax.get_xlabel() == sizes.AXES[across][0]
    fig.canvas.draw()
    yield table, axes
    plt.close(fig)


def places(ax):
    """Where the five points stand across."""
    return [box.lines[0].get_xdata()[0] for box in ax.containers]


def test_only_a_point_that_hides_another_is_moved(drawn):
    table, (size, speed) = drawn
    shown = np.array(places(size)) - table["bytes"] / 1e6
    assert shown.tolist()[:3] == [0, 0, 0] and shown[3] > 0 and shown[4] == 0
    assert places(speed) == [10] * 5  # their bars say where they are


def test_bars_across_go_from_the_slowest_turn_to_the_fastest(drawn):
    _, (size, speed) = drawn
    assert all(box.has_xerr and box.has_yerr for box in speed.containers)
    assert not any(box.has_xerr for box in size.containers)
    across = speed.containers[0].lines[2][0].get_segments()[0]
    assert across[:, 0].tolist() == [9, 12]


def test_models_have_their_colour_and_the_second_of_a_kind_is_hollow(drawn):
    handles = dict(zip(*reversed(drawn[1][0].get_legend_handles_labels()), strict=True))
    color = {name: handles[name].get_color() for name in ("dense", "v3", "refitted-25", "distilled-25")}
    assert color == {name: figures.COLORS[role] for name, role in zip(color, ("dense", "v3", "refit", "recovered"))}
    assert handles["distilled-50"].get_color() == color["distilled-25"]
    assert handles["distilled-50"].get_markerfacecolor() == "white" != handles["distilled-25"].get_markerfacecolor()


def test_weights_are_counted_as_the_file_has_them(tmp_path, fields):
    model = small_model(**SHAPE)
    surgery.keep_channels(model, 1, range(41))
    for kind in ("f16", "q4_0"):
        tensors = export.write_model(tmp_path / f"{kind}.gguf", model, kind, {"name": "a"} | fields)
        assert quantised.weight(model, kind)["bytes"] == sum(tensor.num_bytes for tensor in tensors.values())
    assert quantised.weight(model, "q4_0") | {"bytes": 0} == {"matrices": 29, "kept f16": 1, "bytes": 0}
    assert quantised.weight(model, "f16")["kept f16"] == 0


def test_a_cut_shape_has_the_multiple_and_leaves_the_configuration_alone():
    config = small_model(**SHAPE | {"intermediate_size": 256}).config
    loose, even = (quantised.cut_shape(config, 0.3, multiple) for multiple in (1, 32))
    widths = [layer.mlp.gate_proj.out_features for layer in even.model.layers]
    assert all(width % 32 == 0 for width in widths) and config.intermediate_size == 256
    assert quantised.weight(even, "q8_0")["kept f16"] == 0 < quantised.weight(loose, "q8_0")["kept f16"]
    counts = [sum(p.numel() for p in model.parameters()) for model in (loose, even)]
    assert counts[0] == pytest.approx(counts[1], rel=0.05)


# ---------------------------------------------------------------- a made-up server

PAUSE = 0.004  # seconds per token


class FakeServer:
    """Streams an answer of `tokens` tokens, one every PAUSE × `slow` seconds, and notes what it was asked."""

    def __init__(self, slow=1, tokens=None, status=200):
        self.slow, self.tokens, self.status = slow, tokens, status
        self.asked = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_POST(self):
                fake.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler, body):
        self.asked.append(body)
        handler.send_response(self.status)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        count = body["max_tokens"] if self.tokens is None else self.tokens
        for part in [*({"text": f" {i}"} for i in range(count)), None]:
            time.sleep(PAUSE * self.slow if part else 0)
            choices = [{"index": 0, "finish_reason": None, "logprobs": None} | part] if part else []
            usage = None if part else {"completion_tokens": count, "prompt_tokens": 1, "total_tokens": count + 1}
            said = {"id": "a", "object": "text_completion", "created": 0, "model": "m", "choices": choices}
            handler.wfile.write(f"data: {json.dumps(said | {'usage': usage})}\n\n".encode())
            handler.wfile.flush()
        handler.wfile.write(b"data: [DONE]\n\n")


def test_an_answer_is_timed_token_by_token():
    with FakeServer(slow=5) as server:
        found = asyncio.run(compare.answer(compare.client_of(server.url), "once", 5))
    assert found["tokens"] == 5 and found["text"] == " 0 1 2 3 4"
    assert found["first_ms"] >= 5e3 * PAUSE and found["token_ms"] > 0
    assert found["first_ms"] + 4 * found["token_ms"] >= 5 * 5e3 * PAUSE
    asked = server.asked[0]
    assert (asked["prompt"], asked["max_tokens"], asked["temperature"], asked["stream"]) == ("once", 5, 0, True)
    assert asked["ignore_eos"] is True and asked["cache_prompt"] is False


def test_servers_that_cannot_be_timed():
    for bad, says in (({"status": 500}, "does not answer"), ({"tokens": 1}, "gave 1 tokens, too few")):
        with FakeServer(**bad) as server, pytest.raises(InputError, match=says) as raised:
            asyncio.run(compare.answer(compare.client_of(server.url), "once", 5))
        assert "\n" not in str(raised.value) and len(server.asked) == 1  # no second try
    with pytest.raises(InputError, match="does not answer"):
        asyncio.run(compare.answer(compare.client_of(server.url), "once", 5))


class FakeClient(str):
    """A client that is its URL."""

    closed = False

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.closed = True


@pytest.fixture
def asked(monkeypatch):
    """Servers that answer at once; what each was asked, in order, and how many answers were under way at most."""
    log, under_way, most = [], [], [0]

    async def answer(client, prompt, num_new_tokens):
        log.append((client, prompt))
        under_way.append(client)
        most[0] = max(most[0], len(under_way))
        assert not client.closed and prompt != "fail"
        assert len(set(under_way)) == 1, "one server waits while the other is timed"
        await asyncio.sleep(0)
        under_way.remove(client)
        return {"first_ms": 1.0, "token_ms": 2.0 if client == "fast" else 4.0, "tokens": num_new_tokens, "text": ""}

    monkeypatch.setattr(compare, "answer", answer)
    monkeypatch.setattr(compare, "client_of", FakeClient)
    return log, most


def test_in_pairs_asks_both_each_prompt_in_random_order(asked):
    urls, prompts = {"dense": "slow", "pruned": "fast"}, [f"prompt {i}" for i in range(12)]
    rows = asyncio.run(compare.in_pairs(urls, prompts, 3, seed=1))
    log, most = asked
    assert log[:2] == [("slow", compare.BACKGROUND), ("fast", compare.BACKGROUND)] and most == [1]
    assert all(client.closed for client, _ in log)
    assert log[2:] == [(urls[row.server], prompts[row.prompt]) for row in rows.itertuples()]
    assert rows["prompt"][::2].tolist() == rows["prompt"][1::2].tolist() != list(range(12))
    assert sorted(rows["prompt"][::2]) == list(range(12))
    assert 0 < (rows["server"][::2] == "dense").sum() < 12
    assert rows.equals(asyncio.run(compare.in_pairs(urls, prompts, 3, seed=1)))
    noise = 0.01 * rows["prompt"] * (rows["server"] == "dense")
    times = rows[rows["prompt"] > 0].assign(token_ms=rows["token_ms"] + noise)
    found = compare.paired(times, "token_ms", "prompt", ["dense", "pruned"])
    assert found["pairs"] == 11 and found["ratio_high"] < 1 and found["difference"] == pytest.approx(-2.06)


def test_under_load_as_many_at_once_as_asked(asked):
    urls, (log, most) = {"dense": "slow", "pruned": "fast"}, asked
    rows = asyncio.run(compare.under_load(urls, ["a"] * 6, 3, at_once=(1, 3), rounds=2))
    assert rows.groupby(["at_once", "round", "server"]).size().tolist() == [1] * 8
    assert most == [3] and len(log) == 8 * 6 and (rows["tokens_per_s"] > 0).all()


def test_where_one_answer_fails_the_others_end(asked):
    async def load():
        with pytest.raises(AssertionError):
            await compare.under_load({"dense": "slow"}, ["a", "fail", *"bcdefgh"], 3, at_once=[2], rounds=1)
        await asyncio.sleep(0)
        return len(asyncio.all_tasks())

    assert asyncio.run(load()) == 1 and len(asked[0]) < 9 and asked[0][0][0].closed


def test_files_are_timed_in_turn(monkeypatch, tmp_path):
    """In rounds: no file has its second turn before each has had its first; what was timed is kept."""
    asked, speeds = [], iter(range(100))

    def speed(file, num_new_tokens):
        asked.append(file)
        return float(next(speeds))

    monkeypatch.setattr(compare, "decode_speed", speed)
    files = [tmp_path / name / "a.gguf" for name in "abcde"]
    kept = Progress(tmp_path / "kept", {})
    found = compare.decode_speeds(files, 8, rounds=3, seed=1, progress=kept)
    assert [sorted(asked[start : start + 5]) for start in (0, 5, 10)] == [files] * 3 and asked[:5] != asked[5:10]
    own = [[turn for turn, file in enumerate(asked) if file == each] for each in files]
    assert found["tokens/s"].tolist() == [turns[1] for turns in own]
    assert found["slowest"].tolist() == [turns[0] for turns in own]
    assert found["fastest"].tolist() == [turns[2] for turns in own]
    assert found.equals(compare.decode_speeds(files, 8, rounds=3, seed=1, progress=kept)) and len(asked) == 15


def test_speeds_are_of_the_machine_and_the_server(monkeypatch, tmp_path):
    """Timed again: beside other notebooks, with other threads, by another version of the server."""
    asked = []
    monkeypatch.setattr(compare, "decode_speed", lambda *_: asked.append(1) or 1.0)

    def timed():
        compare.decode_speeds([tmp_path / "a" / "a.gguf"], rounds=1, progress=Progress(tmp_path / "kept", {}))
        return len(asked)

    assert timed() == timed() == 1
    for count, (name, value) in enumerate({"GQALIB_AT_ONCE": "3", "OMP_NUM_THREADS": "77"}.items(), 2):
        monkeypatch.setenv(name, value)
        assert timed() == timed() == count, name
    monkeypatch.setattr(compare, "version", lambda name: f"another {name}")
    assert timed() == 4


# ---------------------------------------------------------------- what it shows


FAKE = """#!{python}
import json, subprocess, sys
told = dict(zip(sys.argv[3::2], sys.argv[4::2]))
value = {{name: text.rpartition("=")[2] for name, text in told.items()}}
rows = [json.loads(line) for line in open(value["--data"])]
backend = json.loads(told["--backend"])
assert backend["extras"]["body"] == {{"ignore_eos": True, "cache_prompt": False, "temperature": 0}}
assert backend["target"] == "http://there" and value["--constraint"] == "2" and value["--profile"] == "4"
print("guidellm:", rows[0]["prompt"])
if rows[0]["prompt"] == "fail":
    raise OSError("no such server")
if rows[0]["prompt"] == "leave":
    print(subprocess.Popen(["sleep", "60"]).pid, file=open(sys.argv[0] + ".child", "w"))
tokens = sum(row["output_tokens_count"] for row in rows)
found = {{"output_tokens_per_second": {{"successful": {{"mean": tokens}}}}}}
found |= {{f"{{name}}_ms": {{"successful": {{"median": 9}}}} for name in ("time_to_first_token", "inter_token_latency")}}
json.dump({{"benchmarks": [{{"metrics": found}}]}}, open(value["--output"], "w"))
"""


@pytest.fixture
def guidellm(tmp_path):
    """What the stand-in finds for prompts."""
    program = tmp_path / "guidellm"
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(0o755)
    return lambda *prompts: compare.guidellm(str(program), "http://there", byte_tokenizer(), prompts, 16, at_once=4)


def test_guidellm_is_asked_for_the_same_answers(guidellm):
    assert guidellm("one", "two") == {"tokens_per_s": 32, "first_ms": 9, "token_ms": 9}
    with pytest.raises(InputError, match="guidellm ended without a result: OSError: no such server$"):
        guidellm("fail", "two")


def test_no_process_of_guidellm_outlives_it(guidellm, tmp_path, monkeypatch):
    """Nor does one that keeps the pipes hold us up."""
    monkeypatch.setattr(compare, "LONGEST", 20)
    assert guidellm("leave", "two")["tokens_per_s"] == 32
    assert is_gone(int((tmp_path / "guidellm.child").read_text()))


def test_paired_interval_is_that_of_the_differences():
    """Differences 1, 2, 3: mean 2, standard error 1/√3, t of 2 degrees of freedom 4.3027."""
    rows = pd.DataFrame({"prompt": [0, 0, 1, 1, 2, 2], "server": list("ababba"), "ms": [10.0, 11, 20, 22, 33, 30]})
    found = compare.paired(rows, "ms", "prompt", ["a", "b"])
    assert (found["pairs"], found["first"], found["second"], found["difference"]) == (3, 20, 22, 2)
    assert found["high"] - 2 == pytest.approx(4.302653 / 3**0.5) == 2 - found["low"]
    assert found["ratio"] == pytest.approx((1.1 * 1.1 * 1.1) ** (1 / 3))
    turned = compare.paired(rows, "ms", "prompt", ["b", "a"])
    assert turned["difference"] == -2 and turned["ratio"] == pytest.approx(1 / 1.1)
    with pytest.raises(InputError, match="1 pairs of answers show nothing"):
        compare.paired(rows[:2], "ms", "prompt", ["a", "b"])


def test_two_steps_multiply_to_the_whole():
    rows = pd.DataFrame({"prompt": [0, 0, 0, 1, 1, 1], "server": list("acb") * 2, "ms": [8.0, 4, 1, 16, 9, 3]})
    ratio = {names: compare.paired(rows, "ms", "prompt", list(names))["ratio"] for names in ("ac", "cb", "ab")}
    assert ratio["ac"] == pytest.approx((1 / 2 * 9 / 16) ** 0.5)
    assert ratio["ac"] * ratio["cb"] == pytest.approx(ratio["ab"])


def test_share_has_the_interval_of_the_delta_method():
    """log(last / first) is 2, 4 and the middle has made 1, 2.2 of it: s = 3.2 / 6; residuals ∓0.0667, t(1) = 12.706."""
    steps = {"a": [0, 0], "c": [1, 2.2], "b": [2, 4]}
    rows = pd.DataFrame([(i, name, math.exp(v)) for name, own in steps.items() for i, v in enumerate(own)])
    found = compare.share(rows.set_axis(["prompt", "server", "ms"], axis=1), "ms", "prompt", "acb")
    residuals = np.array([1, 2.2]) - 3.2 / 6 * np.array([2, 4])
    reach = 12.7062 * residuals.std(ddof=1) / 2**0.5 / 3
    assert found["share"] == pytest.approx(3.2 / 6) and found["high"] - found["share"] == pytest.approx(reach, rel=1e-5)


def test_interval_of_paired_proportions():
    """Bentur et al. (2009), of 21 examples 1 and 7 differ: with one more of either, (2 − 8) / 23 ± 1.96 · 0.12627."""
    first, second = [1] * 7 + [0] + [1] * 1 + [0] * 12, [0] * 7 + [1] + [1] * 1 + [0] * 12
    found = compare.mcnemar(first, second)
    assert (found["low"], found["high"]) == pytest.approx((-50.83, -1.34), abs=0.01)
    turned = compare.mcnemar(second, first)
    assert (turned["low"], turned["high"]) == (-found["high"], -found["low"])
    same = compare.mcnemar([1] * 50, [1] * 50)
    assert -10 < same["low"] < 0 < same["high"] < 10  # that none of so few differ does not make them equal


def test_mcnemar_against_a_known_value():
    """1 and 9 of 10 examples that differ: p = 2 (C(10,0) + C(10,1)) / 2^10 = 22 / 1024, however many agree."""
    first = [1] * 1 + [0] * 9 + [1] * 50 + [0] * 40
    second = [0] * 1 + [1] * 9 + [1] * 50 + [0] * 40
    found = compare.mcnemar(first, second)
    assert found["p"] == pytest.approx(22 / 1024) and found["difference"] == pytest.approx(8)
    counts = {name: found[name] for name in ("examples", "both", "only_first", "only_second", "neither")}
    assert counts == {"examples": 100, "both": 50, "only_first": 1, "only_second": 9, "neither": 40}
    assert compare.mcnemar(first[:10], second[:10])["p"] == found["p"]
    assert compare.mcnemar([1, 0], [1, 0])["p"] == 1


def test_answers_are_paired_by_example_not_by_row():
    first = pd.DataFrame({"task": ["a", "a", "b"], "example": [0, 1, 0], "right": [1, 0, 1]})
    second = first.sample(frac=1, random_state=1)
    found = compare.compared_answers(first, second).set_index("task")
    assert list(found.index) == ["a", "b", "all"] and (found["only_first"] + found["only_second"] == 0).all()
    assert found["examples"].tolist() == [2, 1, 3]


def test_an_answer_that_is_partly_right_counts_by_its_exact_match():
    own = pd.DataFrame({"task": ["squad", "squad", "a"], "example": [0, 1, 0], "right": [0.05, 1.0, 1.0]})
    first, second = (own.assign(exact=[exact, 1.0, math.nan]) for exact in (0.0, 1.0))
    assert compare.compared_answers(first, second).set_index("task")["only_second"].to_dict() == {
        "squad": 1, "a": 0, "all": 1,
    }  # fmt: skip


def test_last_token_right():
    model, windows = small_model(), torch.randint(1, 61, (6, 9), generator=torch.Generator().manual_seed(0))
    windows[::2, -1] = model(windows[::2]).logits[:, -2].argmax(-1)
    assert compare.last_token_right(model, windows)[::2] == [1, 1, 1]
    assert (
        compare.last_token_right(model, windows)
        == (model(windows).logits[:, -2].argmax(-1) == windows[:, -1]).int().tolist()
    )


# ---------------------------------------------------------------- votes


def vote(which="left", left="a", right="b"):
    return {"time": "now", "prompt": "é\n?", "left": left, "right": right, "vote": which}


def test_votes_come_back_and_half_a_vote_is_left_out(tmp_path):
    log = tmp_path / "votes.jsonl"
    assert feedback.read_votes(log) == []
    for which in feedback.VOTES:
        feedback.append(log, vote(which))
    whole = log.read_bytes()
    assert feedback.read_votes(log) == [vote(which) for which in feedback.VOTES] and whole.count(b"\n") == 3
    log.write_bytes(whole[:-2])
    assert len(feedback.read_votes(log)) == 2
    log.write_bytes(whole[:-1])  # an editor took the end of the line
    assert len(feedback.read_votes(log)) == 3
    feedback.append(log, vote("tie"))
    assert feedback.read_votes(log)[2:] == [vote("right"), vote("tie")]
    log.write_bytes(whole + whole[:20])
    assert len(feedback.read_votes(log)) == 3
    feedback.append(log, vote("tie"))  # what is torn goes, what is whole stays
    assert feedback.read_votes(log)[2:] == [vote("right"), vote("tie")] and log.read_bytes().startswith(whole)


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"vote": "left"}', json.dumps(vote("middle"))])
def test_a_line_that_is_no_vote_is_named(line, tmp_path):
    log = tmp_path / "votes.jsonl"
    feedback.append(log, vote())
    log.write_bytes(log.read_bytes() + line.encode() + b"\n")
    with pytest.raises(InputError, match="line 2 of "):
        feedback.read_votes(log)


def test_a_ballot_hides_names_until_the_vote(tmp_path):
    """And what a model wrote is text, whatever it looks like."""
    answers = {"dense": ["<b>x</b>", "d2"], "pruned": ["p1", "p2"]}
    ballot = feedback.Ballot(["first?", "second?"], answers, tmp_path / "votes.jsonl", seed=0)
    assert isinstance(ballot.widget, ipywidgets.VBox)
    assert "dense" not in ballot.page.value and "pruned" not in ballot.page.value and ballot.said.value == ""
    assert "&lt;b&gt;x" in ballot.page.value and "<b>x" not in ballot.page.value
    left = ballot.sides[0][0]
    ballot.buttons[0].click()
    assert f"left was {left}" in ballot.said.value and "second?" in ballot.page.value
    ballot.buttons[1].click()
    assert ballot.page.value == "no more answers to compare" and all(button.disabled for button in ballot.buttons)
    votes = feedback.read_votes(tmp_path / "votes.jsonl")
    assert [(each["prompt"], each["vote"]) for each in votes] == [("first?", "left"), ("second?", "tie")]
    assert votes[0]["left"] == left and {votes[0]["left"], votes[0]["right"]} == {"dense", "pruned"}


def test_votes_are_of_the_answers(tmp_path):
    """A model that is made anew gives other texts: votes on the old ones, and votes that say of none, are left out."""
    prompts, log = ["first?", "second?"], tmp_path / "votes.jsonl"
    answers = {"dense": ["same", "d2"], "pruned": ["same", "p2"]}
    feedback.append(log, vote() | {"prompt": "first?", "left": "dense", "right": "pruned"})
    ballot = feedback.Ballot(prompts, answers, log)
    ballot.vote("left"), ballot.vote("right")
    votes = feedback.read_votes(log)
    assert feedback.current(votes, prompts, answers) == votes[1:]
    assert feedback.current(votes, prompts, dict(reversed(answers.items()))) == votes[1:]
    anew = answers | {"pruned": ["same", "p3"]}
    assert feedback.current(votes, prompts, anew) == votes[1:2]
    assert feedback.current(votes, prompts, {"dense": answers["pruned"], "pruned": answers["dense"]}) == votes[1:2]
    assert feedback.current(votes, ["other?", "second?"], answers) == votes[2:]
    assert feedback.preference(votes, "dense", "pruned")["votes"] == 3


def test_sides_are_drawn():
    many = feedback.Ballot([""] * 64, {"a": [""] * 64, "b": [""] * 64}, None, seed=3)
    assert 20 < sum(left == "a" for left, _ in many.sides) < 44


def test_preference():
    """8 of 10: Wilson's 95 % interval is 0.490 to 0.943, exact p = 2 (45 + 10 + 1) / 1024."""
    votes = [vote("left", "b", "a")] * 5 + [vote("right", "a", "b")] * 3 + [vote("left")] * 2 + [vote("tie")] * 4
    found = feedback.preference([*votes, vote("left", "a", "c")], "a", "b")
    assert (found["votes"], found["ties"], found["for_first"], found["for_second"]) == (14, 4, 2, 8)
    assert (found["low"], found["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert found["share"] == 0.8 and found["p"] == pytest.approx(112 / 1024)
    assert math.isnan(feedback.preference([vote("tie")], "a", "b")["share"])


@pytest.mark.parametrize("share", [0.6, 0.3, 0.9, 1.0])
def test_votes_needed_by_simulation(share):
    """So many votes are enough, by counting, and the power is that of the test that `preference` makes."""
    needed, draw = feedback.votes_needed(share), np.random.default_rng(0)
    assert feedback.power(share, needed) >= 0.8 > feedback.power(share, needed - 1)
    counts = draw.binomial(needed, share, 4000)
    p = {int(count): compare.binomtest(int(count), needed).pvalue for count in set(counts)}
    told = np.mean([p[int(count)] <= 0.05 for count in counts])
    assert told == pytest.approx(feedback.power(share, needed), abs=0.025)


def test_votes_needed_at_its_ends():
    assert feedback.votes_needed(0.5) == math.inf
    assert feedback.votes_needed(0.7) == feedback.votes_needed(0.3) < feedback.votes_needed(0.55)
    assert feedback.votes_needed(0.7, wanted=0.95) > feedback.votes_needed(0.7)
    for share, wanted in ((1.2, 0.8), (0.6, 1.0)):
        with pytest.raises(InputError, match="give probabilities"):
            feedback.votes_needed(share, wanted)


def test_simulated_votes_say_so_and_have_the_stated_preference():
    votes = feedback.simulated(["q"], "a", "b", share=0.7, ties=0.25, count=4000, seed=1)
    found = feedback.preference(votes, "a", "b")
    assert {each["time"] for each in votes} == {"simulated"}
    assert found["share"] == pytest.approx(0.7, abs=0.03) and found["ties"] / 4000 == pytest.approx(0.25, abs=0.03)
    assert sum(each["left"] == "a" for each in votes) / 4000 == pytest.approx(0.5, abs=0.03)
    assert votes == feedback.simulated(["q"], "a", "b", 0.7, 0.25, 4000, seed=1)
