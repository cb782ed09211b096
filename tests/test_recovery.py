import dataclasses
import json

import pytest
import torch
from conftest import small_model
from test_distillation import marked

from gqalib import InputError
from gqalib.measure.perplexity import perplexity
from gqalib.model import surgery
from gqalib.model.load import load_model, save_model
from gqalib.recover import lora
from gqalib.run.presets import load_preset


@pytest.fixture
def settings():
    base = load_preset("tiny").recovery
    return dataclasses.replace(base, num_epochs=4, num_examples=16, batch_size=4, learning_rate=1e-2, max_length=24)


ROWS = [{"prompt": "w2 w3", "completion": " w4 w5 w6 w7"}] * 16


@pytest.fixture
def uneven(model):
    surgery.keep_groups(model, 0, [0])
    surgery.keep_channels(model, 1, range(7))
    return model


def test_trains_and_merges(uneven, logits_of, tokenizer, windows, settings, tmp_path):
    base = {name: p.detach().clone() for name, p in uneven.named_parameters()}
    before = perplexity(uneven, windows)
    adapted, log = lora.finetune_lora(uneven, tokenizer, ROWS, settings, tmp_path)
    for name, parameter in adapted.named_parameters():
        if "lora" not in name:
            original = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, base[original]), name
    names = {n.split(".lora_A")[0].split(".")[-1] for n, _ in adapted.named_parameters() if "lora_A" in n}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert perplexity(adapted, windows) != pytest.approx(before, rel=1e-3)
    with adapted.disable_adapter():
        assert perplexity(adapted, windows) == pytest.approx(before, rel=1e-6)
    assert log["loss"].iloc[-1] < 0.7 * log["loss"].iloc[0]
    assert len(log) == 16 and log["tokens"].is_monotonic_increasing
    unmerged = logits_of(adapted)
    merged = lora.merge(adapted)
    assert torch.allclose(logits_of(merged), unmerged, atol=1e-4)
    assert type(merged).__name__ == "GqaLlamaForCausalLM"
    assert all(p.dtype == torch.float32 for p in merged.parameters())
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt"))


def test_a_loss_that_is_not_finite(tokenizer, settings, tmp_path):
    model = small_model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite: lower recovery.learning_rate from 0.01"):
        lora.finetune_lora(model, tokenizer, ROWS, settings, tmp_path)


def test_the_loss_is_on_the_completion_only(tokenizer, settings, tmp_path):
    """Random prompts, one completion. With the prompts in it the loss could not fall below 7 · log 59 / 12 = 2.38
    nats."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "prompt": " ".join(f"w{int(i)}" for i in torch.randint(2, 61, (8,), generator=generator)),
            "completion": " w9 w9 w9 w9",
        }
        for _ in range(64)
    ]
    longer = dataclasses.replace(settings, num_examples=64, num_epochs=6, learning_rate=3e-2)
    _, log = lora.finetune_lora(small_model(), tokenizer, rows, longer, tmp_path)
    assert log["loss"].iloc[-5:].mean() < 2.3


def test_what_came_in_odd_goes_out_as_it_came(tokenizer, settings, tmp_path):
    """A temperature without `do_sample` is saved as long as nobody has touched the configuration; training would."""
    save_model(small_model(pad_token_id=None, eos_token_id=[0, 7]), tokenizer, tmp_path / "model")
    odd = {"temperature": 0.9, "eos_token_id": [0, 7], "bos_token_id": 5}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(odd))
    model = load_model(tmp_path / "model")
    adapted, _ = lora.finetune_lora(model, tokenizer, ROWS, settings, tmp_path / "training")
    save_model(lora.merge(adapted), tokenizer, tmp_path / "out")
    config, generation = ("config.json", "generation_config.json")
    saved = json.loads((tmp_path / "out" / generation).read_text())
    assert {key: saved[key] for key in saved.keys() - {"transformers_version", "_from_model_config"}} == odd
    assert (tmp_path / "out" / config).read_text() == (tmp_path / "model" / config).read_text()


def test_an_end_mark_stands_at_the_end_alone(tokenizer, settings, tmp_path, monkeypatch):
    seen, one_end = [], {"input_ids": [1, 2, 3, 4, 5, 6, 7, 0], "labels": [-100] * 3 + [4, 5, 6, 7, 0]}
    monkeypatch.setattr(lora.SFTTrainer, "train", lambda self, **_: seen.extend(self.train_dataset) or (1 / 0))
    with pytest.raises(ZeroDivisionError):
        lora.finetune_lora(small_model(), marked(tokenizer), ROWS, settings, tmp_path)
    assert [{key: row[key] for key in one_end} for row in seen] == [one_end] * 16


def test_prompts_that_are_too_long(tokenizer, settings, tmp_path):
    with pytest.raises(InputError, match="no row has a token of its completion within max_length = 2"):
        lora.finetune_lora(small_model(), tokenizer, ROWS, dataclasses.replace(settings, max_length=2), tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_rows(tokenizer, settings, tmp_path):
    with pytest.raises(InputError, match="no rows"):
        lora.finetune_lora(small_model(), tokenizer, [], settings, tmp_path)


def test_report_to_is_passed_through(settings, tmp_path):
    assert lora._arguments(settings, tmp_path, 0, torch.device("cpu")).report_to in ([], "none", ["none"])
    watched = dataclasses.replace(settings, report_to="tensorboard")
    assert "tensorboard" in str(lora._arguments(watched, tmp_path, 0, torch.device("cpu")).report_to)
