"""A certificate has one encoding, and its numbers follow from its mechanism or are refused."""

import json
from dataclasses import replace
from hashlib import sha256

import pytest
import rfc8785

from huizhen.protocol.accounting import Spend, epsilon
from huizhen.protocol.certificate import (
    MAX_BYTES,
    Certificate,
    LedgerState,
    MechanismTerms,
    MetricsBudget,
    SiteSpend,
    Statement,
    check_certificate,
    parse_certificate,
)
from huizhen.protocol.errors import PrivacyError, WireError
from huizhen.protocol.membership import attack_bounds

STEP = Spend(noise_multiplier=2.0, sampling_rate=0.2, steps=4)
DELTA = 1e-5


def after(rounds):
    return epsilon([STEP.times(rounds)], DELTA)


def words(code):
    return Statement(code=code, zh="前提", en="an assumption")


@pytest.fixture(scope="module")
def certificate():
    ledger = LedgerState(
        sequence=14, digest="cd" * 32, epsilon=after(12), delta=DELTA, metrics_epsilon=0.5
    )
    return Certificate(
        study="罕见病 2026",
        digest="ab" * 32,
        purpose="",
        issued="2026-11-22",
        unit="patient",
        epsilon_agreed=6.0,
        delta=DELTA,
        epsilon=after(10),
        epsilon_renyi=after(10) * 1.1,
        accountant="PLD",
        accountant_version="0.6.0",
        mechanism=MechanismTerms(
            name="poisson_gaussian",
            clipping="flat",
            max_grad_norm=1.0,
            records_per_patient=4,
            per_round=STEP,
            rounds=10,
            noise=words("chacha20"),
        ),
        sites=(
            SiteSpend(
                site="North",
                cohort="all",
                patients_public=400,
                rounds=10,
                epsilon=after(10),
                ledger=ledger,
            ),
            SiteSpend(
                site="South",
                cohort="",
                patients_public=90,
                rounds=7,
                epsilon=after(7),
                ledger=None,
            ),
        ),
        metrics=MetricsBudget(epsilon=0.5, minimum=10),
        attacks=attack_bounds([STEP.times(10)], DELTA),
        assumptions=(words("one"), words("two")),
        not_covered=(words("three"),),
    )


def test_a_certificate_comes_back_from_its_bytes(certificate):
    for one in (certificate, replace(certificate, metrics=None, epsilon_renyi=None)):
        assert parse_certificate(one.canonical()) == one
        check_certificate(one)


def test_the_fingerprint_is_that_of_the_file(certificate):
    assert certificate.fingerprint() == sha256(certificate.canonical()).hexdigest()
    assert certificate.fingerprint() != replace(certificate, issued="2026-11-23").fingerprint()


def test_the_document_can_be_read_without_the_software(certificate):
    table = json.loads(certificate.canonical())
    assert table["schema"] == 1
    assert table["mechanism"]["per_round"] == {
        "noise_multiplier": 2,
        "sampling_rate": 0.2,
        "steps": 4,
        "batch_cap": None,
        "patients_bound": None,
    }
    assert table["sites"][0]["ledger"]["digest"] == "cd" * 32
    assert table["assumptions"][0] == {"code": "one", "zh": "前提", "en": "an assumption"}


def test_a_report_gets_the_main_facts_as_plain_values(certificate):
    found = certificate.summary()
    assert found["epsilon"] == {"North": after(10), "South": after(7)}
    assert (found["noise_multiplier"], found["sampling_rate"], found["steps"]) == (2.0, 0.2, 40)
    assert (found["unit"], found["delta"], found["metrics_epsilon"]) == ("patient", DELTA, 0.5)
    assert "PLD" in found["accountant"]
    assert found["does_not_cover"] == ["an assumption"]


def changed(certificate, path, value):
    """Return the bytes with one value replaced, or taken out where it is ``...``."""
    table = json.loads(certificate.canonical())
    *way, last = path.split(".")
    place = table
    for key in way:
        place = place[int(key) if key.isdigit() else key]
    if value is ...:
        del place[last]
    else:
        place[int(last) if last.isdigit() else last] = value
    return rfc8785.dumps(table)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", 2),
        ("schema", ...),
        ("study", ...),
        ("digest", "ab" * 31),
        ("digest", "AB" * 32),
        ("issued", "22.11.2026"),
        ("issued", "20261122"),
        ("unit", "none"),
        ("neighbouring", "replace_one"),
        ("delta", 0),
        ("delta", 1),
        ("epsilon", 1),
        ("epsilon", "6"),
        ("epsilon_agreed", 1),
        ("epsilon_agreed", 0),
        ("mechanism.name", "truncated_poisson_gaussian"),
        ("mechanism.name", "laplace"),
        ("mechanism.clipping", "none"),
        ("mechanism.max_grad_norm", 0),
        ("mechanism.records_per_patient", 0),
        ("mechanism.rounds", 9),
        ("mechanism.rounds", 0),
        ("mechanism.per_round.noise_multiplier", 0),
        ("mechanism.per_round.batch_cap", 90),
        ("mechanism.per_round.steps", 1.5),
        ("mechanism.noise.en", " "),
        ("sites", []),
        ("sites.0.epsilon", 0),
        ("sites.0.rounds", -1),
        ("sites.0.patients_public", 0),
        ("sites.0.more", 1),
        ("sites.1.site", 7),
        ("sites.0.ledger.digest", "cd" * 31),
        ("sites.0.ledger.sequence", 0),
        ("sites.0.ledger.epsilon", -1),
        ("sites.0.ledger.delta", 0),
        ("sites.0.ledger.metrics_epsilon", -1),
        ("metrics.epsilon", 0),
        ("metrics.minimum", 0),
        ("attacks", []),
        ("attacks.1.false_positive_rate", 0.0),
        ("attacks.1.by_mechanism", 1.5),
        ("assumptions", []),
        ("not_covered", []),
        ("not_covered.0.zh", ""),
        ("not_covered.0.code", "<b>"),
        ("more", 1),
    ],
)
def test_what_is_no_certificate_is_refused(certificate, path, value):
    with pytest.raises(WireError):
        parse_certificate(changed(certificate, path, value))


def test_a_cohort_that_is_listed_twice_is_refused(certificate):
    sites = json.loads(certificate.canonical())["sites"]
    with pytest.raises(WireError, match="listed twice"):
        parse_certificate(changed(certificate, "sites", [sites[0], sites[0]]))


@pytest.fixture(scope="module")
def two_cohorts(certificate):
    """North's ten rounds, charged to two cohorts that may share patients."""
    north, south = certificate.sites
    parts = [
        replace(north, cohort=cohort, rounds=rounds, epsilon=after(rounds))
        for cohort, rounds in (("all", 6), ("2025", 4))
    ]
    return replace(certificate, sites=(*parts, south))


def test_the_cohorts_of_a_site_are_composed(certificate, two_cohorts):
    assert parse_certificate(two_cohorts.canonical()) == two_cohorts
    check_certificate(two_cohorts)
    assert two_cohorts.rounds_by_site == {"North": 10, "South": 7}
    assert two_cohorts.spends == (STEP.times(10),)
    assert two_cohorts.epsilon_by_site() == {"North": after(10), "South": after(7)}
    assert two_cohorts.summary()["epsilon"] == {"North": after(10), "South": after(7)}
    assert certificate.epsilon_by_site() == {"North": after(10), "South": after(7)}


def test_the_largest_of_a_sites_cohorts_is_not_what_the_site_spent(two_cohorts):
    largest = replace(two_cohorts, epsilon=after(7))
    with pytest.raises(PrivacyError, match="epsilon with all cohorts of site 'North' is stated as"):
        check_certificate(largest)
    with pytest.raises(ValueError, match="expected the largest of the sites'"):
        replace(two_cohorts, epsilon=after(6))


def test_cohorts_that_spent_more_than_was_agreed_are_refused(two_cohorts):
    north, other, south = two_cohorts.sites
    with pytest.raises(ValueError, match="a site has more rounds than the study, 10"):
        replace(two_cohorts, sites=(north, replace(other, rounds=5, epsilon=after(5)), south))


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"{}", b"NaN", b"[" * 100_000])
def test_bytes_that_are_no_certificate_are_refused(data):
    with pytest.raises(WireError):
        parse_certificate(data)


def test_too_many_bytes_are_refused_before_they_are_read():
    with pytest.raises(WireError, match=f"at most {MAX_BYTES}"):
        parse_certificate(b" " * (MAX_BYTES + 1))


def test_another_encoding_of_the_same_certificate_is_refused(certificate):
    data = certificate.canonical()
    for loose in (json.dumps(json.loads(data)).encode(), data + b"\n", data[:-1] + b',"schema":1}'):
        with pytest.raises(WireError, match="one canonical encoding"):
            parse_certificate(loose)


# Numbers that do not follow from the mechanism.


def test_attacks_are_on_a_patient_of_the_site_that_spent_the_most(certificate):
    assert certificate.spends == (STEP.times(10),)


def with_site(certificate, number, **changes):
    sites = list(certificate.sites)
    sites[number] = replace(sites[number], **changes)
    most = max(site.epsilon for site in sites)
    return replace(certificate, sites=tuple(sites), epsilon=most)


def test_an_understated_epsilon_is_found(certificate):
    for number, rounds in enumerate((10, 7)):
        low = with_site(certificate, number, epsilon=0.99 * after(rounds))
        with pytest.raises(PrivacyError, match="epsilon of site"):
            check_certificate(low)
    with pytest.raises(PrivacyError, match="epsilon of site 'South'"):
        check_certificate(with_site(certificate, 1, epsilon=after(6)))


def test_less_noise_than_the_epsilon_needs_is_found(certificate):
    louder = replace(certificate.mechanism, per_round=replace(STEP, noise_multiplier=1.9))
    with pytest.raises(PrivacyError, match="epsilon of site"):
        check_certificate(replace(certificate, mechanism=louder))


def test_a_ledger_that_states_less_than_this_study_is_found(certificate):
    ledger = replace(certificate.sites[0].ledger, epsilon=after(9))
    with pytest.raises(PrivacyError, match="ledger of site 'North'"):
        check_certificate(with_site(certificate, 0, ledger=ledger))


@pytest.mark.parametrize("delta", [1e-7, 1e-4, 1e-3])
def test_a_ledger_is_held_to_what_the_steps_cost_at_its_own_delta(certificate, delta):
    due = epsilon([STEP.times(10)], delta)
    ledger = replace(certificate.sites[0].ledger, delta=delta, epsilon=due)
    check_certificate(with_site(certificate, 0, ledger=ledger))
    low = replace(ledger, epsilon=0.99 * due)
    with pytest.raises(PrivacyError, match="ledger of site 'North' is stated as"):
        check_certificate(with_site(certificate, 0, ledger=low))


def test_a_delta_that_lets_a_whole_patient_out_is_refused(certificate):
    check_certificate(with_site(certificate, 1, patients_public=99_999))
    with pytest.raises(PrivacyError, match="delta is 1e-05, site 'South' has about 100000 patient"):
        check_certificate(with_site(certificate, 1, patients_public=100_000))


@pytest.mark.parametrize(("name", "stated"), [("by_mechanism", 0.011), ("by_epsilon", None)])
def test_an_understated_attack_is_found(certificate, name, stated):
    bounds = list(certificate.attacks)
    place = next(i for i, bound in enumerate(bounds) if bound.false_positive_rate == 0.01)
    bounds[place] = replace(bounds[place], **{name: stated or bounds[place].by_mechanism})
    with pytest.raises(PrivacyError, match=f"attacks by {name[3:]}"):
        check_certificate(replace(certificate, attacks=tuple(bounds)))


def test_attacks_that_are_left_out_are_found(certificate):
    for attacks in (certificate.attacks[:4], certificate.attacks[1:]):
        with pytest.raises(PrivacyError, match="other false positive rates"):
            check_certificate(replace(certificate, attacks=attacks))
