"""The aggregation benchmark measures what it says, on sizes that take no time."""

import json

import numpy as np

from huizhen.benchmarks import aggregation


def test_its_figures_are_whole_and_printed_and_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(aggregation, "WIDTH", 64)
    out = tmp_path / "figures.json"
    sizes = ["--sites", "3", "--numbers", "160000", "--repeats", "1"]
    assert aggregation.main([*sizes, "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == found
    mean = found["mean"]
    assert list(mean["seconds"]) == ["read", "hash", "check", "add", "finish"]
    assert min(mean["seconds"].values()) > 0
    assert mean["bytes_a_second"] == 20 * 160_000 / mean["seconds"]["add"]
    assert mean["share_of_bandwidth"] > 0
    assert mean["adapters_of_memory"] > 1
    assert found["svd"]["width"] == 64
    assert set(found["rules"]["seconds"]) == {
        "mean", "median", "trimmed_mean", "geometric_median", "multi_krum", "centred_clipping",
    }  # fmt: skip
    assert aggregation.main([*sizes, "svd"]) == 0
    assert "s a layer" in capsys.readouterr().out


def test_an_update_has_the_numbers_that_were_asked_for():
    update = aggregation.update_of(1600, 10)
    assert sum(value.size for value in update.values()) == 1600
    assert all(value.dtype == np.dtype("<f4") for value in update.values())
