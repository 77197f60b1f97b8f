"""What a study reads of clean records: one example each, or one of an encounter or a patient.

A task names fields (``[task] text = "{text}"``). These are there:

    text, kind       of the record; texts of a group stand under each other in the order of time
    findings         their names, or their codes where they have none; those that are absent are not
    sex, age         age in years at the time of the first record of a group
    KEY              the result of a lab by its key in the table of labs, in the table's unit; the
                     number, or the words where it is none
    LAB (UNIT)       of a lab or unit that the table does not have, as the source writes both
    NAME             any field of ``[sources.fields]``; of a group the last value that is not empty;
                     none of the names above
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from huizhen.client.clean import CleanRecord
from huizhen.client.data_terms import ExampleTerms
from huizhen.client.quality.labs import LAB_SYSTEM
from huizhen.client.records.mapping import is_empty
from huizhen.client.records.record import Finding, Lab

ABOUT_PEOPLE = ("patient", "relative", "coverage")
# kinds of records that say who somebody is, and are no examples


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """One example's fields, before a task chooses among them."""

    patient: str
    is_held_out: bool
    fields: Mapping[str, Any]
    place: str
    # of its first record

    def __repr__(self) -> str:
        return f"StudyRecord(<masked>, {self.place})"


def study_records(records: Iterable[CleanRecord], terms: ExampleTerms) -> list[StudyRecord]:
    """Return the examples of clean records, in the order of their first records.

    Args:
        records: of one site.
        terms: what one example is made of.
    """
    groups: dict[tuple[str, ...], list[CleanRecord]] = {}
    for number, record in enumerate(records):
        if record.kind in terms.kinds or (not terms.kinds and record.kind not in ABOUT_PEOPLE):
            groups.setdefault(_group(record, terms, number), []).append(record)
    return [_example(group, terms) for group in groups.values()]


def _group(record: CleanRecord, terms: ExampleTerms, number: int) -> tuple[str, ...]:
    """Return what records of one example have in common; one without an encounter is alone."""
    if terms.group == "patient":
        return (record.patient,)
    if terms.group == "encounter" and record.encounter:
        return (record.patient, record.encounter)
    return (record.patient, "", str(number))


def _example(group: Sequence[CleanRecord], terms: ExampleTerms) -> StudyRecord:
    ordered = sorted(group, key=lambda record: record.time)  # stable: those without a time first
    first = ordered[0]
    fields: dict[str, Any] = {
        "text": "\n\n".join(record.text for record in ordered if record.text),
        "kind": first.kind,
        "findings": list(dict.fromkeys(_name(one) for record in ordered for one in record.findings
                                       if not one.is_absent)),
        "sex": next((record.sex for record in ordered if record.sex), ""),
        "age": next((record.age for record in ordered if record.age is not None), None),
    }  # fmt: skip
    labs = [(lab.time or record.time, lab) for record in ordered for lab in record.labs]
    own = fields | _labs(labs, terms.labs)
    for record in ordered:
        for name, value in record.fields.items():
            if name not in own and not (is_empty(value) and name in fields):
                fields[name] = value
    fields |= own
    return StudyRecord(
        patient=first.patient, is_held_out=first.is_held_out, fields=fields, place=group[0].place
    )


def _name(finding: Finding) -> str:
    return finding.name or finding.code


def _labs(labs: Sequence[tuple[str, Lab]], which: str) -> dict[str, Any]:
    """Return the result of each lab that a group has; of numbers and words the numbers.

    Args:
        labs: with their times.
        which: as ``[examples] labs``.
    """
    found: dict[str, list[Lab]] = {}
    for _, lab in sorted(labs, key=lambda one: one[0]):
        if lab.system == LAB_SYSTEM:
            found.setdefault(lab.code, []).append(lab)
        else:
            found.setdefault(f"{lab.name or lab.code} ({lab.unit or '?'})", []).append(lab)
    results: dict[str, Any] = {}
    for name, some in found.items():
        numbers = [lab.value for lab in some if lab.value is not None]
        values: list[Any] = numbers or [lab.text for lab in some if lab.text]
        if not values:
            continue
        match which if numbers else "last":
            case "first":
                results[name] = values[0]
            case "min":
                results[name] = min(numbers)
            case "max":
                results[name] = max(numbers)
            case "mean":
                results[name] = fmean(numbers)
            case _:
                results[name] = values[-1]
    return results
