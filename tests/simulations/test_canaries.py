"""Canaries: orthogonal, of one length, in parts that fit in memory, scored by their direction."""

import numpy as np
import pytest
import torch

from huizhen.protocol.errors import ConfigError
from huizhen.simulations import canaries
from huizhen.simulations.canaries import CANARY_NORM, Canaries

SHAPES = {"a": (40, 30), "b": (7, 13, 9), "head": (5,)}


@pytest.mark.parametrize("count", [2, 37, 2024])
def test_canaries_are_orthogonal_and_of_one_length(count):
    planted = Canaries(count, SHAPES, 0.7)
    batches = list(planted.batches(np.arange(min(count, 60))))
    rows = torch.cat(
        [torch.cat([b.gradients[n].flatten(1) for n in SHAPES], dim=1) for b in batches]
    ).double()
    assert {n: b.shape[1:] for n, b in batches[0].gradients.items()} == SHAPES
    products = rows @ rows.T
    expected = (0.7 * CANARY_NORM) ** 2 * torch.eye(len(rows)).double()
    assert torch.allclose(products, expected, rtol=1e-5, atol=1e-3)


def test_a_score_is_the_product_with_the_direction():
    planted = Canaries(37, SHAPES, 0.7)
    generator = torch.Generator().manual_seed(3)
    released = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    rows = planted.gradients(np.arange(37))
    products = [(rows[n] * released[n]).flatten(1).double().sum(1) for n in SHAPES]
    expected = torch.stack(products).sum(0).numpy() / 70
    assert planted.scores(released) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("count", [-1, 0, 1, 2025])
def test_a_number_of_canaries_that_does_not_fit_is_refused(count):
    with pytest.raises(ConfigError, match="expected 2 to 2024"):
        Canaries(count, SHAPES, 1.0)


@pytest.mark.parametrize("numbers", [1, 5000, 10_000])
def test_canaries_that_do_not_fit_in_memory_come_in_parts(monkeypatch, numbers):
    planted = Canaries(37, SHAPES, 0.7)
    chosen = np.asarray([3, 0, 36, 20, 8])
    whole = planted.gradients(chosen)
    monkeypatch.setattr(canaries, "_ROW_NUMBERS", numbers)
    parts = [batch.gradients for batch in planted.batches(chosen)]
    assert len(parts) == {1: 5, 5000: 3, 10_000: 2}[numbers]
    for name in SHAPES:
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
