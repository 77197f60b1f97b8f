"""``data.toml``: what a hospital's export is, and what may be done with it.

One strict file beside the export. ``[[sources]]`` says what is read and what columns mean
(``records/terms.py``), ``[governance]`` on what ground it may be used, ``[quality]`` what becomes
of what is wrong with it (``quality/problems.py``), ``[identifiers]`` how those that name a patient
are replaced, ``[examples]`` what one example is, ``[split]`` who is held out.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import rfc8785

from huizhen.client.quality.problems import Rules
from huizhen.client.records.terms import SourceTerms
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.strict import build, build_sections, check_keys, read_toml

FORMAT = 1
DATA = "data.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTerms:
    """``[data]``: what people call it."""

    name: str
    description: str = ""
    # of the patients and of how they were chosen, for those who read what was trained on them

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("name is empty, expected what people call this data")


@dataclass(frozen=True, slots=True, kw_only=True)
class GovernanceTerms:
    """``[governance]``: on what ground the records may be used."""

    purpose: str
    basis: Literal["consent", "waiver", "public", "made_up"]
    # consent of the patients; a waiver by an ethics committee; published data; invented patients
    ethics: str = ""
    # the committee's reference
    ethics_expires: str = ""
    # the last day on which it holds, such as "2027-12-31"
    minimum_patients: int = 20
    # to train on
    smallest_cell: int = 10
    # of patients or records; what the report counts of fewer is not shown
    excluded: str | None = None
    # a file of patients who have withdrawn, one id a line; relative to data.toml

    def __post_init__(self) -> None:
        if not self.purpose.strip():
            raise ValueError("purpose is empty, expected what the records are used for")
        if self.needs_ethics and not self.ethics.strip():
            raise ValueError(f"ethics is empty, basis {self.basis!r} needs a committee's reference")
        if self.needs_ethics and not self.ethics_expires:
            raise ValueError(f"ethics_expires is empty, basis {self.basis!r} needs its last day")
        if self.ethics_expires:
            self.expires()
        if self.minimum_patients < 2:
            raise ValueError(f"minimum_patients is {self.minimum_patients}, expected 2 or more")
        if self.smallest_cell < 1:
            raise ValueError(f"smallest_cell is {self.smallest_cell}, expected 1 or more")

    @property
    def needs_ethics(self) -> bool:
        """Whether the records are of real patients of this hospital."""
        return self.basis in ("consent", "waiver")

    def expires(self) -> date | None:
        """Return the last day on which the reference holds; None where there is none."""
        if not self.ethics_expires:
            return None
        try:
            return date.fromisoformat(self.ethics_expires)
        except ValueError as error:
            raise ValueError(
                f"ethics_expires is {self.ethics_expires[:80]!r}, expected such as '2027-12-31'"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentifierTerms:
    """``[identifiers]``: how what names a patient is found and replaced."""

    method: Literal["replace", "none"] = "replace"
    # none only for public or made-up records
    style: Literal["surrogate", "tag"] = "surrogate"
    # another name, number or day of the same form; or what it was, such as [电话]
    staff: str | None = None
    # a file with the names of the staff, one a line; relative to data.toml


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleTerms:
    """``[examples]``: what one example is made of."""

    group: Literal["record", "encounter", "patient"] = "record"
    labs: Literal["last", "first", "min", "max", "mean"] = "last"
    # which result of a group a study reads by the lab's name
    kinds: tuple[str, ...] = ()
    # of records that examples are made of; all but those that only say who somebody is when empty


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitTerms:
    """``[split]``: whole patients are held out, to measure on; the same ones next time."""

    held_out: float = 0.2
    # the share of them
    label: str | None = None
    # a field: its classes are looked at one by one in the report

    def __post_init__(self) -> None:
        if not (math.isfinite(self.held_out) and 0 <= self.held_out < 1):
            raise ValueError(f"held_out is {self.held_out}, expected 0 to below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """A whole ``data.toml``."""

    data: DataTerms
    governance: GovernanceTerms
    sources: tuple[SourceTerms, ...]
    quality: Rules = field(default_factory=Rules)
    identifiers: IdentifierTerms = field(default_factory=IdentifierTerms)
    examples: ExampleTerms = field(default_factory=ExampleTerms)
    split: SplitTerms = field(default_factory=SplitTerms)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("has no [[sources]]: add what is to be read")
        if self.identifiers.method == "none" and self.governance.needs_ethics:
            raise ValueError(
                f"[identifiers] method is 'none' with [governance] basis "
                f"{self.governance.basis!r}, expected 'replace': only public or made-up records "
                "go without"
            )

    def digest(self) -> str:
        """Return the SHA-256 of the RFC 8785 JSON of it, defaults filled in, in hex."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        return hashlib.sha256(rfc8785.dumps(values)).hexdigest()


def load_data(path: Path) -> Data:
    """Return what a ``data.toml`` says.

    Raises:
        ConfigError: naming the file, the section, the key and what was expected.
    """
    return parse_data(read_toml(path), path.name)


def parse_data(tables: Mapping[str, Any], where: str) -> Data:
    """Make the terms from parsed TOML tables; ``where`` is the file's name, for errors.

    Raises:
        ConfigError: naming the file, the section, the key and what was expected.
    """
    check_keys(tables, [*_SECTIONS, "sources"], where)
    for name in ("data", "governance", "sources"):
        if name not in tables:
            raise ConfigError(f"{where} has no [{name}]: add the section")
    sources = tables["sources"]
    if not isinstance(sources, list) or not all(isinstance(one, Mapping) for one in sources):
        raise ConfigError(f"{where} sources is no list of tables: write [[sources]]")
    rest = {name: table for name, table in tables.items() if name != "sources"}
    values = build_sections(_SECTIONS, rest, where)
    values["sources"] = tuple(
        build(SourceTerms, table, f"{where} [[sources]] {number}")
        for number, table in enumerate(sources, 1)
    )
    try:
        return Data(**values)
    except ValueError as error:
        raise ConfigError(f"{where} {error}") from error


_SECTIONS: dict[str, type] = {
    "data": DataTerms,
    "governance": GovernanceTerms,
    "quality": Rules,
    "identifiers": IdentifierTerms,
    "examples": ExampleTerms,
    "split": SplitTerms,
}
