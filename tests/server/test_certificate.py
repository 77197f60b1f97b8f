"""The certificate that is issued holds what the ledgers say, and its page holds the certificate."""

import re
from dataclasses import replace
from decimal import Decimal
from html import unescape
from html.parser import HTMLParser

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.ledger import Ledger
from huizhen.protocol.certificate import check_certificate, parse_certificate
from huizhen.protocol.errors import PrivacyError, ProtocolError
from huizhen.protocol.ledger_entries import Cap, Head
from huizhen.protocol.ledger_statement import StudyTotals, Totals
from huizhen.protocol.mechanism import Mechanism
from huizhen.server.certificate import _texts, issue, page, rounded_up

DAY = "2026-11-22"


@pytest.fixture(scope="module")
def study(make_study):
    return make_study(
        study={"name": "rare", "purpose": "diagnosis"},
        privacy={"delta": 1e-5, "sampling_rate": 0.2, "metrics_epsilon": 0.5},
        rounds={"count": 5, "local_steps": 4},
    )


@pytest.fixture(scope="module")
def certificate(study):
    return issue(study, issued=DAY, ledgers=[totals(study, "A", 5), totals(study, "B", 3)])


def totals(study, site, rounds, *, cohort="all", spend=None, sequence=9):
    """Return what a site's ledger states after so many rounds of the study, and others before."""
    mechanism = Mechanism.of(study)
    spent = mechanism.epsilon_after(rounds)
    account = StudyTotals(
        study=study.digest(),
        spend=spend or mechanism.per_round,
        rounds_reserved=5,
        rounds_charged=rounds,
        last_round=rounds,
        is_closed=True,
        epsilon_charged=spent,
        epsilon_committed=spent,
        metrics_epsilon=0.5,
    )
    other = replace(account, study="ee" * 32, rounds_charged=1)
    return Totals(
        site=site,
        cohort=cohort,
        unit="patient",
        cap=Cap(epsilon=20.0, delta=1e-5, metrics_epsilon=2.0),
        head=Head(sequence, "cd" * 32),
        epsilon_charged=spent + 1.5,
        epsilon_committed=spent + 2,
        epsilon_left=1.0,
        metrics_epsilon=0.75,
        metrics_left=1.25,
        epsilon_with_metrics=spent + 2.25,
        studies=(other, account),
    )


def codes(statements):
    return [statement.code for statement in statements]


# What is issued.


def test_each_site_states_the_rounds_that_its_ledger_charged(study, certificate):
    mechanism = Mechanism.of(study)
    north, south = certificate.sites
    assert [(s.site, s.cohort, s.rounds) for s in (north, south)] == [
        ("A", "all", 5),
        ("B", "all", 3),
    ]
    assert north.epsilon == mechanism.epsilon_after(5) == certificate.epsilon
    assert south.epsilon == mechanism.epsilon_after(3) < north.epsilon
    assert south.ledger is not None
    assert south.ledger.epsilon == south.epsilon + 1.5
    assert (south.ledger.sequence, south.ledger.digest) == (9, "cd" * 32)
    assert (south.ledger.delta, south.ledger.metrics_epsilon) == (1e-5, 0.75)


def test_the_terms_are_the_studys(study, certificate):
    assert (certificate.study, certificate.digest) == ("rare", study.digest())
    assert (certificate.unit, certificate.delta, certificate.epsilon_agreed) == ("patient", 1e-5, 8)
    assert certificate.mechanism.per_round == Mechanism.of(study).per_round
    assert (certificate.mechanism.rounds, certificate.mechanism.records_per_patient) == (5, 4)
    assert (certificate.mechanism.clipping, certificate.mechanism.max_grad_norm) == ("flat", 1.0)
    assert certificate.metrics is not None
    assert (certificate.metrics.epsilon, certificate.metrics.minimum) == (0.5, 10)
    assert certificate.accountant_version == "0.6.0"


def test_its_numbers_can_be_computed_again(certificate):
    check_certificate(parse_certificate(certificate.canonical()))


def test_the_cross_check_is_the_libraries_own_renyi_accounting(study, certificate):
    sigma = certificate.mechanism.per_round.noise_multiplier
    step = PoissonSampledDpEvent(0.2, GaussianDpEvent(sigma))
    bound = RdpAccountant(range(2, 100)).compose(SelfComposedDpEvent(step, 20)).get_epsilon(1e-5)
    assert certificate.epsilon_renyi == pytest.approx(bound, rel=1e-3)
    assert certificate.epsilon_renyi > certificate.epsilon


def test_the_attack_is_that_on_the_site_that_spent_the_most(study):
    few = issue(study, issued=DAY, ledgers=[totals(study, s, 2) for s in "AB"])
    more = issue(study, issued=DAY, ledgers=[totals(study, "A", 2), totals(study, "B", 4)])
    for one, other in zip(few.attacks[1:-1], more.attacks[1:-1], strict=True):
        assert one.by_mechanism < other.by_mechanism
    assert few.spends == (few.mechanism.per_round.times(2),)
    assert few.epsilon_renyi is not None
    assert more.epsilon_renyi is not None
    assert few.epsilon_renyi < more.epsilon_renyi


def test_a_site_without_a_ledger_is_taken_to_have_joined_every_round(study):
    found = issue(study, issued=DAY, ledgers=[totals(study, "A", 2)])
    assert [(site.site, site.rounds) for site in found.sites] == [("A", 2), ("B", 5)]
    assert found.sites[1].ledger is None
    assert "no_ledger" in codes(found.not_covered)
    assert "complete_ledger" in codes(found.assumptions)
    bare = issue(study, issued=DAY)
    assert "complete_ledger" not in codes(bare.assumptions)
    check_certificate(bare)


def test_a_site_may_have_several_cohorts(study):
    two = [totals(study, "A", 2), totals(study, "A", 3, cohort="2025", sequence=3)]
    found = issue(study, issued=DAY, ledgers=[*two, totals(study, "B", 4)])
    assert [(s.site, s.cohort) for s in found.sites] == [("A", "all"), ("A", "2025"), ("B", "all")]
    mechanism = Mechanism.of(study)
    assert [s.epsilon for s in found.sites] == [mechanism.epsilon_after(n) for n in (2, 3, 4)]
    # a patient may be in both cohorts: five rounds, more than B's four
    assert found.epsilon == mechanism.epsilon_after(5)
    assert found.spends == (mechanism.per_round.times(5),)
    check_certificate(parse_certificate(found.canonical()))
    assert f"one hospital are composed) {rounded_up(found.epsilon)}" in Seen(page(found)).text


def test_cohorts_that_together_spent_more_than_was_agreed_are_refused(study):
    two = [totals(study, "A", 2), totals(study, "A", 4, cohort="2025")]
    with pytest.raises(PrivacyError, match="site 'A' were charged 6 rounds together, the study ha"):
        issue(study, issued=DAY, ledgers=two)


def test_ledgers_that_do_not_hold_the_study_do_not_make_it_free(study):
    other = totals(study, "A", 5)
    other = replace(other, studies=other.studies[:1])
    with pytest.raises(ProtocolError, match="no ledger of site 'A' holds this study"):
        issue(study, issued=DAY, ledgers=[other, totals(study, "B", 5)])
    beside = [replace(other, cohort="2025"), totals(study, "A", 5)]
    found = issue(study, issued=DAY, ledgers=[*beside, totals(study, "B", 5)])
    assert [(s.cohort, s.rounds) for s in found.sites] == [("2025", 0), ("all", 5), ("all", 5)]


def test_real_ledgers_make_a_certificate(study, tmp_path):
    mechanism, states = Mechanism.of(study), []
    for site, rounds in (("A", 5), ("B", 2)):
        path = tmp_path / site / "ledger.sqlite"
        cap = Cap(epsilon=9.0, delta=1e-5)
        with Ledger.create(path, site=site, cohort="all", cap=cap) as ledger:
            ledger.reserve(study.digest(), mechanism.per_round, 5)
            for round in range(1, rounds + 1):
                ledger.charge(study.digest(), round)
            states.append(ledger.totals())
    found = issue(study, issued=DAY, ledgers=states)
    check_certificate(found)
    assert [site.rounds for site in found.sites] == [5, 2]
    assert found.sites[0].ledger is not None
    assert found.sites[0].ledger.epsilon == pytest.approx(found.epsilon)


def test_what_was_never_private_is_not_certified(make_study, study):
    with pytest.raises(PrivacyError, match="nothing to certify"):
        issue(make_study(privacy={"unit": "none"}), issued=DAY)
    with pytest.raises(PrivacyError, match="no site has charged a round"):
        issue(study, issued=DAY, ledgers=[totals(study, "A", 0), totals(study, "B", 0)])


def test_a_ledger_that_does_not_fit_is_refused(study):
    with pytest.raises(ProtocolError, match="site 'C', not in this study"):
        issue(study, issued=DAY, ledgers=[totals(study, "C", 5)])
    with pytest.raises(ProtocolError, match="counts by record, the study by patient"):
        issue(study, issued=DAY, ledgers=[replace(totals(study, "A", 5), unit="record")])
    louder = replace(Mechanism.of(study).per_round, noise_multiplier=0.9)
    with pytest.raises(ProtocolError, match="another mechanism"):
        issue(study, issued=DAY, ledgers=[totals(study, "A", 5, spend=louder)])
    with pytest.raises(ProtocolError, match="cohort 'all' came twice"):
        issue(study, issued=DAY, ledgers=[totals(study, "A", 5), totals(study, "A", 4)])


def test_what_is_assumed_and_left_out_depends_on_the_study(make_study, study, certificate):
    always = {"disjoint_patients", "honest_hospital", "public_terms", "floating_point"}
    assert always <= set(codes(certificate.assumptions))
    assert "held_out_split" in codes(certificate.assumptions)
    assert {"tuning", "base_model", "public_labels", "side_channels", "groups"} <= set(
        codes(certificate.not_covered)
    )
    assert "no_ledger" not in codes(certificate.not_covered)
    assert "simulated" in codes(issue(study, issued=DAY, simulated=True).not_covered)
    other = make_study(privacy={"unit": "record", "max_grad_norm": "auto", "batch_cap": 12})
    found = issue(other, issued=DAY)
    assert found.not_covered[0].code == "record_unit"
    assert "size_bound" in codes(found.assumptions)
    assert "held_out_split" not in codes(found.assumptions)
    assert "held_out_and_trained" not in codes(found.not_covered)
    assert (found.metrics, found.epsilon_renyi) == (None, None)
    assert (found.mechanism.clipping, found.mechanism.max_grad_norm) == ("auto_s", 1.0)
    assert found.mechanism.name == "truncated_poisson_gaussian"
    assert found.mechanism.records_per_patient == 1
    check_certificate(parse_certificate(found.canonical()))


def test_a_study_without_a_base_leaves_none_out(study):
    linear = replace(study, base=None, adapter=None)
    assert "base_model" not in codes(issue(linear, issued=DAY).not_covered)


# The page.


class Seen(HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags: set[str] = set()
        self.values: list[tuple[str, str]] = []
        self.parts: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.values += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.parts.append(data)


def test_the_page_says_all_that_the_certificate_says(certificate):
    seen, south = Seen(page(certificate)), certificate.sites[1]
    for statement in (*certificate.assumptions, *certificate.not_covered):
        assert statement.zh in seen.text
        assert statement.en in seen.text
    for text in (
        "ε ≤ " + rounded_up(certificate.epsilon),
        "δ = 0.00001",
        certificate.digest,
        certificate.fingerprint(),
        "9:" + "cd" * 32,
        "4 × 5 = 20",
        DAY,
        certificate.mechanism.noise.zh,
        rounded_up(certificate.epsilon_renyi),
        f"{rounded_up(south.epsilon)} {rounded_up(south.ledger.epsilon)}",
        "k = 10",
    ):
        assert text in seen.text, text


def test_a_certificate_that_was_read_back_makes_the_same_page(certificate):
    assert page(parse_certificate(certificate.canonical())) == page(certificate)


def test_the_page_loads_and_runs_nothing(certificate):
    text = page(certificate)
    seen = Seen(text)
    assert not seen.tags & {"script", "img", "link", "iframe", "object", "form", "a", "base"}
    names = {name for name, _ in seen.values}
    assert not names & {"src", "href", "srcset", "action", "data", "poster", "background"}
    assert not any(name.startswith("on") for name in names)
    assert not re.search(r"@import|url\(|https?:|//\w", text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in seen.values


def test_names_are_shown_and_not_run(study):
    hostile = "<script>alert(1)<b>&\"'"
    other = replace(
        study,
        study=replace(study.study, purpose=hostile),
        sites={hostile: study.sites["A"], "B": study.sites["B"]},
    )
    text = page(issue(other, issued=DAY))
    assert "<script" not in text
    assert text.count(hostile) == 0
    assert unescape(text).count(hostile) == 2


def test_a_record_level_certificate_speaks_of_records(make_study):
    seen = Seen(page(issue(make_study(privacy={"unit": "record"}), issued=DAY)))
    assert "每条记录 per record" in seen.text
    assert "Whether or not any one record is used" in seen.text
    assert "each record's gradient" in seen.text
    assert "records of a patient in a step" not in seen.text
    assert "none: no metrics leave" in seen.text


def test_every_text_is_there_in_both_languages():
    han = re.compile(r"[\u4e00-\u9fff]")
    for section, texts in _texts().items():
        for code, text in texts.items():
            assert text.keys() == {"zh", "en"}, (section, code)
            assert han.search(text["zh"]), (section, code)
            assert not han.search(text["en"]), (section, code)


# What is printed is never better than what is true.


@given(st.floats(1e-9, 1e9))
def test_numbers_are_rounded_up(value):
    shown = Decimal(rounded_up(value))
    assert Decimal(value) * (1 - Decimal("1e-15")) <= shown <= Decimal(value) * Decimal("1.0101")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (7.9999, "8.00"),
        (0.3861, "0.387"),
        (12.01, "12.1"),
        (9.999, "10.00"),
        (0.0, "0"),
        (3.0, "3.00"),
    ],
)
def test_rounding_by_hand(value, shown):
    assert rounded_up(value) == shown


def test_the_table_of_attacks_by_hand(certificate):
    seen = Seen(page(certificate))
    # ε = 1: e · 1 % + δ = 2.719 %, e · 10 % + δ = 27.184 %; ε = 3, at 10 %: 1 - e⁻³ · 0.9 = 95.52 %
    assert "ε = 1 2.8 % 27.2 %" in seen.text
    assert "ε = 3 20.1 % 95.6 %" in seen.text
    assert "guessing 1.0 % 10.0 %" in seen.text
