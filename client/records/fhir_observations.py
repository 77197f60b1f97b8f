"""What an Observation of FHIR R4 says: one lab for its value and one for each component."""

from dataclasses import dataclass
from typing import Any

from huizhen.client.records.codings import Concept
from huizhen.client.records.fhir_elements import (
    Content,
    JsonObject,
    UnfitError,
    category,
    concept,
    filled,
    notes,
    number,
    objects,
    one,
    quantity,
    reference_range,
    string,
    time,
    words,
)
from huizhen.client.records.record import Comparator, Lab
from huizhen.client.records.results import number_of


@dataclass(frozen=True, slots=True)
class _Value:
    number: float | None = None
    comparator: Comparator = ""
    text: str = ""
    unit: str = ""
    is_given: bool = True


def _value(parent: JsonObject) -> _Value:
    """Return the value of an Observation or a component, Observation.value[x]."""
    key = next((key for key in parent if key.startswith("value")), "")
    value: Any = parent.get(key)
    match key:
        case "":
            return _Value(is_given=False)
        case "valueQuantity":
            amount, sign, unit = quantity(one(parent, key))
            return _Value(amount, sign, "" if amount is None else f"{sign}{amount:.15g}", unit)
        case "valueString":
            return _Value(*number_of(text := string(parent, key)), text)
        case "valueInteger":
            amount = number(parent, key)
            return _Value(amount, "", "" if amount is None else f"{amount:.15g}")
        case "valueCodeableConcept":
            return _Value(text=words(one(parent, key)))
        case "valueBoolean" if isinstance(value, bool):
            return _Value(text="true" if value else "false")
        case "valueDateTime" | "valueTime":
            return _Value(text=string(parent, key))
        case "valueRange" | "valueRatio" | "valuePeriod":
            first, last, between = {
                "valueRange": ("low", "high", "-"),
                "valueRatio": ("numerator", "denominator", ":"),
                "valuePeriod": ("start", "end", "/"),
            }[key]
            value = one(parent, key)
            return _Value(text=between.join(_end(value.get(end)) for end in (first, last)))
        case _:
            shown = key if key in ("valueSampledData", "valueAttachment") else "value[x]"
            raise UnfitError(f"element {shown!r} is not read, expected a number or text: leave it")


def _end(value: Any) -> str:
    if isinstance(value, dict):
        amount, sign, unit = quantity(value)
        return "" if amount is None else f"{sign}{amount:.15g}{unit and ' '}{unit}"
    return value if isinstance(value, str) else ""


def observation(resource: JsonObject) -> Content:
    """Return the labs of an Observation; of a panel that only names its members, none."""
    moment = time(resource, "effectiveDateTime", "effectivePeriod", "effectiveInstant", "issued")
    panel = concept(one(resource, "code"), "loinc")
    components = objects(resource, "component")
    value = _value(resource)
    is_single = value.is_given or "dataAbsentReason" in resource
    if not is_single and not components and not objects(resource, "hasMember"):
        is_single = True  # registered, its result is still to come
    results = [(resource, value)] if is_single else []
    results += [(component, _value(component)) for component in components]
    rows = [_lab(parent, panel, result, moment) for parent, result in results[:1] if is_single]
    for parent, result in results[len(rows) :]:
        code = concept(one(parent, "code"), "loinc")
        rows.append(_lab(parent, code, result, moment))
    columns: dict[str, list[str]] = {
        "statuses": [string(resource, "status")] * len(rows),
        "interpretations": [_interpretation(parent) for parent, _ in results],
        "references": [reference for _, reference in rows],
        "absent_reasons": [words(one(parent, "dataAbsentReason")) for parent, _ in results],
    }
    fields: dict[str, Any] = {key: column for key, column in columns.items() if any(column)}
    if components or not is_single:
        filled(fields, panel=panel.name or panel.code)
    filled(fields, category=category(resource), other_codes=panel.others)
    return Content("labs", fields, moment, notes(resource), labs=tuple(lab for lab, _ in rows))


def _lab(parent: JsonObject, code: Concept, result: _Value, moment: str) -> tuple[Lab, str]:
    """Return a result as a lab, and the text of its reference range where that has no ends."""
    if not (code.code or code.name):
        raise UnfitError("element 'code' says nothing, expected what was measured: mend it")
    low, high, reference = reference_range(parent)
    lab = Lab(
        code=code.code,
        system=code.system,
        name=code.name,
        value=result.number,
        comparator=result.comparator,
        text=result.text,
        unit=result.unit,
        low=low,
        high=high,
        time=moment,
    )
    return lab, reference


def _interpretation(parent: JsonObject) -> str:
    flags = (concept(item) for item in objects(parent, "interpretation"))
    return " ".join(flag.code or flag.name for flag in flags)
