"""Counts of a hospital's data, none of which is of so few that they are somebody."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.clean import CleanRecord
from huizhen.client.data_profile import SAMPLE, Profile, suppressed
from huizhen.client.records.record import Lab, Record


def profile(rows, label="class", smallest_cell=2):
    made = Profile(label=label, smallest_cell=smallest_cell)
    for i, (patient, terms) in enumerate(rows):
        values, place = dict(terms), f"a:{i}"
        fields = {"class": values.pop("label", "A")}
        is_held_out = values.pop("is_held_out", False)
        clean = CleanRecord(
            patient=patient, is_held_out=is_held_out, place=place, fields=fields,
            sex=values.pop("sex", ""), age=values.pop("age", None), labs=values.get("labs", ()),
        )  # fmt: skip
        made.add(Record(patient, fields, place, **values), clean)
    return made


def ldh(value):
    return Lab(code="ldh", system="huizhen", value=float(value), unit="U/L")


def table(made, name):
    return {cell.name: cell.count for cell in made.tables()[name] if cell.count != 0}


def test_records_and_patients_are_counted():
    rows = [("p", {"kind": "note", "time": "2023-05-06"}), ("p", {"kind": "note", "time": "2023"})]
    made = profile([*rows, *((f"q{i}", {"kind": "labs", "is_held_out": True}) for i in range(3))])
    assert (made.records, made.patients, made.held_out) == (5, 4, 3)
    assert table(made, "kind") == {"note": 2, "labs": 3}
    assert table(made, "year") == {"2023": 2, "": 3}
    assert table(made, "class, held out") == {"A": 3}
    assert table(made, "class, training") == {"A": 2}
    assert made.missing() == {"class": 0.0, "time": 0.6}  # of the others nothing is filled


def test_people_are_counted_once_by_the_first_record_that_says_it():
    rows = [("p", {}), ("p", {"sex": "female", "age": 61.9}), ("p", {"sex": "male", "age": 70.0})]
    made = profile([*rows, ("q", {"sex": "female", "age": 69.0})])
    assert table(made, "sex") == {"female": 2}
    assert table(made, "age") == {"60–69": 2}


def test_bands_and_scripts():
    texts = ["咳嗽 WBC 高", "cough and fever", "12,5", "", "x" * 20_000]
    made = profile([(str(i), {"text": text}) for i, text in enumerate(texts)], smallest_cell=1)
    assert table(made, "language") == {"zh": 1, "latin": 2, "": 2}
    assert table(made, "length of text") == {"0–49": 4, "10000+": 1}
    assert table(made, "records of a patient") == {"1": 5}


def test_labs_have_quantiles_of_a_sample_that_is_the_same_each_time():
    values = np.random.default_rng(3).normal(100, 10, 5 * SAMPLE)
    rows = [
        (
            f"p{i}",
            {
                "labs": (
                    Lab(code="ldh", system="huizhen", value=float(value), unit="U/L"),
                    Lab(code="x", text="+"),
                )
            },
        )
        for i, value in enumerate(values)
    ]
    lab = profile(rows).labs["ldh"]
    again = profile(rows).labs["ldh"]
    assert lab.quantiles() == again.quantiles()
    assert (lab.count, lab.unit, len(lab.sample)) == (5 * SAMPLE, "U/L", SAMPLE)
    wanted = [100 - 16.45, 100, 100 + 16.45]
    assert lab.quantiles() == pytest.approx(wanted, abs=5 * 10 / np.sqrt(SAMPLE * 0.05))
    assert list(profile(rows).labs) == ["ldh"]


def test_what_few_say_is_not_said():
    rows = [(str(i), {"label": f"王建国 {i}", "kind": f"sort {i}"}) for i in range(300)]
    made = profile([*rows, *((str(i), {"label": "A", "kind": "note"}) for i in range(5))])
    assert table(made, "class, training") == {"(few)": 300, "A": 5}
    assert table(made, "kind") == {"(few)": 300, "note": 5}
    odd = [(str(i), {"labs": (Lab(code="", name="王建国特检", value=1.0),)}) for i in range(9)]
    assert profile(odd).labs == {}


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 30), max_size=8), st.integers(1, 12))
def test_dq_4_no_cell_is_small_and_none_can_be_told_from_the_total(counts, least):
    cells = suppressed(counts, least)
    assert [cell.name for cell in cells] == list(counts)
    for cell in cells:
        assert cell.count is None or cell.count == counts[cell.name]
        assert cell.count is None or cell.count == 0 or cell.count >= least
    hidden = [cell.name for cell in cells if cell.count is None]
    total = sum(counts[name] for name in hidden)
    if hidden and (len(hidden) == 1 or total < least):  # nothing else is left to hide it behind
        assert not [cell for cell in cells if cell.count]
    assert not hidden or any(0 < counts[name] < least for name in hidden)


def test_a_table_is_in_the_order_of_what_was_counted():
    assert [cell.name for cell in suppressed(Counter(b=20, a=30), 10)] == ["b", "a"]
