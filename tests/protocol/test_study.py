"""A study refuses what it cannot promise, and its digest covers all that was agreed."""

import copy
import dataclasses
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.protocol.errors import ConfigError
from huizhen.protocol.study import FORMAT, SECTIONS, Study, parse_study

GOLDEN = Path(__file__).parent.parent / "golden"
DIGEST = "84a0dde26418ba79beae4887646473d8b87dd911a0cdc90442c281693427d697"

MINIMAL = """
[study]
name = "golden 会诊"

[base]
name = "tiny"
digests = { "model.safetensors" = "9f86", "config.json" = "60303a" }

[adapter]
target_modules = ["query", "value"]

[task]
kind = "classification"
text = "{note}"
label = "icd"

[sites.north]
patients_public = 700

[sites."Süd"]
patients_public = 130
"""

# Every field set, none to its default; the digest walks over it.
FULL: dict[str, dict[str, Any]] = {
    "study": {"name": "full", "purpose": "p", "seed": 11},
    "base": {"name": "tiny", "digests": {"a": "00", "b": "11"}, "dtype": "bfloat16"},
    "adapter": {"rank": 3, "alpha": 7.5, "target_modules": ["q", "v"], "layers": 2},
    "task": {
        "kind": "classification",
        "text": "{note}",
        "label": "icd",
        "labels": ["G12", "G11"],
        "label_text": "name",
        "label_texts": ["spinal", "ataxia"],
        "head": "normalised",
        "head_scale": 5.5,
        "label_smoothing": 0.07,
        "max_tokens": 99,
        "max_new_tokens": 5,
    },
    "privacy": {
        "unit": "record",
        "epsilon": 2.5,
        "delta": 3e-4,
        "sampling_rate": 0.3,
        "max_grad_norm": 0.7,
        "records_per_patient": 2,
        "learning_rate": 0.01,
        "optimizer": "adamw",
        "batch_cap": 900,
        "metrics_epsilon": 0.4,
        "metrics_minimum": 17,
    },
    "strategy": {
        "name": "fedadam",
        "weights": "public",
        "combine": "geometric_median",
        "server_learning_rate": 0.2,
        "beta1": 0.8,
        "beta2": 0.7,
        "tau": 0.6,
    },
    "rounds": {
        "count": 7,
        "length": "steps",
        "local_epochs": 2,
        "local_steps": 9,
        "batch_size": 13,
        "learning_rate": 0.02,
        "head_learning_rate": 0.03,
        "optimizer": "sgd",
        "head_optimizer": "adamw",
        "momentum": 0.4,
        "max_norm": 0.9,
        "schedule": "cosine",
        "quorum": 1,
        "deadline_minutes": 45.0,
        "max_update_norm": 77.0,
        "update_dtype": "int8",
    },
    "sites": {"north": {"patients_public": 700}, "south": {"patients_public": 130}},
}
TABULAR: dict[str, dict[str, Any]] = {
    **{name: terms for name, terms in FULL.items() if name not in ("base", "adapter")},
    "task": {
        "kind": "tabular",
        "features": {"age": [18, 99.5], "sex": [0, 1]},
        "missing": "middle",
        "label": "icd",
        "labels": ["G12", "G11"],
        "label_smoothing": 0.07,
    },
}
INSTRUCTION = {"kind": "instruction", "text": "{q}", "answer": "{a}", "system": "be brief"}


def minimal():
    return parse_study(tomllib.loads(MINIMAL), "study.toml")


def changed(section, **values):
    """Return the tables of FULL with some values of a section changed; None removes a key."""
    tables = copy.deepcopy(FULL)
    terms = tables[section]
    for key, value in values.items():
        terms[key] = value
        if value is None:
            del terms[key]
    return tables


def refusal(tables):
    with pytest.raises(ConfigError) as caught:
        parse_study(tables, "study.toml")
    return str(caught.value)


def test_the_digest_and_the_canonical_bytes_are_the_golden_ones():
    golden = (GOLDEN / "study.json").read_bytes()
    assert minimal().canonical() == golden
    assert hashlib.sha256(golden).hexdigest() == DIGEST
    assert minimal().digest() == DIGEST


def test_the_resolved_document_holds_every_field_and_its_default():
    found = json.loads(minimal().canonical())
    assert found["format"] == FORMAT == 1
    assert found["rounds"]["count"] == 20
    assert found["rounds"]["quorum"] is None
    assert found["privacy"] == {
        "unit": "patient",
        "epsilon": 8,
        "delta": 1e-5,
        "sampling_rate": 0.2,
        "max_grad_norm": 1,
        "records_per_patient": 4,
        "learning_rate": None,
        "optimizer": "sgd",
        "batch_cap": None,
        "metrics_epsilon": None,
        "metrics_minimum": 10,
    }
    assert found["base"]["dtype"] == "float32"
    own = {"name": "ffa_ortho", "weights": "equal", "combine": "mean"}
    assert {key: value for key, value in found["strategy"].items() if value is not None} == own

    def names(value):
        return {field.name for field in dataclasses.fields(value)}

    for section in SECTIONS:
        if section != "sites":
            assert found[section].keys() == names(getattr(minimal(), section))
    assert {**found, "format": None}.keys() == {"format", *SECTIONS}


def leaves(value, path=()):
    """Yield the path of every field, item and entry below a value."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path


def replaced(value, path):
    """Return a copy of the value whose leaf at ``path`` is another, past every check."""
    if not path:
        return "other"
    key, rest = path[0], path[1:]
    if dataclasses.is_dataclass(value):
        clone = copy.copy(value)
        object.__setattr__(clone, key, replaced(getattr(value, key), rest))
        return clone
    if isinstance(value, tuple):
        return (*value[:key], replaced(value[key], rest), *value[key + 1 :])
    return {**value, key: replaced(value[key], rest)}


STUDY = parse_study(FULL, "study.toml")
TABULAR_STUDY = parse_study(TABULAR, "study.toml")
LEAVES = [
    *((STUDY, path) for path in leaves(STUDY)),
    *((TABULAR_STUDY, path) for path in leaves(TABULAR_STUDY) if path[0] == "task"),
]


def test_the_walk_meets_every_field_of_every_section():
    found = {path for _, path in LEAVES}
    assert {path[:2] for path in found} >= {
        (section, field.name)
        for section in SECTIONS
        if section != "sites"
        for field in dataclasses.fields(getattr(STUDY, section))
    }
    assert ("sites", "north", "patients_public") in found
    assert ("base", "digests", "a") in found
    assert ("task", "features", "age", 0) in found
    for section in SECTIONS:  # a new field must be added to FULL, away from its default
        if section != "sites":
            unset = {field.name for field in dataclasses.fields(getattr(STUDY, section))}
            assert unset - FULL[section].keys() <= {
                "answer",
                "system",
                "features",
                "missing",
                # of other strategies and rules: tests/protocol/test_strategy_terms.py
                "byzantine",
                "clip_radius",
                "every",
                "mu",
                "update_share",
                "time",
                "warm_rounds",
            }


@pytest.mark.parametrize(
    ("study", "path"), LEAVES, ids=lambda value: "" if isinstance(value, Study) else str(value)
)
def test_the_digest_changes_with_every_field(study, path):
    assert replaced(study, path).digest() != study.digest()
    assert parse_study(FULL, "study.toml") == STUDY


def test_the_digest_changes_with_the_names_of_sites_and_files_and_the_order_of_labels():
    digests = {STUDY.digest()}
    for change in (
        changed("sites", east={"patients_public": 700}, north=None),
        changed("sites", north=None),
        changed("base", digests={"b": "00", "a": "11"}),
        changed("base", digests={"a": "00"}),
        changed("task", labels=["G11", "G12"]),
        changed("task", label_texts=["ataxia", "spinal"]),
        changed("adapter", target_modules=["q"]),
        changed("rounds", quorum=None),
    ):
        digests.add(parse_study(change, "study.toml").digest())
    assert len(digests) == 9


@given(st.data())
def test_the_order_of_keys_in_toml_does_not_change_the_digest(data):
    def shuffled(value):
        if not isinstance(value, dict):
            return value
        keys = data.draw(st.permutations(list(value)))
        return {key: shuffled(value[key]) for key in keys}

    assert parse_study(shuffled(FULL), "other.toml").digest() == STUDY.digest()


def test_a_whole_number_for_a_number_does_not_change_the_digest():
    assert (
        parse_study(changed("adapter", alpha=16), "s").digest()
        == parse_study(changed("adapter", alpha=16.0), "s").digest()
    )
    whole = parse_study(changed("privacy", epsilon=8, learning_rate=1, max_grad_norm=2), "s")
    assert (whole.privacy.epsilon, whole.privacy.max_grad_norm) == (8.0, 2.0)
    assert type(whole.privacy.epsilon) is float


NAN, INF = float("nan"), float("inf")
REFUSED = [
    *[("study", "name", value) for value in ["", " a", ".a", "a" * 101, "a/b", "a\nb", "a\n", 5]],
    *[("study", "seed", value) for value in [-1, 2**53, 2**70, 1.0, True, "1"]],
    ("study", "purpose", 5),
    ("base", "name", 5),
    ("base", "digests", {"a": 1}),
    *[("base", "dtype", value) for value in ["float16", "", 32]],
    *[("adapter", "rank", value) for value in [0, -8, 8.0, True, "8", 2**60]],
    *[("adapter", "alpha", value) for value in [0, -1, NAN, INF, True, "16", 10**400]],
    *[("adapter", "target_modules", value) for value in [[], "query", [1], {}]],
    *[("adapter", "layers", value) for value in [0, -1, 1.0, True]],
    *[("task", "kind", value) for value in ["Classification", "", 1]],
    *[("task", "label", value) for value in ["", 3]],
    *[("task", "labels", value) for value in [["a", "a"], "ab", [1, 2]]],
    ("task", "label_texts", ["only one"]),
    ("task", "head", "mlp"),
    *[("task", "head_scale", value) for value in [0, -1.0, NAN, INF, -INF]],
    *[("task", "label_smoothing", value) for value in [-0.1, 1, NAN, INF, True]],
    *[("task", "max_tokens", value) for value in [0, -1, 131_073, 1.0]],
    *[("task", "max_new_tokens", value) for value in [0, -1, 2**60, True]],
    *[("task", name, "x") for name in ["answer", "system"]],
    *[("privacy", "unit", value) for value in ["hospital", "Patient", ""]],
    *[("privacy", "epsilon", value) for value in [0, 0.0, -1, NAN, INF, True, "8", 10**400]],
    *[("privacy", "delta", value) for value in [0, 1, 1.5, -1e-5, NAN, INF, "1e-5"]],
    *[("privacy", "sampling_rate", value) for value in [0, -0.1, 1.0000001, 2, NAN, INF, True]],
    *[("privacy", "max_grad_norm", value) for value in [0, -1, NAN, INF, "Auto", True]],
    *[("privacy", "records_per_patient", value) for value in [0, -1, 1.5, True]],
    *[("privacy", "learning_rate", value) for value in [0, -1e-3, NAN, INF, True]],
    ("privacy", "optimizer", "adam"),
    *[("privacy", "batch_cap", value) for value in [0, -1, 900.0, True, "900"]],
    *[("privacy", "metrics_epsilon", value) for value in [0, -0.1, NAN, INF, True]],
    *[("privacy", "metrics_minimum", value) for value in [0, -1, 10.0, True]],
    ("strategy", "name", 1),
    ("strategy", "weights", "size"),
    ("strategy", "combine", "krum"),
    *[
        ("rounds", name, value)
        for name in ["count", "local_epochs", "local_steps", "batch_size"]
        for value in [0, -1, 1_000_001, 2.0, True, "3"]
    ],
    *[
        ("rounds", name, value)
        for name in ["learning_rate", "head_learning_rate", "max_norm"]
        for value in [0, -0.1, NAN, INF, True]
    ],
    *[("rounds", name, "adam") for name in ["optimizer", "head_optimizer"]],
    ("rounds", "schedule", "linear"),
    *[("rounds", "quorum", value) for value in [0, -1, 1.0, True]],
]


@pytest.mark.parametrize(
    ("section", "key", "value"), REFUSED, ids=lambda value: str(value)[:20].replace("\n", "\\n")
)
def test_a_value_that_makes_no_sense_is_refused_by_section_and_key(section, key, value):
    message = refusal(changed(section, **{key: value}))
    assert message.startswith(f"study.toml [{section}] ")
    assert key in message


ACCEPTED = [
    ("study", "name", "a"),
    ("study", "name", "会诊 2.0-b_c"),
    ("study", "seed", 2**53 - 1),
    ("adapter", "rank", 1),
    ("adapter", "layers", 1),
    ("task", "max_tokens", 131_072),
    ("privacy", "sampling_rate", 1),
    ("privacy", "max_grad_norm", "auto"),
    ("privacy", "epsilon", 1e-3),
    ("privacy", "metrics_minimum", 1),
    ("rounds", "count", 1_000_000),
    ("rounds", "quorum", 1),
]


@pytest.mark.parametrize(("section", "key", "value"), ACCEPTED, ids=lambda value: str(value))
def test_a_value_on_the_edge_is_accepted_and_has_a_digest(section, key, value):
    study = parse_study(changed(section, **{key: value}), "study.toml")
    assert getattr(getattr(study, section), key) == value
    assert len(study.digest()) == 64


@pytest.mark.parametrize("value", [0, -5, 1.0, True, "700", 2**60])
def test_a_public_size_that_makes_no_sense_is_refused_by_site(value):
    message = refusal(changed("sites", north={"patients_public": value}))
    assert message.startswith("study.toml [sites.north] patients_public")


@pytest.mark.parametrize("name", ["", " north", "a/b", "..", "a\\b", "a\nb", "a\u200bb", "x" * 65])
def test_a_site_whose_name_misleads_is_refused(name):
    message = refusal(changed("sites", **{name: {"patients_public": 700}}))
    assert message.startswith("site name is")


@pytest.mark.parametrize("name", ["北京协和医院", "Hôpital Nº 3 (Est)", "x" * 64, "0"])
def test_a_site_has_any_name_that_people_read(name):
    assert name in parse_study(changed("sites", **{name: {"patients_public": 700}}), "s").sites


@pytest.mark.parametrize("terms", [3, [1], "x"])
def test_a_site_or_a_section_that_is_no_table_is_refused(terms):
    assert refusal(changed("sites", north=terms)).startswith("study.toml [sites.north]")
    assert refusal({**FULL, "rounds": terms}).startswith("study.toml [rounds]")
    assert refusal({**FULL, "sites": terms}).startswith("study.toml [sites]")


# 1/700 = 0.00142857…: the largest site decides.
@pytest.mark.parametrize("delta", [1 / 700, 0.0015, 0.5])
def test_a_delta_that_would_allow_to_publish_one_patient_is_refused_by_site(delta):
    message = refusal(changed("privacy", delta=delta))
    assert message.startswith("[privacy] delta is")
    assert "'north'" in message
    assert "under 0.0014" in message


def test_a_delta_under_one_in_the_largest_site_is_accepted_and_without_privacy_any_is():
    assert parse_study(changed("privacy", delta=0.0014), "s").is_private
    assert not parse_study(changed("privacy", delta=0.5, unit="none"), "s").is_private


# q = 0.3: north has 210 + 4 · √210 = 267.97 patients, south 39 + 4 · √39 = 63.98.
def test_a_cap_that_cuts_into_ordinary_batches_is_refused_by_site_with_the_least_that_serves():
    message = refusal(changed("privacy", batch_cap=267))
    assert message == (
        "[privacy] batch_cap is 267, site 'north' has about 700 patients: it must be at least 268"
    )
    assert parse_study(changed("privacy", batch_cap=268), "s").privacy.batch_cap == 268
    assert parse_study(changed("privacy", batch_cap=None), "s").privacy.batch_cap is None
    alone = changed("sites", north=None)
    alone["privacy"]["batch_cap"] = 64
    assert parse_study(alone, "s").privacy.least_batch_cap(130) == 64
    alone["privacy"]["batch_cap"] = 63
    assert "'south'" in refusal(alone)


def test_a_cap_says_nothing_of_a_study_without_privacy():
    assert parse_study(changed("privacy", batch_cap=1, unit="none"), "s").privacy.batch_cap == 1


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        (changed("privacy", epsilom=1), "'epsilon'"),
        (changed("privacy", noise_multiplier=0), "known are"),
        (changed("rounds", local_step=4), "'local_steps'"),
        (changed("sites", north={"patients": 3, "patients_public": 5}), "'patients_public'"),
        ({**FULL, "privcy": {}}, "'privacy'"),
        ({**FULL, "Privacy": {}}, "'privacy'"),
    ],
    ids=["epsilom", "noise_multiplier", "local_step", "site", "privcy", "Privacy"],
)
def test_a_misspelt_key_never_falls_back_to_a_default(unknown, nearest):
    message = refusal(unknown)
    assert "unknown key" in message
    assert nearest in message


@pytest.mark.parametrize("section", ["study", "base", "adapter", "task"])
def test_a_missing_section_is_named(section):
    tables = {name: terms for name, terms in FULL.items() if name != section}
    assert refusal(tables) == f"study.toml has no [{section}]: add the section"


@pytest.mark.parametrize(
    ("section", "key"),
    [("study", "name"), ("base", "name"), ("adapter", "target_modules"), ("task", "text")],
)
def test_a_missing_key_is_named(section, key):
    expected = f"study.toml [{section}] has no {key!r}: add it"
    assert refusal(changed(section, **{key: None})) == expected


def test_each_kind_of_task_needs_its_own_keys_and_refuses_the_others():
    assert "needs the field that holds the class" in refusal(changed("task", label=None))
    tables = {**FULL, "task": INSTRUCTION}
    assert parse_study(tables, "s").task.answer == "{a}"
    without = {name: value for name, value in INSTRUCTION.items() if name != "answer"}
    assert "needs the template of the answer" in refusal({**tables, "task": without})
    for key in ("label", "label_text"):
        message = refusal({**tables, "task": {**INSTRUCTION, key: "x"}})
        assert f"{key} has no meaning for kind 'instruction'" in message


def tabular_with(**terms):
    """Return the tables of TABULAR with some values of the task changed; None removes a key."""
    task = {**TABULAR["task"], **terms}
    return {**TABULAR, "task": {name: value for name, value in task.items() if value is not None}}


def test_a_tabular_study_has_no_base_and_no_adapter_and_its_digest_says_so():
    study = TABULAR_STUDY
    assert study.base is None
    assert study.adapter is None
    assert study.task.features == {"age": (18.0, 99.5), "sex": (0.0, 1.0)}
    resolved = json.loads(study.canonical())
    assert resolved["base"] is resolved["adapter"] is None
    for section in ("base", "adapter"):
        message = refusal({**TABULAR, section: FULL[section]})
        assert message == f"[{section}] has no meaning for kind 'tabular': remove the section"


def test_a_tabular_study_names_a_strategy_that_needs_no_lora():
    for terms in ({}, {"name": "ffa_ortho"}, {"name": "rolora"}):
        message = refusal({**TABULAR, "strategy": terms})
        assert "a tabular study has no LoRA: set one of fedadagrad, fedadam, fedavg" in message


def test_a_tabular_study_needs_features_and_a_label_and_refuses_what_is_of_texts():
    assert "has no 'features', a tabular task needs" in refusal(tabular_with(features=None))
    assert "has no 'features', a tabular task needs" in refusal(tabular_with(features={}))
    assert "needs the field that holds the class" in refusal(tabular_with(label=None))
    for key in ("text", "label_text", "answer", "system"):
        message = refusal(tabular_with(**{key: "x"}))
        assert f"{key} has no meaning for kind 'tabular'" in message
    assert "head has no meaning" in refusal(tabular_with(head="normalised"))
    for kind in (FULL["task"], INSTRUCTION):
        message = refusal({**FULL, "task": {**kind, "features": {"age": [0, 1]}}})
        assert "features has no meaning for kind" in message
        message = refusal({**FULL, "task": {**kind, "missing": "middle"}})
        assert "missing has no meaning for kind" in message


@pytest.mark.parametrize(
    "bounds", [[], [1], [0, 1, 2], [1, 1], [2, 1], [0, INF], [NAN, 1], ["0", 1], 5, True]
)
def test_a_range_that_scales_nothing_is_refused_by_feature(bounds):
    message = refusal(tabular_with(features={"age": bounds}))
    assert message.startswith("study.toml [task] features")
    assert "age" in message


def test_the_order_of_features_is_not_agreed_and_their_names_and_ranges_are():
    digests = {
        parse_study(tabular_with(features=features), "s").digest()
        for features in (
            {"age": [18, 99.5], "sex": [0, 1]},
            {"sex": [0, 1], "age": [18, 99.5]},
            {"sex": [18, 99.5], "age": [0, 1]},
            {"sexe": [0, 1], "age": [18, 99.5]},
            {"sex": [0, 2], "age": [18, 99.5]},
            {"sex": [0, 1]},
        )
    }
    assert len(digests) == 5


def test_the_quorum_is_all_sites_unless_the_study_says_otherwise():
    assert parse_study(changed("rounds", quorum=None), "s").quorum == 2
    assert STUDY.quorum == 1


def test_a_study_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        STUDY.privacy.epsilon = 100.0  # type: ignore[misc]  # this is the attack
    assert isinstance(STUDY, Study)
