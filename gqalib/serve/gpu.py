"""What a GPU's tools must be told of a pruned model: the matrices that do not fit a group, and a script that heeds
them."""

from collections.abc import Sequence

from torch import nn

W4A16 = """\
import sys

from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoTokenizer

sys.path.append("{folder}")  # the model's class lies beside its weights
from modeling_gqa_llama import GqaLlamaForCausalLM

model = GqaLlamaForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
weights = {{"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": {group}}}
recipe = GPTQModifier(
    config_groups={{"group_0": {{"targets": ["Linear"], "weights": weights}}}},
    ignore=[{ignored}],
)
oneshot(
    model=model, tokenizer=tokenizer, dataset="open_platypus", recipe=recipe, max_seq_length=2048,
    num_calibration_samples=512,
)
model.save_pretrained("{folder}-w4a16", save_compressed=True)
tokenizer.save_pretrained("{folder}-w4a16")"""


def misfits(model: nn.Module, group: int) -> list[str]:
    """The names of the layers' matrices whose columns a group does not divide; the model may be on `meta`."""
    parts = model.model.layers.named_modules(prefix="model.layers")
    return [name for name, part in parts if isinstance(part, nn.Linear) and part.in_features % group]


def w4a16(folder: str, ignore: Sequence[str], group: int = 32) -> str:
    """A script for llm-compressor 0.14 that writes a saved model in 4 bits with one scale for each `group` columns.
    It leaves out the output matrix and the matrices named in `ignore`, for which it would end with an error."""
    ignored = ", ".join(f'"{name}"' for name in ("lm_head", *ignore))
    if ignore:
        ignored = "\n        " + ignored.replace(", ", ",\n        ") + ",\n    "
    return W4A16.format(folder=folder, ignored=ignored, group=group)
