"""Several processes, one calibration: under `torchrun` each takes its share of the windows, and what they sum is summed over all.

Without `torchrun` (or inside one process) everything here does nothing.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def rank_and_size() -> tuple[int, int]:
    """This process' number and how many there are; 0 and 1 where there is no process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Inside, the processes that `torchrun` started know each other: nccl on CUDA, where each has a card of its own, else gloo.

    Yields the device of this process.
    """
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def share(windows: torch.Tensor) -> torch.Tensor:
    """This process' rows of windows [count, length]: every size-th, from its rank on; none if there are fewer rows than processes."""
    rank, size = rank_and_size()
    return windows[rank::size]


def sum_over_ranks(tensors: Iterable[torch.Tensor]) -> None:
    """Replace tensors, of the same shapes everywhere, by their sums over all processes, in one message per dtype and device."""
    groups: dict[tuple, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    if rank_and_size()[1] == 1:
        return
    for group in groups.values():
        joined = torch.cat([tensor.flatten() for tensor in group])
        on_wire = joined.to("cuda") if dist.get_backend() == "nccl" else joined
        dist.all_reduce(on_wire)
        for tensor, total in zip(group, on_wire.to(joined.device).split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(total.view_as(tensor))


def mean_over_ranks(values: torch.Tensor) -> float:
    """Mean of all processes' values, [count] in each."""
    if rank_and_size()[1] == 1:
        return values.mean().item()
    totals = torch.stack([values.sum(), values.new_tensor(len(values))])
    sum_over_ranks([totals])
    return (totals[0] / totals[1]).item()


def total_over_ranks(number: int) -> int:
    """Sum of a whole number of each process."""
    total = torch.tensor([number])
    sum_over_ranks([total])
    return int(total)
