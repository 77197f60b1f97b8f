"""A whole run on ``tiny``: the contract of results.json, and what else lands in the folder."""

import itertools
import json
import math

import pytest
import torch

from huizhen.learning.bases import load_model
from huizhen.protocol.certificate import check_certificate, parse_certificate
from huizhen.protocol.errors import AggregationError, ConfigError
from huizhen.server.rounds import Coordinator
from huizhen.simulations import federation, run_folder, runner
from huizhen.simulations.experiment import load_experiment
from huizhen.simulations.federation import Watcher
from huizhen.simulations.report import write_report
from huizhen.simulations.runner import run_experiment

INSTRUCTION = (
    ('kind = "classification"', 'kind = "instruction"\nanswer = "{disease}"\nmax_new_tokens = 3'),
    ('label = "disease"\n', ""),
    ("max_tokens = 48", "max_tokens = 96"),
)


@pytest.fixture
def start(experiment_file, home, tmp_path):
    def start(*changes, out="run", resume=False, **files):
        experiment = load_experiment(experiment_file(*changes, **files))
        folder = tmp_path / out
        return folder, run_experiment(experiment, folder, home=home, resume=resume)

    return start


def assert_metrics(found, names=("top1", "top3", "macro_f1")):
    assert set(names) <= found.keys()
    assert all(0 <= found[name] <= 1 for name in names)


def test_a_run_of_all_arms_keeps_the_contract(start):
    folder, results = start(('site = "hospital"', 'site = "hospital"\nseeds = [1, 2]'))
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results
    arms = results["arms"]
    assert list(arms) == ["local", "pooled", "federated", "federated_dp"]
    for name in ("pooled", "federated", "federated_dp"):
        arm = arms[name]
        assert_metrics(arm["metrics"])
        assert arm["seconds"] > 0
        assert [one["seed"] for one in arm["per_seed"]] == [1, 2]
        for key, value in arm["metrics"].items():
            assert value == pytest.approx(sum(s["metrics"][key] for s in arm["per_seed"]) / 2)
        assert len({one["adapter"] for one in arm["per_seed"]}) == 2
        assert set(arm["sites"]) == {"North", "South"}
        for site in arm["sites"].values():
            assert_metrics(site["metrics"])
        assert [entry["round"] for entry in arm["rounds"]] == [1, 2]
        for entry in arm["rounds"]:
            assert entry["seconds"] > 0
            assert entry["bytes_up"] > 1000
            assert entry["bytes_down"] > 1000
            assert_metrics(entry["metrics"])
    # two sites send twice what the one that holds everything sends
    up = [arms[name]["rounds"][0]["bytes_up"] for name in ("pooled", "federated")]
    assert up[1] == pytest.approx(2 * up[0], rel=0.01)
    assert set(arms["local"]["sites"]) == {"North", "South"}
    for site in arms["local"]["sites"].values():
        assert_metrics(site["metrics"])
    assert arms["federated_dp"]["epsilon"].keys() == {"North", "South"}
    assert all(7.9 < spent <= 8 for spent in arms["federated_dp"]["epsilon"].values())
    spent = [entry["epsilon"] for entry in arms["federated_dp"]["rounds"]]
    assert spent == sorted(spent)
    assert "epsilon" not in arms["federated"]
    assert not any("epsilon" in entry for entry in arms["federated"]["rounds"])
    assert "baseline" in results

    certificate = parse_certificate((folder / "privacy.json").read_bytes())
    check_certificate(certificate)
    assert [site.rounds for site in certificate.sites] == [2, 2]
    assert certificate.fingerprint() in (folder / "privacy.html").read_text(encoding="utf-8")
    privacy = results["privacy"]
    assert privacy == certificate.summary()
    assert privacy["unit"] == "patient"
    assert (privacy["sampling_rate"], privacy["steps"], privacy["delta"]) == (0.5, 4, 1e-3)
    assert privacy["noise_multiplier"] > 0.3
    assert privacy["epsilon"] == arms["federated_dp"]["epsilon"]
    assert "PLD" in privacy["accountant"]
    for name in ("federated", "federated_dp"):
        assert (folder / name / "adapter_model.safetensors").exists()
    assert not any(path.name.startswith(".") and path.name != ".lock" for path in folder.rglob("*"))


def test_an_instruction_run_reports_loss_exact_match_and_answers(start):
    folder, results = start(*INSTRUCTION)
    for name in ("pooled", "federated", "federated_dp"):
        arm = results["arms"][name]
        assert arm["metrics"]["loss"] > 0
        assert 0 <= arm["metrics"]["exact_match"] <= 1
        assert set(arm["sites"]) == {"North", "South"}
    losses = [entry["loss"] for entry in results["arms"]["pooled"]["rounds"]]
    assert losses[1] < losses[0]
    assert len(results["samples"]) == 1
    assert set(results["samples"][0]["answers"]) == {"pooled", "federated", "federated_dp"}
    assert results["samples"][0]["expected"] in ("asthma", "epilepsy", "measles")
    assert "baseline" not in results
    assert not (folder / "federated" / "head.safetensors").exists()


TABULAR = (
    ('[base]\nname = "tiny"\n', ""),
    ('[adapter]\nrank = 2\nalpha = 4\ntarget_modules = ["q_proj", "v_proj"]\n', ""),
    ('kind = "classification"\ntext = "{text}"\n', 'kind = "tabular"\n'),
    ("max_tokens = 48\n", "features = {fever = [35, 42], age = [0, 99]}\n"),
    ("[privacy]", '[strategy]\nname = "fedavg"\n[privacy]'),
    ("learning_rate = 1e-2", "learning_rate = 0.5"),
)


@pytest.fixture
def numbers(cohort):
    """Records of two classes that body temperature tells apart, and age does not."""
    found = []
    for i, one in enumerate(cohort(patients=40, test=20)):
        sick = i % 3 > 0
        found.append(
            one | {"fever": 40.5 if sick else 36.5, "age": 7 * i % 99, "disease": str(sick)}
        )
    return found


def test_a_tabular_run_of_all_arms_keeps_the_contract(start, numbers):
    lines = "seeds = [1, 2]\nsweep_epsilon = [2.0]"
    site = ('site = "hospital"', f'site = "hospital"\n{lines}')
    folder, results = start(*TABULAR, site, records=numbers)
    assert results["kind"] == "tabular"
    assert results["provenance"]["base"] == "none: a linear model"
    for name in ("pooled", "federated", "federated_dp"):
        arm = results["arms"][name]
        assert arm["metrics"].keys() == {"top1", "macro_f1"}  # the third of two is always right
        assert len(arm["per_seed"]) == 2
        # three numbers of four bytes in an update; its header is most of it
        assert 2 * 12 < arm["rounds"][0]["bytes_up"] < 2000
        if name != "federated_dp":
            assert arm["metrics"]["top1"] == 1.0
    assert all(7.9 < e <= 8 for e in results["arms"]["federated_dp"]["epsilon"].values())
    assert "baseline" not in results
    assert [point["epsilon"] for point in results["sweep"]] == pytest.approx([2, 8], rel=0.02)
    assert {path.name for path in (folder / "federated").iterdir()} == {
        "README.md",
        "features.json",
        "model.safetensors",
    }
    assert (folder / "privacy.json").exists()
    page = write_report(results, folder).read_text(encoding="utf-8")
    assert "top-1" in page
    assert "top-3" not in page


def test_a_tabular_run_gives_the_same_weights_again_and_goes_on_after_a_stop(start, numbers):
    arms = ('site = "hospital"', 'site = "hospital"\narms = ["federated"]')
    _, first = start(*TABULAR, arms, records=numbers, out="one")
    _, second = start(*TABULAR, arms, records=numbers, out="two")
    _, again = start(*TABULAR, arms, records=numbers, out="two", resume=True)
    for results in (second, again):
        assert results["arms"]["federated"]["per_seed"] == first["arms"]["federated"]["per_seed"]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_run_gives_the_same_adapter_bit_for_bit(start, threads):
    arms = ('site = "hospital"', 'site = "hospital"\narms = ["pooled", "federated"]')
    found: list[object] = []
    for out in ("one", "two"):
        torch.manual_seed(len(found))  # must not matter
        torch.set_num_threads(threads)
        try:
            folder, results = start(arms, out=out)
        finally:
            torch.set_num_threads(1)
        digests = [
            results["arms"][arm]["per_seed"][0]["adapter"] for arm in ("pooled", "federated")
        ]
        exported = {p.name: p.read_bytes() for p in (folder / "federated").iterdir()}
        found.append((digests, exported))
    assert found[0] == found[1]
    assert not (folder / "privacy.json").exists()


def test_a_label_that_no_site_trained_counts_as_an_error(start, cohort):
    records = cohort()
    for one in records:
        if one["split"] == "test":
            one["disease"] = "plague"
    arms = ('site = "hospital"', 'site = "hospital"\narms = ["federated"]')
    _, results = start(arms, records=records)
    assert results["data"]["unseen_labels"] == sum(one["split"] == "test" for one in records)
    assert results["arms"]["federated"]["metrics"] == {"top1": 0, "top3": 0, "macro_f1": 0}


def test_a_test_set_of_unlisted_classes_alone_ends_in_results(start, cohort):
    records = [one | {"disease": "plague"} if one["split"] == "test" else one for one in cohort()]
    lines = 'arms = ["federated", "federated_dp"]\nsweep_epsilon = [30.0]'
    _, results = start(('site = "hospital"', f'site = "hospital"\n{lines}'), records=records)
    assert "no better than always naming one class (0.000)" in results["enough"]["text"]
    assert "first seed" not in results["enough"]["text"]  # there is but one
    assert results["baseline"]["pooled"] == {"top1": 0, "top3": 0, "macro_f1": 0}


def test_a_folder_of_a_run_that_could_not_begin_is_free_for_the_mended_one(start):
    arms = ('site = "hospital"', 'site = "hospital"\narms = ["federated"]')
    with pytest.raises(ConfigError, match="rank"):
        start(arms, ("rank = 2", "rank = 1700"))
    _, results = start(arms)
    assert results["arms"].keys() == {"federated"}


def test_a_line_that_says_what_is_so_anyway_makes_no_other_run(start):
    arms = ('site = "hospital"', 'site = "hospital"\narms = ["federated"]')
    said = ('site = "hospital"', 'evaluate_every = 1\nsite = "hospital"\narms = ["federated"]')
    _, first = start(arms)
    _, again = start(said, resume=True)
    assert again["arms"]["federated"]["per_seed"] == first["arms"]["federated"]["per_seed"]
    with pytest.raises(ConfigError, match=r"\(other simulation evaluate_every 1, now 2\)"):
        start(said, ("evaluate_every = 1", "evaluate_every = 2"), resume=True)


def test_values_of_a_sweep_that_lie_close_are_units_of_their_own(start):
    lines = 'arms = ["federated_dp"]\nsweep_epsilon = [2.0000001, 2.0000002]'
    folder, results = start(('site = "hospital"', f'site = "hospital"\n{lines}'))
    assert {path.stem for path in (folder / "state").iterdir()} == {
        "federated_dp-1",
        "sweep_epsilon-2.0000001",
        "sweep_epsilon-2.0000002",
    }
    assert len(results["sweep"]) == 3


def test_a_finished_run_is_not_done_again(start, monkeypatch):
    arms = ('site = "hospital"', 'site = "hospital"\narms = ["federated", "federated_dp"]')
    _, first = start(arms)

    def never(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(federation, "_run_round", never)
    _, again = start(arms, resume=True)
    for arm in first["arms"]:
        assert again["arms"][arm]["per_seed"] == first["arms"][arm]["per_seed"]
        assert again["arms"][arm]["rounds"] == first["arms"][arm]["rounds"]


def test_a_sweep_gives_points_of_more_epsilon_and_of_fewer_patients(start):
    lines = 'arms = ["federated_dp"]\nsweep_epsilon = [2.0]\nsweep_patients = [0.5]'
    _, results = start(('site = "hospital"', f'site = "hospital"\n{lines}'))
    sweep, fewer = results["sweep"], results["sweep_patients"]
    assert [point["epsilon"] for point in sweep] == pytest.approx([2.0, 8.0], rel=0.02)
    assert sweep[0]["sigma"] > sweep[1]["sigma"]
    assert [point["times_patients"] for point in sweep] == [pytest.approx(0.3, abs=0.2), 1.0]
    assert [point["patients"] for point in fewer] == [
        8,
        18,
    ]  # of nine patients at each of two sites
    assert fewer[0]["sigma"] == fewer[1]["sigma"] == sweep[1]["sigma"]


def test_a_refused_update_stops_the_round(start, monkeypatch):
    class Refusing(Coordinator):
        def receive(self, state, data):
            return super().receive(state, data[:-1])

    monkeypatch.setattr(federation, "Coordinator", Refusing)
    with pytest.raises(AggregationError, match=r"update of site '.*' in round 1 was refused"):
        start()


def test_the_watcher_hears_of_each_site_and_round(experiment_file, home, tmp_path):
    heard: list[object] = []

    class Listening(runner.Observer):
        def planned(self, works):
            heard.append([work.unit for work in works])

        def site_done(self, work, round, site, loss, sent):
            heard.append((work.unit, round, site, math.isfinite(loss), sent > 1000))

        def round_done(self, work, entry):
            heard.append((work.unit, entry["round"]))

    arms = ('site = "hospital"', 'site = "hospital"\narms = ["local", "federated"]')
    experiment = load_experiment(experiment_file(arms))
    run_experiment(experiment, tmp_path / "run", home=home, observer=Listening())
    assert heard[0] == ["local-1-North", "local-1-South", "federated-1"]
    assert heard[-3:] == [
        ("federated-1", 2, "North", True, True),
        ("federated-1", 2, "South", True, True),
        ("federated-1", 2),
    ]
    assert issubclass(Listening, Watcher)


@pytest.mark.parametrize("size", [2, 3])
def test_names_of_files_differ_where_names_of_sites_do(size):
    alphabet = ["a", "A", "0", "4", "%", "/", ".", "丁", "\x04", "e", "2", "d", " ", "é"]
    names = ["".join(letters) for letters in itertools.product(alphabet, repeat=size)]
    safe = [run_folder.safe_name(name) for name in (*names, "4e01", "\x04e01", "丁")]
    assert len(set(safe)) == len(safe)
    assert all(c.isascii() and (c.isalnum() or c in "-_%") for name in safe for c in name)


def test_the_arms_are_studies_of_their_own(start, make_study):
    study = make_study()
    plain = runner.arm_study(study, 5, private=False)
    private = runner.arm_study(study, 5, private=True)
    assert (plain.privacy.unit, private.privacy.unit) == ("none", "patient")
    assert plain.study.seed == private.study.seed == 5
    assert len({study.digest(), plain.digest(), private.digest()}) == 3


def test_the_exported_adapter_is_what_the_last_round_made(start, tiny):
    from peft import PeftModel

    arms = ('site = "hospital"', 'site = "hospital"\narms = ["federated"]')
    folder, _ = start(arms, *INSTRUCTION)
    network, tokenizer = load_model(tiny, causal_lm=True)
    ids = tokenizer("fever", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = network(input_ids=ids).logits
        with pytest.warns(FutureWarning, match=r"is_gradient_checkpointing"):
            adapted = PeftModel.from_pretrained(network, folder / "federated").eval()
        after = adapted(input_ids=ids).logits
    assert not torch.allclose(before, after, atol=1e-4)


def test_metrics_that_sites_let_out_are_in_the_results_and_the_report(start):
    changes = (
        ("[rounds]", "metrics_epsilon = 50.0\nmetrics_minimum = 3\n[rounds]"),
        ('site = "hospital"', 'site = "hospital"\narms = ["federated_dp"]'),
    )
    folder, results = start(*changes)
    arm = results["arms"]["federated_dp"]
    released = arm["released"]
    assert released["epsilon"] == 50
    held_out = {n: s["test_patients"] for n, s in results["data"]["sites"].items()}
    assert released["silent"] == []
    for name, patients in held_out.items():  # noise of this ε is 0 but for one in 10^21
        found = released["sites"][name]
        assert (found["patients"]["value"] if found else 0) == (patients if patients >= 3 else 0)
    assert released["joint"]["patients"] == sum(n for n in held_out.values() if n >= 3)
    certificate = parse_certificate((folder / "privacy.json").read_bytes())
    assert [one.ledger and one.ledger.metrics_epsilon for one in certificate.sites] == [50, 50]
    assert start(*changes, resume=True)[1]["arms"]["federated_dp"]["released"] == released
    page = write_report(results, folder).read_text(encoding="utf-8")
    assert "Noised counts on held-out patients, ε = 50 for each of them" in page
