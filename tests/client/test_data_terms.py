"""A ``data.toml`` says everything, and nothing that it does not know."""

import tomllib

import pytest

from huizhen.client.data_terms import load_data, parse_data
from huizhen.protocol.errors import ConfigError

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
