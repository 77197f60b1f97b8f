"""Which tables and columns of the OMOP common data model are read.

Columns are those of CDM 5.4 (https://ohdsi.github.io/CommonDataModel/cdm54.html). Not read are
who treated (``provider_id``), how the entry came about (``…_type_concept_id``), links to other
events, parts of a visit, devices, specimens, costs, and what is derived (eras, periods).
"""

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from huizhen.client.records.record import Unreadable
from huizhen.protocol.errors import ConfigError

Rows = Iterator[tuple[str, dict[str, Any]] | Unreadable]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layout:
    """What is read of a table."""

    key: str
    # its rows' own number
    needed: tuple[str, ...]
    # without these columns it is another table; any other that is missing reads as empty
    concepts: tuple[str, ...] = ()
    # hold the number of a concept
    others: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Return all columns, each once."""
        return tuple(dict.fromkeys((self.key, *self.needed, *self.concepts, *self.others)))


def _event(stem: str, concepts: str = "", others: str = "", *, key: str = "") -> Layout:
    """Return the layout of a table whose rows have a person, a concept, and perhaps a visit."""
    concept = f"{stem}_concept_id"
    return Layout(
        key or f"{stem}_id",
        ("person_id", concept),
        (concept, f"{stem}_source_concept_id", *concepts.split()),
        ("visit_occurrence_id", f"{stem}_source_value", *others.split()),
    )


LAYOUTS = {
    "concept": Layout(
        "concept_id", ("concept_id", "concept_name", "vocabulary_id", "concept_code")
    ),
    "location": Layout(
        "location_id", ("location_id",), (), ("address_1", "address_2", "zip")
    ),
    "person": Layout(
        "person_id",
        ("person_id",),
        ("race_concept_id", "ethnicity_concept_id"),
        ("gender_concept_id", "gender_source_value", "year_of_birth", "month_of_birth",
         "day_of_birth", "birth_datetime", "location_id", "care_site_id", "person_source_value"),
    ),
    "death": Layout(
        "person_id",
        ("person_id",),
        ("cause_concept_id", "cause_source_concept_id"),
        ("death_date", "death_datetime", "cause_source_value"),
    ),
    "visit_occurrence": _event(
        "visit",
        "admitted_from_concept_id discharged_to_concept_id",
        "visit_start_date visit_start_datetime visit_end_date visit_end_datetime care_site_id "
        "preceding_visit_occurrence_id",
        key="visit_occurrence_id",
    ),
    "condition_occurrence": _event(
        "condition",
        "condition_status_concept_id",
        "condition_start_date condition_start_datetime condition_end_date condition_end_datetime "
        "stop_reason",
        key="condition_occurrence_id",
    ),
    "procedure_occurrence": _event(
        "procedure",
        "modifier_concept_id",
        "procedure_date procedure_datetime procedure_end_date procedure_end_datetime quantity",
        key="procedure_occurrence_id",
    ),
    "drug_exposure": _event(
        "drug",
        "route_concept_id",
        "drug_exposure_start_date drug_exposure_start_datetime drug_exposure_end_date "
        "drug_exposure_end_datetime stop_reason refills quantity days_supply sig "
        "dose_unit_source_value",
        key="drug_exposure_id",
    ),
    "measurement": _event(
        "measurement",
        "value_as_concept_id unit_concept_id",
        "measurement_date measurement_datetime operator_concept_id value_as_number range_low "
        "range_high unit_source_value value_source_value",
    ),
    "observation": _event(
        "observation",
        "value_as_concept_id unit_concept_id qualifier_concept_id",
        "observation_date observation_datetime value_as_number value_as_string "
        "unit_source_value value_source_value",
    ),
    "note": Layout(
        "note_id",
        ("person_id", "note_text"),
        ("note_class_concept_id", "language_concept_id"),
        ("visit_occurrence_id", "note_date", "note_datetime", "note_title"),
    ),
}  # fmt: skip


def expect_columns(place: str, name: str, there: Collection[str]) -> None:
    """Refuse a table that lacks what makes it one.

    Raises:
        ConfigError: it does.
    """
    missing = [wanted for wanted in LAYOUTS[name].needed if wanted not in there]
    if missing:
        raise ConfigError(
            f"{place}: table has no column {', '.join(missing)}, expected those of OMOP CDM 5.4"
        )


def tell_unread(name: str, tables: Collection[str]) -> None:
    """Log which tables a source has that are not read."""
    unread = sorted(set(tables) - LAYOUTS.keys())
    if unread:
        _log.info("source=%s tables_not_read=%s", name, ",".join(t[:40] for t in unread))
