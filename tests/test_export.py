"""Models as .gguf files: what is written comes back, in the type that was asked for; or nothing is written."""

import json
import re

import gguf
import pytest
import torch
from conftest import biased_model, small_model
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from gqalib.errors import InputError
from gqalib.model import deci, surgery
from gqalib.model import gguf as gguf_files
from gqalib.model.load import load_model, load_tokenizer, save_model
from gqalib.run.cli import main
from gqalib.serve import check_export, export, vocabulary

SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 4}
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
IDS = torch.arange(40)[None]


def byte_tokenizer(pre="gpt-2", bos=False, **special) -> PreTrainedTokenizerFast:
    """All bytes and a few merges, cut into words by one of the rules that llama.cpp names."""
    rule, whole = deci.PRE_TOKENIZERS[pre]
    letters = ["<|end|>", *sorted(ByteLevel.alphabet())]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ"), ("1", "2"), ("12", "3"), ("Ġ", "1")]
    vocab = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges), "wxyz"])}
    parts = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": whole}
    files = {"version": "1.0", "added_tokens": [], "pre_tokenizer": rule, "decoder": deci.BYTES, "model": parts}
    words = Tokenizer.from_str(json.dumps(files))
    words.add_tokens([AddedToken("<|end|>", special=True, normalized=False), AddedToken("<tool>", normalized=False)])
    if bos:
        words.post_processor = deci.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>", bos_token="<|end|>", **special)


def piece_tokenizer(metaspace=False) -> PreTrainedTokenizerFast:
    """Of SentencePiece's kind: a few letters and merges, bytes for all others."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"theor12"]
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("th", "e"), ("1", "2")]
    vocab = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>", "byte_fallback": True}
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    each = {"type": "Sequence", "normalizers": [deci.PREFIX, deci.ESCAPED]}
    spaces = {"pre_tokenizer": first} if metaspace else {"normalizer": each}
    decoder = {
        "type": "Sequence",
        "decoders": [deci.UNESCAPED, {"type": "ByteFallback"}, {"type": "Fuse"}, deci.STRIPPED],
    }
    files = {"version": "1.0", "added_tokens": [], "decoder": decoder, "model": model | {"fuse_unk": True}, **spaces}
    words = Tokenizer.from_str(json.dumps(files))
    words.add_special_tokens([AddedToken(token, normalized=False) for token in letters[:3]])
    words.post_processor = deci.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def uneven(model):
    """Other groups and widths in each layer, one of them no multiple of 32."""
    surgery.keep_groups(model, 0, [0, 1, 3]), surgery.keep_groups(model, 1, [2])
    surgery.keep_channels(model, 1, range(41)), surgery.keep_channels(model, 2, range(64))
    return model


def with_output_biases(model):
    (
        surgery.add_output_bias(model, 0, "o_proj", torch.randn(64)),
        surgery.add_output_bias(model, 1, "down_proj", torch.randn(64)),
    )
    return model


def without_attention(model):
    surgery.drop_attention(model, 2), surgery.drop_attention(model, 3)
    return model


MODELS = {
    "dense": lambda: small_model(**SHAPE),
    "uneven": lambda: uneven(small_model(**SHAPE)),
    "untied": lambda: uneven(small_model(**SHAPE, tie_word_embeddings=False)),
    "biases": lambda: uneven(biased_model(**SHAPE)),
    "output biases": lambda: with_output_biases(uneven(small_model(**SHAPE))),
    "without attention": lambda: without_attention(uneven(small_model(**SHAPE))),
    "llama 3": lambda: uneven(small_model(**SHAPE, rope_parameters=LLAMA_3)),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder for models, beside which `models/` is that of .gguf files."""
    monkeypatch.setattr(gguf_files, "MODELS", tmp_path / "models")
    monkeypatch.setattr(gguf_files, "REPOSITORY", tmp_path)
    monkeypatch.setattr(vocabulary, "read_corpus", lambda *_: iter(["the 123rd of 12", "def the(x):\n    return 1  2"]))
    return tmp_path


def exported(place, model, kind, tokenizer=None):
    save_model(model, tokenizer or byte_tokenizer(), place / "pruned")
    said = export.export(str(place / "pruned"), place / "a.gguf", kind)
    return load_model(str(place / "a.gguf"), device="cpu"), said


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_comes_back(name, kind, place):
    model = MODELS[name]()
    back, _ = exported(place, model, kind)
    weights, loaded = model.state_dict(), back.state_dict()
    assert weights.keys() == loaded.keys()
    for key, weight in weights.items():
        assert torch.equal(weight.half().float() if kind == "f16" and weight.ndim > 1 else weight, loaded[key]), key
    shapes = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    for ours, theirs in zip(model.config.per_layer_config, back.config.per_layer_config, strict=True):
        assert [getattr(ours, key) for key in shapes] == [getattr(theirs, key) for key in shapes]
    if kind == "f32":
        for other in (back, deci.read_model(place / "a.gguf")):
            assert torch.equal(model(IDS).logits, other(IDS).logits)


def test_rows_that_turn_together_are_neighbours():
    """Row i of a head and row i + head_dim / 2 here are rows 2i and 2i + 1 there."""
    rows = torch.arange(12)[:, None]  # two heads of 6
    there = deci.neighbours("model.layers.0.self_attn.q_proj.weight", rows, 6)
    assert there.flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(deci.neighbours("k_proj.bias", there[:, 0], 6, back=True), rows[:, 0])
    assert deci.neighbours("model.layers.0.self_attn.v_proj.weight", rows, 6) is rows


def test_llama_3_frequencies_are_a_tensor_of_the_file(place):
    model = MODELS["llama 3"]()
    exported(place, model, "f16")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(place / "a.gguf").tensors}
    plain = 500_000.0 ** -(torch.arange(0, 16, 2) / 16)
    there = plain / torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
    torch.testing.assert_close(there, model.model.rotary_emb.inv_freq)
    assert not torch.allclose(there, plain)


def test_the_smaller_the_type_the_larger_the_error(place):
    """And norms and biases are exact in every type, embeddings no smaller than q8_0."""
    model, errors, sizes = MODELS["biases"](), [], []
    save_model(model, byte_tokenizer(), place / "pruned")
    for kind in ("f16", "q8_0", "q5_0", "q4_0"):
        file = place / f"{kind}.gguf"
        export.export(str(place / "pruned"), file, kind)
        back = load_model(str(file), device="cpu")
        errors.append((model(IDS).logits - back(IDS).logits).norm() / model(IDS).logits.norm())
        sizes.append(file.stat().st_size)
        stored = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(file).tensors}
        assert (
            stored["token_embd.weight"] == ("q8_0" if kind != "f16" else kind) and stored["blk.0.attn_q.weight"] == kind
        )
        assert {kind for name, kind in stored.items() if "norm" in name or "bias" in name} == {"f32"}
    assert errors == sorted(errors) and errors[1] < 0.05 < errors[3] < 1
    assert sizes == sorted(sizes, reverse=True)


def test_unaligned_widths_stay_f16_and_it_is_said(place):
    _, said = exported(place, MODELS["uneven"](), "q4_0")
    tensors = gguf.GGUFReader(place / "a.gguf").tensors
    kept = [tensor.name for tensor in tensors if tensor.tensor_type == gguf.GGMLQuantizationType.F16]
    assert kept == ["blk.1.ffn_down.weight"]
    assert "kept as f16: 1 of 29 matrices, whose columns are no multiple of 32; prune with --multiple 32" in said
    by_type = {name: int(size.replace(",", "")) for size, name in re.findall(r"([\d,]+) bytes in (\w+)", said)}
    assert by_type.keys() == {"q4_0", "q8_0", "f16", "f32"}
    assert sum(by_type.values()) == sum(int(tensor.n_bytes) for tensor in tensors)


def test_a_width_that_fits_leaves_nothing_f16(place):
    model = small_model(**SHAPE)
    surgery.keep_channels(model, 1, range(32))
    assert "f16" not in exported(place, model, "q8_0")[1]


def test_a_type_that_most_of_a_model_cannot_take(place):
    """Its rows are as long as hidden_size, which is nobody's to prune."""
    with pytest.raises(InputError, match="cannot be had in q8_0: most of its weights are in matrices of 40 columns"):
        exported(place, small_model(**SHAPE | {"hidden_size": 40}), "q8_0")
    assert not (place / "a.gguf").exists()
    assert "bytes in f16" in export.export(str(place / "pruned"), place / "a.gguf", "f16")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pre", deci.PRE_TOKENIZERS)
def test_the_tokenizer_comes_back(pre, bos, place):
    ours = byte_tokenizer(pre, bos, chat_template="{{ messages }}")
    exported(place, small_model(**SHAPE), "f16", ours)
    theirs = load_tokenizer(str(place / "a.gguf"))
    for text in (vocabulary.SELDOM, "the  123 wxyz<|end|><tool>the", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    assert (theirs.eos_token, theirs.chat_template, len(theirs)) == ("<|end|>", "{{ messages }}", len(ours))
    fields = deci.read_fields(place / "a.gguf")[1]
    assert (fields["tokenizer.ggml.pre"], fields["tokenizer.ggml.add_bos_token"]) == (pre, bos)
    kinds = fields["tokenizer.ggml.token_type"]  # filled up to the rows of the embeddings
    assert len(kinds) == 300 and kinds[len(ours) :] == [gguf.TokenType.UNUSED] * (300 - len(ours))
    assert (kinds[0], kinds[1], kinds[len(ours) - 1]) == (3, 1, 4)  # control, normal, user-defined


@pytest.mark.parametrize("metaspace", [False, True])
def test_sentence_pieces_come_back(metaspace, place):
    """But for spaces that llama.cpp puts and newer tokenizers do not: export says so."""
    ours = piece_tokenizer(metaspace)
    _, said = exported(place, small_model(**SHAPE), "f16", ours)
    theirs = load_tokenizer(str(place / "a.gguf"))
    for text in (vocabulary.SELDOM, "the  12 wxyz the", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    other = ours("</s>the")["input_ids"] != theirs("</s>the")["input_ids"]
    assert other == metaspace == ("llama.cpp puts a space before text" in said)
    fields = deci.read_fields(place / "a.gguf")[1]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.add_bos_token"]) == ("llama", True)
    kinds = [fields["tokenizer.ggml.token_type"][i] for i in (0, 2, 3, 258, 259, 299)]
    assert kinds == [3, 3, 6, 6, 1, 5]  # control, byte, normal, unused


@pytest.mark.parametrize(
    ("pre", "begins"),
    [("gpt-2", False), ("smollm", False), ("llama-bpe", True), ("llama3", True), ("llama-v3", True), (None, True)],
)
def test_a_file_that_does_not_say_whether_a_text_begins_with_bos(pre, begins, tmp_path):
    """Published ones of Llama 3: llama.cpp begins those, and SentencePiece's, as long as they name a token for it."""
    ours = byte_tokenizer(deci.ALIASES.get(pre, pre)) if pre else piece_tokenizer()
    fields = vocabulary.tokenizer_fields(ours, 300) | ({"tokenizer_pre": pre} if pre else {})
    fields.pop("add_bos_token")
    ids = ours(" 123  123 wxyz", add_special_tokens=False)["input_ids"]
    for begin in ([ours.bos_token_id] * begins, []):
        export.write(tmp_path / "a.gguf", {}, small_model(**SHAPE).config, fields)
        assert deci.read_tokenizer(tmp_path / "a.gguf")(" 123  123 wxyz")["input_ids"] == [*begin, *ids]
        fields.pop("bos_token_id", None)


def test_the_three_rules_are_not_the_same():
    cut = {pre: byte_tokenizer(pre).tokenize(" 123  123 wxyz 1") for pre in deci.PRE_TOKENIZERS}
    assert len({tuple(tokens) for tokens in cut.values()}) == 3


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_evaluate_reads_every_type(kind, place, capsys):
    save_model(MODELS["uneven"](), byte_tokenizer(), place / "pruned")
    (place / "text.txt").write_text("the 123 times the other thing, wxyz. " * 2000)
    where = ["--corpus", f"file:{place / 'text.txt'}", "--device", "cpu", "--tokens", "640"]
    assert main(["export", "--model", str(place / "pruned"), "--out", str(place / "a.gguf"), "--type", kind]) == 0
    assert f"bytes in {kind}" in capsys.readouterr().out
    assert main(["evaluate", "--model", str(place / "pruned"), "--against", str(place / "a.gguf"), *where]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("making"))
    assert float(shown["ratio_64"]) == pytest.approx(1, abs={"f16": 0.01, "q8_0": 0.1, "q4_0": 0.9}[kind])
    assert kind == "f16" or float(shown["ratio_64"]) != 1


def test_another_model_in_the_same_place(place):
    """Of the same size, and alike at both ends of the file: an untied model's last MiB lies in lm_head."""
    model = small_model(**SHAPE | {"vocab_size": 4200}, tie_word_embeddings=False)
    save_model(model, byte_tokenizer(), place / "pruned")
    fields = {"description": "x" * 2**20} | vocabulary.tokenizer_fields(load_tokenizer(str(place / "pruned")), 4200)
    for template, scale in (("one", 1), ("two", 1), ("two", 2)):  # the template stands behind the first MiB
        model.model.layers[2].input_layernorm.weight.data.mul_(scale)
        tensors = export.stored(model, "f32")
        export.write(place / "a.gguf", tensors, model.config, fields | {"chat_template": template})
        assert load_tokenizer(str(place / "a.gguf")).chat_template == template
        assert torch.equal(load_model(str(place / "a.gguf"), device="cpu")(IDS).logits, model(IDS).logits)


# ---------------------------------------------------------------- refusals


def refused(place, model, says, tokenizer=None, kind="f16", out="a.gguf"):
    save_model(model, tokenizer or byte_tokenizer(), place / "pruned")
    with pytest.raises(InputError, match=says) as raised:
        export.export(str(place / "pruned"), place / out, kind)
    assert "\n" not in str(raised.value) and {path.name for path in place.iterdir()} <= {"pruned", "there.gguf"}


def first_without_attention():
    model = small_model(**SHAPE)
    surgery.drop_attention(model, 0)
    return model


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (first_without_attention, "llama.cpp needs attention in the first layer"),
        (lambda: small_model(**SHAPE, hidden_act="gelu"), "no hidden_act 'gelu'"),
        (
            lambda: small_model(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope of type 'dynamic' cannot be exported",
        ),
        (lambda: small_model(**SHAPE | {"vocab_size": 100}), "has token 264, but the embeddings end at 99"),
    ],
)
def test_models_that_llama_cpp_cannot_hold(model, says, place):
    refused(place, model(), says)


def test_types_and_names_of_files(place):
    (place / "there.gguf").write_text("mine")
    refused(place, small_model(**SHAPE), "unknown type 'q6_k': use one of f32, f16, q8_0, q5_0, q4_0", kind="q6_k")
    refused(place, small_model(**SHAPE), "is no .gguf file", out="a.bin")
    refused(place, small_model(**SHAPE), "exists: give another --out", out="there.gguf")
    refused(place, small_model(**SHAPE), "folder .* does not exist", out="nowhere/a.gguf")
    assert (place / "there.gguf").read_text() == "mine"


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "model.gguf").mkdir()
    with pytest.raises(InputError, match="model.gguf is a folder: give another --out"):
        check_export(tmp_path / "model.gguf", "f16")


def test_tokenizers_that_llama_cpp_does_not_know(place, tokenizer):
    refused(place, small_model(**SHAPE), "this WordLevel tokenizer has no name in llama.cpp", tokenizer)
    words = Tokenizer(BPE())
    words.pre_tokenizer = ByteLevel(add_prefix_space=True)
    words.add_tokens(["a", "<e>"])
    other = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>")
    refused(place, small_model(**SHAPE), "this BPE tokenizer has no name in llama.cpp", other)


def test_other_tokens_than_the_models(place, monkeypatch):
    monkeypatch.setattr(deci, "read_tokenizer", lambda file: byte_tokenizer("smollm"))
    refused(place, small_model(**SHAPE), "llama.cpp would read other tokens than the model in ")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError("No space left on device")])
def test_nothing_half_written(error, place, monkeypatch):
    done = []

    def fails(self, tensor):
        done.append(tensor.nbytes)
        if len(done) == 5:
            raise error

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fails)
    save_model(small_model(**SHAPE), byte_tokenizer(), place / "pruned")
    says = "a.gguf cannot be written .No space left|^$"
    with pytest.raises((KeyboardInterrupt, MemoryError, InputError), match=says):
        export.export(str(place / "pruned"), place / "a.gguf")
    assert [path.name for path in place.iterdir()] == ["pruned"] and len(done) == 5


def test_deci_files_of_others(place):
    """Refused: a file with other tensors than its metadata ask for, or a tokenizer of another kind."""
    model = small_model(**SHAPE)
    save_model(model, byte_tokenizer(), place / "pruned")
    fields = vocabulary.tokenizer_fields(load_tokenizer(str(place / "pruned")), 300) | {"tokenizer_pre": "tekken"}
    tensors = export.stored(model, "f32")
    export.write(place / "other.gguf", tensors, model.config, fields)
    tensors.pop("blk.1.attn_k.weight")
    export.write(place / "less.gguf", tensors, model.config, fields)
    for name, says in (("other", "has a tokenizer of another kind .tekken."), ("less", "blk.1.attn_k.weight")):
        with pytest.raises(InputError, match=says):
            load_model(str(place / f"{name}.gguf"), device="cpu")
    assert list((place / "models").iterdir()) == []
