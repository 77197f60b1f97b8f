"""A record after de-identification: what may be kept in a snapshot and read by a task.

``deidentify`` alone makes one. It knows no patient of the hospital: the patient and the encounter
are keyed hashes, times are moved, texts and names are replaced.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import polars as pl

from huizhen.client.records.record import Finding, Image, Lab, Sex

LAB_FIELDS = (
    "code", "system", "name", "value", "comparator", "text", "unit", "low", "high", "time",
)  # fmt: skip
_FINDING = {
    "code": pl.String, "system": pl.String, "name": pl.String, "kind": pl.String,
    "time": pl.String, "is_absent": pl.Boolean,
}  # fmt: skip
_LAB = {name: pl.Float64 if name in ("value", "low", "high") else pl.String for name in LAB_FIELDS}
_IMAGE = {"path": pl.String, "modality": pl.String, "frames": pl.Int64}
SCHEMA: Mapping[str, Any] = {
    "patient": pl.String, "is_held_out": pl.Boolean, "place": pl.String, "kind": pl.String,
    "encounter": pl.String, "time": pl.String, "text": pl.String, "sex": pl.String,
    "age": pl.Float64, "findings": pl.List(pl.Struct(_FINDING)), "labs": pl.List(pl.Struct(_LAB)),
    "images": pl.List(pl.Struct(_IMAGE)), "fields": pl.String,
}  # fmt: skip
# the columns of a snapshot; ``fields`` is one JSON object


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanRecord:
    """A record after de-identification; it shows nothing but its place all the same."""

    patient: str
    # a keyed hash, 32 hex digits
    is_held_out: bool
    place: str
    kind: str = ""
    encounter: str = ""
    # a keyed hash, or empty
    time: str = ""
    # moved by the patient's own number of days
    text: str = ""
    sex: Sex = ""
    age: float | None = None
    # in years at the time of the record; 90 for all above
    findings: tuple[Finding, ...] = ()
    labs: tuple[Lab, ...] = ()
    images: tuple[Image, ...] = ()
    fields: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"CleanRecord(<masked>, {self.place})"

    def canonical(self) -> bytes:
        """Return the one JSON of this record, one line: what a snapshot's digest is made of."""
        return orjson.dumps(self.row(), option=orjson.OPT_SORT_KEYS) + b"\n"

    def row(self) -> dict[str, Any]:
        """Return the record as a row of ``SCHEMA``."""
        fields = orjson.dumps(dict(self.fields), option=orjson.OPT_SORT_KEYS).decode()
        return {
            "patient": self.patient,
            "is_held_out": self.is_held_out,
            "place": self.place,
            "kind": self.kind,
            "encounter": self.encounter,
            "time": self.time,
            "text": self.text,
            "sex": self.sex,
            "age": self.age,
            "findings": [{name: getattr(one, name) for name in _FINDING} for one in self.findings],
            "labs": [{name: getattr(one, name) for name in _LAB} for one in self.labs],
            "images": [{name: getattr(one, name) for name in _IMAGE} for one in self.images],
            "fields": fields,
        }


def from_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[CleanRecord]:
    """Yield the records of rows of ``SCHEMA``."""
    for row in rows:
        yield CleanRecord(
            **{
                **row,
                "findings": tuple(Finding(**one) for one in row["findings"]),
                "labs": tuple(Lab(**one) for one in row["labs"]),
                "images": tuple(Image(**one) for one in row["images"]),
                "fields": orjson.loads(row["fields"]),
            }
        )
