"""Text from a record's fields: ``"{age} years, {observed_labels}"``; lists are joined by commas.

Only plain field names may stand in braces: no attributes, indices, conversions or formats, so that
a study file can say which fields it reads and no more.
"""

import difflib
import string
from collections.abc import Iterable, Mapping
from typing import Any

from huizhen.protocol.errors import ConfigError


def fields_of(template: str, where: str) -> tuple[str, ...]:
    """Return the names of the fields that a template reads.

    Raises:
        ConfigError: the template does not parse, or asks for more than plain fields.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{where} is not a template: {error}") from error
    names = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        plain = name.replace("_", "a").isalnum() and not name.isdecimal()
        if not plain or spec or conversion:
            raise ConfigError(
                f"{where} holds {'{' + name + '}'!r}, expected a plain field in braces"
            )
        names.append(name)
    return tuple(dict.fromkeys(names))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known field that a misspelt one is nearest to, or nothing.

    Only that one is named: the header of a file without one is a patient's record.
    """
    near = difflib.get_close_matches(name, [str(one) for one in known], n=1, cutoff=0.7)
    return f": did you mean {near[0]!r}?" if near else ""


def render(template: str, fields: Mapping[str, Any]) -> str:
    """Return the text of one record; absent values are empty.

    It is empty where every field is: the words of the template say nothing of a record.

    Raises:
        KeyError: the record has no such field.
    """
    values = {name: _text(fields[name]) for name in fields_of(template, "template")}
    if values and not any(value.strip() for value in values.values()):
        return ""
    return template.format_map(values).strip()


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(text for item in value if (text := _text(item)).strip())
    return str(value)
