"""The audit of a study from its file: the step that training runs, and a document that says so.

The experiment's ε is 8 at δ = 1e-3 in 4 steps. Canaries can show less than that however they guess,
so a wrong alarm can come from the draws and the noise only: twice 1e-6.
"""

import json
import struct
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from huizhen.client import dp_sgd, private_steps, randomness
from huizhen.client.patient_gradients import ModelGradients
from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.simulations import audit
from huizhen.simulations import audit_study as audit_study_module
from huizhen.simulations.audit import Bound, Claim
from huizhen.simulations.audit_figure import audit_figure
from huizhen.simulations.audit_report import audit_table, write_audit
from huizhen.simulations.audit_study import Auditor, audit_study
from huizhen.simulations.audit_verdict import LEVEL, advice, reasons_against
from huizhen.simulations.experiment import load_experiment
from huizhen.simulations.runner import run_experiment


class Listener(Auditor):
    def __init__(self):
        self.steps, self.said = [], []

    def say(self, text):
        self.said.append(text)

    def stepped(self, done, steps, seconds):
        self.steps.append((done, steps))


@pytest.fixture
def start(experiment_file, home):
    def start(*changes, auditor=None, canaries=64, records=None, **terms):
        experiment = load_experiment(experiment_file(*changes, records=records))
        return audit_study(experiment, canaries=canaries, home=home, auditor=auditor, **terms)

    return start


def test_an_audit_documents_claim_checks_and_verdict(start):
    listener = Listener()
    found = start(auditor=listener)
    claim, bound = found["claim"], found["bound"]
    assert 7.9 < claim["epsilon"] <= 8.0
    assert (claim["delta"], claim["sampling_rate"], claim["steps"]) == (1e-3, 0.5, 4)
    assert claim["denominator"] == 0.5 * 9  # North has nine training patients
    assert found["site"] == "North"
    assert len(found["scores"]["in"]) + len(found["scores"]["out"]) == 64
    assert 0 <= bound["epsilon_lower"] <= bound["ceiling"] < claim["epsilon"]
    assert not found["in_reach"]
    assert found["verdict"] == "not refuted"
    assert found["reasons"] == []
    assert "not proved" in found["meaning"]
    assert 0.9 < max(found["neighbours"]["moved"]) <= 1
    assert found["draws"]["of"] == 9 + len(found["scores"]["in"])
    assert found["draws"]["p_value"] >= LEVEL
    assert found["noise"]["p_value"] >= LEVEL
    assert listener.steps == [(i, 4) for i in range(1, 5)]
    said = [text for text in listener.said if "canaries" in text]
    assert (
        f"could show epsilon {bound['ceiling']:.2f}, the claim is {claim['epsilon']:.2f}" in said[0]
    )
    json.dumps(found, allow_nan=False)


def test_fewer_steps_make_a_smaller_claim(start):
    found = start(steps=1)
    assert found["claim"]["steps"] == 1
    assert found["claim"]["epsilon"] < 6
    assert any("1 of the study's 4 steps" in note for note in found["notes"])


@pytest.mark.parametrize("clipping", ["0.3", '"auto"'])
def test_the_audited_step_has_the_terms_of_the_trained_one(
    start, experiment_file, home, tmp_path, monkeypatch, clipping
):
    calls: dict[Any, list[Any]] = {private_steps: [], audit: []}
    for module, seen in calls.items():
        true = module.private_gradient

        def watched(source, shapes, *, noise, true=true, seen=seen, **terms):
            seen.append((dict(shapes), terms))
            return true(source, shapes, noise=noise, **terms)

        monkeypatch.setattr(module, "private_gradient", watched)
    changes = (
        ("sampling_rate = 0.5", f"sampling_rate = 0.5\nmax_grad_norm = {clipping}"),
        ('site = "hospital"', 'site = "hospital"\narms = ["federated_dp"]'),
    )
    run_experiment(load_experiment(experiment_file(*changes)), tmp_path / "run", home=home)
    start(*changes)
    assert len(calls[private_steps]) == 2 * 4  # two sites of the same public size
    assert len(calls[audit]) == 4
    for shapes, terms in calls[private_steps]:
        assert shapes == calls[audit][0][0]
        assert terms == {"batch_cap": None} | calls[audit][0][1]


@pytest.mark.parametrize("most", [1, 3])
def test_a_patient_has_as_many_records_in_a_step_as_the_study_says(start, monkeypatch, most):
    built = []

    class Watched(ModelGradients):
        def __init__(self, *arguments, records_per_patient, **terms):
            built.append(records_per_patient)
            super().__init__(*arguments, records_per_patient=records_per_patient, **terms)

    monkeypatch.setattr(audit_study_module, "ModelGradients", Watched)
    start(("sampling_rate = 0.5", f"sampling_rate = 0.5\nrecords_per_patient = {most}"))
    assert built == [2, most]  # all of them where patients are left out


def test_the_site_with_the_most_patients_is_audited_unless_one_is_named(start, cohort):
    larger = [one for one in cohort(patients=12) if one["hospital"] == "South"]
    records = [*(one for one in cohort() if one["hospital"] == "North"), *larger]
    assert start(records=records, steps=1)["site"] == "South"
    assert start(records=records, steps=1, site="North")["site"] == "North"


def test_the_whole_data_of_the_site_takes_part(start, monkeypatch):
    asked = []
    true = ModelGradients.microbatches

    def watched(self, chosen):
        asked.append(len(chosen))
        yield from true(self, chosen)

    monkeypatch.setattr(ModelGradients, "microbatches", watched)
    monkeypatch.setattr(dp_sgd, "poisson_sample", lambda count, rate: np.arange(count))
    start()
    assert asked[-5:] == [9] * 5  # what the auditor knows, and four steps


def test_a_study_without_noise_is_refuted(start, monkeypatch):
    monkeypatch.setattr(randomness, "normals", np.zeros)
    found = start()
    assert found["verdict"] == "refuted"
    assert "varies less than noise" in found["reasons"][0]


def test_a_step_that_does_not_clip_is_refuted_by_real_patients(start, monkeypatch):
    monkeypatch.setattr(
        dp_sgd, "clip_factors", lambda gradients, _: torch.ones(len(gradients["head.bias"]))
    )
    found = start(("sampling_rate = 0.5", "sampling_rate = 0.5\nmax_grad_norm = 0.01"))
    assert found["verdict"] == "refuted"
    assert any("over C" in reason for reason in found["reasons"])


def test_a_tabular_study_can_be_audited(start, cohort):
    measured = [one | {"age": 5 * i % 100, "weight": 90 + i} for i, one in enumerate(cohort())]
    found = start(
        ('[base]\nname = "tiny"\n', ""),
        ('[adapter]\nrank = 2\nalpha = 4\ntarget_modules = ["q_proj", "v_proj"]\n', ""),
        (
            'kind = "classification"\ntext = "{text}"\nlabel = "disease"\nmax_tokens = 48',
            'kind = "tabular"\nfeatures = {age = [0, 100], weight = [1, 200]}\nlabel = "disease"',
        ),
        ("[rounds]", '[strategy]\nname = "fedavg"\n[rounds]'),
        canaries=8,
        records=measured,
    )
    assert found["study"]["base"] is None
    assert found["verdict"] == "not refuted"


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"site": "West"}, "--site is 'West', sites are North, South"),
        ({"steps": 0}, "the study has 4: choose 1 to 4"),
        ({"steps": 5}, "the study has 4: choose 1 to 4"),
        ({"canaries": 1}, "1 canaries, expected 2 to 291"),
        ({"canaries": 292}, "292 canaries, expected 2 to 291"),
    ],
)
def test_terms_that_cannot_be_are_refused(start, terms, message):
    with pytest.raises(ConfigError, match=message):
        start(**terms)


def test_a_study_that_promises_nothing_is_refused(start):
    with pytest.raises(ConfigError, match="there is no claim to audit"):
        start(
            ('unit = "patient"', 'unit = "none"'),
            ('site = "hospital"', 'site = "hospital"\narms = ["federated"]'),
        )


CLAIM = Claim(
    epsilon=2.0,
    delta=1e-5,
    noise_multiplier=4.67,
    sampling_rate=0.5,
    steps=20,
    max_grad_norm=1.0,
    denominator=25.0,
)
BOUND = Bound(guesses=64, right=46, epsilon_lower=0.45, ceiling=3.03, p_value=0.99, confidence=0.95)


def test_every_check_can_refute_and_says_why():
    fine = {"moved": 1.0, "draws": LEVEL, "noise": LEVEL}
    assert reasons_against(CLAIM, BOUND, **fine) == []
    for change, text in (
        ({"moved": 1.0001}, "moved the clipped sum by 1.000 C"),
        ({"moved": float("nan")}, "moved the clipped sum"),
        ({"draws": 9e-7}, "not drawn by Poisson sampling with rate 0.5"),
        ({"noise": 9e-7}, "varies less than noise of 4.67 C"),
    ):
        (reason,) = reasons_against(CLAIM, BOUND, **(fine | change))
        assert text in reason
    higher = Bound(
        guesses=64, right=64, epsilon_lower=2.01, ceiling=3.03, p_value=0.04, confidence=0.95
    )
    (reason,) = reasons_against(CLAIM, higher, **fine)
    assert "epsilon 2.01 or more, the claim is 2.00" in reason


def test_advice_names_what_would_bring_the_claim_within_reach():
    assert CLAIM.ceiling(16, 16) < CLAIM.epsilon
    found = advice(CLAIM, 16, 10_000) or ""
    count = int(found.split()[1])
    assert CLAIM.ceiling(count, CLAIM.guesses(count)) > CLAIM.epsilon
    assert CLAIM.ceiling(count // 4, CLAIM.guesses(count // 4)) < CLAIM.epsilon
    assert "--canaries" not in (advice(CLAIM, 16, 20) or "")


@pytest.fixture(scope="module")
def document():
    generator = np.random.default_rng(3)
    return {
        "site": "甲医院 [red]",
        "unit": "patient",
        "claim": {"epsilon": 2.0, "delta": 1e-5, "noise_multiplier": 4.67, "sampling_rate": 0.5}
        | {"steps": 20},
        "canaries": 60,
        "bound": {"guesses": 32, "right": 20, "epsilon_lower": 0.3, "ceiling": 2.1}
        | {"confidence": 0.95},
        "in_reach": False,
        "advice": "--canaries 128",
        "neighbours": {"moved": [0.999, 0.5], "patients": 14},
        "draws": {"p_value": 0.3, "least": 40, "most": 60, "of": 100},
        "noise": {"p_value": 0.2},
        "notes": ["4 of 20."],
        "verdict": "not refuted",
        "meaning": "Not refuted is not proved.",
        "scores": {
            "in": generator.normal(10, 20, 30).tolist(),
            "out": generator.normal(0, 20, 30).tolist(),
        },
    }


def test_the_picture_is_a_png_and_the_same_for_the_same_document(document):
    first = audit_figure(document)
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", first[16:24]) == (1152, 896)
    assert audit_figure(document) == first
    assert audit_figure(document | {"verdict": "refuted"}) != first


@pytest.mark.parametrize("scores", [{"in": [], "out": [0.0, 1.0]}, {"in": [5.0, 5.0], "out": []}])
def test_the_picture_does_not_need_both_groups(document, scores):
    bound = document["bound"] | {"guesses": 2}
    assert audit_figure(document | {"scores": scores, "bound": bound})


def test_the_table_says_what_was_found_and_what_could_have_been(document):
    text = StringIO()
    Console(file=text, width=200, markup=False).print(audit_table(document))
    shown = text.getvalue()
    for part in (
        "ε = 2.00, δ = 1e-05 per patient at site 甲医院 [red]",
        "ε ≥ 0.30 with 95 % confidence: 20 of 32 guesses on 60 canaries",
        "without any noise they would show 2.10",
        "within reach: --canaries 128",
        "moved the clipped sum by 0.999 C",
        "not refuted. Not refuted is not proved.",
    ):
        assert part in shown


def test_the_files_are_written_over_those_of_an_earlier_audit(document, tmp_path):
    write_audit(document, tmp_path / "new" / "audit")
    write_audit(document | {"canaries": 61}, tmp_path / "new" / "audit")
    files = sorted(path.name for path in (tmp_path / "new" / "audit").iterdir())
    assert files == ["audit.json", "audit.png"]
    text = (tmp_path / "new" / "audit" / "audit.json").read_text(encoding="utf-8")
    assert json.loads(text)["canaries"] == 61


def test_a_folder_that_cannot_be_written_is_a_storage_error(document, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match="cannot write"):
        write_audit(document, tmp_path / "taken")
