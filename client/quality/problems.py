"""What can be wrong with a record, and what becomes of it.

A problem is one of four things to whoever checks:

    keep        the record stays as it is
    fix         it is changed as ``FIXES`` says; only these codes can be fixed
    quarantine  the record is set apart, for a person to look at
    refuse      the whole check stops

``Rules`` says which, for each code. A check changes only what it says it changed: each change is
one ``Problem`` whose action is ``fix``.
"""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

from huizhen.protocol.errors import GovernanceError

Action = Literal["keep", "fix", "quarantine", "refuse"]


class Code(StrEnum):
    """Every problem that a check may find."""

    UNREADABLE = "unreadable"
    # the entry is no record (records/record.py)

    UNKNOWN_LAB = "unknown_lab"
    # not in the table of labs: it stays as the source has it
    AMBIGUOUS_LAB = "ambiguous_lab"
    # its code says one lab, its name another
    UNKNOWN_UNIT = "unknown_unit"
    # no unit, or none that this lab can be converted from
    MISSING_UNIT = "missing_unit"
    NO_NUMBER = "no_number"
    # neither a number nor a result in words that the table knows
    NUMBER_IN_TEXT = "number_in_text"
    # the number, sign or unit stands in the text
    CONVERTED_UNIT = "converted_unit"
    IMPOSSIBLE_VALUE = "impossible_value"
    # outside what a living person, or the instrument, can give
    IMPLAUSIBLE_VALUE = "implausible_value"
    UNIT_SUSPECT = "unit_suspect"
    # implausible, and plausible in another unit
    REFERENCE_RANGE = "reference_range"
    # its lower end lies above its upper end
    CONTRADICTORY_LABS = "contradictory_labs"
    # one lab, one moment, two values
    REPEATED_LAB = "repeated_lab"
    # one lab, one moment, the same value again

    TWO_SEXES = "two_sexes"
    TWO_BIRTHS = "two_births"
    TWO_DEATHS = "two_deaths"
    BEFORE_BIRTH = "before_birth"
    AFTER_DEATH = "after_death"
    TOO_OLD = "too_old"
    IN_FUTURE = "in_future"
    BAD_TIME = "bad_time"
    # a time that is not in the one form (records/times.py)
    ENCOUNTER_OF_TWO = "encounter_of_two"
    # one encounter, two patients

    MOJIBAKE = "mojibake"
    # read in the wrong encoding, and can be read rightly
    LOST_CHARACTERS = "lost_characters"
    # read in the wrong encoding, and what was there is lost
    CONTROL_CHARACTERS = "control_characters"
    MISSING_TEXT = "missing_text"
    TEMPLATE_TEXT = "template_text"
    # mostly lines that a large share of all records has

    EXACT_DUPLICATE = "exact_duplicate"
    # of an earlier record of the same patient
    NEAR_DUPLICATE = "near_duplicate"
    EXACT_ACROSS_PATIENTS = "exact_across_patients"
    NEAR_ACROSS_PATIENTS = "near_across_patients"


FIXES = MappingProxyType(
    {
        Code.UNREADABLE: "the entry is left out",
        Code.UNKNOWN_LAB: "the result is left out of its record",
        Code.AMBIGUOUS_LAB: "the result is left out of its record",
        Code.UNKNOWN_UNIT: "the result is left out of its record",
        Code.MISSING_UNIT: "the result is left out of its record",
        Code.NO_NUMBER: "the result is left out of its record",
        Code.NUMBER_IN_TEXT: "the number is read from the text",
        Code.CONVERTED_UNIT: "the value is converted to the table's unit",
        Code.IMPOSSIBLE_VALUE: "the result is left out of its record",
        Code.IMPLAUSIBLE_VALUE: "the result is left out of its record",
        Code.UNIT_SUSPECT: "the result is left out of its record",
        Code.REFERENCE_RANGE: "the range is left out, the value stays",
        Code.REPEATED_LAB: "the repetition is left out of its record",
        Code.MOJIBAKE: "the text is read again in the right encoding",
        Code.CONTROL_CHARACTERS: "the characters are left out",
        Code.EXACT_DUPLICATE: "the later record is left out",
        Code.NEAR_DUPLICATE: "the later record is left out",
        Code.EXACT_ACROSS_PATIENTS: "the later record is left out",
        Code.NEAR_ACROSS_PATIENTS: "the later record is left out",
    }
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, where, and what became of it."""

    code: Code
    place: str
    # of the record
    subject: str = ""
    # the name of a lab or field, or the place of an earlier record; never a value
    action: Action = "keep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What becomes of each problem; a field for each code, named as the code."""

    unreadable: Action = "quarantine"

    unknown_lab: Action = "keep"
    ambiguous_lab: Action = "quarantine"
    unknown_unit: Action = "keep"
    missing_unit: Action = "keep"
    no_number: Action = "keep"
    number_in_text: Action = "fix"
    converted_unit: Action = "fix"
    impossible_value: Action = "fix"
    implausible_value: Action = "keep"
    unit_suspect: Action = "keep"
    reference_range: Action = "fix"
    contradictory_labs: Action = "keep"
    repeated_lab: Action = "fix"

    two_sexes: Action = "quarantine"
    two_births: Action = "quarantine"
    two_deaths: Action = "quarantine"
    before_birth: Action = "quarantine"
    after_death: Action = "quarantine"
    too_old: Action = "quarantine"
    in_future: Action = "quarantine"
    bad_time: Action = "quarantine"
    encounter_of_two: Action = "quarantine"

    mojibake: Action = "fix"
    lost_characters: Action = "quarantine"
    control_characters: Action = "fix"
    missing_text: Action = "keep"
    template_text: Action = "keep"

    exact_duplicate: Action = "fix"
    near_duplicate: Action = "keep"
    exact_across_patients: Action = "keep"
    near_across_patients: Action = "keep"

    def __post_init__(self) -> None:
        """Check that only what can be fixed is to be fixed."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) == "fix" and Code(field.name) not in FIXES:
                raise ValueError(
                    f"{field.name} is 'fix', there is no way to mend it: "
                    "choose 'keep', 'quarantine' or 'refuse'"
                )

    def action(self, code: Code) -> Action:
        """Return what becomes of a problem of this code."""
        action: Action = getattr(self, code)
        return action

    def settle(self, code: Code, place: str, subject: str = "") -> Problem:
        """Return the problem with what becomes of it.

        Raises:
            GovernanceError: the rule is to refuse.
        """
        action = self.action(code)
        if action == "refuse":
            about = f" in {subject[:80]!r}" if subject else ""
            raise GovernanceError(
                f"{place}: record has {code}{about}, the rules refuse it: "
                f"mend the export, or change {code} in the rules"
            )
        return Problem(code, place, subject, action)


DEFAULT_RULES = Rules()
