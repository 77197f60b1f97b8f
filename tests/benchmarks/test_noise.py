"""The benchmark of the noise runs on small sizes, and its shares are shares."""

import json
import sys

import pytest

from huizhen.benchmarks import noise
from huizhen.client.randomness import NoiseSource


def test_it_measures_a_small_model(tiny_assistant, make_site, rows):
    draw = NoiseSource.draw
    examples = make_site(tiny_assistant, rows[:4])
    found = noise.measure(tiny_assistant, examples, count=1000, repeats=3, steps=2)
    size = sum(parameter.numel() for parameter in tiny_assistant.parameters.values())
    assert (found["normals"]["count"], found["step"]["numbers"]) == (1000, size)
    assert 0 < found["normals"]["seconds"] < 1
    assert 0 < found["step"]["wait_share"] < 1
    assert found["step"]["drawing_share"] > 0
    assert NoiseSource.draw is draw  # as it was before


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_it_prints_what_it_measured(options, tiny_assistant, make_site, rows, monkeypatch, capsys):
    small = (tiny_assistant, make_site(tiny_assistant, rows[:2]))
    monkeypatch.setattr(noise, "write_base", lambda model, folder: None)
    monkeypatch.setattr(noise, "load", lambda model, targets, folder: small)
    monkeypatch.setattr(noise, "COUNT", 500)
    monkeypatch.setattr(sys, "argv", ["noise", "--repeats", "1", "--steps", "1", *options])
    noise.main()
    out = capsys.readouterr().out
    if options:
        assert json.loads(out)["normals"]["count"] == 500
    else:
        assert out.startswith("500 normals take ")
        assert "of it waits for noise" in out
