"""Excel and Parquet give the rows that CSV gives; nothing in them is larger than it looks."""

import io
import zipfile
from datetime import date, datetime

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.records import tables
from huizhen.client.records.record import Unreadable
from huizhen.client.records.rows import whole
from huizhen.client.records.tables import read_excel, read_parquet
from huizhen.protocol.errors import ConfigError, GovernanceError, HuizhenError

TYPES = (
    '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Default '
    'Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="xml" ContentType="application/xml"/></Types>'
)
RELS = '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{}</Relationships>'
REL = (
    '<Relationship Id="rId{0}" Target="{1}" '
    'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/{2}"/>'
)
MAIN = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'


def sheet(*rows):
    return f"<worksheet {MAIN}><sheetData>{''.join(rows)}</sheetData></worksheet>"


def row(number, **cells):
    written = "".join(
        f'<c r="{letter}{number}" t="inlineStr"><is><t>{value}</t></is></c>'
        if isinstance(value, str)
        else f'<c r="{letter}{number}"><v>{value!r}</v></c>'
        for letter, value in cells.items()
    )
    return f'<row r="{number}">{written}</row>'


def workbook(**sheets):
    """Return the bytes of a workbook made by hand (ECMA-376 part 1, 18.2 and 18.3)."""
    names = "".join(
        f'<sheet name="{name}" sheetId="{i}" r:id="rId{i}"/>' for i, name in enumerate(sheets, 1)
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", TYPES)
        archive.writestr(
            "_rels/.rels", RELS.format(REL.format(1, "xl/workbook.xml", "officeDocument"))
        )
        archive.writestr(
            "xl/workbook.xml",
            f'<workbook {MAIN} xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/'
            f'relationships"><sheets>{names}</sheets></workbook>',
        )
        links = [
            REL.format(i, f"worksheets/sheet{i}.xml", "worksheet")
            for i in range(1, len(sheets) + 1)
        ]
        archive.writestr("xl/_rels/workbook.xml.rels", RELS.format("".join(links)))
        for i, text in enumerate(sheets.values(), 1):
            archive.writestr(f"xl/worksheets/sheet{i}.xml", text)
    return out.getvalue()


def read(data, **options):
    return list(read_excel(io.BytesIO(data), "a.xlsx", **options))


LABS = sheet(
    row(3, B="住院号", C="LDH", D="备注"),
    row(4, B=7.0, C=250.5, D="溶血"),
    row(6, B="007", C="&lt;0.01"),
)


def test_a_sheet_gives_its_rows_as_text_with_their_places():
    assert read(workbook(labs=LABS)) == [
        ("a.xlsx:labs:4", {"住院号": "7", "LDH": "250.5", "备注": "溶血"}),
        ("a.xlsx:labs:6", {"住院号": "007", "LDH": "<0.01", "备注": ""}),
    ]


def test_a_sheet_is_chosen_by_its_name():
    data = workbook(cover=sheet(row(1, A="x")), labs=LABS)
    assert len(read(data, sheet="labs")) == 2
    assert read(data) == []  # a header alone
    with pytest.raises(ConfigError, match=r"a\.xlsx has no sheet 'lab': it has 'cover', 'labs'"):
        read(data, sheet="lab")


def test_a_number_whose_last_digits_excel_has_lost_is_no_patient():
    data = workbook(a=sheet(row(1, A="id"), row(2, A=110101196503071234.0), row(3, A=5.0)))
    bad, good = read(data)
    assert isinstance(bad, Unreadable)
    assert bad.place == "a.xlsx:a:2"
    assert "over 15 digits" in bad.problem
    assert "110101" not in bad.problem
    assert good == ("a.xlsx:a:3", {"id": "5"})


def test_two_columns_of_one_name_and_a_value_without_a_name_are_refused():
    with pytest.raises(GovernanceError, match=r"a\.xlsx:a:1: header has a column twice"):
        read(workbook(a=sheet(row(1, A="SECRET", B="SECRET"))))
    [bad] = read(workbook(a=sheet(row(1, A="id"), row(2, A=1.0, B="SECRET"))))
    assert bad.problem == "row has a value in a column without a name: name or empty it"


def test_a_cell_at_the_far_corner_makes_no_giant():
    data = workbook(a=sheet(row(1, A="id"), row(1048576, XFD=1.0)))
    with pytest.raises(GovernanceError, match="1048576 rows and 16384 columns"):
        read(data)


@pytest.mark.parametrize("is_lying", [False, True])
def test_a_bomb_is_refused_before_it_is_unpacked(is_lying, monkeypatch):
    monkeypatch.setattr(tables, "MAX_WORKBOOK_BYTES", 20 << 20)
    data = bytearray(workbook(a=sheet(" " * (30 << 20))))
    if is_lying:  # the directory's entry says that it is small; see APPNOTE 4.3.12
        entry = data.rindex(b"PK\x01\x02")
        data[entry + 24 : entry + 28] = (1000).to_bytes(4, "little")
    with pytest.raises(GovernanceError, match="when unpacked: save it as CSV"):
        read(bytes(data))


@pytest.mark.parametrize("data", [b"", b"id,text\n", b"PK\x03\x04", b"\xd0\xcf\x11\xe0" * 600])
def test_what_is_no_workbook_is_refused(data):
    with pytest.raises(ConfigError, match=r"is no \.xlsx workbook"):
        read(data)


WHOLE = workbook(labs=LABS)


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.integers(0, len(WHOLE)))
def test_a_damaged_workbook_gives_rows_or_a_clean_error(place, byte, end):
    data = bytearray(WHOLE)
    data[place] = byte
    try:
        read(bytes(data[:end] if byte % 2 else data))
    except HuizhenError:
        return


def test_parquet_gives_rows_of_plain_values(tmp_path):
    frame = pl.DataFrame(
        {
            "id": [1, 2], "text": ["热", None], "values": [[1.5, float("nan")], []],
            "day": [date(2023, 5, 6), None], "at": [datetime(2023, 5, 6, 8, 30)] * 2,  # noqa: DTZ001
            "price": pl.Series(["1.50", "2"]).str.to_decimal(scale=2),
        }
    )  # fmt: skip
    frame.write_parquet(tmp_path / "a.parquet")
    first, second = whole(read_parquet(tmp_path / "a.parquet"))
    assert first == (
        "a.parquet:1",
        {
            "id": 1, "text": "热", "values": [1.5, None], "day": "2023-05-06",
            "at": "2023-05-06T08:30:00", "price": "1.50",
        },
    )  # fmt: skip
    assert (second[0], second[1]["text"], second[1]["values"]) == ("a.parquet:2", None, [])


def test_parquet_is_read_in_order_over_many_batches(tmp_path):
    rows = 3 * tables.BATCH_ROWS + 7
    pl.DataFrame({"id": range(rows)}).write_parquet(tmp_path / "a.parquet", row_group_size=1000)
    found = whole(read_parquet(tmp_path / "a.parquet"))
    assert [fields["id"] for _, fields in found] == list(range(rows))


def test_binary_columns_and_what_is_no_parquet_are_refused(tmp_path):
    pl.DataFrame({"id": [1], "scan": [b"x"]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(GovernanceError, match=r"a\.parquet: column 'scan' is binary"):
        list(read_parquet(tmp_path / "a.parquet"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and so on")
    for name in ("b.parquet", "none.parquet"):
        with pytest.raises(ConfigError, match="cannot read"):
            list(read_parquet(tmp_path / name))


@given(st.data())
def test_a_damaged_parquet_gives_rows_or_a_clean_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    pl.DataFrame({"id": [1, 2, 3], "text": ["a", "b", "热"]}).write_parquet(path)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(whole))
    try:
        list(read_parquet(path))
    except HuizhenError:
        return
