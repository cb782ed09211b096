"""The uneven class: it is Llama, it saves, it loads, with and without gqalib."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import kv_heads, small_config, small_model
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from peft import get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gqalib import InputError, stream
from gqalib.measure import cost
from gqalib.model import shapes, surgery
from gqalib.model.load import (
    GqaLlamaConfig,
    GqaLlamaForCausalLM,
    check_model,
    load_config,
    load_model,
    load_tokenizer,
    random_model,
    save_model,
    shape_config,
    to_device,
)
from gqalib.recover import trainer
from gqalib.run import corpora, instructions


@pytest.fixture
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<e>": 0, "a": 1}, "<e>")), eos_token="<e>")


@pytest.fixture
def uneven(model):
    groups = kv_heads(model)
    surgery.keep_groups(model, 0, range(1, groups))
    surgery.keep_groups(model, 2, [0])
    surgery.keep_channels(model, 1, range(0, 24, 2))
    if model.config.tie_word_embeddings:  # half of them: the KV cache begins with the second layer
        surgery.drop_attention(model, 0)
    return model


def test_is_llama(windows, tmp_path):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
                                         num_attention_heads=8, num_key_value_heads=2, head_dim=6)).eval()  # fmt: skip
    llama.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded).__name__ == "GqaLlamaForCausalLM"
    assert torch.equal(loaded(windows).logits, llama(windows).logits)


def edit(folder, **changes):
    """Change values of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_llama_whose_heads_do_not_divide_its_hidden_size(windows, tokenizer, tmp_path):
    """transformers refuses it as a Llama, and its tokenizer, too, although `head_dim` is given."""
    llama = small_model(hidden_size=64, num_attention_heads=12, num_key_value_heads=4, head_dim=8)
    save_model(llama, tokenizer, tmp_path)
    edit(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"], auto_map={})
    assert torch.equal(load_model(str(tmp_path), device="cpu")(windows).logits, llama(windows).logits)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()


def test_save_load_same_logits(uneven, logits_of, tokenizer, tmp_path):
    save_model(uneven, tokenizer, tmp_path)
    for loaded in (load_model(str(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert torch.equal(logits_of(loaded), logits_of(uneven))
        assert shapes.layer_shapes(loaded).equals(shapes.layer_shapes(uneven))
        assert loaded.config.tie_word_embeddings == uneven.config.tie_word_embeddings


# trust_remote_code: without gqalib, transformers loads such a folder in no other way, so nothing else can be tested.
# What it trusts is this repository's own file, which save_model has just copied; the process has no network.
WITHOUT_GQALIB = """
import sys; sys.modules["gqalib"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
for folder in map(str.strip, sys.stdin):
    expected = load_file(folder + "/expected.safetensors")
    load = lambda kind: kind.from_pretrained(folder + "/m", trust_remote_code=True).eval()
    logits = load(AutoModelForCausalLM)(expected["x"], use_cache=False).logits
    states = load(AutoModel)(expected["x"], use_cache=False).last_hidden_state  # vLLM's
    print(torch.equal(logits, expected["y"]), torch.equal(states, expected["states"]), flush=True)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What says, in a process that has no gqalib, whether a saved folder gives the logits and the last hidden states
    that are expected."""
    home = tmp_path_factory.mktemp("elsewhere")
    environment = {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": (home / "said").open("w"), "text": True}
    command = [sys.executable, "-c", WITHOUT_GQALIB]
    with subprocess.Popen(command, cwd=home, env=environment, **pipes) as process:

        def same(folder):
            print(folder, file=process.stdin, flush=True)
            return process.stdout.readline().split() or (home / "said").read_text()[-2000:]

        yield same
        process.stdin.close()


def test_loads_without_gqalib(uneven, windows, logits_of, tokenizer, tmp_path, elsewhere):
    """A saved folder carries its own modelling code, so that plain transformers can load it."""
    save_model(uneven, tokenizer, tmp_path / "m")
    with torch.no_grad():
        states = uneven.model(windows, use_cache=False).last_hidden_state
    save_file({"x": windows, "y": logits_of(uneven), "states": states}, tmp_path / "expected.safetensors")
    assert elsewhere(tmp_path) == ["True", "True"]


def test_a_saved_folder_names_every_class(tokenizer, tmp_path):
    """Also one that was loaded from a folder that named fewer. vLLM wants the configuration first."""
    save_model(small_model(), tokenizer, tmp_path / "old")
    edit(tmp_path / "old", auto_map={"AutoConfig": "elsewhere.Config"})
    save_model(load_model(str(tmp_path / "old")), tokenizer, tmp_path / "new")
    found = json.loads((tmp_path / "new" / "config.json").read_text())["auto_map"]
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    assert list(found.items()) == [(key, f"modeling_gqa_llama.GqaLlama{name}") for key, name in classes.items()]


def test_cached_and_uncached_generation_agree(uneven, windows):
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = uneven.generate(windows[:2], use_cache=False, **options)
    for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(uneven.generate(windows[:2], use_cache=True, **cache, **options), expected)


def test_a_cache_is_read_from_where_the_text_stopped(uneven, windows, logits_of):
    """Without positions given: transformers asks the cache how long the text was."""
    with torch.no_grad():
        first = uneven(windows[:, :13], use_cache=True)
        second = uneven(windows[:, 13:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), logits_of(uneven), atol=1e-4)


def test_some_layer_has_attention(tmp_path, tokenizer):
    save_model(small_model(), tokenizer, tmp_path)
    for changes, says in (
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, "no layer has attention: give one of them"),
        ({"num_attention_heads": 0}, "layer 0 has 0 query heads, 4 KV heads"),
        ({"num_key_value_heads": 0}, "layer 0 has 8 query heads, 0 KV heads"),
    ):
        edit(tmp_path, per_layer_config=None, **{"num_attention_heads": 8, "num_key_value_heads": 4, **changes})
        with pytest.raises(InputError, match=says):
            load_config(str(tmp_path))


@pytest.mark.parametrize("implementation", ["eager", "blocked"])
def test_attention_implementations_agree(uneven, windows, logits_of, implementation):
    expected = logits_of(uneven)
    uneven.set_attn_implementation(implementation)
    assert uneven.model.layers[1].self_attn.config._attn_implementation == implementation
    assert torch.allclose(logits_of(uneven), expected, atol=1e-4)


def test_blocked_attention_over_several_blocks(logits_of, monkeypatch):
    monkeypatch.setattr("gqalib.model.attention.BLOCK", 7)
    model = small_model()
    expected = logits_of(model)
    model.set_attn_implementation("blocked")
    assert torch.allclose(logits_of(model), expected, atol=1e-4)


def test_golden_count():
    counts = shapes.count_parameters(random_model(shape_config("llama-3-8b"), device="meta"))
    assert counts["total"] == 8_030_261_248
    assert counts["backbone"] == 6_979_321_856
    assert counts["embeddings"] == 1_050_673_152
    assert counts["norms"] == 266_240


def test_without_its_attention_a_layer_counts_as_its_mlp(model):
    dense = shapes.count_parameters(model)
    surgery.drop_attention(model, 1)
    counts = shapes.count_parameters(model)
    assert counts["attention"] * 3 == dense["attention"] * 2 and counts["mlp"] == dense["mlp"]
    assert dense["norms"] - counts["norms"] == 32  # the norm in front of it
    assert shapes.layer_shapes(model).loc[1].tolist() == [0, 0, 24]


def test_count_matches_tensors(model):
    assert shapes.count_parameters(model)["total"] == sum(p.numel() for p in model.parameters())


def test_size_of(model, clone):
    dense = shapes.count_parameters(model)
    assert shapes.size_of(model, dense) == {"parameters_kept_percent": 100.0, "backbone_removed_percent": 0.0}
    surgery.keep_channels(model, 0, range(12))
    removed = 12 * 3 * 32
    assert shapes.size_of(model, dense)["backbone_removed_percent"] == pytest.approx(100 * removed / dense["backbone"])


@pytest.mark.parametrize(
    ("config", "files", "says"),
    [
        (None, [], "no readable config.json"),
        ({"model_type": "gpt2"}, ["model.safetensors"], "no Llama"),
        ({"model_type": "llama"}, ["pytorch_model.bin"], "pickled"),
    ],
)
def test_folders_that_are_no_model(tmp_path, config, files, says):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=says):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 40}, r"embed_tokens.weight is \[61, 32\] instead of \[61, 40\]"),
        ({"num_hidden_layers": 4}, "layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 2}, "layers.2.input_layernorm.weight is left over"),
    ],
)
def test_weights_of_another_configuration(changes, says, tokenizer, tmp_path):
    save_model(small_model(), tokenizer, tmp_path)
    edit(tmp_path, per_layer_config=None, **changes)
    with pytest.raises(
        InputError, match=f"of another configuration .*{says}.*: give the config.json that was saved with them"
    ):
        load_model(str(tmp_path))


def test_an_adapter_beside_the_weights_is_no_part_of_the_model(tokenizer, logits_of, clone, tmp_path):
    """transformers would put it on top without a word."""
    model = small_model()
    save_model(model, tokenizer, tmp_path)
    with trainer.quiet():
        get_peft_model(clone(model), trainer.lora_config(2, 4)).save_pretrained(tmp_path)
    for load in (load_model, load_config):
        with pytest.raises(InputError, match="an adapter beside its weights: remove adapter_config.json, or merge"):
            load(str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    assert torch.equal(logits_of(load_model(str(tmp_path), device="cpu")), logits_of(model))


@pytest.mark.parametrize("same", [False, True], ids=["own lm_head", "the table twice"])
def test_what_the_weights_tie_is_tied_whatever_the_configuration_says(same, tokenizer, windows, tmp_path):
    """So that counts on paper are those of the model."""
    model = small_model(tie_word_embeddings=False)
    if same:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    save_model(model, tokenizer, tmp_path)
    edit(tmp_path, tie_word_embeddings=True)
    loaded, config = load_model(str(tmp_path), device="cpu"), load_config(str(tmp_path))
    on_paper = random_model(config, device="meta")
    assert torch.equal(loaded(windows).logits, model(windows).logits)
    assert loaded.config.tie_word_embeddings == config.tie_word_embeddings == same
    for count in (shapes.count_parameters, cost.weight_bytes, cost.step_bytes):
        assert count(on_paper) == count(loaded)


def torn(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"is quantized \(gptq\): give the model that it"),
        ({"quantization_config": {"quant_method": "awq"}}, r"is quantized \(awq\): give the model"),
        ({"quantization_config": {"load_in_4bit": True}}, r"is quantized \(bitsandbytes\): give the model"),
        ({"rms_norm_eps": 1}, r"no Llama's \(.*'rms_norm_eps': .* expected float, got int \(value: 1\)\): correct it"),
        ({"num_attention_heads": 0, "head_dim": None}, r"is no Llama's \(.*\): correct it"),
        ({"num_key_value_heads": 3}, r"is no Llama's \(.* layer 0 has 8 query heads, 3 KV heads .*\): correct it"),
        (torn, r"cannot be loaded \(.* incomplete metadata.*\): check its files, or save it again"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"no readable config.json \(.*\): give a folder"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xe9"), r"no readable config.json \(.*\): give"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer of .* cannot be loaded \(.+\): put token"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), r"tokenizer of .* cannot be loaded \(.+\): put"),
    ],
)
def test_whatever_cannot_be_loaded_is_one_sentence(damage, says, tokenizer, tmp_path):
    save_model(small_model(), tokenizer, tmp_path)
    edit(tmp_path, **damage) if isinstance(damage, dict) else damage(tmp_path)
    with pytest.raises(InputError, match=says) as caught:
        load_tokenizer(str(tmp_path)), load_model(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["mtia:9", "nonsense"])
def test_a_device_that_cannot_be_had(device, logits_of):
    model = small_model()
    expected = logits_of(model)
    uses = [
        lambda: to_device(model, device),
        lambda: load_model("shape:tiny", device=device),
        lambda: stream.streamed(model, device),
    ]
    for use in uses:
        with pytest.raises(InputError, match=rf"^the model cannot be put on {device} \(.+\): give a device .*$"):
            use()
    assert torch.equal(logits_of(model), expected)


def hub_error(kind):
    response = SimpleNamespace(headers={}, status_code=403, request=None, url="", reason="", text="")
    return kind("403", response=response)


@pytest.mark.parametrize(
    ("cause", "says"),
    [
        (
            hub_error(GatedRepoError),
            "model a/b is gated: ask for access on its page, then log in with `hf auth login`, or give a folder",
        ),
        (
            hub_error(RepositoryNotFoundError),
            "model a/b is not on the hub, or private: check the name, log in with `hf auth login`",
        ),
        (
            ConnectionError("no route"),
            r"model a/b cannot be loaded \(first line\): connect, log in with `hf auth login` if it is gated",
        ),
    ],
)
def test_hub_models_that_cannot_be_had(cause, says, monkeypatch):
    """Whether the configuration is refused, or only the weights are."""

    def refuse(*args, **kwargs):
        raise OSError("first line.\nsecond line") from cause

    untied = small_config(tie_word_embeddings=False)
    with monkeypatch.context() as patch:
        patch.setattr(GqaLlamaForCausalLM, "from_pretrained", refuse)
        patch.setattr(GqaLlamaConfig, "get_config_dict", lambda source: (untied.to_dict(), {}))
        with pytest.raises(InputError, match=says):
            load_model("a/b")
    monkeypatch.setattr(GqaLlamaConfig, "get_config_dict", refuse)
    with pytest.raises(InputError, match=says) as caught:
        load_model("a/b")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- shapes


def test_a_shape_is_a_model_of_random_weights():
    model = load_model("shape:tiny", "bfloat16", "cpu")
    assert model.dtype == torch.bfloat16 and not model.training and model.device.type == "cpu"
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    shape = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 224}
    assert shapes.layer_shapes(model).to_dict("records") == [shape] * 4
    assert 0.01 < model.model.layers[0].mlp.up_proj.weight.float().std() < 0.04


def test_a_shape_has_the_same_weights_every_time_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (load_model("shape:tiny", device="cpu").state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    other = random_model(shape_config("tiny"), device="cpu", seed=1).state_dict()
    assert not torch.equal(other["lm_head.weight"], first["lm_head.weight"])


def test_weights_are_made_in_the_dtype_and_on_the_device_asked(monkeypatch):
    """Never in float32 first, never on the CPU first: 8B parameters would not fit."""
    made = set()
    monkeypatch.setattr(
        torch.nn.Linear, "reset_parameters", lambda self: made.add((self.weight.dtype, self.weight.device.type))
    )
    random_model(shape_config("tiny"), "bfloat16", "meta")
    assert made == {(torch.bfloat16, "meta")}


def test_a_pruned_shape_saves_and_loads(tmp_path):
    model, tokenizer = load_model("shape:tiny", device="cpu"), load_tokenizer("shape:tiny")
    surgery.keep_groups(model, 1, [0, 5])
    save_model(model, tokenizer, tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert load_tokenizer(str(tmp_path))("w7 . w9")["input_ids"] == [7, 1, 9]


def test_a_tokenizer_of_more_tokens_than_the_model_has_rows(tokenizer, tmp_path):
    """The end of a text pads; a text with such a token, and an end without a row, is one sentence."""
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    save_model(small_model(vocab_size=2), tokenizer, tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id == 2 and loaded.pad_token_id == loaded.eos_token_id == 0
    says = r"the text has '\[PAD\]', token 2, but the model's embeddings end at 1: take it out of the text"
    for encode in (corpora.token_ids, lambda *text: corpora.running_text_ids(*text, 9)):
        assert encode(iter(["a"]), loaded).max() < 2
        with pytest.raises(InputError, match=says):
            encode(iter(["a", "a[PAD]"]), loaded)
    with pytest.raises(InputError, match=says):
        instructions.examples([{"prompt": "a", "completion": "[PAD]"}], loaded, 9)
    for mark in ("[PAD]", None):
        tokenizer.eos_token = mark
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(InputError, match="cannot end a text .*: correct its tokenizer_config.json"):
            load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("pad", [61, -1])
def test_a_padding_token_without_a_row_is_none(pad, tokenizer, logits_of, tmp_path):
    model = small_model()
    save_model(model, tokenizer, tmp_path)
    edit(tmp_path, pad_token_id=pad)
    loaded = load_model(str(tmp_path), device="cpu")
    assert loaded.config.pad_token_id is None and torch.equal(logits_of(loaded), logits_of(model))


def test_the_tokenizer_of_a_shape():
    tokenizer = load_tokenizer("shape:tiny")
    assert len(tokenizer) == shape_config("tiny").vocab_size and tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert tokenizer("w2 w511 w512 .")["input_ids"] == [2, 511, 0, 1] and tokenizer.decode([3, 1]) == "w3 ."


def test_unknown_shapes():
    with pytest.raises(InputError, match="unknown shape 'shape:huge': use shape:llama-3-8b, shape:tiny"):
        check_model("shape:huge")


def test_missing_folder():
    with pytest.raises(InputError, match="does not exist"):
        check_model("/nowhere/at/all")


# ---------------------------------------------------------------- output biases, dropped layers


@pytest.fixture
def corrected(model):
    """Biases on single projections, uneven widths, and a layer gone."""
    surgery.keep_groups(model, 2, [0])
    surgery.keep_channels(model, 0, range(9))
    surgery.add_output_bias(model, 2, "o_proj", torch.linspace(-1, 1, 32))
    surgery.add_output_bias(model, 0, "down_proj", torch.linspace(1, 2, 32))
    surgery.drop_layers(model, [1])
    return model


def test_biases_and_dropped_layers_save_and_load(corrected, logits_of, tokenizer, tmp_path):
    save_model(corrected, tokenizer, tmp_path)
    for loaded in (load_model(str(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert torch.equal(logits_of(loaded), logits_of(corrected))
        assert [x.self_attn.o_proj.bias is not None for x in loaded.model.layers] == [False, True]
        assert [x.mlp.down_proj.bias is not None for x in loaded.model.layers] == [True, False]
        assert loaded.config.num_hidden_layers == 2 and loaded.model.layers[0].self_attn.q_proj.bias is None


def test_biases_and_dropped_layers_load_without_gqalib(corrected, windows, logits_of, tokenizer, tmp_path, elsewhere):
    test_loads_without_gqalib(corrected, windows, logits_of, tokenizer, tmp_path, elsewhere)


def test_biases_and_dropped_layers_generate(corrected, windows):
    test_cached_and_uncached_generation_agree(corrected, windows)


def test_biases_and_dropped_layers_count(corrected):
    counts = shapes.count_parameters(corrected)
    assert counts["total"] == sum(p.numel() for p in corrected.parameters())
    weights = sum(
        p.numel() for n, p in corrected.named_parameters() if ("self_attn" in n or "mlp" in n) and n.endswith("weight")
    )
    assert counts["backbone"] == weights + 2 * 32
    assert cost.count_flops(corrected, 1, 12) == cost.closed_form_flops(corrected, 12)
    kv_heads_left = shapes.layer_shapes(corrected)["num_key_value_heads"].sum()
    assert cost.kv_cache_bytes_per_token(corrected) == 2 * 6 * 4 * kv_heads_left


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_llama_biases_stay(bias, logits_of, tokenizer, tmp_path):
    """A Llama that has biases everywhere keeps them, cut or not; an output bias is added to the one that is there."""
    model = small_model(**{bias: True})
    for name, parameter in model.named_parameters():
        parameter.data.normal_() if name.endswith("bias") else None
    surgery.keep_groups(model, 0, [1, 3])
    surgery.keep_channels(model, 1, range(7))
    surgery.add_output_bias(model, 1, "o_proj", torch.ones(32))
    surgery.add_output_bias(model, 1, "down_proj", torch.ones(32))
    save_model(model, tokenizer, tmp_path)
    assert torch.equal(logits_of(load_model(str(tmp_path))), logits_of(model))
