"""From a table's row to a record, as ``[[sources]]`` says what its columns mean."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from huizhen.client.records.record import (
    Entry,
    Finding,
    Lab,
    Record,
    Sex,
    Unreadable,
    patient_of,
)
from huizhen.client.records.results import number_of
from huizhen.client.records.rows import Row
from huizhen.client.records.terms import RESERVED, SourceTerms
from huizhen.client.records.times import iso
from huizhen.learning.template import nearest
from huizhen.protocol.errors import ConfigError, GovernanceError

# GB/T 2261.1 numbers the sexes 1 and 2, and 9 for what was not said
_SEXES: Mapping[str, Sex] = {
    "f": "female", "female": "female", "女": "female", "女性": "female", "2": "female",
    "m": "male", "male": "male", "男": "male", "男性": "male", "1": "male",
    "other": "other", "其他": "other", "未说明的性别": "", "未知": "", "unknown": "", "u": "",
    "": "", "0": "", "9": "",
}  # fmt: skip
_EXAMPLES: Mapping[str, str] = {
    "text": 'text = ["text"]', "findings": 'findings = [{name = "findings", separator = ";"}]',
    "sex": 'sex = "sex"', "age": 'age = "age"', "kind": 'fields = {sort = "kind"}',
}  # fmt: skip
_MAX_AGE = 130
_AGE = re.compile(
    r"(\d{1,4}(?:\.\d{1,3})?)\s*(Y|M|W|D|岁|周岁|月|个月|月龄|周|天|日龄|)", re.IGNORECASE
)
_IN_A_YEAR: Mapping[str, float] = {
    "": 1, "Y": 1, "岁": 1, "周岁": 1, "M": 12, "月": 12, "个月": 12, "月龄": 12,
    "W": 52.18, "周": 52.18, "D": 365.25, "天": 365.25, "日龄": 365.25,
}  # fmt: skip


def map_rows(
    rows: Iterable[Row | Unreadable], terms: SourceTerms, name: str, *, is_uniform: bool
) -> Iterator[Entry]:
    """Yield the record of each row.

    Args:
        rows: of one file or query.
        terms: what its columns mean.
        name: of the file or query, for errors.
        is_uniform: whether all rows have the same columns, as in every table but JSON lines.

    Raises:
        ConfigError: a column that the source names is in no row.
    """
    missing, seen = set(terms.columns), set[str]()
    down = _FillDown(terms)
    for row in rows:
        if isinstance(row, Unreadable):
            down.lose()
            yield row
            continue
        place, fields = row
        if missing:
            missing -= fields.keys()
            seen |= fields.keys()
            if missing and is_uniform:
                break
        try:
            down.fill(fields, place)
            yield to_record(fields, terms, place)
        except GovernanceError as error:
            yield Unreadable(place, str(error).removeprefix(f"{place}: "))
    if missing and seen:
        column = min(missing)
        raise ConfigError(
            f"{name} has no column {column!r}, [[sources]] names it{nearest(column, seen)}"
        )


class _FillDown:
    """Columns that are filled on a patient's first row only: nothing goes over to the next one."""

    def __init__(self, terms: SourceTerms) -> None:
        self._columns, self._patient = terms.fill_down, terms.patient
        self._last: dict[str, Any] = {}
        self._is_lost = False

    def lose(self) -> None:
        """Say that a row was not read: whose the next ones are is told by one that says so."""
        self._is_lost = bool(self._columns)

    def fill(self, fields: dict[str, Any], place: str) -> None:
        """Fill a row's empty columns from those above.

        Raises:
            GovernanceError: the row above was not read, and may have begun another patient.
        """
        if not self._columns:
            return
        if not is_empty(fields.get(self._patient)):
            if fields[self._patient] != self._last.get(self._patient):
                self._last = {}
            self._is_lost = False
        elif self._is_lost:
            raise GovernanceError(
                f"{place}: row follows one that could not be read and names no patient: mend that "
                "one"
            )
        for column in self._columns:
            if is_empty(fields.get(column)):
                fields[column] = self._last.get(column)
            self._last[column] = fields[column]
        self._last[self._patient] = fields.get(self._patient)


def to_record(fields: Mapping[str, Any], terms: SourceTerms, place: str) -> Record:
    """Return the record of a row.

    Raises:
        GovernanceError: there is no patient, or a cell is not what the source says; the message
            names the column and does not show the cell.
    """
    patient = patient_of(fields.get(terms.patient), terms.patient, place)
    time = _time(fields, terms.time, place)
    return Record(
        patient,
        _extra(fields, terms),
        place,
        kind=terms.kind,
        encounter=_cell(fields, terms.encounter),
        time=time,
        text=_text(fields, terms.text),
        findings=tuple(_findings(fields, terms, time)),
        labs=tuple(_labs(fields, terms, time)),
        sex=_sex(fields, terms.sex, place),
        birth=_time(fields, terms.birth, place),
        death=_time(fields, terms.death, place),
        age=_age(fields, terms.age, place),
        identifiers=_identifiers(fields, terms),
    )


def is_empty(value: Any) -> bool:
    """Tell whether a cell holds nothing."""
    return value is None or (isinstance(value, str) and not value.strip())


def _cell(fields: Mapping[str, Any], column: str | None) -> str:
    """Return a cell as text; a whole number is written in one way."""
    value = None if column is None else fields.get(column)
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _time(fields: Mapping[str, Any], column: str | None, place: str) -> str:
    try:
        return iso(_cell(fields, column))
    except ValueError as error:
        raise GovernanceError(f"{place}: column {column!r} {error}") from error


def _sex(fields: Mapping[str, Any], column: str | None, place: str) -> Sex:
    found = _SEXES.get(_cell(fields, column).lower())
    if found is None:
        raise GovernanceError(
            f"{place}: column {column!r} is no sex, expected male or female, 男 or 女, or the "
            "numbers of GB/T 2261.1"
        )
    return found


def _age(fields: Mapping[str, Any], column: str | None, place: str) -> float | None:
    cell = _cell(fields, column)
    if not cell:
        return None
    found = _AGE.fullmatch(cell)
    if found is None:
        raise GovernanceError(
            f"{place}: column {column!r} is no age, expected years, or such as 8M, 3岁, 6月龄, 10天"
        )
    years = float(found[1]) / _IN_A_YEAR[found[2].upper()]
    if years > _MAX_AGE:
        raise GovernanceError(
            f"{place}: column {column!r} is over {_MAX_AGE} years: mend the export"
        )
    return years


def _text(fields: Mapping[str, Any], columns: tuple[str, ...]) -> str:
    cells = [(column, _cell(fields, column)) for column in columns]
    if len(columns) == 1:
        return cells[0][1]
    return "\n".join(f"{column}: {cell}" for column, cell in cells if cell)


def _identifiers(fields: Mapping[str, Any], terms: SourceTerms) -> dict[str, tuple[str, ...]]:
    found = {}
    for kind, given in terms.identifiers.items():
        columns = (given,) if isinstance(given, str) else given
        cells = tuple(cell for cell in (_cell(fields, column) for column in columns) if cell)
        if cells:
            found[kind] = cells
    return found


def _extra(fields: Mapping[str, Any], terms: SourceTerms) -> dict[str, Any]:
    if terms.fields is not None:
        return {name: fields.get(column) for name, column in terms.fields.items()}
    named = set(terms.columns)
    for name in RESERVED:
        if name in fields and name not in named:
            raise ConfigError(
                f"column {name!r} has the name of what every record has: say under [[sources]] "
                f"what it is, such as {_EXAMPLES[name]}"
            )
    return {name: value for name, value in fields.items() if name not in named}


def _labs(fields: Mapping[str, Any], terms: SourceTerms, time: str) -> Iterator[Lab]:
    for column, unit in terms.labs.items():
        cell = _cell(fields, column)
        if cell:
            value, comparator = number_of(cell)
            yield Lab(
                code="",
                name=column,
                value=value,
                comparator=comparator,
                text=cell,
                unit=unit,
                time=time,
            )
    lab = terms.lab
    if lab is not None and (cell := _cell(fields, lab.value)):
        value, comparator = number_of(cell)
        yield Lab(
            code=_cell(fields, lab.code),
            system=lab.system,
            name=_cell(fields, lab.name),
            value=value,
            comparator=comparator,
            text=cell,
            unit=_cell(fields, lab.unit),
            low=number_of(_cell(fields, lab.low))[0],
            high=number_of(_cell(fields, lab.high))[0],
            time=time,
        )


def _findings(fields: Mapping[str, Any], terms: SourceTerms, time: str) -> Iterator[Finding]:
    for one in terms.findings:
        codes, names = (
            [cell.strip() for cell in _cell(fields, column).split(one.separator)]
            if one.separator
            else [_cell(fields, column)]
            for column in (one.code, one.name)
        )
        for i in range(max(len(codes), len(names))):
            code = codes[i] if i < len(codes) else ""
            name = names[i] if i < len(names) else ""
            if code or name:
                yield Finding(code=code, system=one.system, name=name, kind=one.kind, time=time)
