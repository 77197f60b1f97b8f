"""Every number of results.json, recomputed from the run's checkpoints and from the records.

The checkpoints hold the history of each unit of work: what was measured after each round. The code
here is plain and shares nothing with ``results.py`` and ``baseline.py``.
"""

import hashlib
import json
import math
from itertools import chain

import pytest
from safetensors import safe_open
from safetensors.numpy import save
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from huizhen.simulations import report
from huizhen.simulations.experiment import load_experiment
from huizhen.simulations.runner import run_experiment

EXPERIMENT = """
[study]
name = "recomputed"
[base]
name = "tiny"
[adapter]
rank = 2
alpha = 4
target_modules = ["q_proj", "v_proj"]
[task]
kind = "classification"
text = "{text}"
label = "disease"
labels = ["asthma", "epilepsy", "measles"]
max_tokens = 48
[privacy]
unit = "patient"
epsilon = 8.0
delta = 1e-3
sampling_rate = 0.5
learning_rate = 0.5
[rounds]
count = 3
local_steps = 2
batch_size = 4
learning_rate = 3e-2
head_learning_rate = 0.3
[simulation]
data = DATA
site = "hospital"
patient = "id"
seeds = [3, 5]
sweep_epsilon = [50.0]
"""
SITES = ("North", "South")
SHARED = ("pooled", "federated", "federated_dp")
LISTED = ("asthma", "epilepsy", "measles")
UNLISTED = {("North", 4): "plague", ("South", 10): "plague", ("South", 11): "cholera"}


@pytest.fixture(scope="module")
def records(cohort):
    """Records of two hospitals; one to train on and two patients' to test on are of no class."""
    found = cohort(patients=9, test=6)
    for one in found:
        hospital, number = one["id"].split("-")
        one["disease"] = UNLISTED.get((hospital, int(number)), one["disease"])
    return found


@pytest.fixture(scope="module")
def run(records, home, tmp_path_factory):
    """Run once; return the folder and results.json as a reader finds it."""
    folder = tmp_path_factory.mktemp("recomputed")
    data = folder / "records.jsonl"
    data.write_text("".join(f"{json.dumps(one)}\n" for one in records))
    path = folder / "experiment.toml"
    path.write_text(EXPERIMENT.replace("DATA", json.dumps(str(data))))
    run_experiment(load_experiment(path), folder / "run", home=home)
    return folder / "run", json.loads((folder / "run" / "results.json").read_text())


@pytest.fixture(scope="module")
def arms(run):
    return run[1]["arms"]


@pytest.fixture(scope="module")
def history(run):
    """Return the rounds of a unit of work."""

    def history(unit):
        with safe_open(run[0] / "state" / f"{unit}.safetensors", framework="numpy") as file:
            return json.loads(file.metadata()["notes"])["history"]

    return history


def mean(rows):
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def spread(rows):
    """Return the standard deviation over two or more runs, with n - 1."""
    centre = mean(rows)
    return {
        key: math.sqrt(sum((row[key] - centre[key]) ** 2 for row in rows) / (len(rows) - 1))
        for key in centre
    }


def close(expected):
    """Return what is equal but for the last digits, in tables of tables."""
    if isinstance(expected, dict):
        return {key: close(value) for key, value in expected.items()}
    return pytest.approx(expected, rel=1e-9, abs=1e-12)


def time_of(histories):
    """Return seconds, and the share of the training time outside forward and backward."""
    rounds = list(chain.from_iterable(histories))
    training = sum(one["training_seconds"] for one in rounds)
    outside = sum(one["training_seconds"] * one["outside_share"] for one in rounds)
    return sum(one["seconds"] for one in rounds), outside / training


@pytest.mark.parametrize("arm", SHARED)
def test_a_shared_arm(arms, history, arm):
    found, runs = arms[arm], [history(f"{arm}-{seed}") for seed in (3, 5)]
    last = [rounds[-1] for rounds in runs]
    assert found["metrics"] == close(mean([one["metrics"] for one in last]))
    assert found["spread"] == close(spread([one["metrics"] for one in last]))
    if arm != "federated_dp":  # whose noise is new in each run
        assert any(value > 0 for value in found["spread"].values())
    assert [one["seed"] for one in found["per_seed"]] == [3, 5]
    assert [one["metrics"] for one in found["per_seed"]] == [one["metrics"] for one in last]
    assert found["seconds"] == close(time_of(runs)[0])
    assert found["outside_share"] == close(time_of(runs)[1])


@pytest.mark.parametrize("arm", SHARED)
def test_what_each_site_has_of_a_shared_arm(arms, history, arm):
    runs = [history(f"{arm}-{seed}") for seed in (3, 5)]
    assert arms[arm]["sites"].keys() == set(SITES)
    for site in SITES:
        found = arms[arm]["sites"][site]
        own = [rounds[-1]["test_sites"][site] for rounds in runs]
        assert found["metrics"] == close(mean(own))
        sent = [one["sites"][site]["bytes_up"] for one in runs[0]] if arm != "pooled" else [0]
        assert found["bytes_up"] == sum(sent)
    if arm != "federated_dp":
        assert arms[arm]["sites"]["North"]["metrics"] != arms[arm]["sites"]["South"]["metrics"]


@pytest.mark.parametrize("arm", SHARED)
def test_the_rounds_of_a_shared_arm_are_those_of_the_first_seed(arms, history, arm):
    rounds = history(f"{arm}-3")
    for one in rounds:
        assert one["bytes_up"] == sum(site["bytes_up"] for site in one.pop("sites").values())
        one.pop("test_sites", None)
    assert arms[arm]["rounds"] == rounds
    assert len(rounds) == 3


@pytest.mark.parametrize("arm", SHARED)
def test_the_digest_of_each_seeds_adapter(run, arms, arm):
    for one in arms[arm]["per_seed"]:
        path = run[0] / "state" / f"{arm}-{one['seed']}.safetensors"
        with safe_open(path, framework="numpy") as file:
            names = sorted(name for name in file.keys() if name.startswith("x/"))  # noqa: SIM118
            tensors = {name[2:]: file.get_tensor(name) for name in names}
        assert one["adapter"] == hashlib.sha256(save(tensors)).hexdigest()


def test_epsilon_is_what_the_last_round_was_charged_for(run, arms, history):
    spent = history("federated_dp-3")[-1]["epsilon"]
    assert arms["federated_dp"]["epsilon"] == dict.fromkeys(SITES, close(spent))
    assert run[1]["privacy"]["epsilon"] == dict.fromkeys(SITES, close(spent))
    assert "epsilon" not in arms["federated"]


def test_every_hospital_alone(arms, history):
    runs = {site: [history(f"local-{seed}-{site}") for seed in (3, 5)] for site in SITES}
    last = {site: [rounds[-1]["metrics"] for rounds in runs[site]] for site in SITES}
    for site in SITES:
        found = arms["local"]["sites"][site]
        assert found["metrics"] == close(mean(last[site]))
        assert found["spread"] == close(spread(last[site]))
        assert [one["seed"] for one in found["per_seed"]] == [3, 5]
        assert [one["metrics"] for one in found["per_seed"]] == last[site]
        own = [rounds[-1]["test_sites"][site] for rounds in runs[site]]
        assert found["own"] == close(mean(own))
        assert found["own"] != found["metrics"]
    found, over_sites = (
        arms["local"],
        [mean(list(pair)) for pair in zip(*last.values(), strict=True)],
    )
    assert found["metrics"] == close(mean(over_sites))
    assert found["spread"] == close(spread(over_sites))
    assert [one["seed"] for one in found["per_seed"]] == [3, 5]
    assert [one["metrics"] for one in found["per_seed"]] == [close(one) for one in over_sites]
    every = list(chain.from_iterable(runs.values()))
    assert (found["seconds"], found["outside_share"]) == close_pair(time_of(every))


def close_pair(pair):
    return tuple(map(close, pair))


def test_the_sweep(run, history, records):
    sweep, privacy = run[1]["sweep"], run[1]["privacy"]
    units = ["federated_dp-3", "sweep_epsilon-50.0"]
    last = [history(unit)[-1] for unit in units]
    assert [point["metrics"] for point in sweep] == [one["metrics"] for one in last]
    assert [point["epsilon"] for point in sweep] == [close(one["epsilon"]) for one in last]
    assert sweep[1]["epsilon"] == pytest.approx(50, rel=0.05)
    patients = {one["id"] for one in listed(records, "train")}
    assert [point["patients"] for point in sweep] == [len(patients)] * 2
    for point in sweep:
        of_patients = point["times_patients"] * point["sigma"]
        assert of_patients == close(privacy["noise_multiplier"])
    assert sweep[0]["times_patients"] == 1
    assert sweep[1]["times_patients"] > 2


def test_what_more_patients_would_do(run, history, records):
    reached, most, together = (
        history(unit)[-1]["metrics"]["top1"]
        for unit in ("federated_dp-3", "sweep_epsilon-50.0", "federated-3")
    )
    target, factor = together - 0.05, run[1]["sweep"][1]["times_patients"]
    test = [one["disease"] for one in records if one["split"] == "test"]
    chance = max(test.count(name) for name in LISTED) / len(test)
    text = f"At ε = 8 top-1 is {reached:.3f} with the first seed"
    if reached <= chance:
        text += f", no better than always naming one class ({chance:.3f})"
    goal = f"the federation without privacy less 0.05 ({target:.3f})."
    if reached >= target:
        times = 1.0
        text += f", which reaches {goal}"
    elif most >= target:  # between the two points of the sweep, on a log scale
        times = factor ** ((target - reached) / (most - reached))
        text += f"; each hospital would need about {times:.1f} times its patients for {goal}"
    else:
        times = None
        text += f"; even {factor:.1f} times the patients per hospital would not reach {goal}"
    assert run[1]["enough"] == {
        "metric": "top1",
        "target": close(target),
        "times_patients": times if times is None else close(times),
        "text": text,
    }


def listed(records, split):
    """Return the records that are trained on, or tested on: these may be of any class."""
    found = [one for one in records if one["split"] == split]
    return found if split == "test" else [one for one in found if one["disease"] in LISTED]


def scored(train, test):
    """Return top-1, top-3 and macro F1 of TF-IDF and logistic regression, counted by hand."""
    vectorizer = TfidfVectorizer()
    model = LogisticRegression(C=10.0, max_iter=5000)
    model.fit(
        vectorizer.fit_transform([one["text"] for one in train]), [one["disease"] for one in train]
    )
    table = model.predict_proba(vectorizer.transform([one["text"] for one in test]))
    truth = [one["disease"] if one["disease"] in LISTED else "no class" for one in test]
    ranks = [[name for _, name in sorted(zip(-row, model.classes_, strict=True))] for row in table]
    guess = [names[0] for names in ranks]
    f1 = []
    for name in set(truth):
        right = sum(g == t == name for g, t in zip(guess, truth, strict=True))
        f1.append(2 * right / (guess.count(name) + truth.count(name)))
    return {
        "top1": sum(g == t for g, t in zip(guess, truth, strict=True)) / len(test),
        "top3": sum(t in names[:3] for names, t in zip(ranks, truth, strict=True)) / len(test),
        "macro_f1": sum(f1) / len(f1),
    }


def test_the_baseline_has_the_same_classes_as_the_arms(run, records):
    train, test = listed(records, "train"), listed(records, "test")
    found = run[1]["baseline"]
    assert found["pooled"] == close(scored(train, test))
    assert found["local"].keys() == set(SITES)
    for site in SITES:
        own = [one for one in train if one["hospital"] == site]
        assert found["local"][site] == close(scored(own, test))
    assert found["text"] == "TF-IDF + logistic regression"


def test_what_the_results_say_of_the_data(run, records):
    data = run[1]["data"]
    assert data["labels"] == 3
    assert data["unseen_labels"] == sum(
        one["disease"] not in LISTED for one in listed(records, "test")
    )
    for site in SITES:
        train, test = (
            [one for one in listed(records, split) if one["hospital"] == site]
            for split in ("train", "test")
        )
        everything = [one for one in records if one["hospital"] == site]
        assert data["sites"][site] == {
            "train_patients": len({one["id"] for one in train}),
            "test_patients": len({one["id"] for one in test}),
            "train_records": sum(one["split"] == "train" for one in everything),
            "test_records": len(test),
            "labels_seen": len({one["disease"] for one in train}),
        }


def test_every_fact_of_privacy_that_the_report_names_is_there(run):
    assert run[1]["privacy"].keys() >= report.PRIVACY.keys()
