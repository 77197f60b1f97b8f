"""What one phenopacket says, as a record.

https://phenopacket-schema.readthedocs.io: Phenopacket, with the names of version 2 and those that
version 1 had (negated, ageOfOnset, classOfOnset, ageAtCollection).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from huizhen.client.records.codings import sex_of, system_name
from huizhen.client.records.naming import Naming
from huizhen.client.records.phenopacket_elements import (
    age_of,
    flag_of,
    list_of,
    number_in,
    object_of,
    objects_of,
    text_of,
    value_of,
)
from huizhen.client.records.record import Finding, FindingKind, Lab, Record, patient_of
from huizhen.client.records.times import iso

_WHOLE: Final = frozenset({"HP", "MONDO"})
# whose codes are written with the prefix: "HP:0001250"
_GENOMIC: Final = ("genes", "variants")
_OTHER: Final = ("biosamples", "files", "htsFiles", "pedigree")
_UNSOLVED: Final = "UNSOLVED"


class Packet:
    """A phenopacket on its way to a record."""

    def __init__(self, packet: Mapping[str, Any], place: str) -> None:
        """Keep it; nothing is read yet."""
        self._packet = packet
        self._place = place
        self._findings: list[Finding] = []
        self._labs: list[Lab] = []
        self._notes: list[str] = []
        self._onset_years: dict[str, float] = {}
        self._onset_classes: dict[str, str] = {}
        self._genomic = 0
        self._unread_times = 0
        self._not_read: Counter[str] = Counter()

    def record(self) -> Record:
        """Return the record.

        Raises:
            GovernanceError: the phenopacket's subject has no id.
        """
        subject = object_of(self._packet, "subject")
        patient = patient_of(subject.get("id"), "subject.id", self._place)
        self._read()
        encountered = object_of(subject, "timeAtLastEncounter")
        vital = object_of(subject, "vitalStatus")
        time, birth = self._time(encountered), self._iso(value_of(subject, "dateOfBirth"))
        death = self._time(object_of(vital, "timeOfDeath"))
        naming = Naming()
        naming.add("id", patient, text_of(self._packet.get("id")))
        naming.add("id", *(text_of(each) for each in list_of(subject, "alternateIds")))
        return Record(
            patient=patient,
            fields=self._fields(encountered or object_of(subject, "ageAtCollection")),
            place=self._place,
            kind="diagnosis",
            text="\n".join(self._notes),
            findings=tuple(self._findings),
            labs=tuple(self._labs),
            sex=sex_of(text_of(subject.get("sex")).removesuffix("_SEX")),
            identifiers=naming.done(),
            time=time,
            birth=birth,
            death=death,
        )

    def _fields(self, age: Mapping[str, Any]) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "schema": text_of(
                value_of(object_of(self._packet, "metaData"), "phenopacketSchemaVersion")
            ),
            "genomic_interpretations": self._genomic,
        }
        written, years = age_of(age)
        if written:
            fields |= {"age": written, "age_years": years}
        counted = {
            "onset_years": self._onset_years,
            "onset_classes": self._onset_classes,
            "not_read": dict(self._not_read),
            "times_not_read": self._unread_times,
        }
        return fields | {name: value for name, value in counted.items() if value}

    def _read(self) -> None:
        self._each("phenotypicFeatures", self._feature)
        self._each("diseases", self._disease)
        self._interpretations()
        self._each("measurements", self._measure)
        self._each("medicalActions", self._act)
        self._genomic += sum(len(list_of(self._packet, part)) for part in _GENOMIC)
        for part in _OTHER:
            if found := value_of(self._packet, part):
                self._not_read[part] = len(found) if isinstance(found, list) else 1

    def _each(self, part: str, read: Callable[[Mapping[str, Any]], None]) -> None:
        """Read each of a part; count those that say nothing."""
        if value_of(self._packet, part) and not list_of(self._packet, part):
            self._not_read[part] += 1
        for each in list_of(self._packet, part):
            before = len(self._findings) + len(self._labs)
            if isinstance(each, dict):
                read(each)
            if len(self._findings) + len(self._labs) == before:
                self._not_read[part] += 1

    def _feature(self, feature: Mapping[str, Any]) -> None:
        finding = self._find(
            object_of(feature, "type"),
            "phenotype",
            onset=_onset(feature),
            is_absent=flag_of(feature, "excluded") or flag_of(feature, "negated"),
        )
        if finding and (note := text_of(feature.get("description"))):
            self._notes.append(f"{finding.name or finding.code}: {note}")

    def _disease(self, disease: Mapping[str, Any]) -> None:
        self._find(
            object_of(disease, "term"),
            "condition",
            onset=_onset(disease),
            is_absent=flag_of(disease, "excluded"),
        )

    def _interpretations(self) -> None:
        """Read the diseases that interpretations name, unless they are among the others."""
        known = {(each.code, each.system) for each in self._findings if each.kind == "condition"}
        for interpretation in objects_of(self._packet, "interpretations"):
            diagnosis = object_of(interpretation, "diagnosis")
            self._genomic += len(list_of(diagnosis, "genomicInterpretations"))
            disease = object_of(diagnosis, "disease")
            is_unsolved = value_of(interpretation, "progressStatus") == _UNSOLVED
            if not is_unsolved and _code(disease) not in known:
                self._find(disease, "condition")
                known.add(_code(disease))

    def _measure(self, measurement: Mapping[str, Any]) -> None:
        code, system = _code(assay := object_of(measurement, "assay"))
        name, time = text_of(assay.get("label")), self._time(object_of(measurement, "timeObserved"))
        value = object_of(measurement, "value")
        several = objects_of(object_of(measurement, "complexValue"), "typedQuantities")
        if not (code or name):
            return
        if term := object_of(value, "ontologyClass"):
            text = text_of(term.get("label")) or text_of(term.get("id"))
            self._labs.append(Lab(code=code, system=system, name=name, text=text, time=time))
        if quantity := object_of(value, "quantity"):
            self._labs.append(_lab((code, system), name, quantity, time))
        for typed in several:
            if quantity := object_of(typed, "quantity"):
                part = object_of(typed, "type")
                self._labs.append(_lab(_code(part), text_of(part.get("label")), quantity, time))

    def _act(self, action: Mapping[str, Any]) -> None:
        if procedure := object_of(action, "procedure"):
            onset = object_of(procedure, "performed")
            self._find(object_of(procedure, "code"), "procedure", onset=onset)
        if treatment := object_of(action, "treatment"):
            starts = [
                object_of(each, "interval") for each in objects_of(treatment, "doseIntervals")
            ]
            onset = {"interval": starts[0]} if starts else {}
            self._find(object_of(treatment, "agent"), "drug", onset=onset)
        if radiation := object_of(action, "radiationTherapy"):
            self._find(object_of(radiation, "modality"), "procedure")
        if regimen := object_of(action, "therapeuticRegimen"):
            term = object_of(regimen, "ontologyClass") or object_of(regimen, "externalReference")
            self._find(term, "other", onset=object_of(regimen, "startTime"))

    def _find(
        self,
        term: Mapping[str, Any],
        kind: FindingKind,
        *,
        onset: Mapping[str, Any] | None = None,
        is_absent: bool = False,
    ) -> Finding | None:
        code, system = _code(term)
        name = text_of(term.get("label")) or text_of(term.get("description"))
        if not (code or name):
            return None
        finding = Finding(
            code=code,
            system=system,
            name=name,
            kind=kind,
            time=self._time(onset or {}),
            is_absent=is_absent,
        )
        self._findings.append(finding)
        _, years = age_of(onset or {})
        if years is not None:
            self._onset_years[code or name] = years
        if named := text_of(object_of(onset or {}, "ontologyClass").get("id")):
            self._onset_classes[code or name] = named
        return finding

    def _time(self, element: Mapping[str, Any]) -> str:
        """Return the time of a time element, of an interval its beginning; ages are none."""
        interval = object_of(element, "interval") or element
        return self._iso(element.get("timestamp")) or self._iso(interval.get("start"))

    def _iso(self, value: Any) -> str:
        try:
            return iso(text_of(value))
        except ValueError:
            self._unread_times += 1
            return ""


def _lab(coded: tuple[str, str], name: str, quantity: Mapping[str, Any], time: str) -> Lab:
    unit, limits = object_of(quantity, "unit"), object_of(quantity, "referenceRange")
    value = number_in(quantity.get("value"))
    return Lab(
        code=coded[0],
        system=coded[1],
        name=name,
        value=value,
        text="" if value is None else f"{value:g}",
        unit=_unit(unit),
        low=number_in(limits.get("low")),
        high=number_in(limits.get("high")),
        time=time,
    )


def _unit(unit: Mapping[str, Any]) -> str:
    """Return a unit: UCUM's code where it is one, otherwise its name."""
    prefix, _, code = text_of(unit.get("id")).partition(":")
    return code if prefix.upper() == "UCUM" else text_of(unit.get("label")) or code


def _code(term: Mapping[str, Any]) -> tuple[str, str]:
    """Return the code and the system of an ontology class, whose id is a CURIE."""
    given = text_of(term.get("id"))
    prefix, colon, local = given.partition(":")
    if not colon:
        return given, ""
    known = system_name(prefix)
    system = known if known != prefix else prefix.lower()
    return (given if prefix.upper() in _WHOLE else local), system


def _onset(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an onset as version 2 has it, also of version 1, which has a field for each form."""
    onset = object_of(holder, "onset")
    if term := object_of(holder, "classOfOnset"):
        return {"ontologyClass": term}
    return onset or object_of(holder, "ageOfOnset") or object_of(holder, "ageRangeOfOnset")
