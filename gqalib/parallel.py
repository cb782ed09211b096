"""One training in several processes: each takes its share of a step, and what they sum is summed over all.

`torchrun` or `accelerate launch` starts them; where `accelerate` says FSDP 2, `in_shards` splits a model that is
trained over them. Inside one process everything here does nothing.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gqalib.errors import InputError, one_sentence
from gqalib.model.load import to_device


def rank_and_size() -> tuple[int, int]:
    """This process' number and how many there are; 0 and 1 where there is no process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_one_of_several() -> bool:
    """Whether a launcher started this process beside others, whether or not they know each other yet."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Inside, the processes that a launcher started know each other: nccl on CUDA, where each has a card of its own,
    else gloo.

    Yields the device of this process.
    """
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        with one_sentence(f"the process has no card {device}", "start as many processes as there are cards"):
            torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def sum_over_ranks(tensors: Iterable[torch.Tensor]) -> None:
    """Replace tensors, of the same shapes everywhere, by their sums over all processes, in one message per dtype and
    device."""
    groups: dict[tuple, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    if rank_and_size()[1] == 1:
        return
    for group in groups.values():
        joined = torch.cat([tensor.flatten() for tensor in group])
        on_wire = joined.to("cuda") if dist.get_backend() == "nccl" else joined
        dist.all_reduce(on_wire)
        for tensor, total in zip(
            group, on_wire.to(joined.device).split([tensor.numel() for tensor in group]), strict=True
        ):
            tensor.copy_(total.view_as(tensor))


def total_over_ranks(number: int) -> int:
    """Sum of a whole number of each process."""
    total = torch.tensor([number])
    sum_over_ranks([total])
    return int(total)


def wait_for_all() -> None:
    """Go on when every process is here."""
    total_over_ranks(0)


# ---------------------------------------------------------------- a model in shards


def in_shards(model: nn.Module, opts: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """Put a model that is trained where `accelerate launch` says, and give back its optimisers.

    In place: in shards over the processes (FSDP 2; the parameters become DTensors), or whole on the device of each. One
    process' model stays where it is.

    Raises:
        InputError: accelerate is told something else.
    """
    if rank_and_size()[1] == 1:
        return opts
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.is_fsdp2:
        return [prepared.optimizer for prepared in accelerator.prepare(model, *opts)[1:]]
    if accelerator.distributed_type not in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise InputError(
            f"accelerate is set to {accelerator.distributed_type.value}: use FSDP with fsdp_version 2, or --multi_gpu"
        )
    to_device(model, accelerator.device)
    return opts


def is_in_shards(model: nn.Module) -> bool:
    """Whether each process holds a part of every parameter only."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor from its shards, the same in every process; all of them call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_sharded(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process' part of a whole tensor, which every process has, cut as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
