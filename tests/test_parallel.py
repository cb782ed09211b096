"""Two processes with half the text each find what one finds with all of it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import small_model

from gqalib import InputError, parallel


def test_what_accelerate_may_be_told(monkeypatch):
    monkeypatch.setattr(parallel, "rank_and_size", lambda: (0, 2))
    told = SimpleNamespace(is_fsdp2=False, distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr(parallel, "Accelerator", lambda **_: told)
    with pytest.raises(
        InputError, match="accelerate is set to DEEPSPEED: use FSDP with fsdp_version 2, or --multi_gpu"
    ):
        parallel.in_shards(small_model(), [])


def test_more_processes_than_cards(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "99")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: (_ for _ in ()).throw(RuntimeError("no ordinal\nmore")))
    says = r"the process has no card cuda:99 \(no ordinal\): start as many processes as there are cards"
    with pytest.raises(InputError, match=says), parallel.processes("cuda"):
        pass
