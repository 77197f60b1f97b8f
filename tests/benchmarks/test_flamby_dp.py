"""FLamby's nominal ε against what its steps spend, and the benchmark on rows made up here."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from huizhen.benchmarks import flamby_dp
from huizhen.benchmarks.flamby_accounting import Spent, spent
from huizhen.benchmarks.flamby_data import (
    PUBLIC_RANGES,
    PUBLISHED,
    SOURCE,
    STANDARDISED,
    published,
    read_centres,
    write_records,
)
from huizhen.client.records.rows import read_rows, whole
from huizhen.simulations.experiment import load_experiment

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not (DATA / SOURCE).exists(), reason=f"{SOURCE} is not beside the checkout"
)
SIZES = {"cleveland": 199, "hungarian": 172, "switzerland": 30, "va": 85}


@pytest.fixture(scope="module")
def study():
    return load_experiment(flamby_dp.EXPERIMENT).study


@pytest.fixture
def made_up(tmp_path, study):
    """A data folder with two hospitals of 9 and 6 training patients, and made-up published rows."""
    generator = np.random.default_rng(5)
    source = tmp_path / SOURCE
    source.parent.mkdir()
    with source.open("w", newline="", encoding="utf-8") as file:
        names = ["center", "split", *study.task.features, "disease"]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for center, train in (("a", 9), ("b", 6)):
            for i in range(train + 4):
                values = {
                    name: round(float(generator.uniform(*bounds)), 3)
                    for name, bounds in study.task.features.items()
                }
                split = "train" if i < train else "test"
                writer.writerow({"center": center, "split": split, **values, "disease": i % 2})
    results = tmp_path / PUBLISHED
    results.parent.mkdir()
    lines = ["perf,e,d,seed", "0.7,,,42", "0.5,1.0,0.1,42", "0.6,1.0,0.0001,42"]
    lines += ["0.8,,,43", "0.4,1.0,0.0001,43"]
    results.write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


# RDP, by an independent computation of the research behind this benchmark.
@pytest.mark.parametrize(
    ("nominal", "places", "true"),
    [
        (5.0, 1, [7.0, 7.6, 22.0, 11.4]),
        (1.0, 2, [1.45, 1.57, 4.10, 2.29]),
        (0.1, 2, [0.13, 0.13, 0.34, 0.19]),
    ],
)
def test_the_steps_that_run_spend_more_than_was_asked_for(nominal, places, true):
    found = [spent(nominal, 1 / math.ceil(n / 4)) for n in SIZES.values()]
    assert [one.steps_counted for one in found] == [750, 645, 120, 330]
    assert [round(one.rdp_true, places) for one in found] == true
    for one in found:
        assert 0.9 * nominal < one.rdp_counted <= nominal
        assert nominal < one.pld_true < one.rdp_true < one.unamplified


def test_a_record_of_shuffled_batches_is_in_one_batch_of_each_pass():
    # 1,500 steps of 8 batches are 187.5 passes; μ = √188 / σ of Gaussian differential privacy
    found = spent(1.0, 1 / 8)
    mu, e = math.sqrt(188) / found.sigma, found.unamplified
    delta = norm.cdf(-e / mu + mu / 2) - math.exp(e) * norm.cdf(-e / mu - mu / 2)
    assert delta == pytest.approx(1e-4, rel=0.05)


def test_a_run_on_made_up_rows_has_every_series_and_a_figure(made_up, monkeypatch, capsys):
    monkeypatch.setattr(flamby_dp, "ROUNDS", 2)
    monkeypatch.setattr(flamby_dp, "STEPS", 3)
    figure = made_up / "figure.png"
    arguments = ["flamby_dp", "--data", str(made_up), "--nominal", "1.0", "--seeds", "42", "43"]
    monkeypatch.setattr("sys.argv", [*arguments, "--json", "--figure", str(figure)])
    flamby_dp.main()
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"].keys() == {"published", STANDARDISED, PUBLIC_RANGES}
    for series in result["accuracy"].values():
        assert series.keys() == {"none", "1"}
        for found in series.values():
            assert len(found["seeds"]) == 2
            assert found["mean"] == pytest.approx(np.mean(found["seeds"]))
    assert result["accuracy"]["published"]["1"]["seeds"] == [0.6, 0.4]  # at δ = 1e-4 alone
    assert result["epsilon"]["1"].keys() == {"a", "b"}
    assert figure.read_bytes().startswith(b"\x89PNG")
    flamby_dp.print_tables(result)
    printed = capsys.readouterr().out
    assert "standardisation by private means" in printed
    assert f"{result['epsilon']['1']['a']['pld_true']:.3g}" in printed


def test_the_noise_reaches_the_weights_and_the_run_without_dp_repeats(made_up, study, monkeypatch):
    monkeypatch.setattr(flamby_dp, "ROUNDS", 2)
    monkeypatch.setattr(flamby_dp, "STEPS", 50)
    loaded = []

    def classify(model, examples):
        loaded.append(model.read(frozenset(model.shapes))["head.weight"])
        return np.zeros((len(examples.ids), 2), np.float32)

    monkeypatch.setattr(flamby_dp, "classify", classify)
    centres = read_centres(made_up, study, STANDARDISED)
    quiet, loud = (
        {
            name: Spent(
                sigma=sigma,
                steps_counted=1,
                rdp_counted=1,
                rdp_true=1,
                pld_true=1,
                unamplified=1,
            )
            for name in centres
        }
        for sigma in (1e-6, 1e3)
    )
    for noise in ({}, {}, quiet, loud):
        flamby_dp.accuracy(centres, study, noise, 42)
    plain, again, still, noisy = loaded[::2]
    assert np.array_equal(plain, again)
    assert np.abs(still - plain).max() < 0.1  # 100 steps of rate 0.001 on clipped gradients
    assert np.abs(noisy - plain).max() > 0.5


def test_standardising_takes_the_training_rows_alone(made_up, study):
    centres = read_centres(made_up, study, STANDARDISED)
    for centre in centres.values():
        train = torch.stack(centre.train.inputs)
        assert train.mean(dim=0).abs().max() < 1e-5
        assert (train.std(dim=0) - 1).abs().max() < 1e-5
        assert torch.stack(centre.test.inputs).mean(dim=0).abs().max() > 0.1
    for centre in read_centres(made_up, study, PUBLIC_RANGES).values():
        assert torch.stack(centre.train.inputs).abs().max() <= 1


def test_records_are_written_with_an_id_each(made_up, tmp_path):
    path = tmp_path / "runs" / "heart.csv"
    write_records(made_up, path)
    rows = [fields for _, fields in whole(read_rows(path))]
    source = [fields for _, fields in whole(read_rows(made_up / SOURCE))]
    assert [row.pop("id") for row in rows] == [str(i) for i in range(1, 24)]
    assert rows == source


@needs_data
def test_the_split_is_flambys_and_so_are_the_published_means(study):
    centres = read_centres(DATA, study, PUBLIC_RANGES)
    assert {name: centre.train.num_patients for name, centre in centres.items()} == SIZES
    assert [len(centre.test.ids) for centre in centres.values()] == [104, 89, 16, 45]
    assert [centre.batches for centre in centres.values()] == [50, 43, 8, 22]
    means = {e: round(float(np.mean(v)), 4) for e, v in published(DATA, 1e-4).items()}
    assert means == {
        math.inf: 0.7125, 50: 0.7016, 10: 0.7004, 5: 0.7036, 1: 0.6853, 0.1: 0.6056
    }  # fmt: skip
