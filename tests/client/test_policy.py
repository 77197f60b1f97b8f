"""A policy file says exactly what is allowed, or which key of it is wrong."""

import dataclasses
import hashlib
import json
import re
import tomllib
from pathlib import Path

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client import policy_terms
from huizhen.client.policy import (
    Policy,
    base_digest,
    default_policy,
    load_policy,
    parse_policy,
)
from huizhen.client.policy_terms import CohortLimits
from huizhen.learning.catalogue import catalogue
from huizhen.protocol.errors import ConfigError

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "policy.md").read_text("utf-8")
ONE, TWO = "1" * 64, "2" * 64
MINIMAL = {"policy": {"site": "North"}}
COHORT = {"epsilon": 4.0, "data": "a.jsonl"}

SECTIONS = {
    "policy": policy_terms.About,
    "cohorts.NAME": policy_terms.CohortLimits,
    "privacy": policy_terms.PrivacyLimits,
    "bases": policy_terms.BaseLimits,
    "adapter": policy_terms.AdapterLimits,
    "rounds": policy_terms.RoundLimits,
    "schedule": policy_terms.Schedule,
    "approval": policy_terms.ApprovalRule,
    "sandbox": policy_terms.SandboxRule,
    "stop": policy_terms.StopRule,
}


def parsed(**sections):
    return parse_policy(MINIMAL | sections, "policy.toml")


def refusal(**sections):
    with pytest.raises(ConfigError) as caught:
        parsed(**sections)
    return str(caught.value)


FULL = """
[policy]
site = "北京第一医院"
[privacy]
max_epsilon = 4
max_delta = 1e-6
min_noise_multiplier = 1
metrics = true
max_metrics_epsilon = 0.5
metrics_minimum = 30
[cohorts.rare]
epsilon = 2
unit = "record"
min_patients = 50
data = "rare.jsonl"
ledger = "rare.sqlite"
[cohorts."肺 2019-2025"]
data = "/srv/lung.jsonl"
[bases]
allow_any = true
[bases.allowed]
minilm = "1111111111111111111111111111111111111111111111111111111111111111"
[adapter]
max_rank = 16
max_parameters = 1000
target_modules = ["query"]
[rounds]
min_sites = 5
max_rounds = 60
max_rounds_per_day = 12
[schedule]
windows = ["Mon-Fri 20:00-06:00", "Sat-Sun 00:00-24:00"]
timezone = "Asia/Shanghai"
[approval]
people = 1
[approval.stewards]
"王医生" = "2222222222222222222222222222222222222222222222222222222222222222"
[sandbox]
require = "network"
[stop]
file = "/run/huizhen/STOP"
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "policy.toml"
        path.write_text(text, encoding="utf-8")
        path.chmod(0o600)
        return path

    return write


def test_every_key_of_a_file_is_read(write):
    found = load_policy(write(FULL))
    tables = tomllib.loads(FULL)
    tables["cohorts"]["肺 2019-2025"] |= {
        "epsilon": None,
        "unit": "patient",
        "min_patients": 20,
        "ledger": None,
    }
    assert json.loads(found.canonical()) == {"format": 1, **tables}
    assert found.site == "北京第一医院"
    assert type(found.privacy.max_epsilon) is float


def test_the_digest_is_that_of_the_canonical_policy():
    found = parsed(cohorts={"rare": COHORT})
    values = {"format": 1, **dataclasses.asdict(found)}
    assert found.digest() == hashlib.sha256(rfc8785.dumps(values)).hexdigest()
    written_out = parsed(
        cohorts={"rare": COHORT | {"unit": "patient"}}, privacy={"max_epsilon": 10}
    )
    assert written_out.digest() == found.digest()


@pytest.mark.parametrize(
    "sections",
    [
        {"policy": {"site": "South"}},
        {"cohorts": {"rare": COHORT | {"epsilon": 3.9}}},
        {"cohorts": {"rare": COHORT | {"data": "b.jsonl"}}},
        {"cohorts": {"rare": COHORT, "more": COHORT | {"data": "b.jsonl"}}},
        {"bases": {"allow_any": True}},
        {"approval": {"people": 1, "stewards": {"A": ONE}}},
        {"sandbox": {"require": "none"}},
        {"stop": {"file": "HALT"}},
    ],
)
def test_any_change_changes_the_digest(sections):
    before = parsed(cohorts={"rare": COHORT})
    assert parsed(**{"cohorts": {"rare": COHORT}} | sections).digest() != before.digest()


def test_nothing_is_allowed_that_is_not_said():
    found = parsed()
    assert found.cohorts == {}
    assert found.bases.allowed == {}
    assert not found.bases.allow_any
    assert not found.privacy.metrics
    assert CohortLimits(data="a.jsonl").epsilon is None
    assert found.sandbox.require == "full"


# ---- What is wrong is named.

WRONG = [
    ({"policy": {}}, "[policy] has no 'site': add it"),
    ({"policy": {"site": ""}}, "[policy] site name is ''"),
    ({"policy": {"site": "a/b"}}, "[policy] site name is 'a/b'"),
    ({"policy": {"site": 3}}, "[policy] site is 3, expected a string"),
    ({"policy": 3}, "[policy] is 3, expected a table"),
    ({"polices": {}}, "has an unknown key 'polices': did you mean 'policy'?"),
    ({"privacy": {"max_epsilons": 1}}, "[privacy] has an unknown key 'max_epsilons': did you mean"),
    ({"privacy": {"max_epsilon": 0}}, "[privacy] max_epsilon is 0.0, expected more than 0"),
    ({"privacy": {"max_epsilon": float("nan")}}, "[privacy] max_epsilon is nan"),
    ({"privacy": {"max_epsilon": float("inf")}}, "[privacy] max_epsilon is inf"),
    ({"privacy": {"max_epsilon": "4"}}, "[privacy] max_epsilon is '4', expected a number"),
    ({"privacy": {"max_delta": 0}}, "[privacy] max_delta is 0.0, expected between 0 and 1"),
    ({"privacy": {"max_delta": 1}}, "[privacy] max_delta is 1.0, expected between 0 and 1"),
    ({"privacy": {"max_delta": float("nan")}}, "[privacy] max_delta is nan"),
    ({"privacy": {"min_noise_multiplier": -1}}, "min_noise_multiplier is -1.0, expected 0 or more"),
    ({"privacy": {"min_noise_multiplier": float("inf")}}, "min_noise_multiplier is inf"),
    ({"privacy": {"metrics": 1}}, "[privacy] metrics is 1, expected true or false"),
    ({"privacy": {"max_metrics_epsilon": 0}}, "max_metrics_epsilon is 0.0, expected more than 0"),
    ({"privacy": {"metrics_minimum": 0}}, "metrics_minimum is 0, expected 1 or more"),
    ({"privacy": {"metrics_minimum": 1.5}}, "metrics_minimum is 1.5, expected a whole number"),
    ({"cohorts": 3}, "[cohorts] is 3, expected a table"),
    ({"cohorts": {"rare": 3}}, "[cohorts.rare] is 3, expected a table"),
    ({"cohorts": {"rare": {}}}, "[cohorts.rare] has no 'data': add it"),
    ({"cohorts": {"": COHORT}}, "[cohorts] has '', expected a name"),
    ({"cohorts": {"a/b": COHORT}}, "[cohorts] has 'a/b', expected a name"),
    ({"cohorts": {"..": COHORT}}, "[cohorts] has '..', expected a name"),
    ({"cohorts": {"rare ": COHORT}}, "[cohorts] has 'rare ', expected a name"),
    ({"cohorts": {"rare\n": COHORT}}, "[cohorts] has 'rare\\n', expected a name"),
    ({"cohorts": {"a" * 65: COHORT}}, "expected a name of 1 to 64"),
    ({"cohorts": {"rare": COHORT | {"epsilon": 0}}}, "[cohorts.rare] epsilon is 0.0, expected"),
    ({"cohorts": {"rare": COHORT | {"epsilon": float("inf")}}}, "[cohorts.rare] epsilon is inf"),
    ({"cohorts": {"rare": COHORT | {"unit": "site"}}}, "[cohorts.rare] unit is 'site', expected"),
    ({"cohorts": {"rare": COHORT | {"min_patients": 0}}}, "[cohorts.rare] min_patients is 0"),
    ({"cohorts": {"rare": COHORT | {"data": ""}}}, "[cohorts.rare] data is '', expected the path"),
    ({"cohorts": {"rare": COHORT | {"ledger": " "}}}, "[cohorts.rare] ledger is ' '"),
    ({"cohorts": {"rare": COHORT | {"data": "a\0"}}}, "[cohorts.rare] data is 'a\\x00'"),
    ({"cohorts": {"rare": COHORT | {"epsilo": 4}}}, "did you mean 'epsilon'?"),
    ({"bases": {"allowed": {"small": "ab"}}}, "[bases] allowed 'small' is 'ab', expected 64 hex"),
    ({"bases": {"allowed": {"small": "A" * 64}}}, "expected 64 hex digits"),
    ({"bases": {"allowed": ["small"]}}, "[bases] allowed is ['small'], expected a table"),
    ({"bases": {"allowed": {"small": 3}}}, "[bases] allowed.small is 3, expected a string"),
    ({"bases": {"allow_any": "no"}}, "[bases] allow_any is 'no', expected true or false"),
    ({"bases": {"small": ONE}}, "[bases] has an unknown key 'small'"),
    ({"adapter": {"max_rank": 0}}, "[adapter] max_rank is 0, expected 1 or more"),
    ({"adapter": {"max_parameters": -1}}, "[adapter] max_parameters is -1, expected 1 or more"),
    ({"adapter": {"target_modules": "q_proj"}}, "[adapter] target_modules is 'q_proj', expected a"),
    ({"rounds": {"min_sites": 0}}, "[rounds] min_sites is 0, expected 1 or more"),
    ({"rounds": {"max_rounds": 0}}, "[rounds] max_rounds is 0, expected 1 or more"),
    ({"rounds": {"max_rounds_per_day": 0}}, "[rounds] max_rounds_per_day is 0, expected 1"),
    ({"rounds": {"max_round": 1}}, "did you mean 'max_rounds'?"),
    ({"schedule": {"windows": ["Mon-Fri 20:00-6:00"], "timezone": "UTC"}}, "[schedule] window is"),
    ({"schedule": {"windows": "always"}}, "[schedule] windows is 'always', expected a list"),
    ({"schedule": {"windows": ["Mon 08:00-09:00"]}}, "[schedule] has windows and no timezone"),
    ({"schedule": {"timezone": "Beijing"}}, "[schedule] timezone is 'Beijing', expected a name"),
    ({"approval": {"people": -1}}, "[approval] people is -1, stewards names 0"),
    ({"approval": {"people": 1}}, "[approval] people is 1, stewards names 0: name at least"),
    (
        {"approval": {"people": 2, "stewards": {"A": ONE}}},
        "[approval] people is 2, stewards names 1: name at least so many",
    ),
    ({"approval": {"stewards": {"A": ONE}}}, "people is 0: say how many of them must sign"),
    (
        {"approval": {"people": 2, "stewards": {"A": ONE, "B": ONE}}},
        "stewards has one key twice, expected a key of each person's own",
    ),
    ({"approval": {"people": 1, "stewards": {"A": "x"}}}, "stewards 'A' is 'x', expected 64 hex"),
    ({"approval": {"people": 1, "stewards": {"A": "F" * 64}}}, "expected 64 hex digits"),
    ({"approval": {"people": 1, "stewards": {"": ONE}}}, "expected a person's name"),
    ({"approval": {"people": 1, "stewards": {"A ": ONE}}}, "expected a person's name"),
    ({"approval": {"people": 1, "stewards": {"A\nB": ONE}}}, "expected a person's name"),
    ({"approval": {"people": 1, "stewards": {"A" * 101: ONE}}}, "expected a person's name"),
    ({"approval": {"people": True, "stewards": {"A": ONE}}}, "people is True, expected a whole"),
    ({"sandbox": {"require": "some"}}, "[sandbox] require is 'some', expected one of"),
    ({"stop": {"file": ""}}, "[stop] file is '', expected the path of a file"),
    ({"stop": {"files": "STOP"}}, "did you mean 'file'?"),
]


@pytest.mark.parametrize(("sections", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_refused_by_file_section_and_key(sections, message):
    found = refusal(**sections)
    assert found.startswith("policy.toml ")
    assert message in found


def test_the_longest_names_are_accepted():
    found = parsed(cohorts={"a" * 64: COHORT}, approval={"people": 1, "stewards": {"A" * 100: ONE}})
    assert len(*found.cohorts) == 64


def test_a_file_without_its_first_section_is_refused():
    with pytest.raises(ConfigError, match=r"policy.toml has no \[policy\]: add the section"):
        parse_policy({}, "policy.toml")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*policy\.toml"):
        load_policy(tmp_path / "policy.toml")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_policy_that_others_may_change_is_refused(write, mode):
    path = write(FULL)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=r"others may change .*: chmod go-w"):
        load_policy(path)


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o440])
def test_a_policy_that_others_may_read_is_accepted(write, mode):
    path = write(FULL)
    path.chmod(mode)
    assert load_policy(path).site == "北京第一医院"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ('data = "a.jsonl"', 'data = "a.jsonl"'),
        ('data = "a.jsonl"', 'data = "./b/../a.jsonl"'),
        ('data = "a.jsonl"', 'data = "link.jsonl"'),
        ('data = "a.jsonl"\nledger = "l.sqlite"', 'data = "b.jsonl"\nledger = "l.sqlite"'),
        ('data = "a.jsonl"', 'data = "b.jsonl"\nledger = "ledger-one.sqlite"'),
        ('data = "a.jsonl"', 'data = "b.jsonl"\nledger = "a.jsonl"'),
    ],
)
def test_two_cohorts_that_share_a_file_are_refused(write, tmp_path, first, second):
    """The same patients under two ledgers: neither would add up what they lose."""
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    head = '[policy]\nsite = "North"\n'
    path = write(f"{head}[cohorts.one]\n{first}\n[cohorts.two]\n{second}\n")
    with pytest.raises(ConfigError, match=r"policy.toml \[cohorts.two\] .* is the file of \[coh"):
        load_policy(path)


def test_paths_are_relative_to_the_policys_folder():
    found = parse_policy(tomllib.loads(FULL), "policy.toml")
    folder = Path("/home/site")
    assert found.data_file(folder, "rare") == folder / "rare.jsonl"
    assert found.ledger_file(folder, "rare") == folder / "rare.sqlite"
    assert found.data_file(folder, "肺 2019-2025") == Path("/srv/lung.jsonl")
    assert found.ledger_file(folder, "肺 2019-2025") == folder / "ledger-肺 2019-2025.sqlite"


# ---- The file that stops everything.


@pytest.mark.parametrize("kind", ["file", "folder", "a link that leads nowhere"])
def test_whatever_has_the_name_of_the_stop_file_stops(tmp_path, kind):
    policy, path = parsed(), tmp_path / "STOP"
    assert not policy.is_stopped(tmp_path)
    if kind == "file":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    assert policy.is_stopped(tmp_path)
    assert not parsed(stop={"file": "HALT"}).is_stopped(tmp_path)


def test_a_stop_file_that_cannot_be_looked_at_stops(tmp_path):
    (tmp_path / "run").touch()
    assert parsed(stop={"file": "run/STOP"}).is_stopped(tmp_path)  # its folder is a file
    assert parsed(stop={"file": "a" * 300}).is_stopped(tmp_path)


# ---- Bases by one digest.

names = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=5)
digests = st.dictionaries(names, st.text("0123456789abcdef", min_size=64, max_size=64), max_size=4)


@given(digests, digests)
def test_a_bases_digest_names_its_files_and_what_is_in_them(one, other):
    assert (base_digest(one) == base_digest(other)) == (one == other)
    assert base_digest(dict(reversed(one.items()))) == base_digest(one)


def test_a_bases_digest_by_hand():
    text = b'{"a.json":"' + ONE.encode() + b'","b/c":"' + TWO.encode() + b'"}'
    assert base_digest({"b/c": TWO, "a.json": ONE}) == hashlib.sha256(text).hexdigest()


# ---- The policy of a new hospital.


@pytest.mark.parametrize("site", ["North", '北京 "A" 医院', "a'b", "@SITE@"])
def test_the_default_policy_is_the_defaults_and_one_cohort_without_epsilon(write, site):
    found = load_policy(write(default_policy(site)))
    expected = Policy(
        policy=policy_terms.About(site=site),
        cohorts={"all": CohortLimits(data="records.jsonl", ledger="ledger.sqlite")},
        bases=policy_terms.BaseLimits(
            allowed={n: base_digest(e.digests) for n, e in catalogue().items() if e.digests}
        ),
    )
    assert found == expected
    assert {"minilm", "smollm2-135m-instruct"} <= found.bases.allowed.keys()


def test_the_default_policy_needs_one_decision(write):
    text = default_policy("North")
    assert text.count("\n# epsilon = 4.0\n") == 1
    decided = load_policy(write(text.replace("\n# epsilon = 4.0\n", "\nepsilon = 4.0\n")))
    assert decided.cohorts["all"].epsilon == 4.0


def test_the_default_policy_writes_every_key_out(write):
    """A default that a later version changes then changes nothing at this hospital."""
    tables = tomllib.loads(default_policy("North"))
    tables["cohorts"] = tables["cohorts"]["all"]
    decided_later = {"cohorts": {"epsilon"}, "schedule": {"timezone"}, "approval": {"stewards"}}
    for name, cls in SECTIONS.items():
        section = name.partition(".")[0]
        keys = {field.name for field in dataclasses.fields(cls)}
        assert tables[section].keys() == keys - decided_later.get(section, set())
    for section, keys in decided_later.items():
        for key in keys:
            assert re.search(rf"^# \[?({section}\.)?{key}\b", default_policy("North"), re.MULTILINE)


@pytest.mark.parametrize("site", ["", "a/b", " x", "x" * 65, "a\nb"])
def test_no_policy_is_written_for_what_is_no_sites_name(site):
    with pytest.raises(ConfigError, match="site name is"):
        default_policy(site)


# ---- docs/policy.md says the same.


def rows(heading):
    """The cells of the table under a heading, code marks removed."""
    section = PAGE.split(f"\n{heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (`.*) \|$", section, re.MULTILINE)
    return [[cell.strip().strip("`") for cell in line.split(" |")] for line in lines]


def shown(field):
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if value == policy_terms.MODULES:
        return "see below"
    return "absent" if value is None else json.dumps(value)


@pytest.mark.parametrize(("section", "cls"), SECTIONS.items())
def test_the_page_has_every_key_with_its_default(section, cls):
    found = {key: default for key, default, *_ in rows(f"## `[{section}]`")}
    assert found == {field.name: shown(field) for field in dataclasses.fields(cls)}


def test_the_page_names_the_modules():
    for name in policy_terms.MODULES:
        assert f"`{name}`" in PAGE


def test_the_page_has_every_section():
    assert re.findall(r"^## `\[(.+)\]`$", PAGE, re.MULTILINE) == list(SECTIONS)


def test_the_page_has_a_policy_that_is_one():
    [text] = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    found = parse_policy(tomllib.loads(text), "docs/policy.md")
    assert found.bases.allowed == {"minilm": base_digest(catalogue()["minilm"].digests)}
