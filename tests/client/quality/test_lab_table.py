"""The alliance's table of labs."""

import copy
import csv
import time
import tomllib
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from huizhen.client.quality.lab_table import LabTable, load_table, plain, shipped_table
from huizhen.protocol.errors import ConfigError

SMALL: dict[str, Any] = {
    "format": 1,
    "words": {"毫摩尔": "mmol", "升": "L"},
    "aliases": {"mg/dL": ["mg%"], "mmol/L": []},
    "comparators": {"<": ["<", "小于"]},
    "results": ["阳性"],
    "labs": {
        "glucose": {
            "names": ["葡萄糖", "GLU"],
            "loinc": ["2345-7"],
            "unit": "mmol/L",
            "molar_mass": 180.156,
            "possible": [0, 200],
            "plausible": [1, 70],
        }
    },
}


def small(**changes):
    document = copy.deepcopy(SMALL)
    document["labs"]["glucose"].update(changes)
    return document


@pytest.fixture(scope="module")
def table():
    return shipped_table()


def test_the_shipped_table_has_common_labs_with_limits_and_a_way_from_each_unit(table):
    assert len(table.entries) >= 120
    for entry in table.entries:
        for unit in (entry.unit, *entry.same, *entry.lines):
            assert not unit or table.way(entry, unit) is not None, (entry.key, unit)
        assert not entry.unit or entry.possible, entry.key
        assert table.find_key(entry.key) is not None


def test_a_mass_can_be_read_wherever_there_is_a_molar_mass(table):
    for entry in table.entries:
        if entry.molar_mass and "mol" in entry.unit and "mol/mol" not in entry.unit:
            assert table.way(entry, "mg/dL") is not None, entry.key


@pytest.mark.parametrize(
    ("name", "unit", "value", "expected"),
    [
        ("血糖", "mg/dL", 99, 5.495),
        ("GLU", "毫摩尔/升", 5.5, 5.5),
        ("glucose", "MMOL/L", 5.5, 5.5),
        ("肌酐", "mg/dL", 1.0, 88.4),
        ("BUN", "mg/dL", 14, 4.997),
        ("Urea", "mg/dL", 30, 4.995),
        ("谷丙转氨酶", "单位/升", 40, 40),
        ("ALT", "IU/L", 40, 40),
        ("总胆红素", "mg/dl", 1.0, 17.1),
        ("白细胞", "×10⁹/L", 6.1, 6.1),
        ("WBC", "G/L", 6.1, 6.1),
        ("WBC", "/uL", 6100, 6.1),
        ("wbc", "万/微升", 0.61, 6.1),
        ("红细胞", "10^6/uL", 4.5, 4.5),
        ("血红蛋白", "g/dl", 12, 120),
        ("Hb", "g/l", 120, 120),
        ("HCT", "L/L", 0.45, 45),
        ("体温", "℃", 36.6, 36.6),
        ("Temperature", "°F", 98.6, 37),
        ("心率", "次/分", 80, 80),
        ("收缩压", "毫米汞柱", 120, 120),
        ("SBP", "kPa", 16, 120.01),
        ("总胆固醇", "mg/dL", 200, 5.173),
        ("甘油三酯", "mg/dL", 150, 1.694),
        ("尿酸", "mg/dL", 7, 416.4),
        ("Ca2+", "mEq/L", 5, 2.5),
        ("Na+", "mEq/L", 140, 140),
        ("TSH", "μIU/mL", 2.5, 2.5),
        ("cTnI", "ng/mL", 0.04, 40),
        ("HbA1c", "mmol/mol", 53, 7.0),
        ("D-dimer", "ng/mL FEU", 500, 0.5),
        ("eGFR", "ml/min/1.73m²", 90, 90),
        ("INR", "", 1.1, 1.1),
        ("ESR", "mm/1h", 20, 20),
    ],
)
def test_values_are_converted_as_textbooks_do(table, name, unit, value, expected):
    entry = table.find_name(name)
    assert entry is not None
    way = table.way(entry, unit)
    assert way is not None
    assert way.of(value) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("ALT", ""),
        ("ALT", "mmol/L"),
        ("glucose", "g"),
        ("D-dimer", "mg/L"),  # FEU and DDU differ by a factor of two
        ("D-dimer", "mg/L DDU"),
        ("PDW", "%"),
        ("HBsAg", "S/CO"),
        ("glucose", "x" * 10_000),
    ],
)
def test_a_unit_that_could_mean_two_things_is_unknown(table, name, unit):
    assert table.way(table.find_name(name), unit) is None


def test_names_match_but_for_case_spaces_and_marks_and_nothing_else(table):
    assert table.find_name(" alt(sgpt) ").key == "alt"
    assert table.find_name("ＡＬＴ").key == "alt"
    assert table.find_name("中性粒细胞(%)").key == "neutrophils_percent"
    assert table.find_name("中性粒细胞(#)").key == "neutrophils"
    assert table.find_name("尿葡萄糖") is None
    assert table.find_name("PCT") is None  # procalcitonin, or plateletcrit
    assert table.find_name("x" * 10**6) is None


def test_urea_nitrogen_ends_as_urea(table):
    assert table.find_name("BUN").key == table.find_name("尿素").key == "urea"
    assert table.find_key("urea").molar_mass == pytest.approx(60.056)


def test_the_digest_is_of_the_meaning_not_of_the_spelling():
    one = LabTable(SMALL)
    assert one.digest == LabTable(dict(reversed(SMALL.items()))).digest
    assert one.digest == LabTable(small(possible=[0.0, 200.0])).digest
    assert one.digest != LabTable(small(possible=[0, 201])).digest
    assert len(one.digest) == 64


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (SMALL | {"format": 2}, "format is 2, expected 1"),
        (SMALL | {"lab": {}}, "did you mean 'labs'"),
        (small(molar_masses=1.0), "did you mean 'molar_mass'"),
        (small(possible=[5]), "expected lowest and highest"),
        (small(possible=[2, 1]), "expected lowest and highest"),
        (small(plausible=[-1, 70]), "not within possible"),
        (small(possible=[]), "not within possible"),
        (small(lines={"g": [1]}), "a factor and an offset"),
        (small(molar_mass=-1), "must not be negative"),
        (small(molar_mass=float("inf")), "no canonical form"),
        (SMALL | {"aliases": {"g/L": ["x"], "mg/L": ["x"]}}, "the unit 'x' twice"),
    ],
)
def test_a_wrong_table_is_refused(document, message):
    with pytest.raises(ConfigError, match=message):
        LabTable(document)


@pytest.mark.parametrize("other", [{"names": ["glu"]}, {"names": ["x"], "loinc": ["2345-7"]}])
def test_a_name_or_code_of_two_labs_is_refused(other):
    document = copy.deepcopy(SMALL)
    document["labs"]["other"] = other
    with pytest.raises(ConfigError, match="it can mean one lab only"):
        LabTable(document)


def test_an_alliances_own_table_is_read_from_its_file(tmp_path):
    path = tmp_path / "own.toml"
    text = files("huizhen.client.quality").joinpath("labs.toml").read_text("utf-8")
    path.write_text(text, "utf-8")
    assert load_table(path).digest == shipped_table().digest
    assert tomllib.loads(text)["format"] == 1
    path.write_text("labs = 3", "utf-8")
    with pytest.raises(ConfigError, match=r"own\.toml"):
        load_table(path)


def test_chinese_and_english_columns_of_tongji_are_the_same_labs(samples, table):
    def labs(name):
        with (samples / "covid_tongji" / name).open(encoding="utf-8-sig", newline="") as file:
            return [table.find_name(column) for column in next(csv.reader(file))[7:]]

    chinese, english = labs("train375_zh.csv"), labs("train375_en.csv")
    assert len(chinese) == 74
    assert None not in chinese
    assert [entry.key for entry in chinese] == [entry.key for entry in english]
    assert len({entry.key for entry in chinese}) == 74


def test_looking_up_a_known_unit_takes_no_time_to_speak_of(table):
    entry = table.find_name("glucose")
    table.way(entry, "mg/dL")
    begin = time.process_time()
    for _ in range(20_000):
        table.way(entry, "mg/dL")
    assert (time.process_time() - begin) / 20_000 < 5e-6


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_any_name_and_unit_is_found_or_not(text):
    table = LabTable(SMALL)
    entry = table.find_name(text)
    assert (entry is not None) == (plain(text) in {"葡萄糖", "glu"})
    way = table.way(table.entries[0], text)
    assert way is None or way.factor
