"""What names a patient, gathered under the kinds that ``Record.identifiers`` has."""

from collections.abc import Iterable, Mapping
from typing import Final

# HL7 table 0203, which FHIR and HL7 v2 share; what is not here is a number of the hospital's
_PERSONAL: Final = frozenset(("SS", "SB", "NI", "PPN", "DL", "CZ", "TAX", "PRC", "BC", "MIL", "DP"))
_INSURED: Final = frozenset(("MC", "MA", "MB", "HC", "SN", "NIIP", "JHN", "NH", "WC", "MCD", "MCR"))


def identifier_kind(type_code: str) -> str:
    """Return the kind of a patient's number: "id", "insurance" or else "mrn".

    Args:
        type_code: of HL7 table 0203, such as "MR", "SS" or "NNCHN"; may be empty.
    """
    code = type_code.strip().upper()
    if code in _PERSONAL or (len(code) == 5 and code.startswith("NN")):
        return "id"
    return "insurance" if code in _INSURED else "mrn"


def name_forms(family: str, given: Iterable[str], whole: str = "") -> list[str]:
    """Return the forms in which a person's name may stand in a text, the longest first.

    A part of one character is no form: it stands everywhere. Chinese names are written without
    a space, family name first.
    """
    family, parts = family.strip(), [part.strip() for part in given if part.strip()]
    every = [part for part in (family, *parts) if part]
    if any(ord(letter) >= 0x3400 for part in every for letter in part):
        forms = ["".join(every), " ".join(every), "".join(parts), family]
    else:
        forms = [" ".join((*parts, family)), " ".join(every)]
        forms += [f"{parts[0]} {family}", f"{family} {parts[0]}"] if parts and family else []
        forms += every
    return [form for form in dict.fromkeys((whole.strip(), *forms)) if len(form.strip()) > 1]


class Naming:
    """Gathers what names a patient; each thing once, in the order it came."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._kinds: dict[str, dict[str, None]] = {}

    def add(self, kind: str, *values: str) -> None:
        """Keep values of a kind, but not the empty ones."""
        for value in values:
            if value := value.strip():
                self._kinds.setdefault(kind, {})[value] = None

    def done(self) -> Mapping[str, tuple[str, ...]]:
        """Return what was gathered."""
        return {kind: tuple(values) for kind, values in self._kinds.items()}

    def __repr__(self) -> str:
        return "Naming(<masked>)"
