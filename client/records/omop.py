"""Records of the OMOP common data model, version 5.4, from CSV files or a database.

https://ohdsi.github.io/CommonDataModel/cdm54.html. Each table is read by itself, in its own order:

    PERSON                 "patient"; its death is that of DEATH, its address that of LOCATION
    DEATH                  "death", its cause a finding
    VISIT_OCCURRENCE       "encounter"
    CONDITION_OCCURRENCE   "diagnosis"         each row a record with one finding
    PROCEDURE_OCCURRENCE   "procedure"
    DRUG_EXPOSURE          "drug"
    MEASUREMENT            "labs"              rows that follow each other, of one person, visit
    OBSERVATION            "observation"       and time, are one record
    NOTE                   "note"

An observation with a value is a lab, one without is a finding. A code is that of the standard
concept, else of the source's concept; where CONCEPT knows neither it is the concept's number in
the system "omop", where there is no number the hospital's own code. A value's unit is the
concept's code, else the source's. A visit that VISIT_OCCURRENCE lacks is kept as its number:
nothing depends on that row.

``fields`` has, where there is something: race, ethnicity, care_site_id (patient); visit,
visit_end, admitted_from, discharged_to, preceding_visit_occurrence_id, care_site_id,
visit_source_value (encounter); condition_end, condition_status, condition_source_value,
stop_reason; procedure_end, modifier, quantity, procedure_source_value; drug_exposure_end, route,
quantity, days_supply, refills, sig, dose_unit_source_value, drug_source_value, stop_reason;
note_title, note_class, language. Concepts are there by name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from huizhen.client.records.omop_layout import LAYOUTS
from huizhen.client.records.omop_memory import Memory, concept_of, person_id
from huizhen.client.records.omop_tables import Tables, open_tables
from huizhen.client.records.omop_values import Cells, RowError, number, text, time, whole
from huizhen.client.records.record import (
    Comparator,
    Entry,
    Finding,
    FindingKind,
    Lab,
    Record,
    Sex,
    Unreadable,
)
from huizhen.client.records.times import iso

_SEXES: dict[str, Sex] = {
    "8507": "male", "8532": "female", "8521": "other", "8570": "other",
    "m": "male", "male": "male", "男": "male", "f": "female", "female": "female", "女": "female",
}  # fmt: skip
# by gender_concept_id, and where that is 0 by gender_source_value
_COMPARATORS: dict[int, Comparator] = {
    0: "", 4172703: "", 4171756: "<", 4171754: "<=", 4172704: ">", 4171755: ">=",
}  # fmt: skip
# the domain "Meas Value Operator"; 4172703 is =
_LONGEST = 1000
# rows of one record


def read_omop(
    source: Path | str,
    *,
    name: str,
    schema: str = "",
    password_file: Path | None = None,
    encoding: str = "utf-8",
) -> Iterator[Entry]:
    """Yield the records of a folder of CSV files, or of a database; no table is held.

    Held are a few dozen bytes of each person, and the concepts that are referred to. A place is
    ``name/file:line`` of a file, ``name/table:row`` of a database.

    Args:
        source: the folder, its files named as the tables in any case, ``.csv`` or ``.csv.gz``,
            with commas or tabs; or a database's URL as for ``read_sql``.
        name: what to call the source in places and errors.
        schema: of the database; empty: its default.
        password_file: of the database.
        encoding: of the files.

    Raises:
        ConfigError: there is no such source, or a table lacks what makes it one.
        GovernanceError: a file cannot be read further.
    """
    with open_tables(
        source, name=name, schema=schema, password_file=password_file, encoding=encoding
    ) as tables:
        yield from _Reader(tables).entries()


class _Moment(NamedTuple):
    """Whose and when; rows that share it are one record."""

    person: int
    encounter: str
    time: str


@dataclass(slots=True)
class _Reader:
    tables: Tables
    memory: Memory = field(default_factory=Memory)

    def entries(self) -> Iterator[Entry]:
        yield from self._learn()
        yield from self._each("person", self._patient)
        yield from self._each("death", self._death)
        yield from self._each("visit_occurrence", self._visit)
        yield from self._each("condition_occurrence", self._condition)
        yield from self._each("procedure_occurrence", self._procedure)
        yield from self._each("drug_exposure", self._drug)
        yield from self._grouped("measurement", "labs", self._measurement)
        yield from self._grouped("observation", "observation", self._observation)
        yield from self._each("note", self._note)

    def _learn(self) -> Iterator[Entry]:
        """Remember what other tables refer to."""
        if self.tables.has("concept"):
            for row in self.tables.used_concepts():
                if isinstance(row, Unreadable):
                    yield row
                    continue
                try:
                    key, concept = concept_of(row[1])
                    self.memory.concepts[key] = concept
                except RowError as error:
                    yield Unreadable(row[0], str(error))
        yield from self._each("location", lambda _, cells: self.memory.add_location(cells))
        for _ in self._each("death", lambda _, cells: self.memory.add_death(cells)):
            pass  # a bad row is told when the table is read again

    def _each(self, table: str, make: Callable[[str, Cells], Record | None]) -> Iterator[Entry]:
        """Yield what becomes of each row of a table that there may be."""
        if not self.tables.has(table):
            return
        for row in self.tables.rows(table, LAYOUTS[table].columns):
            if isinstance(row, Unreadable):
                yield row
                continue
            place, cells = row
            try:
                record = make(place, cells)
            except RowError as error:
                yield Unreadable(place, str(error))
            else:
                if record is not None:
                    yield record

    def _grouped(
        self, table: str, kind: str, make: Callable[[Cells], tuple[_Moment, Lab | Finding]]
    ) -> Iterator[Entry]:
        """Yield a record of each run of rows that are of one moment."""
        if not self.tables.has(table):
            return
        items: list[Lab | Finding] = []
        begin, current = "", None
        for row in self.tables.rows(table, LAYOUTS[table].columns):
            if isinstance(row, Unreadable):
                yield row
                continue
            try:
                moment, item = make(row[1])
            except RowError as error:
                yield Unreadable(row[0], str(error))
                continue
            if current is not None and (moment != current or len(items) == _LONGEST):
                yield self._record(begin, current, kind, items)
                items = []
            if not items:
                begin, current = row[0], moment
            items.append(item)
        if current is not None:
            yield self._record(begin, current, kind, items)

    def _record(
        self,
        place: str,
        moment: _Moment,
        kind: str,
        items: Sequence[Lab | Finding] = (),
        fields: Mapping[str, str | float | None] | None = None,
        *,
        text: str = "",
        own: Mapping[str, tuple[str, ...]] | None = None,
    ) -> Record:
        person = self.memory.person(moment.person)
        return Record(
            str(moment.person),
            {name: value for name, value in (fields or {}).items() if value not in ("", None)},
            place,
            kind=kind,
            encounter=moment.encounter,
            time=moment.time,
            text=text,
            findings=tuple(item for item in items if isinstance(item, Finding)),
            labs=tuple(item for item in items if isinstance(item, Lab)),
            sex=person.sex,
            birth=person.birth,
            death=person.death,
            identifiers=person.identifiers if own is None else {**person.identifiers, **own},
        )

    def _moment(self, cells: Cells, stem: str) -> _Moment:
        person = person_id(cells)
        self.memory.person(person)
        visit = whole(cells, "visit_occurrence_id")
        return _Moment(person, str(visit) if visit else "", time(cells, stem))

    def _patient(self, place: str, cells: Cells) -> Record:
        fields = {
            "race": self.memory.name(cells, "race_concept_id"),
            "ethnicity": self.memory.name(cells, "ethnicity_concept_id"),
            "care_site_id": _id(cells, "care_site_id"),
        }
        self.memory.add_person(cells, _sex(cells), _birth(cells))
        return self._record(place, _Moment(person_id(cells), "", ""), "patient", (), fields)

    def _death(self, place: str, cells: Cells) -> Record:
        moment = _Moment(person_id(cells), "", time(cells, "death"))
        if self.memory.person(moment.person).death != moment.time:
            raise RowError("death is at another time than an earlier row has it: keep one")
        has_cause = any(
            text(cells, f"cause_{part}") not in ("", "0")
            for part in ("concept_id", "source_concept_id", "source_value")
        )
        causes = [self._finding(cells, "cause", "condition", moment)] if has_cause else []
        return self._record(place, moment, "death", causes)

    def _visit(self, place: str, cells: Cells) -> Record:
        moment = self._moment(cells, "visit_start")
        if not moment.encounter:
            raise RowError("visit has no visit_occurrence_id, every one needs it: fill it")
        own = text(cells, "visit_source_value")
        is_number = any(character.isdigit() for character in own)  # of the stay, no word for it
        fields = {
            "visit": self.memory.name(cells, "visit_concept_id"),
            "visit_end": time(cells, "visit_end"),
            "admitted_from": self.memory.name(cells, "admitted_from_concept_id"),
            "discharged_to": self.memory.name(cells, "discharged_to_concept_id"),
            "preceding_visit_occurrence_id": _id(cells, "preceding_visit_occurrence_id"),
            "care_site_id": _id(cells, "care_site_id"),
            "visit_source_value": "" if is_number else own,
        }
        mrn = (*self.memory.person(moment.person).identifiers.get("mrn", ()), own)
        names = {"mrn": mrn} if is_number else None
        return self._record(place, moment, "encounter", (), fields, own=names)

    def _condition(self, place: str, cells: Cells) -> Record:
        moment = self._moment(cells, "condition_start")
        fields = {
            "condition_end": time(cells, "condition_end"),
            "condition_status": self.memory.name(cells, "condition_status_concept_id"),
            "condition_source_value": text(cells, "condition_source_value"),
            "stop_reason": text(cells, "stop_reason"),
        }
        found = self._finding(cells, "condition", "condition", moment)
        return self._record(place, moment, "diagnosis", [found], fields)

    def _procedure(self, place: str, cells: Cells) -> Record:
        moment = self._moment(cells, "procedure")
        fields = {
            "procedure_end": time(cells, "procedure_end"),
            "modifier": self.memory.name(cells, "modifier_concept_id"),
            "quantity": number(cells, "quantity"),
            "procedure_source_value": text(cells, "procedure_source_value"),
        }
        found = self._finding(cells, "procedure", "procedure", moment)
        return self._record(place, moment, "procedure", [found], fields)

    def _drug(self, place: str, cells: Cells) -> Record:
        moment = self._moment(cells, "drug_exposure_start")
        fields = {
            "drug_exposure_end": time(cells, "drug_exposure_end"),
            "route": self.memory.name(cells, "route_concept_id"),
            **{column: number(cells, column) for column in ("quantity", "days_supply", "refills")},
            **{
                column: text(cells, column)
                for column in ("sig", "dose_unit_source_value", "drug_source_value", "stop_reason")
            },
        }
        found = self._finding(cells, "drug", "drug", moment)
        return self._record(place, moment, "drug", [found], fields)

    def _note(self, place: str, cells: Cells) -> Record:
        moment = self._moment(cells, "note")
        written = text(cells, "note_text")
        if not written:
            raise RowError("note has no note_text, every one needs it: remove the row")
        fields = {
            "note_title": text(cells, "note_title"),
            "note_class": self.memory.name(cells, "note_class_concept_id"),
            "language": self.memory.name(cells, "language_concept_id"),
        }
        return self._record(place, moment, "note", (), fields, text=written)

    def _measurement(self, cells: Cells) -> tuple[_Moment, Lab | Finding]:
        moment = self._moment(cells, "measurement")
        comparator = _COMPARATORS.get(whole(cells, "operator_concept_id"))
        if comparator is None:
            raise RowError("operator_concept_id is none of <, <=, =, >=, >: mend the row")
        return moment, self._lab(cells, "measurement", moment, comparator)

    def _observation(self, cells: Cells) -> tuple[_Moment, Lab | Finding]:
        moment = self._moment(cells, "observation")
        has_text = text(cells, "value_as_string") or text(cells, "value_source_value")
        has_value = (
            whole(cells, "value_as_concept_id") or number(cells, "value_as_number") is not None
        )
        if has_text or has_value:
            return moment, self._lab(cells, "observation", moment)
        return moment, self._finding(cells, "observation", "other", moment)

    def _finding(self, cells: Cells, stem: str, kind: FindingKind, moment: _Moment) -> Finding:
        code, system, name = self.memory.coded(cells, stem)
        return Finding(code=code, system=system, name=name, kind=kind, time=moment.time)

    def _lab(self, cells: Cells, stem: str, moment: _Moment, comparator: Comparator = "") -> Lab:
        code, system, name = self.memory.coded(cells, stem)
        value = number(cells, "value_as_number")
        written = text(cells, "value_as_string") or text(cells, "value_source_value")
        if value is None:
            written = self.memory.name(cells, "value_as_concept_id") or written
        return Lab(
            code=code,
            system=system,
            name=name,
            value=value,
            comparator=comparator,
            text=written,
            unit=self.memory.unit(cells),
            low=number(cells, "range_low"),
            high=number(cells, "range_high"),
            time=moment.time,
        )


def _id(cells: Cells, column: str) -> str:
    key = whole(cells, column)
    return str(key) if key else ""


def _sex(cells: Cells) -> Sex:
    concept = whole(cells, "gender_concept_id")
    return _SEXES.get(str(concept) if concept else text(cells, "gender_source_value").lower(), "")


def _birth(cells: Cells) -> str:
    """Return the day of birth, as precise as it is known; the hour is not taken."""
    year, month, day = (whole(cells, f"{part}_of_birth") for part in ("year", "month", "day"))
    try:
        if not year:
            return iso(text(cells, "birth_datetime"))[:10]
        return iso(f"{year:04d}{f'-{month}' if month else ''}{f'-{day}' if month and day else ''}")
    except ValueError as error:
        raise RowError(f"year_of_birth or birth_datetime {error}") from None
