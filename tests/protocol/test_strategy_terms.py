"""Which way to average: parameters of their own, defaults in the digest, pairs that cannot be."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.protocol.errors import ConfigError
from huizhen.protocol.strategy_terms import (
    MERGES,
    MIXED_RANKS,
    PARAMETERS,
    SEE_EACH_UPDATE,
    StrategyTerms,
    shares_of,
)
from huizhen.protocol.study import parse_study

STEPS: dict[str, Any] = {"length": "steps", "optimizer": "sgd", "momentum": 0.0}
OPTIONAL = sorted({name for values in PARAMETERS.values() for name in values})


def study(sites=3, quorum=None, unit="none", **strategy):
    rounds = {} if quorum is None else {"quorum": quorum}
    rounds |= STEPS if strategy.get("name") == "scaffold" else {}
    return parse_study(
        {
            "study": {"name": "s"},
            "base": {"name": "tiny"},
            "adapter": {"target_modules": ["query"]},
            "task": {"kind": "classification", "text": "{t}", "label": "y"},
            "privacy": {"unit": unit},
            "strategy": strategy,
            "rounds": rounds,
            "sites": {f"s{i}": {"patients_public": 100} for i in range(sites)},
        },
        "study.toml",
    )


def refusal(**terms):
    with pytest.raises(ConfigError) as caught:
        study(**terms)
    return str(caught.value)


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_a_file_leaves_out_is_in_the_digest_with_its_default(name):
    terms = json.loads(study(name=name).canonical())["strategy"]
    assert {key: terms[key] for key in OPTIONAL if terms[key] is not None} == PARAMETERS[name]
    assert study(name=name).digest() == study(name=name, **PARAMETERS[name]).digest()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_of_another_strategy_is_refused(name):
    for key in OPTIONAL:
        if key not in PARAMETERS[name]:
            value = 1 if key in ("every", "warm_rounds") else 0.5
            message = refusal(name=name, **{key: value})
            assert message == f"study.toml [strategy] {key} has no meaning for {name!r}: remove it"


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("fedprox", "mu", [-0.1, float("nan"), float("inf"), "1"]),
        ("fedadam", "server_learning_rate", [0, -1, float("nan"), float("inf")]),
        ("fedadam", "tau", [0, -1e-3, float("inf")]),
        ("fedavgm", "beta1", [-0.1, 1, 1.5, float("nan")]),
        ("fedyogi", "beta2", [-0.1, 1]),
        ("ffa_refresh", "every", [0, -1, 1.5, 10**9]),
        ("rolora", "warm_rounds", [-1, 0.5]),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(name, key, values):
    for value in values:
        assert key in refusal(name=name, **{key: value})


@pytest.mark.parametrize(
    ("sites", "quorum", "terms", "least"),
    [
        (6, None, {"combine": "multi_krum", "byzantine": 1}, None),
        (5, None, {"combine": "multi_krum", "byzantine": 1}, None),
        (4, None, {"combine": "multi_krum", "byzantine": 1}, 5),
        (9, 4, {"combine": "multi_krum", "byzantine": 1}, 5),  # with four it must hold too
        (6, None, {"combine": "multi_krum", "byzantine": 2}, 7),
        (3, None, {"combine": "trimmed_mean", "byzantine": 1}, None),
        (3, 2, {"combine": "trimmed_mean", "byzantine": 1}, 3),
        (4, None, {"combine": "trimmed_mean", "byzantine": 2}, 5),
        (2, None, {"combine": "median"}, None),
    ],
)
def test_a_rule_that_so_few_sites_cannot_carry_is_refused(sites, quorum, terms, least):
    terms = {"name": "ffa_ortho", "sites": sites, "quorum": quorum, **terms}
    if least is None:
        study(**terms)
    else:
        assert f"it needs {least} updates in every round" in refusal(**terms)


def test_what_a_rule_needs_must_be_said_and_nothing_else():
    assert "needs byzantine: add it" in refusal(combine="multi_krum")
    assert "needs byzantine: add it" in refusal(combine="trimmed_mean")
    assert "needs clip_radius: add it" in refusal(combine="centred_clipping")
    for combine in ("mean", "median", "geometric_median", "centred_clipping"):
        message = refusal(combine=combine, byzantine=1)
        assert f"byzantine has no meaning for combine {combine!r}" in message
    assert "clip_radius has no meaning" in refusal(combine="median", clip_radius=1.0)
    for value in (0, -1.0, float("inf")):
        assert "clip_radius" in refusal(combine="centred_clipping", clip_radius=value)
    for value in (0, -1):
        assert "byzantine" in refusal(combine="multi_krum", byzantine=value)


@pytest.mark.parametrize("name", sorted(SEE_EACH_UPDATE))
def test_a_strategy_of_products_has_no_one_update_to_choose(name):
    assert f"{name!r} works on each site's product" in refusal(name=name, combine="median")


@pytest.mark.parametrize("combine", ["median", "trimmed_mean", "multi_krum"])
def test_a_rule_that_counts_every_site_alike_takes_no_weights(combine):
    extra = {} if combine == "median" else {"byzantine": 1}
    message = refusal(sites=6, name="ffa", combine=combine, weights="public", **extra)
    assert "counts every site alike: set weights = 'equal'" in message


def test_plain_krum_is_never_named():
    assert "krum" not in PARAMETERS
    assert "combine" in refusal(combine="krum")


def test_without_noise_no_variance_is_known():
    assert "there is no variance to know" in refusal(weights="inverse_variance")
    assert study(weights="inverse_variance", unit="patient").strategy.weights == "inverse_variance"


def test_shares_by_hand():
    sizes = {"a": 10, "b": 30}
    assert shares_of("equal", sizes) == {"a": 0.5, "b": 0.5}
    assert shares_of("public", sizes) == {"a": 0.25, "b": 0.75}
    assert shares_of("inverse_variance", sizes) == {"a": 0.1, "b": 0.9}


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 10**6), min_size=2, max_size=8))
def test_inverse_variance_shares_give_the_least_noise(sizes):
    """Of Σ p_i σ_i/n_i in squares, with one σ: p_i in proportion to n_i² has the least."""

    def variance(shares):
        return sum((shares[name] / sizes[name]) ** 2 for name in sizes)

    best = variance(shares_of("inverse_variance", sizes))
    assert best <= variance(shares_of("equal", sizes)) * (1 + 1e-9)
    assert best <= variance(shares_of("public", sizes)) * (1 + 1e-9)
    assert StrategyTerms(weights="inverse_variance").weights == "inverse_variance"


def test_a_site_of_another_rank_needs_a_strategy_that_takes_it():
    def with_rank(name, rank):
        tables = {
            "study": {"name": "s"},
            "base": {"name": "tiny"},
            "adapter": {"target_modules": ["query"], "rank": 4},
            "task": {"kind": "classification", "text": "{t}", "label": "y"},
            "privacy": {"unit": "none"},
            "strategy": {"name": name},
            "rounds": STEPS if name == "scaffold" else {},
            "sites": {"a": {"patients_public": 9}, "b": {"patients_public": 9, "rank": rank}},
        }
        return parse_study(tables, "study.toml")

    for name in PARAMETERS:
        if name in MIXED_RANKS:
            assert with_rank(name, 2).sites["b"].rank == 2
            with pytest.raises(ConfigError, match=r"rank is 5, \[adapter\] rank is 4"):
                with_rank(name, 5)
            with pytest.raises(ConfigError, match="rank is 0, expected at least 1"):
                with_rank(name, 0)
        else:
            with pytest.raises(ConfigError, match=f"with {name!r} all sites train one rank"):
                with_rank(name, 2)


def changed(name, *, count=20, dtype="float32", sizes=(100, 100), **own):
    return parse_study(
        {
            "study": {"name": "s"},
            "base": {"name": "tiny", "dtype": dtype},
            "adapter": {"target_modules": ["query"]},
            "task": {"kind": "classification", "text": "{t}", "label": "y"},
            "privacy": {"unit": "none"},
            "strategy": {"name": name, **own},
            "rounds": {"count": count, **(STEPS if name == "scaffold" else {})},
            "sites": {f"s{i}": {"patients_public": size} for i, size in enumerate(sizes)},
        },
        "study.toml",
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_coarse_base_is_refused_when_the_study_is_read_where_something_is_merged(name):
    """Not at the hospital in the second round, when it is paid for."""
    if name in MERGES:
        with pytest.raises(ConfigError, match=r"\[base\] dtype is 'bfloat16', which rounds away"):
            changed(name, dtype="bfloat16")
    else:
        changed(name, dtype="bfloat16")


def test_a_parameter_that_the_rounds_leave_without_effect_is_refused():
    for name, key in (("ffa_refresh", "every"), ("rolora", "warm_rounds")):
        changed(name, count=6, **{key: 5})
        with pytest.raises(ConfigError, match=f"{key} is 6, the study has 6 rounds"):
            changed(name, count=6, **{key: 6})


def test_a_share_that_would_be_rounded_away_is_refused():
    changed("ffa", sizes=(1, 16_383), weights="public")
    with pytest.raises(ConfigError, match=r"gives site 's0' a share of 6\.1e-05"):
        changed("ffa", sizes=(1, 16_384), weights="public")
    changed("ffa", sizes=(1, 16_384))
