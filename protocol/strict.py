"""Turn parsed TOML into frozen dataclasses, refusing what is not declared.

An unknown key is an error that names the file, the section, the key and the nearest declared key:
a misspelt privacy setting must never fall back to a default in silence.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from huizhen.protocol.errors import ConfigError

T = TypeVar("T")

MAX_WHOLE = 2**53 - 1  # the largest that RFC 8785 writes, so every study has a digest


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file; a byte order mark is dropped.

    Raises:
        ConfigError: the file is missing, is not UTF-8 or is not TOML; the message names the line.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r} is not UTF-8, TOML must be: save it as UTF-8") from error
    except (ValueError, RecursionError) as error:  # also digits and nesting without end
        raise ConfigError(
            f"{str(path)!r} is not TOML: {str(error)[:1].lower()}{str(error)[1:]}"
        ) from error


def build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Make the dataclass ``cls`` from a table.

    Args:
        cls: a dataclass whose fields are scalars, literals, tuples, mappings, unions or
            dataclasses.
        table: the parsed table.
        where: what to call the table in errors, such as ``study.toml [rounds]``.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    check_keys(table, fields, where)
    values = {key: _convert(hints[key], value, f"{where} {key}") for key, value in table.items()}
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING
        if name not in values and no_default and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where} has no {name!r}: add it")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{where} {error}") from error


def build_sections(
    sections: Mapping[str, type], tables: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return what the tables of a settings file make, by name; one that is absent is left out.

    Raises:
        ConfigError: naming the file, the section, the key and what was expected.
    """
    check_keys(tables, sections, where)
    found: dict[str, Any] = {}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where} [{name}] is {table!r}, expected a table")
        found[name] = build(sections[name], table, f"{where} [{name}]")
    return found


def check_keys(table: Mapping[str, Any], known: typing.Iterable[str], where: str) -> None:
    """Refuse keys that are not ``known``.

    Raises:
        ConfigError: naming the first unknown key and the nearest known one.
    """
    known = list(known)
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"{where} has an unknown key {key!r}: {hint}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Return ``value`` as the type ``hint``; TOML has no tuples and writes 1 for 1.0."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} is {value!r}, expected one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple and args[-1] is Ellipsis:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {value!r}, expected a list")
        return tuple(_convert(args[0], item, where) for item in value)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}, expected a table")
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}, expected a table")
        return build(typing.cast(type[Any], hint), value, where)
    if type(value) is int and hint in (int, float) and abs(value) > MAX_WHOLE:
        raise ConfigError(f"{where} is over 2^53 in size, expected a smaller number")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where} is {value!r}, expected {_NAMES.get(hint, str(hint))}")
    return value


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    choices = [arg for arg in args if arg is not type(None)]
    problem: ConfigError | None = None
    for choice in choices:
        try:
            return _convert(choice, value, where)
        except ConfigError as error:
            problem = problem or error
            if isinstance(value, Mapping) and dataclasses.is_dataclass(choice):
                problem = error  # a table was meant as this dataclass: its own complaint helps most
    if problem is not None and (len(choices) == 1 or isinstance(value, Mapping)):
        raise problem
    expected = " or ".join(_describe(choice) for choice in choices)
    raise ConfigError(f"{where} is {value!r}, expected {expected}")


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return _NAMES.get(hint, "a table" if dataclasses.is_dataclass(hint) else str(hint))


_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
