"""From mappings to validated settings.

Every section belongs to a frozen dataclass. Unknown keys are refused by name with the
nearest known key; errors about values of a wrong type say what to write.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A config cannot be used; the message says what to write instead.

    Args:
        *problems: The problems, one sentence each.
        advice: Advice on all of them.
    """

    def __init__(self, *problems: str, advice: str = "") -> None:
        self.problems = problems
        lines = [*problems, advice] if advice else [*problems]
        if len(problems) > 1:
            lines[: len(problems)] = [f"- {problem}" for problem in problems]
            lines.insert(0, "The config cannot be used:")
        super().__init__("\n".join(lines))


class Foreign(str):
    """A problem with a setting that threestudio knows and this workspace does not."""


def part(table: Mapping[str, type]) -> dict[str, Any]:
    """Metadata of a field whose class is looked up by the setting `<name>_type`.

    Args:
        table: Settings classes by name, or classes with such a class as `Config`.
    """
    return {"table": table}


def named(table: Mapping[str, type]) -> dict[str, Any]:
    """Metadata of a field whose section holds a `name` and the arguments of its class.

    Args:
        table: Classes by name; one that is no dataclass takes no arguments.
    """
    return {"names": table}


def section_name(entry: dataclasses.Field[Any], value: Any) -> str:
    """The name of a value in the table of a `named` field."""
    table: Mapping[str, type] = entry.metadata["names"]
    return next(name for name, kind in table.items() if type(value) is kind)


def to_section(value: Any) -> Any:
    """The mapping that `read` turns into these settings."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    section: dict[str, Any] = {}
    for entry in dataclasses.fields(value):
        if entry.metadata.get("internal"):
            continue
        own = getattr(value, entry.name)
        section[entry.name] = to_section(own)
        if "names" in entry.metadata:
            name = {"name": section_name(entry, own)}
            section[entry.name] = {**name, **(section[entry.name] or {})}
    return section


def attempt(problems: list[str], make: Callable[[], Any]) -> Any:
    """The result of a function; the problems of a `ConfigError` are collected."""
    try:
        return make()
    except ConfigError as error:
        problems += error.problems


def settings_class(kind: type) -> type:
    """The settings class of an entry of a table."""
    return kind if dataclasses.is_dataclass(kind) else typing.cast(Any, kind).Config


def read(kind: type[T], section: Any, where: str) -> T:
    """Read a section into a settings object.

    Args:
        kind: A dataclass.
        section: A mapping.
        where: The section's dotted name, for messages.

    Raises:
        ConfigError: A key is unknown or missing, or a value cannot be used; the message
            lists all of them.
    """
    fields: dict[str, dataclasses.Field[Any]] = {
        f.name: f
        for f in dataclasses.fields(typing.cast(Any, kind))
        if not f.metadata.get("internal")
    }
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"`{where}` is {section!r}: write a section of `key: value`, or set one of "
            f"its keys, as `{where}.{next(iter(fields))}=…`."
        )
    problems = [
        _unknown(_dotted(where, str(key)), str(key), fields)
        for key in section
        if key not in fields
    ]
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, entry in fields.items():
        path = _dotted(where, name)
        if "table" in entry.metadata:
            make = functools.partial(_read_part, entry, fields, section, where)
        elif "names" in entry.metadata:
            make = functools.partial(_read_named, entry, section.get(name, {}), path)
        elif name in section:
            make = functools.partial(_convert, section[name], hints[name], path)
        elif _is_required(entry):
            problems.append(missing_sentence(path))
            continue
        else:
            continue
        values[name] = attempt(problems, make)
    if problems:
        raise ConfigError(*problems)
    try:
        return kind(**values)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        prefix = f"In `{where}`: " if where else ""
        raise ConfigError(f"{prefix}{error}") from error


def _read_part(
    entry: dataclasses.Field[Any],
    fields: Mapping[str, dataclasses.Field[Any]],
    section: Mapping[str, Any],
    where: str,
) -> Any:
    """Read a section whose class depends on its type."""
    key = f"{entry.name}_type"
    name = str(section.get(key, fields[key].default))
    kind = choose(entry.metadata["table"], name, _dotted(where, key))
    own = section.get(entry.name, {})
    return read(settings_class(kind), own, _dotted(where, entry.name))


def _read_named(entry: dataclasses.Field[Any], section: Any, where: str) -> Any:
    """Read a section whose class depends on its name; a string is just the name."""
    if section is None or isinstance(section, str):
        section = {"name": section or "none"}
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"`{where}` is {section!r}: write its name, as `{where}.name=…`."
        )
    table: Mapping[str, type] = entry.metadata["names"]
    arguments = dict(section)
    name = str(arguments.pop("name", section_name(entry, entry.default)))
    kind = choose(table, name, _dotted(where, "name"))
    known = _arguments(kind)
    if type(entry.default) is kind and known:
        arguments = {**vars(entry.default), **arguments}
    for key in arguments.keys() - known:
        others = [n for n, other in table.items() if key in _arguments(other)]
        if others:
            raise ConfigError(
                f"`{where}.{key}` has no effect on `{name}`: write "
                f"`{where}.name={others[0]}`, or leave it out."
            )
        raise ConfigError(_unknown(_dotted(where, key), key, known))
    return read(kind, arguments, where) if known else kind()


def _arguments(kind: type) -> dict[str, Any]:
    """The fields of a dataclass by name; empty for other classes."""
    if not dataclasses.is_dataclass(kind):
        return {}
    return {entry.name: entry for entry in dataclasses.fields(kind)}


def _is_required(entry: dataclasses.Field[Any]) -> bool:
    return (
        entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
    )


def choose(table: Mapping[str, T], name: str, where: str) -> T:
    """An entry of a table of classes.

    Raises:
        ConfigError: There is no entry of that name.
    """
    if name not in table:
        known = ", ".join(f"`{n}`" for n in table)
        raise ConfigError(Foreign(f"`{where}` is `{name}`: write one of {known}."))
    return table[name]


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Convert a value to the type of a field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for option in arguments:
            if option is not type(None):
                try:
                    return _convert(value, option, where)
                except ConfigError:
                    continue
        raise _wrong(where, value, hint)
    if dataclasses.is_dataclass(hint):
        return read(typing.cast(type[Any], hint), value, where)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise _wrong(where, value, hint)
        if len(value) != len(arguments):
            raise _wrong(where, value, hint)
        return tuple(
            _convert(v, a, where) for v, a in zip(value, arguments, strict=True)
        )
    if origin is list:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise _wrong(where, value, hint)
        return [_convert(v, arguments[0], where) for v in value]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"`{where}` is {value!r}: write a section of `key: value`."
            )
        return dict(value)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise _wrong(where, value, hint)
    if hint is float and isinstance(value, int | float) and type(value) is not bool:
        if not math.isfinite(value):
            raise ConfigError(f"`{where}` is `{value}`: write a finite number.")
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, hint) and not (hint is not bool and isinstance(value, bool)):
        return value
    raise _wrong(where, value, hint)


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
}


def _wrong(where: str, value: Any, hint: Any) -> ConfigError:
    found = "empty" if value is None else f"`{value}`"
    return ConfigError(f"`{where}` is {found}: write {describe_type(hint)}.")


def describe_type(hint: Any) -> str:
    """The values of a type, in words."""
    if hint is Any:
        return "a number or a schedule"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(
            "null" if a is type(None) else describe_type(a) for a in arguments
        )
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin is dict:
        return "a section"
    if origin is tuple:
        return f"[{', '.join(describe_type(a) for a in arguments)}]"
    if origin is list:
        return f"[{describe_type(arguments[0])}, …]"
    return _NAMES.get(hint, str(hint))


def _unknown(where: str, key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return f"There is no setting `{where}`.{hint} Known here: {', '.join(known)}."


def missing_sentence(where: str) -> str:
    """What to write for a setting without a value."""
    if where.endswith("prompt_processor.prompt"):
        return (
            "The prompt is missing: say what to make, for example "
            '`system.prompt_processor.prompt="a red mushroom"`.'
        )
    return f"`{where}` is missing: write `{where}=…`, or a line of it in the config."


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
