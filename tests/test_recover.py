"""`gqalib recover` and `gqalib distill`: one process and two end at the same model."""

import contextlib
import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest
import torch
import trl
from accelerate import PartialState
from accelerate.commands import launch
from conftest import kl_to, small_model
from transformers import Trainer

from gqalib import InputError
from gqalib.device import is_one_of_several
from gqalib.measure import memory
from gqalib.model import surgery
from gqalib.model.load import REPOSITORY, load_model, load_tokenizer, save_model
from gqalib.recover import lora, trainer
from gqalib.run.cli import main, overrides
from gqalib.run.corpora import END_OF_DOCUMENT, training_windows
from gqalib.run.instructions import read_instructions
from gqalib.run.presets import load_preset

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SETTINGS = [
    "num_epochs=2",
    "num_examples=16",
    "batch_size=2",
    "gradient_accumulation_steps=2",
    "learning_rate=1e-2",
    "max_length=24",
]


@pytest.fixture
def pairs(tokenizer, tmp_path):
    """A pruned model and instructions of different lengths, in a folder."""
    model = small_model()
    surgery.keep_groups(model, 0, [0])
    surgery.keep_channels(model, 1, range(7))
    save_model(model, tokenizer, tmp_path / "model")
    rows = [
        {"instruction": f"w{2 + i}", "output": " ".join(f"w{2 + (i * j) % 59}" for j in range(2 + i % 5))}
        for i in range(60)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return [f"instructions=file:{tmp_path / 'rows.json'}", "device=cpu", *(f"recovery.{pair}" for pair in SETTINGS)]


@pytest.fixture
def arguments(pairs, tmp_path):
    return [
        "recover",
        "--model",
        str(tmp_path / "model"),
        "--seed",
        "3",
        *(part for pair in pairs for part in ("--set", pair)),
    ]


IN_FLOAT32 = """
import torch
torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False
"""


@pytest.fixture
def site(tmp_path_factory, monkeypatch):
    """Products stay in float32, here and in processes that find this folder: in bf16, halves of a batch are not rounded
    as the whole is."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(IN_FLOAT32)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return folder


def launched(arguments, *options):
    """The command line of `accelerate launch` for two processes."""
    count = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    return [*options, *count, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "gqalib", *arguments]


def in_two(arguments, site, *options, succeeds=True, **variables):
    """`accelerate launch` with two processes, forked from one that has loaded torch and trl: to load them takes ten
    seconds each time. The launcher's part is its own, torchrun's is done here."""

    def start(parsed):
        common = dict(os.environ) | {"MASTER_ADDR": "localhost", "MASTER_PORT": parsed.master_port, "WORLD_SIZE": "2"}
        how = [(rank, common, site, parsed.training_script_args) for rank in range(2)]
        processes = [LOADED.Process(target=one_of_two, args=each, daemon=True) for each in how]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            codes.append(process.exitcode)

    codes = []
    with patch.dict(os.environ, ENVIRONMENT | variables), patch("torch.distributed.run.run", start):
        launch.launch_command(launch.launch_command_parser().parse_args(launched(arguments, *options)))
    said = "".join((site / f"said{rank}").read_text() for rank in range(2))
    assert (codes == [0, 0]) == succeeds, said[-2000:]
    return said


LOADED = multiprocessing.get_context("forkserver")
LOADED.set_forkserver_preload(["gqalib.run.cli", "gqalib.recover.lora", "gqalib.recover.distill"])


def one_of_two(rank, environment, site, arguments):
    """A process as torchrun starts it; what it says goes into a file."""
    os.environ.clear()  # the server was forked with the settings of the first launch
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    with (site / f"said{rank}").open("w") as said, contextlib.redirect_stderr(said):
        runpy.run_path(str(site / "sitecustomize.py"))
        code = main(arguments)
        assert code or PartialState().num_processes == 2, "each worked alone"
    sys.exit(code)


def checkpoints(folder):
    return [path.name for path in folder.glob("checkpoint-*")]


def weights(folder):
    return dict(load_model(folder, device="cpu").named_parameters())


def check_same(folder, tolerance, others=frozenset()):
    start, one, two = (weights(folder / name) for name in ("model", "one", "two"))
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, rtol=0, atol=tolerance), name
    assert sum(not torch.allclose(one[name], tensor, atol=1e-3) for name, tensor in start.items()) == 3 * 7
    assert {path.name for path in folder.iterdir()} == {"model", "rows.json", "one", "two"} | others


def test_two_processes_train_as_one(arguments, site, tmp_path):
    """Each takes every other micro-batch of a step, so a step sees the same rows."""
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    command = launched([*arguments, "--out", str(tmp_path / "two")], "--multi_gpu")
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(site), ENVIRONMENT["PYTHONPATH"]])}
    how = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "check": False, "timeout": 300}
    finished = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *command], **how)
    assert finished.returncode == 0, finished.stderr[-2000:]
    check_same(tmp_path, 1e-6)


FSDP_ON_CPU = """
import os
from pathlib import Path
import torch.distributed as dist
from accelerate import state
from accelerate.utils import DistributedType, fsdp_utils

def backend(self, *args):
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU

def report(accelerator, model):
    model = prepare(accelerator, model)
    whole = sum(p.numel() for p in model.parameters())
    shards = sum(p.to_local().numel() for p in model.parameters())
    Path(__file__).with_name("share" + os.environ["RANK"]).write_text(str(shards / whole))
    return model

prepare, fsdp_utils.fsdp2_prepare_model = fsdp_utils.fsdp2_prepare_model, report
state.PartialState._prepare_backend = backend
import accelerate.accelerator
accelerate.accelerator.fsdp2_prepare_model = report
"""
STOP_AFTER_SIX_STEPS = """
def step(self, *args, **options):
    if self.state.global_step == 6:
        raise KeyboardInterrupt
    return whole_step(self, *args, **options)

import transformers
whole_step, transformers.Trainer.training_step = transformers.Trainer.training_step, step
"""


def in_shards(arguments, site, more="", succeeds=True):
    """FSDP 2 over two processes. accelerate has FSDP for accelerators only: here it takes CPU and gloo for two of them.
    The settings are those that trl ships.

    Each process writes its share of the weights into a file of its own: lines of two processes can mix in one pipe.
    """
    (site / "sitecustomize.py").write_text(IN_FLOAT32 + FSDP_ON_CPU + more)
    config = Path(trl.__file__).parent / "accelerate_configs" / "fsdp2.yaml"
    how = {"succeeds": succeeds, "ACCELERATE_TORCH_DEVICE": "cpu"}
    said = in_two(arguments, site, "--config_file", str(config), **how)
    if not succeeds:
        return said
    shares = [float((site / f"share{rank}").read_text()) for rank in range(2)]
    assert sum(shares) == pytest.approx(1) and max(shares) < 0.6
    return said


def test_shards_train_as_one(arguments, site, tmp_path):
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    in_shards([*arguments, "--out", str(tmp_path / "two")], site)
    check_same(tmp_path, 1e-5)


def test_merged_is_what_was_trained(pairs, arguments, tmp_path):
    preset = load_preset("tiny", overrides(pairs))
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    rows = read_instructions(preset.instructions, "train", preset.corpus, preset.recovery.num_examples)
    model, tokenizer = load_model(tmp_path / "model", device="cpu"), load_tokenizer(tmp_path / "model")
    adapted, _ = lora.finetune_lora(model, tokenizer, rows, preset.recovery, tmp_path / "training", seed=3)
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in lora.merge(adapted).named_parameters())
    assert load_tokenizer(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_a_killed_merge_leaves_nothing_and_is_done_again(arguments, tmp_path, monkeypatch):
    out = ["--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*arguments, *out]) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.json", "out.training"}
    monkeypatch.setattr(lora.SFTTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert main([*arguments, *out]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.json", "out"}


def test_what_cannot_be(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    out = ["--out", str(tmp_path / "out")]
    for extra, reason in (
        (["--out", str(tmp_path / "model")], "exists: give another --out"),
        (["--out", str(tmp_path / "missing" / "out")], "does not exist: make it"),
        ([*out, "--model", str(tmp_path / "none")], "none does not exist: give a folder"),
        ([*out, "--model", "owner/none"], "owner/none cannot be loaded"),
        ([*out, "--set", "recovery.report_to=nobody"], "report_to = 'nobody' cannot be used (nobody is not supported"),
        ([*out, "--set", "recovery.report_to=wandb"], "wandb`): install it, or set recovery.report_to=none"),
    ):
        assert main([*arguments, *extra]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.json"}


# ---------------------------------------------------------------- distill

TEACHING = ["num_tokens=960", "batch_tokens=80", "warmup_steps=1", "muon_lr=0.01", "adamw_lr=1e-2"]


@pytest.fixture
def lessons(pairs, tokenizer, tmp_path):
    """A dense model, and text, for the pruned one in a folder."""
    save_model(small_model(), tokenizer, tmp_path / "dense")
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(2, 60, (100, 20), generator=generator).tolist()
    (tmp_path / "text.txt").write_text(
        END_OF_DOCUMENT.join(" ".join(f"w{word}" for word in words) for words in documents)
    )
    settings = [
        f"model={tmp_path / 'dense'}",
        f"corpus=file:{tmp_path / 'text.txt'}",
        "frontier.calibration.length=20",
        "device=cpu",
    ]
    settings += [f"distillation.{pair}" for pair in TEACHING]
    return ["distill", "--model", str(tmp_path / "model"), *(part for pair in settings for part in ("--set", pair))]


def check_taught(folder, tolerance):
    start, one, two = (weights(folder / name) for name in ("model", "one", "two"))
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, rtol=0, atol=tolerance), name
        assert not torch.allclose(start[name], tensor, atol=1e-3), name
    assert {path.name for path in folder.iterdir()} == {"model", "dense", "rows.json", "text.txt", "one", "two"}


def test_two_processes_are_taught_as_one(lessons, site, tmp_path):
    assert main([*lessons, "--out", str(tmp_path / "one")]) == 0
    in_two([*lessons, "--out", str(tmp_path / "two")], site, "--multi_gpu")
    check_taught(tmp_path, 1e-5)


def test_a_folder_of_somebody_else_is_not_taken_for_a_training(lessons, tmp_path, capsys):
    (tmp_path / "one.training").mkdir()
    (tmp_path / "one.training" / "thesis.txt").write_text("mine")
    assert main([*lessons, "--out", str(tmp_path / "one")]) == 2
    assert "one.training is there and is no training: move it away" in capsys.readouterr().err
    assert (tmp_path / "one.training" / "thesis.txt").read_text() == "mine" and not (tmp_path / "one").exists()


def test_shards_are_taught_as_one_also_when_they_are_stopped(lessons, site, tmp_path):
    two = [*lessons, "--out", str(tmp_path / "two")]
    assert main([*lessons, "--out", str(tmp_path / "one")]) == 0
    assert "the same command goes on" in in_shards(two, site, STOP_AFTER_SIX_STEPS, succeeds=False)
    assert checkpoints(tmp_path / "two.training") == ["checkpoint-6"]
    in_shards(two, site)
    check_taught(tmp_path, 1e-5)


def test_begun_in_shards_it_begins_anew_without(lessons, site, tmp_path, monkeypatch):
    """Checkpoints of shards are files of another kind."""
    steps, step, two = [], Trainer.training_step, [*lessons, "--out", str(tmp_path / "two")]
    in_shards(two, site, STOP_AFTER_SIX_STEPS, succeeds=False)
    assert checkpoints(tmp_path / "two.training") == ["checkpoint-6"]
    monkeypatch.setattr(Trainer, "training_step", lambda *given: steps.append(1) or step(*given))
    assert main(two) == 0 and len(steps) == 12


def test_lora_begins_anew_in_shards(arguments, site, tmp_path):
    """In as many processes as before."""
    two = [*arguments, "--out", str(tmp_path / "two")]
    (site / "sitecustomize.py").write_text(IN_FLOAT32 + STOP_AFTER_SIX_STEPS)
    in_two(two, site, "--multi_gpu", succeeds=False)
    assert checkpoints(tmp_path / "two.training") == ["checkpoint-6"]
    in_shards(two, site)
    assert (tmp_path / "two" / "config.json").exists()


def test_an_adapter_in_shards_is_merged(lessons, site, tmp_path):
    adapter = ["--set", "distillation.lora_r=4", "--set", "distillation.muon_lr=0"]
    assert main([*lessons, *adapter, "--out", str(tmp_path / "one")]) == 0
    in_shards([*lessons, *adapter, "--out", str(tmp_path / "two")], site)
    check_same(tmp_path, 1e-5, {"dense", "text.txt"})


def test_a_student_of_an_adapter_is_as_narrow_as_the_preset_says(lessons, tokenizer, tmp_path):
    adapter = ["distillation.lora_r=4", "distillation.muon_lr=0", "dtype=bfloat16"]
    assert (
        main([*lessons, *(part for pair in adapter for part in ("--set", pair)), "--out", str(tmp_path / "one")]) == 0
    )
    start, found = (load_model(tmp_path / name, "bfloat16", "cpu") for name in ("model", "one"))
    teacher, text = (
        load_model(tmp_path / "dense", device="cpu"),
        training_windows(f"file:{tmp_path / 'text.txt'}", tokenizer, 20, 1200),
    )
    assert json.loads((tmp_path / "one" / "config.json").read_text())["dtype"] == "bfloat16"
    assert kl_to(teacher, found.float(), text) < 0.9 * kl_to(teacher, start.float(), text)


@pytest.mark.parametrize(
    ("command", "knob"), [("recover", "recovery.batch_size"), ("distill", "distillation.batch_tokens")]
)
def test_too_little_memory(command, knob, lessons, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert main([*(arguments if command == "recover" else lessons), "--out", str(tmp_path / "one")]) == 2
    assert re.search(rf"error: .* needs .* GB, but 0.0 GB are free on cpu: lower {knob}", capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "dense", "rows.json", "text.txt"}


@pytest.mark.parametrize("command", ["recover", "distill"])
def test_started_again_meanwhile(command, lessons, arguments, tmp_path, monkeypatch, capsys):
    """The second start is refused; the file that a killed one left is no lock."""
    start = [*(arguments if command == "recover" else lessons), "--out", str(tmp_path / "one")]
    codes, train = [], Trainer.train

    def started_again(self, *given, **how):
        if not codes:
            codes.append("running")
            codes.append(main(start))
        return train(self, *given, **how)

    monkeypatch.setattr(Trainer, "train", started_again)
    (tmp_path / ".one.training.lock").touch()
    assert main(start) == 0 and codes == ["running", 2]
    refusal = f"error: another training is working in {tmp_path / 'one.training'}: wait for it, or give another --out"
    assert refusal in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model", "dense", "rows.json", "text.txt", "one"}


def test_no_tokens(lessons, tmp_path, capsys):
    assert main([*lessons, "--set", "distillation.num_tokens=0", "--out", str(tmp_path / "one")]) == 2
    assert (
        "distillation.num_tokens is 0, so there is nothing to learn: give a number of tokens" in capsys.readouterr().err
    )


def test_a_row_for_each_shard(lessons, tokenizer, site, tmp_path):
    model = small_model()
    surgery.keep_channels(model, 1, [3])
    save_model(model, tokenizer, tmp_path / "model")
    out = ["--out", str(tmp_path / "two")]
    said = in_shards([*lessons, *out], site, succeeds=False)
    assert (
        "Muon cannot work on a matrix of 1 rows in 2 shards: start at most 1 processes, or set distillation.muon_lr=0"
        in said
    )
    assert not (tmp_path / "two").exists()


def test_more_processes_than_cards(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="the process has no card cuda:2: start as many processes as there are cards"):
        is_one_of_several()


def test_training_stays_on_the_card_that_the_model_is_on(tmp_path, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    second = torch.device("cuda:1")
    assert trainer.arguments(tmp_path, second).device == second and current == [second]
    monkeypatch.setattr(trainer, "is_one_of_several", lambda: True)  # a launcher's processes have a card each
    assert trainer.arguments(tmp_path, second).device != second


def test_a_pause_does_not_count_as_training():
    """Steps may differ in length; one of many medians is a pause, and counts as a median."""
    assert trainer.training_seconds(pd.DataFrame({"seconds": [3.0, 2.0, 2.0, 1900.0, 2.0]})) == 11
