"""``[[sources]]`` of a ``data.toml``: where a hospital's records are, and what its columns mean.

A table (CSV, TSV, JSONL, Excel, Parquet, SQL) says nothing of itself, so every column that is more
than an extra field is named here, in whatever language it has. The other formats say themselves
what is the patient, the date or a result.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huizhen.protocol.errors import ConfigError

Format = Literal[
    "csv", "tsv", "jsonl", "excel", "parquet", "sql",
    "fhir", "hl7v2", "omop", "phenopackets", "cda", "dicom",
]  # fmt: skip
_SUFFIXES: dict[str, Format] = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".xlsx": "excel", ".parquet": "parquet",
    ".ndjson": "fhir", ".hl7": "hl7v2", ".dcm": "dicom", ".ccda": "cda",
}  # fmt: skip
IDENTIFIERS = (
    "name", "pinyin", "id", "phone", "mrn", "insurance", "address", "email", "relative", "employer",
    "wechat", "staff", "other",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingColumn:
    """``findings = [{code = "诊断编码", name = "诊断", system = "icd-10-cn"}]``."""

    code: str | None = None
    # the column with the code
    name: str | None = None
    # the column with the words; one of the two is needed
    system: str = ""
    kind: Literal["condition", "phenotype", "procedure", "drug", "allergy", "other"] = "condition"
    separator: str | None = None
    # where a cell holds several

    def __post_init__(self) -> None:
        if self.code is None and self.name is None:
            raise ValueError("findings has neither code nor name, expected the name of a column")
        if self.separator == "":
            raise ValueError("findings separator is empty, expected such as ';'")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabColumns:
    """``[sources.lab]``: a table with one result a row, and what its columns are."""

    value: str
    code: str | None = None
    name: str | None = None
    system: str = ""
    unit: str | None = None
    low: str | None = None
    high: str | None = None

    def __post_init__(self) -> None:
        if self.code is None and self.name is None:
            raise ValueError("lab has neither code nor name, expected the name of a column")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTerms:
    """``[[sources]]``: files of one kind, or what a database answers to one query."""

    path: str | None = None
    # a file, a folder (OMOP) or a pattern such as "notes/*.csv"; relative to data.toml
    url: str | None = None
    # or a database, as SQLAlchemy names it
    query: str | None = None
    # sql: one SELECT
    password_file: str | None = None
    schema: str | None = None
    # omop in a database: where its tables are
    format: Format | None = None
    # by the file's ending when absent
    encoding: str = "auto"
    # of text; of HL7 and DICOM where the file does not say it itself
    sheet: str | None = None
    # excel: the first one when absent
    patient_root: str | None = None
    # cda: the OID of the numbers that this hospital gives its patients
    kind: str = "record"
    # what a row of a table is: "note", "labs", "diagnosis", …
    patient: str = "patient"
    encounter: str | None = None
    time: str | None = None
    sex: str | None = None
    birth: str | None = None
    death: str | None = None
    age: str | None = None
    # columns of a table; age in years, also 45Y, 3M, 45岁, 8月龄
    text: tuple[str, ...] = ()
    # columns that make one text; more than one are told apart by their names
    fill_down: tuple[str, ...] = ()
    # columns that are filled on a patient's first row only
    identifiers: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    # columns that name the patient or people about them, by kind; they are found in texts
    labs: dict[str, str] = field(default_factory=dict)
    # columns that are results, and the unit of each
    lab: LabColumns | None = None
    findings: tuple[FindingColumn, ...] = ()
    fields: dict[str, str] | None = None
    # what studies may read by a name of its own: name = column; when absent every column that is
    # nothing else, by its own name

    def __post_init__(self) -> None:
        if (self.path is None) == (self.url is None):
            raise ValueError("has both path and url, or neither: give one of them")
        if self.url is not None and self.format not in ("sql", "omop"):
            raise ValueError(f"format is {self.format!r} with a url, expected 'sql' or 'omop'")
        if (self.query is not None) != (self.format == "sql"):
            raise ValueError("has a query without format = 'sql', or the other way round")
        if self.path is not None and (not self.path.strip() or "\0" in self.path):
            raise ValueError(f"path is {self.path!r}, expected the path of a file")
        for kind in self.identifiers:
            if kind not in IDENTIFIERS:
                raise ValueError(f"identifiers has {kind!r}, known are {', '.join(IDENTIFIERS)}")
        taken = [name for name in (self.fields or {}) if name in RESERVED]
        if taken:
            raise ValueError(f"fields has {taken[0]!r}, which every record has: take another name")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that mean something, each once."""
        about = (self.sex, self.birth, self.death, self.age)
        single = (self.patient, self.encounter, self.time, *about)
        names = [name for name in single if name is not None]
        names += [*self.text, *self.fill_down, *self.labs, *(self.fields or {}).values()]
        for given in self.identifiers.values():
            names += [given] if isinstance(given, str) else given
        for finding in self.findings:
            names += [name for name in (finding.code, finding.name) if name is not None]
        if self.lab is not None:
            lab = self.lab
            all_ = (lab.value, lab.code, lab.name, lab.unit, lab.low, lab.high)
            names += [name for name in all_ if name is not None]
        return tuple(dict.fromkeys(names))


RESERVED = ("text", "findings", "sex", "age", "kind")
# what a study reads by these names comes of the record itself


def format_of(terms: SourceTerms, path: Path) -> Format:
    """Return the format of a source's file.

    Raises:
        ConfigError: neither the source nor the file's ending says.
    """
    if terms.format is not None:
        return terms.format
    suffix = path.name.lower().removesuffix(".gz")
    for ending, name in _SUFFIXES.items():
        if suffix.endswith(ending):
            return name
    raise ConfigError(
        f"{path.name!r} ends in none of {', '.join(_SUFFIXES)}: give [[sources]] a format"
    )
