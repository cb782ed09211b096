"""What this process runs on: whether products in bf16 are fast there, whether a launcher started others beside it."""

import os

import torch

from gqalib.errors import InputError


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the processor has instructions for it: without, as on many a laptop, products in bf16 are 40 times
    slower than in float32."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_bf16(dtype: str, device: torch.device) -> bool:
    """Whether a training's matrix products are in bf16, if its settings say `auto`, `float32` or `bfloat16`."""
    return dtype == "bfloat16" or (dtype == "auto" and bf16_is_fast(device))


def is_one_of_several() -> bool:
    """Whether a launcher (`torchrun`, `accelerate launch`) started this process beside others.

    Raises:
        InputError: there are cards, but none for this process.
    """
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if 0 < torch.cuda.device_count() <= number:
        raise InputError(f"the process has no card cuda:{number}: start as many processes as there are cards")
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
