"""Every setting with its type, default and meaning, read from the settings classes."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from systems.settings.reader import (
    ConfigError,
    describe_type,
    section_name,
    settings_class,
)

WIDTH = 88


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting.

    Attributes:
        name: Dotted name.
        kind: Type of value, in words.
        default: Default as written in a config; "required" if there is none.
        meaning: Description in a sentence or two.
        owner: Types of part that have the setting, such as
            `geometry_type=voxel-grid`; "" for all.
    """

    name: str
    kind: str
    default: str
    meaning: str
    owner: str = ""

    def __str__(self) -> str:
        head = f"{self.name}: {self.kind} [{self.default}]"
        lines = textwrap.wrap(
            self.meaning, WIDTH, initial_indent="    ", subsequent_indent="    "
        )
        return "\n".join([head, *lines])


def settings(kind: type, where: str, owner: str = "") -> Iterator[Setting]:
    """The settings of a settings class, followed by those of its sections.

    Args:
        kind: A dataclass whose docstring describes its fields under `Args:`.
        where: Dotted name of the section.
        owner: Type of part that the settings belong to.
    """
    meanings = _meanings(kind)
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(typing.cast(Any, kind)):
        if entry.metadata.get("internal"):
            continue
        name = f"{where}.{entry.name}" if where else entry.name
        hint: Any = hints[entry.name]
        if "table" in entry.metadata:
            for part, words in _by_class(entry.metadata["table"]).items():
                chosen = f"{name}_type={' or '.join(words)}"
                whose = f"{owner}, {chosen}" if owner else chosen
                yield from settings(part, name, whose)
        elif "names" in entry.metadata:
            table = entry.metadata["names"]
            chosen = section_name(entry, entry.default)
            meaning = meanings.get(entry.name, "")
            words = " or ".join(table)
            yield Setting(f"{name}.name", words, chosen, meaning, owner)
            for word, part in table.items():
                whose = ", ".join(filter(None, (owner, f"{name}.name={word}")))
                if dataclasses.is_dataclass(part):
                    yield from settings(typing.cast(type, part), name, whose)
        elif dataclasses.is_dataclass(hint):
            yield from settings(typing.cast(type, hint), name, owner)
        else:
            meaning = meanings.get(entry.name, "")
            yield Setting(name, describe_type(hint), _default(entry), meaning, owner)


def text(found: list[Setting], section: str) -> str:
    """The settings of a section, for the terminal.

    Raises:
        ConfigError: There is no such section.
    """
    chosen = [
        s for s in found if f"{s.name}.".startswith(f"{section}." * bool(section))
    ]
    if not chosen:
        names = {s.name for s in found}
        names |= {name.rpartition(".")[0] for name in names}
        near = difflib.get_close_matches(section, names, n=3, cutoff=0.4)
        hint = f" Did you mean {', '.join(f'`{name}`' for name in near)}?"
        raise ConfigError(f"There is no section `{section}`.{hint * bool(near)}")
    lines: list[str] = []
    owner = ""
    for setting in chosen:
        if setting.owner != owner:
            owner = setting.owner
            lines.append(f"\nWith {owner}:" if owner else "")
        lines.append(str(setting))
    return "\n".join(lines)


def _by_class(table: Mapping[str, type]) -> dict[type, list[str]]:
    """The names in a table that share one settings class."""
    found: dict[type, list[str]] = {}
    for word, part in table.items():
        found.setdefault(settings_class(part), []).append(word)
    return found


def _meanings(kind: type) -> dict[str, str]:
    """Descriptions of the fields of a class and its bases, from `Args:`."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        lines = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")[2]
        block = re.split(r"\n\n|\n(?=\S)", lines)[0]
        for name, meaning in re.findall(
            r"^    (\w+): (.*(?:\n {6,}.*)*)", block, re.MULTILINE
        ):
            found[name] = " ".join(meaning.split())
    return found


def _default(entry: dataclasses.Field[Any]) -> str:
    if entry.default is not dataclasses.MISSING:
        value = entry.default
    elif entry.default_factory is not dataclasses.MISSING:
        value = entry.default_factory()
    else:
        return "required"
    if isinstance(value, tuple):
        value = list(value)
    if value == "":
        return '""'
    try:
        written = yaml.safe_dump(value, default_flow_style=True, width=1000)
    except yaml.YAMLError:  # a function, for example
        return getattr(value, "__name__", str(value))
    return written.removesuffix("\n").removesuffix("\n...")
