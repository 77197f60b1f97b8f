"""De-identification: an admitted record becomes one that names nobody.

The patient and the encounter become keyed hashes, times are moved by the patient's own number of
days, the age ends at 90, and what names anybody in a text, in a field or in the words of a finding
or result is replaced (``client/identifiers``). Numbers stay: a number that is an identifier belongs
under ``[sources.identifiers]`` of data.toml.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from huizhen.client.clean import CleanRecord
from huizhen.client.data_key import DataKey, Pseudonyms
from huizhen.client.data_terms import IdentifierTerms
from huizhen.client.gate import AdmittedRecord
from huizhen.client.identifiers.finding import KINDS
from huizhen.client.identifiers.surrogates import shift_days, shifted_time
from huizhen.client.identifiers.text import Deidentifier, Finder
from huizhen.client.quality.labs import LAB_SYSTEM
from huizhen.client.records.record import Finding, Image, Lab, Sex
from huizhen.client.records.times import moment

MAX_AGE = 90.0
# HIPAA's Safe Harbor, 45 CFR 164.514(b)(2)(i)(C): all above are one
_DAYS_A_YEAR = 365.25


@dataclass(slots=True)
class Person:
    """What all records of a patient together say of them."""

    identifiers: dict[str, set[str]] = field(default_factory=dict)
    birth: str = ""
    sex: Sex = ""
    is_held_out: bool = False
    is_doubtful: bool = False
    # whether the records may be of two people

    def __repr__(self) -> str:
        return "Person(<masked>)"


class RecordDeidentifier:
    """De-identifies the records of one site.

    Attributes:
        counts: kind of identifier -> how many were replaced.
    """

    def __init__(
        self,
        terms: IdentifierTerms,
        key: DataKey,
        people: Mapping[str, Person],
        staff: Iterable[str],
    ) -> None:
        """Prepare.

        Args:
            terms: how to replace.
            key: of the site.
            people: patient -> what is known of them; every patient is there.
            staff: names of people who work at the site.
        """
        self._people, self._pseudonyms = people, Pseudonyms(key)
        self._key = key.derived("surrogates")
        self.counts: Counter[str] = Counter()
        self._text: Deidentifier | None = None
        if terms.method == "replace":
            actions = dict.fromkeys(KINDS, terms.style)
            self._text = Deidentifier(self._key, finder=Finder(staff=staff), actions=actions)

    def clean(self, admitted: AdmittedRecord, *, place: str) -> CleanRecord:
        """Return a record that names nobody.

        Args:
            admitted: the record.
            place: of it, without the name of a file, which may be a patient's.
        """
        record = admitted.record
        person = self._people[record.patient]
        if record.identifiers:  # also those above MAX_IDENTIFIERS of a patient
            known = {kind: set(values) for kind, values in person.identifiers.items()}
            for kind, values in record.identifiers.items():
                known.setdefault(kind, set()).update(values)
            person = replace(person, identifiers=known)
        words = _Words(self, record.patient, person, record.time)
        days = 0 if self._text is None else shift_days(self._key, record.patient)
        return CleanRecord(
            patient=self._pseudonyms.patient(record.patient),
            is_held_out=person.is_held_out,
            place=place,
            kind=record.kind,
            encounter=self._pseudonyms.encounter(record.patient, record.encounter),
            time=_moved(record.time, days),
            text=words.replaced(record.text),
            sex=record.sex or person.sex,
            age=_age(record.age, record.birth or person.birth, record.time),
            findings=tuple(_finding(one, words, days) for one in record.findings),
            labs=tuple(_lab(one, words, days) for one in record.labs),
            images=tuple(self._image(one, record.patient) for one in record.images),
            fields={name: words.value(value) for name, value in record.fields.items()},
        )

    def replaced(self, text: str, patient: str, person: Person, time: str) -> str:
        """Return a text of a patient's record without identifiers."""
        if self._text is None or not text:
            return text
        found = self._text.clean(text, patient, person.identifiers, time=time)
        self.counts.update(found.counts)
        return found.text

    def _image(self, image: Image, patient: str) -> Image:
        """Return an image under another name: a path may hold the patient's."""
        return replace(image, path=self._pseudonyms.encounter(patient, f"image {image.path}"))


class _Words:
    """The texts of one record."""

    def __init__(self, site: RecordDeidentifier, patient: str, person: Person, time: str) -> None:
        self._site, self._patient, self._person, self._time = site, patient, person, time

    def replaced(self, text: str) -> str:
        return self._site.replaced(text, self._patient, self._person, self._time)

    def value(self, value: Any) -> Any:
        """Return a field's value; texts in lists and tables are found too."""
        if isinstance(value, str):
            return self.replaced(value)
        if isinstance(value, Sequence):
            return [self.value(one) for one in value]
        if isinstance(value, Mapping):
            return {self.replaced(name): self.value(one) for name, one in value.items()}
        return value


def _finding(finding: Finding, words: _Words, days: int) -> Finding:
    code = finding.code if finding.system else words.replaced(finding.code)
    name = words.replaced(finding.name)
    return replace(finding, code=code, name=name, time=_moved(finding.time, days))


def _lab(lab: Lab, words: _Words, days: int) -> Lab:
    """Return a result without identifiers; what the table of labs names is not looked at."""
    text = lab.text if lab.value is not None else words.replaced(lab.text)
    time = _moved(lab.time, days)
    if lab.system == LAB_SYSTEM:
        return replace(lab, text=text, time=time)
    code = lab.code if lab.system else words.replaced(lab.code)
    return replace(lab, code=code, name=words.replaced(lab.name), text=text, time=time)


def _moved(time: str, days: int) -> str:
    return shifted_time(time, days) if days and time else time


def _age(age: float | None, birth: str, time: str) -> float | None:
    if age is None and birth and time:
        years = (moment(time) - moment(birth)).days / _DAYS_A_YEAR
        age = round(years, 1) if years >= 0 else None
    return None if age is None else min(age, MAX_AGE)
