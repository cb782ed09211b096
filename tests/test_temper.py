"""One number on the final norm: the nearest to the dense model, and harmless where nothing was cut."""

import pytest
import torch
from conftest import kl_to

from gqalib.prune.temper import temper, temperature
from gqalib.stream import hidden_states_before


def streams(*models, windows):
    return [hidden_states_before(model, windows, len(model.model.layers)) for model in models]


def test_it_is_the_minimum(model, windows, clone, monkeypatch):
    """Against a search by hand, all tokens asked; at the first, the last and the tokens between."""
    monkeypatch.setattr("gqalib.prune.temper.EVERY", 1)
    dense = clone(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.add_(
            0.3 * torch.randn(model.model.layers[2].mlp.down_proj.weight.shape, generator=generator)
        )
    c = temperature(dense, model, *streams(dense, model, windows=windows))

    def divergence(c):
        other = clone(model)
        temper(other, c)
        return kl_to(dense, other, windows)

    assert c < 0.98 and divergence(c) < min(divergence(0.98 * c), divergence(1.02 * c), divergence(1))


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_a_known_factor_is_found(model, windows, clone, factor):
    sharper = clone(model)
    temper(sharper, factor)
    wanted, current = streams(model, sharper, windows=windows)
    assert temperature(model, sharper, wanted, current) == pytest.approx(1 / factor, rel=1e-3)


def test_a_stream_without_sense_gives_a_number(model, windows):
    wanted, _ = streams(model, model, windows=windows)
    assert 0 < temperature(model, model, wanted, torch.zeros_like(wanted)) < float("inf")
    assert 0 < temperature(model, model, wanted, wanted.flip(-1)) < 1
