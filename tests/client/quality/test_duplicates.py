"""Which records say what an earlier one says."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from huizhen.client.quality.duplicates import MAX_TEXT, Duplicates, plain_text
from huizhen.client.quality.problems import Code, Rules
from huizhen.client.quality.signatures import jaccard, shingles
from huizhen.client.records.record import Finding, Lab, Record
from huizhen.protocol.errors import ConfigError, GovernanceError

ALPHABET = [chr(0x4E00 + 7 * n) for n in range(700)]


def note(patient, text, line=0, **more):
    return Record(
        patient, more.pop("fields", {}), f"n.jsonl:{line}", kind="note", text=text, **more
    )


def words(draw, length):
    return "".join(draw.choice(ALPHABET, length))


def find(records, rules=None):
    with Duplicates() as duplicates:
        for record in records:
            duplicates.add(record)
        return list(duplicates.find(rules))


def told(records):
    return [(p.code, p.place, p.subject) for cluster in find(records) for p in cluster.problems]


def edit(text, *positions):
    letters = list(text)
    for position in positions:
        letters[position] = "改"
    return "".join(letters)


LONG = words(np.random.default_rng(1), 400)
SHORT = words(np.random.default_rng(2), 40)


def test_the_same_record_twice_is_told_of_the_later():
    records = [note("p1", LONG, 1), note("p1", LONG[::-1], 2), note("p1", LONG, 3)]
    (cluster,) = find(records)
    assert cluster.numbers == (0, 2)
    assert cluster.similarity == 1
    (problem,) = cluster.problems
    assert (problem.code, problem.place, problem.subject, problem.action) == (
        Code.EXACT_DUPLICATE,
        "n.jsonl:3",
        "n.jsonl:1",
        "fix",
    )


def test_spaces_width_and_case_make_no_difference():
    spaced = " ".join("Patient：" + LONG)
    assert told([note("p1", "PATIENT:" + LONG, 1), note("p1", spaced, 2)]) == [
        (Code.EXACT_DUPLICATE, "n.jsonl:2", "n.jsonl:1")
    ]


@pytest.mark.parametrize(
    ("patient", "more", "code"),
    [
        ("p1", {}, Code.EXACT_DUPLICATE),
        ("p2", {}, Code.EXACT_ACROSS_PATIENTS),
        ("p1", {"time": "2023-05-07"}, Code.NEAR_DUPLICATE),  # copied to another day
        ("p2", {"time": "2023-05-07"}, Code.NEAR_ACROSS_PATIENTS),
        ("p1", {"findings": (Finding(code="E11"),)}, Code.NEAR_DUPLICATE),
    ],
)
def test_what_else_a_record_holds_tells_exact_from_near(patient, more, code):
    records = [note("p1", LONG, 1), note(patient, LONG, 2, **more)]
    assert told(records) == [(code, "n.jsonl:2", "n.jsonl:1")]


@pytest.mark.parametrize(
    ("one", "other", "is_alike"),
    [
        (LONG, edit(LONG, 50, 150, 300), True),
        (LONG, LONG + "另加一句话。", True),
        (LONG, edit(LONG, *range(0, 400, 12)), False),
        (SHORT, edit(SHORT, 12, 27), True),  # Jaccard 0.57
        (SHORT, edit(SHORT, 5, 12, 27), False),
        (LONG[:80], edit(LONG[:80], 20, 50), True),  # Jaccard 0.77, two edits
        (LONG[:80], edit(LONG[:80], 20, 40, 60), False),
        (SHORT[:24], edit(SHORT[:24], 9), True),
        (SHORT[:24], edit(SHORT[:24], 9, 15), False),
        (SHORT[:20], SHORT[:20], False),  # too short to mean anything
    ],
)
def test_how_alike_depends_on_the_length(one, other, is_alike):
    records = [note("p1", one, 1, time="2023"), note("p2", other, 2, time="2024")]
    expected = [(Code.NEAR_ACROSS_PATIENTS, "n.jsonl:2", "n.jsonl:1")] if is_alike else []
    assert told(records) == expected


def test_a_cluster_joins_chains_and_tells_each_record_once():
    second, third = edit(LONG, 10), edit(LONG, 10, 200)
    records = [
        note("p1", LONG, 1),
        note("p2", third, 2),
        note("p1", second, 3),
        note("p2", third, 4),
    ]
    (cluster,) = find(records)
    assert cluster.numbers == (0, 1, 2, 3)
    assert 0.9 < cluster.similarity < 1
    assert [(p.code, p.place, p.subject) for p in cluster.problems] == [
        (Code.NEAR_ACROSS_PATIENTS, "n.jsonl:2", "n.jsonl:1"),
        (Code.NEAR_DUPLICATE, "n.jsonl:3", "n.jsonl:1"),
        (Code.EXACT_DUPLICATE, "n.jsonl:4", "n.jsonl:2"),
    ]


def test_records_without_text_are_compared_by_what_they_hold():
    labs = (Lab(code="glucose", value=5.0, unit="mmol/L"),)
    records = [
        Record("p1", {}, "l:1", kind="labs", labs=labs, time="2023"),
        Record("p1", {}, "l:2", kind="labs", labs=labs, time="2023"),
        Record("p1", {}, "l:3", kind="labs", labs=labs, time="2024"),
        Record("p1", {}, "l:4", kind="patient", sex="male"),
        Record("p2", {}, "l:5", kind="patient", sex="male"),
    ]
    assert told(records) == [(Code.EXACT_DUPLICATE, "l:2", "l:1")]


def test_a_rule_to_refuse_names_both_places():
    records = [note("p1", LONG, 1), note("p2", edit(LONG, 7), 2)]
    with pytest.raises(
        GovernanceError, match=r"n\.jsonl:2: record has near_across_patients in 'n\.jsonl:1'"
    ):
        find(records, Rules(near_across_patients="refuse"))


def test_nothing_and_odd_things_are_no_duplicates():
    assert find([]) == []
    assert find([note("p1", "")] * 3) == []
    odd = {1: "a", "b": float("nan"), "c": {1, 2}, "d": "\ud800"}
    (cluster,) = find([note("p\ud800", "\ud800" * 9, 1, fields=odd)] * 2)
    assert cluster.problems[0].code == Code.EXACT_DUPLICATE


def test_a_note_of_a_million_characters_is_compared_by_its_beginning():
    huge = LONG * 2500
    assert len(told([note("p1", huge, 1), note("p2", huge + "尾", 2)])) == 1


def test_no_file_remains_and_none_has_a_name(tmp_path):
    with Duplicates(tmp_path) as duplicates:
        duplicates.add(note("p1", LONG))
        assert list(tmp_path.iterdir()) == []
        assert list(duplicates.find()) == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="cannot write in"):
        Duplicates(tmp_path / "missing")


def test_memory_holds_no_texts():
    with Duplicates() as duplicates:
        for number in range(5000):
            duplicates.add(note("p", f"{number} {LONG}"))
        assert sum(map(len, duplicates._waiting)) < 1 << 20
        names = ("_at", "_places", "_sizes", "_patients", "_contents", "_texts")
        held = [getattr(duplicates, name) for name in names]
        assert sum(column.itemsize * len(column) for column in held) <= 54 * 5000 + 8
        assert os.fstat(duplicates._spool.fileno()).st_size > 0


def pairs(clusters):
    return {pair for cluster in clusters for pair in itertools.combinations(cluster.numbers, 2)}


@given(st.integers(0, 2**32))
@settings(max_examples=25)
def test_what_the_exact_twin_finds_at_high_similarity_is_found(seed):
    """All pairs against all pairs, over notes of 25 to 500 characters with planted copies."""
    draw = np.random.default_rng(seed)
    texts: list[str] = []
    for _ in range(40):
        if texts and draw.random() < 0.5:
            base = texts[draw.integers(len(texts))]
            count = 1 + len(base) // 60
            texts.append(edit(base, *draw.choice(len(base), count, replace=False)))
        else:
            texts.append(words(draw, draw.integers(25, 500)))
    found = pairs(find(note("p", text, line) for line, text in enumerate(texts)))
    hashed = [shingles(plain_text(text)) for text in texts]
    for i, j in itertools.combinations(range(len(texts)), 2):
        similarity = jaccard(hashed[i], hashed[j])
        if similarity >= 0.85 and len(texts[i]) >= 64:
            assert (i, j) in found
        if similarity < 0.1:  # of the same origin, a chain may join what is less alike
            assert (i, j) not in found


def test_duplicates_are_found_among_a_thousand_notes_of_one_template():
    draw = np.random.default_rng(9)
    template = [words(draw, 30) + "。" for _ in range(8)]
    texts = []
    for _ in range(1000):
        parts = [*template, *(words(draw, 20) + "。" for _ in range(8))]
        draw.shuffle(parts)
        texts.append("".join(parts))
    copies = [edit(texts[i], 30, 300) for i in range(0, 1000, 20)]
    found = pairs(find(note("p", text, line) for line, text in enumerate(texts + copies)))
    assert found == {(20 * i, 1000 + i) for i in range(50)}


def test_it_is_deterministic():
    draw = np.random.default_rng(4)
    texts = [words(draw, 200) for _ in range(50)]
    records = [note("p", edit(text, n), n) for n, text in enumerate(texts * 2)]
    assert len(find(records)) == 50
    assert find(records) == find(records)


def test_a_long_note_that_goes_on_is_no_copy_of_the_one_it_begins_with():
    """Cumulative notes begin alike for pages; what was added today must not be left out."""
    note = "".join(f"第{i}日,患者一般情况可。" for i in range(4000))
    assert len(note) > MAX_TEXT
    records = [Record("p", {}, "a:1", text=note), Record("p", {}, "a:2", text=note + "今日出院。")]
    with Duplicates() as found:
        for record in records:
            found.add(record)
        codes = [one.code for cluster in found.find() for one in cluster.problems]
    assert codes == [Code.NEAR_DUPLICATE]


def test_a_power_is_not_a_number_of_one_more_digit():
    assert plain_text("WBC 6×10⁹／Ｌ") == "wbc6×10⁹/l"
