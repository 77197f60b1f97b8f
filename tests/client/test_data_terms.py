"""A ``data.toml`` says everything, and nothing that it does not know."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from huizhen.client import data_terms
from huizhen.client.data_terms import load_data, parse_data
from huizhen.client.quality.problems import FIXES, Code, Rules
from huizhen.client.records.terms import IDENTIFIERS, SourceTerms
from huizhen.protocol.errors import ConfigError

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text("utf-8")

TEXT = """
[data]
name = "肾内科住院患者 2019–2024"

[governance]
purpose = "a model of acute kidney injury"
basis = "waiver"
ethics = "2024-伦审-017"
ethics_expires = "2027-12-31"

[[sources]]
path = "notes/*.csv"
kind = "note"
patient = "住院号"
time = "入院时间"
text = ["主诉", "现病史"]
findings = [{code = "诊断编码", system = "icd-10-cn", separator = ";"}]

[sources.identifiers]
name = "姓名"
phone = ["电话", "手机"]

[sources.labs]
"乳酸脱氢酶" = "U/L"

[[sources]]
url = "postgresql://reader@his/labs"
format = "sql"
query = "SELECT * FROM results"
patient = "mrn"
lab = {value = "result", code = "item", unit = "unit"}

[quality]
exact_duplicate = "quarantine"

[identifiers]
style = "tag"

[examples]
group = "encounter"

[split]
held_out = 0.3
"""


def parse(text):
    return parse_data(tomllib.loads(text), "data.toml")


def test_a_whole_file_is_read():
    data = parse(TEXT)
    assert data.sources[0].identifiers == {"name": "姓名", "phone": ("电话", "手机")}
    assert data.sources[0].findings[0].separator == ";"
    assert data.sources[1].lab is not None
    assert data.sources[1].lab.unit == "unit"
    assert data.quality.exact_duplicate == "quarantine"
    assert data.governance.minimum_patients == 20
    assert data.digest() == parse(TEXT + "\n# a comment\n").digest()
    assert data.digest() != parse(TEXT.replace("0.3", "0.2")).digest()


def test_a_file_is_read_from_the_disk(tmp_path):
    (tmp_path / "data.toml").write_text(TEXT, "utf-8")
    assert load_data(tmp_path / "data.toml") == parse(TEXT)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('style = "tag"', 'stile = ""', r"data\.toml \[identifiers\] has an unknown key 'stile'"),
        ("[split]", "[splits]", r"unknown key 'splits': did you mean 'split'"),
        ('kind = "note"', 'knid = "note"', r"\[\[sources\]\] 1 has an unknown key 'knid'"),
        ('value = "result", ', "", r"\[\[sources\]\] 2 lab has no 'value'"),
        ('"waiver"', '"trust me"', r"basis is 'trust me', expected one of"),
        ('ethics = "2024-伦审-017"', "", "needs a committee's reference"),
        ('ethics_expires = "2027-12-31"', "", "needs its last day"),
        ("2027-12-31", "31.12.2027", "expected such as '2027-12-31'"),
        ('purpose = "a model of acute kidney injury"', 'purpose = " "', "purpose is empty"),
        ("0.3", "1.0", "held_out is 1.0, expected 0 to below 1"),
        ('style = "tag"', 'method = "none"', "only public or made-up records go without"),
        ('exact_duplicate = "quarantine"', 'two_sexes = "fix"', "there is no way to mend it"),
        ('ethics_expires = "2027-12-31"', 'ethics_expires = "2027-12-31"\nminimum_patients = 1',
         "expected 2 or more"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(old, new, problem):
    assert old in TEXT
    with pytest.raises(ConfigError, match=problem):
        parse(TEXT.replace(old, new))


def test_a_file_without_sources_is_refused():
    head = TEXT[: TEXT.index("[[sources]]")]
    with pytest.raises(ConfigError, match=r"has no \[sources\]"):
        parse(head)
    with pytest.raises(ConfigError, match=r"has no \[\[sources\]\]"):
        parse("sources = []\n" + head)
    with pytest.raises(ConfigError, match="is no list of tables"):
        parse("sources = 3\n" + head)


# docs/data.md says the same.


def rows(heading):
    """The cells of the table under a heading, code marks removed."""
    _, _, rest = PAGE.partition(f"\n## `{heading}`\n")
    table, _, _ = rest.partition("\n## ")
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    return [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines
    ]


def default(field):
    """A field's default as the page writes it."""
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    if field.default is dataclasses.MISSING:
        return "required"
    value = field.default
    if value is None:
        return "absent"
    return f'"{value}"' if isinstance(value, str) else "[]" if value == () else str(value)


@pytest.mark.parametrize(
    ("heading", "cls"),
    [
        ("[data]", data_terms.DataTerms),
        ("[[sources]]", SourceTerms),
        ("[governance]", data_terms.GovernanceTerms),
        ("[quality]", Rules),
        ("[identifiers]", data_terms.IdentifierTerms),
        ("[examples]", data_terms.ExampleTerms),
        ("[split]", data_terms.SplitTerms),
    ],
)
def test_the_page_has_every_key_with_its_default(heading, cls):
    found = {row[0]: row[1] for row in rows(heading)}
    assert found == {field.name: default(field) for field in dataclasses.fields(cls)}


def test_the_page_says_what_is_mended_and_how():
    found = {row[0]: row[3] for row in rows("[quality]")}
    assert found == {code.value: FIXES.get(code, "") for code in Code}


def test_the_page_has_an_example_that_is_one_and_all_kinds_of_identifiers():
    [text] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert parse(text).sources[1].path == "letters.ndjson"
    [row] = [row for row in rows("[[sources]]") if row[0] == "identifiers"]
    assert all(kind in row[2] for kind in IDENTIFIERS)
