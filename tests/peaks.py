"""Run by test_memory in a process of its own: measured over expected, the weights apart, of every stage at one size."""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from conftest import small_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from gqalib import stream
from gqalib.measure import memory
from gqalib.measure.cost import weight_bytes
from gqalib.model.modeling_gqa_llama import GqaLlamaForCausalLM
from gqalib.prune import allocate, founding, plans, refit, scores, search
from gqalib.recover import distill
from gqalib.recover.lora import finetune_lora
from gqalib.run.presets import Distillation, Recovery

SIZES = {
    "small": {
        "vocab_size": 16_000,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "large": {
        "vocab_size": 24_000,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
    },
}
NARROW = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 8}  # as the reference model's


def random_model(size, **changes):
    shape = {**SIZES[size], "num_key_value_heads": 2, "head_dim": 64, **changes}
    config = small_config(**shape, max_position_embeddings=128, tie_word_embeddings=False)
    torch.manual_seed(0)
    return GqaLlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def ratio(stage, model, num_examples, work, copies=0, **options):
    """Peak over expectation, both without the weights, which were there before."""
    terms = memory.expected(stage, model, num_examples, 128, **options) | {"copies": copies * weight_bytes(model)}
    windows = torch.randint(1, model.config.vocab_size, (num_examples, 128))
    with memory.stage(stage, terms, model, say=lambda line: None) as peak:
        work(windows)
    weights = terms["weights"] / 1e9
    return (peak.peak_gb - weights) / (peak.expected_gb - weights)


def tokenizer():
    words = Tokenizer(WordLevel({"<e>": 0, "<u>": 1, "a": 2}, "<u>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", pad_token="<e>", unk_token="<u>")


def in_context(model, windows, plan, covariances):
    """A copy of the model is pruned, and looked at."""
    table = allocate.cost_table(model, windows, covariances)
    trial = search.Trial(model, windows, covariances)
    search.look(trial, table, plan, windows)


def measure(size):
    ratios, enough = {}, {"small": 6, "large": 9}[size]  # windows: as many tokens as the MLP is wide
    model = random_model(size)
    first = [int(i == 0) for i in range(len(model.model.layers))]
    plan = plans.Plan([0.3 * i for i in first], first, [300 * i for i in first])
    covariances = [(torch.eye(model.config.hidden_size, dtype=torch.float64),) * 2] * len(first)
    rows = [{"prompt": "a " * 20, "completion": "a " * 120}] * 4
    lora = Recovery(1e-4, 8, 16, 0.0, 1, None, 4, 1, 128, 0.0, "linear", "none")
    ratios["layer removal"] = ratio("layer removal", model, 4, lambda w: founding.removal_importance(model, w))
    ratios["one-shot Taylor"] = ratio("one-shot Taylor", model, 4, lambda w: founding.taylor_scores(model, w))
    ratios["gradient covariances"] = ratio(
        "gradient covariances", model, 4, lambda w: scores.gradient_covariances(model, w)
    )
    ratios["cost table"] = ratio("cost table", model, enough, lambda w: allocate.cost_table(model, w, covariances))
    ratios["all gradients"] = ratio("all gradients", model, 4, lambda w: scores.backward(model, w))
    model.zero_grad(set_to_none=True)
    stream.BATCH_TOKENS = 512
    ratios["context"] = ratio("context", model, enough, lambda w: in_context(model, w, plan, covariances), 1)
    ratios["one-shot Taylor, by layer"] = ratio("one-shot Taylor", model, 8, lambda w: founding.taylor_scores(model, w))
    ratios["sequential Taylor"] = ratio("sequential Taylor", model, 4, lambda w: founding.prune(model, plan, w))
    model = random_model(size)
    ratios["LoRA"] = ratio(
        "LoRA",
        model,
        4,
        lambda w: finetune_lora(model, tokenizer(), rows, lora, Path(tempfile.mkdtemp())),
        settings=lora,
    )
    model = random_model(size)
    plan = plans.uniform_plan(model, 0.3)
    ratios["sweep"] = ratio("sweep", model, enough, lambda w: refit.sweep(model, plan, w, covariances=covariances))
    for name, shape, r in (
        ("distillation", {}, 0),
        ("distillation, narrow heads", NARROW, 0),
        ("distillation, adapter", {}, 8),
    ):
        student, teacher = random_model(size, **shape), random_model(size, **shape)
        settings = Distillation(num_tokens=1024, batch_tokens=512, lora_r=r)
        with tempfile.TemporaryDirectory() as folder:
            run = partial(distill.distill, student, teacher, settings=settings, folder=Path(folder))
            ratios[name] = ratio("distillation", student, 4, run, settings=settings)
    return ratios


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
