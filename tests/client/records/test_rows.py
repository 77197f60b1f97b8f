"""What a hospital exports is read or refused with its line, and never shown."""

import contextlib
import csv
import gzip
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from huizhen.client.records import rows
from huizhen.client.records.record import MAX_ENTRY_BYTES, Record, Unreadable
from huizhen.client.records.rows import read_rows, to_record, whole
from huizhen.protocol.errors import ConfigError, GovernanceError, HuizhenError

ENTRIES = [
    {"id": "p1", "text": "发热, rash", "disease": "measles"},
    {"id": "p2", "text": 'a "quoted", comma', "disease": "asthma"},
]


def as_jsonl(entries, ensure_ascii=False):
    return "".join(json.dumps(e, ensure_ascii=ensure_ascii) + "\n" for e in entries)


def as_csv(entries, kind="csv"):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(entries[0]), delimiter="\t" if kind == "tsv" else ",")
    writer.writeheader()
    writer.writerows(entries)
    return out.getvalue()


@pytest.fixture
def write(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


def read(path, **options):
    return [fields for _, fields in whole(read_rows(path, **options))]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("zipped", [False, True], ids=["", "gz"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_jsonl_and_csv_are_read_also_zipped_and_with_a_byte_order_mark(write, kind, zipped, bom):
    text = as_jsonl(ENTRIES) if kind == "jsonl" else as_csv(ENTRIES)
    data = bom + text.encode()
    path = write(f"a.{kind}.gz", gzip.compress(data)) if zipped else write(f"a.{kind}", data)
    assert read(path) == ENTRIES


def test_places_name_the_file_and_the_line(write):
    path = write("a.jsonl", "\n" + as_jsonl(ENTRIES))
    assert [place for place, _ in whole(read_rows(path))] == ["a.jsonl:2", "a.jsonl:3"]
    path = write("b.csv", "id,text\n1,x\n2,y\n")
    assert [place for place, _ in whole(read_rows(path))] == ["b.csv:2", "b.csv:3"]


def test_a_field_of_a_csv_may_span_lines(write):
    assert read(write("a.csv", 'id,text\n1,"two\nlines"\n')) == [{"id": "1", "text": "two\nlines"}]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_in_another_encoding_than_named_is_refused_with_its_line(write, kind):
    text = as_jsonl(ENTRIES[::-1]) if kind == "jsonl" else as_csv(ENTRIES[::-1])
    path = write(f"a.{kind}", text.encode("gb18030"))
    line = 2 if kind == "jsonl" else 3
    with pytest.raises(ConfigError, match=rf"a\.{kind}:{line}: .*gb18030.*encoding = \"gb18030\""):
        read(path, encoding="utf-8")
    assert read(path, encoding="gb18030") == read(path) == ENTRIES[::-1]


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_a_utf16_file_is_recognised(write, codec, kind):
    text = as_jsonl(ENTRIES) if kind == "jsonl" else as_csv(ENTRIES, kind)
    path = write(f"a.{kind}", text.encode(codec))
    assert read(path) == read(path, encoding=codec) == ENTRIES
    with pytest.raises(HuizhenError, match=rf"a\.{kind}:[12]"):
        read(path, encoding="utf-8")


def test_a_file_in_an_unknown_encoding_is_refused(write):
    with pytest.raises(ConfigError, match="'no-such'"):
        read(write("a.jsonl", as_jsonl(ENTRIES)), encoding="no-such")


@pytest.mark.parametrize(
    "codec", ["utf-16", "utf_16", "utf-32", "utf-7", "cp1252", "ascii", "big5"]
)
def test_bytes_that_an_encoding_does_not_have_are_refused(write, codec):
    path = write("a.jsonl", b'{"id": "\x81\xff\xfe"}\n\xd8')
    with pytest.raises(HuizhenError, match=r"a\.jsonl"):
        read(path, encoding=codec)


def test_a_file_that_is_not_gzip_is_refused(write):
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz ends in \.gz but is not gzip"):
        read(write("a.jsonl.gz", as_jsonl(ENTRIES)))


def test_a_cut_gzip_is_refused(write):
    whole = gzip.compress(as_jsonl(ENTRIES * 50).encode())
    with pytest.raises(ConfigError, match="cut short"):
        read(write("a.jsonl.gz", whole[:-9]))


def test_a_damaged_gzip_is_refused(write):
    whole = bytearray(gzip.compress(as_jsonl(ENTRIES * 50).encode()))
    whole[len(whole) // 2] ^= 0xFF
    with pytest.raises(HuizhenError, match=r"a\.jsonl\.gz"):
        read(write("a.jsonl.gz", bytes(whole)))
    whole[10] = 0x07  # a block of a reserved type
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz"):
        read(write("a.jsonl.gz", bytes(whole)))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("SECRET", "not JSON"),
        ('{"id": "SECRET"', "not JSON"),
        ('["SECRET"]', "not a JSON object"),
        ('"SECRET"', "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"id": "SECRET", "dose": 1e999}', "not JSON"),
        ('{"id": 1} {"id": 2}', "not JSON"),
    ],
    ids=["text", "cut", "list", "string", "deep", "large number", "two"],
)
def test_a_line_that_is_no_json_object_is_refused_and_not_shown(write, line, problem):
    path = write("a.jsonl", as_jsonl(ENTRIES) + line + "\n")
    with pytest.raises(GovernanceError, match=rf"^a\.jsonl:3: line is {problem}") as caught:
        read(path)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "[1, NaN]", '{"x": -Infinity}'])
def test_what_json_has_no_number_for_is_refused(write, value):
    path = write("a.jsonl", as_jsonl(ENTRIES) + f'{{"id": "SECRET", "age": {value}}}\n')
    with pytest.raises(GovernanceError, match=r"^a\.jsonl:3: line is not JSON") as caught:
        read(path)
    assert "SECRET" not in str(caught.value)
    assert read(write("b.jsonl", '{"id": "NaN"}')) == [{"id": "NaN"}]  # a text may say so


@pytest.mark.parametrize(
    "line", ['{"SECRET": 1, "a": 2, "SECRET": 1}', '{"a": {"SECRET": 1, "SECRET": 2}}']
)
def test_a_field_twice_in_a_line_is_refused_and_not_shown(write, line):
    path = write("a.jsonl", as_jsonl(ENTRIES) + line)
    with pytest.raises(GovernanceError, match=r"^a\.jsonl:3: line has a field twice") as caught:
        read(path)
    assert "SECRET" not in str(caught.value)


def test_a_column_twice_in_a_header_is_refused_and_not_shown(write):
    for row in ("1,x,2\n", ""):
        path = write("a.csv", f"SECRET,text,SECRET\n{row}")
        with pytest.raises(ConfigError, match=r"^a\.csv: header has a column twice") as caught:
            read(path)
        assert "SECRET" not in str(caught.value)


def test_half_of_a_surrogate_pair_is_refused_and_a_whole_one_read(write):
    assert read(write("a.jsonl", '{"id": "\\ud83d\\ude42"}')) == [{"id": "🙂"}]
    for half in ('{"id": "\\ud83d SECRET"}', '{"\\uDE42 SECRET": 1}', '{"id": ["\\ud800"]}'):
        with pytest.raises(GovernanceError, match=r"^a\.jsonl:1: line holds half") as caught:
            read(write("a.jsonl", half))
        assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("row", ["SECRET", "SECRET,x,y,z", '"SECRET', 'SE"CRET,"x"y,z'])
def test_a_ragged_or_broken_row_of_a_csv_is_refused_and_not_shown(write, row):
    path = write("a.csv", f"id,text,disease\n1,x,y\n{row}\n")
    with pytest.raises(GovernanceError, match=r"^a\.csv:3: ") as caught:
        read(path)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.csv.gz"])
def test_an_empty_file_holds_no_records(write, name):
    assert read(write(name, gzip.compress(b"") if name.endswith("gz") else b"")) == []


@pytest.mark.parametrize("name", ["a.xlsx", "a.json", "a.gz", "a"])
def test_other_kinds_of_file_are_refused(write, name):
    with pytest.raises(ConfigError, match=r"expected a file that ends in \.jsonl"):
        read(write(name, "{}"))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path / "folder.csv")


def test_an_endless_line_is_refused_before_it_fills_memory(write):
    with pytest.raises(GovernanceError, match=r"a\.jsonl:1: line has over"):
        read(write("a.jsonl", b" " * (MAX_ENTRY_BYTES + 2)))


@pytest.mark.parametrize("value", [None, "", "  ", [], ["SECRET"], {"SECRET": 1}, True, 7.5])
def test_a_record_without_a_patient_id_is_refused_and_not_shown(value):
    fields = {"id": value, "text": "SECRET"}
    with pytest.raises(GovernanceError, match=r"^a:7: record has no patient id in 'id'") as caught:
        to_record(fields, "id", "a:7")
    assert "SECRET" not in str(caught.value)
    with pytest.raises(GovernanceError, match="no patient id in 'nhs'"):
        to_record({"id": "1"}, "nhs", "a:7")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(7, "7"), (0, "0"), (" p1 ", "p1"), ("丁", "丁"), ("1.5", "1.5"), ("07", "07")],
)
def test_a_patient_id_may_be_a_number_or_text(value, expected):
    assert to_record({"id": value}, "id", "a:1").patient == expected


def test_a_whole_number_is_one_patient_however_it_is_written():
    assert {
        to_record({"id": id}, "id", "a:1").patient for id in (7, 7.0, "7", " 7 ", "7.0", "７")
    } == {"7"}


def test_a_record_shows_only_its_place():
    record = Record("SECRET", {"text": "SECRET"}, "a:1")
    assert repr(record) == str(record) == f"{record}" == "Record(<masked>, a:1)"
    assert "SECRET" not in repr([record])


def test_a_row_that_cannot_be_read_leaves_the_others(write):
    path = write("a.jsonl", as_jsonl(ENTRIES[:1]) + "{SECRET}\n" + as_jsonl(ENTRIES[1:]))
    bad = Unreadable("a.jsonl:2", "line is not JSON: mend the export")
    assert list(read_rows(path)) == [("a.jsonl:1", ENTRIES[0]), bad, ("a.jsonl:3", ENTRIES[1])]
    path = write("a.csv", "id,text\n1,x\n2,y,z\n3,z\n")
    bad = Unreadable("a.csv:3", "row has 3 columns, the header 2: mend the export")
    first, last = {"id": "1", "text": "x"}, {"id": "3", "text": "z"}
    assert list(read_rows(path)) == [("a.csv:2", first), bad, ("a.csv:4", last)]


def test_a_long_number_keeps_its_digits(write):
    """Two patients whose numbers differ in the last digit must not become one."""
    ids = [12345678901234567890123, 12345678901234567890124]
    found = read(write("a.jsonl", as_jsonl([{"id": id} for id in ids])))
    assert [fields["id"] for fields in found] == [str(id) for id in ids]
    assert read(write("a.jsonl", '{"id": 1234567890123456}')) == [{"id": 1234567890123456}]


def test_a_line_is_nested_as_deep_as_records_are_and_no_deeper(write):
    for depth, is_read in ((39, True), (41, False)):
        [row] = read_rows(write("a.jsonl", '{"a": ' + "[" * depth + "]" * depth + "}"))
        assert isinstance(row, Unreadable) != is_read


jsonish = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
bytes_of_any_kind = st.one_of(
    st.binary(max_size=200),
    jsonish.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(["id", "text"]), jsonish).map(lambda v: json.dumps(v).encode()),
    st.text(alphabet='id,"\r\n\0x;', max_size=60).map(str.encode),
    st.binary(max_size=60).map(gzip.compress),
    st.binary(max_size=60).map(lambda data: gzip.compress(data)[:-5]),
    st.tuples(st.binary(min_size=40, max_size=60), st.integers(0, 55), st.integers(0, 255)).map(
        lambda t: (z := bytearray(gzip.compress(t[0])), z.__setitem__(t[1], t[2]))[0]
    ),
)
codecs = st.sampled_from(
    ["auto", "utf-8", "gb18030", "utf-16", "utf_16", "utf-16-le", "utf-7", "shift_jis"]
)
names = st.sampled_from(["f.jsonl", "f.csv", "f.tsv", "f.jsonl.gz", "f.csv.gz"])


@given(
    st.dictionaries(st.text(), jsonish),
    st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : ")]),
    st.booleans(),
)
def test_the_quick_way_to_read_json_is_the_careful_one(fields, separators, is_ascii):
    line = json.dumps(fields, separators=separators, ensure_ascii=is_ascii)
    quick = rows._quick(line)
    if quick is not None:
        assert json.dumps(quick) == json.dumps(rows._careful(line))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.text('":a ', max_size=4)), min_size=1))
def test_the_quick_way_sees_no_field_twice(pairs):
    line = "{" + ",".join(f"{json.dumps(a)}:{json.dumps(b)}" for a, b in pairs) + "}"
    if len({name for name, _ in pairs}) < len(pairs):
        assert rows._quick(line) is None


@settings(
    max_examples=400,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=bytes_of_any_kind, encoding=codecs, name=names)
def test_any_bytes_give_records_or_one_of_our_errors(tmp_path, data, encoding, name):
    path = tmp_path / name
    path.write_bytes(data)
    with contextlib.suppress(HuizhenError):
        for place, fields in whole(read_rows(path, encoding=encoding)):
            assert place.startswith(name)
            assert isinstance(to_record(fields, "id", place).patient, str)
