"""YAML files and overrides of the command line, as OmegaConf configs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from systems.settings.reader import ConfigError, missing_sentence

LARGEST = 2**20
"""Bytes, and values once aliases are expanded, of a file that is read."""
_NESTS = (yaml.SequenceNode, yaml.MappingNode)


def open_yaml(path: str | Path) -> DictConfig:
    """A YAML file, interpolations not yet resolved.

    Raises:
        ConfigError: The file does not exist, or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        places = dict.fromkeys((path.parent, Path("configs")))
        files = [file for place in places for file in sorted(place.glob("[!.]*.yaml"))]
        near = {file.stem: str(file) for file in reversed(files)}
        names = difflib.get_close_matches(path.stem, near, n=3, cutoff=0.5)
        hint = [near[name] for name in names] or list(near.values())[::-1][:8]
        raise ConfigError(
            f"There is no config `{path}`."
            + (
                f" Did you mean {', '.join(f'`{name}`' for name in hint)}?"
                if hint
                else ""
            )
        )
    try:
        _check_size(path)
        base = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"`{path}` is no YAML that can be read: {error}") from error
    if not isinstance(base, DictConfig):
        raise ConfigError(
            f"`{path}` must hold `key: value` lines, as configs/*.yaml do."
        )
    return base


def _check_size(path: Path) -> None:
    """Refuse a file that a few aliases expand to millions of values.

    Raises:
        ConfigError: Names the size.
    """
    if path.stat().st_size > LARGEST:
        raise ConfigError(
            f"`{path}` has {path.stat().st_size:,} bytes: a config has at most "
            f"{LARGEST:,}."
        )
    sizes: dict[int, int] = {}

    def size(node: yaml.Node | None) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 1  # an alias of a value inside itself
            children: list[Any] = node.value if isinstance(node, _NESTS) else []
            pairs = [c if isinstance(c, tuple) else (c,) for c in children]
            sizes[id(node)] = 1 + sum(size(c) for pair in pairs for c in pair)
        return sizes[id(node)]

    with open(path, encoding="utf-8") as file:
        try:
            count = size(yaml.compose(file, yaml.SafeLoader))
        except RecursionError:
            raise ConfigError(f"`{path}` nests its values too deeply.") from None
    if count > LARGEST:
        raise ConfigError(
            f"`{path}` expands to {count:,} values through its aliases: a config has "
            f"at most {LARGEST:,}."
        )


def apply(base: DictConfig, overrides: Sequence[str]) -> None:
    """Apply overrides, in order.

    Raises:
        ConfigError: An override is not of the form `key=value`.
    """
    for override in overrides:
        key, sign, _ = override.partition("=")
        if not sign or not key.strip() or override.startswith("-"):
            raise ConfigError(
                f"`{override}` is no setting: write `key=value`, for example "
                '`system.prompt_processor.prompt="a red mushroom"`.'
            )
        try:
            parsed = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
            # A whole section replaces the old one, whose keys need not fit.
            OmegaConf.update(base, key, parsed, merge=False)
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(
                f"`{override}` cannot be read ({_first_line(error)}). Quote values "
                "with special characters: `'key=\"value: with colon\"'`."
            ) from error


def to_mapping(config: DictConfig) -> dict[str, Any]:
    """Resolve interpolations.

    Raises:
        ConfigError: A value refers to one that does not exist.
    """
    try:
        mapping = OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, ArithmeticError, TypeError, ValueError) as error:
        raise ConfigError(
            f"The config cannot be resolved: {_first_line(error)}"
        ) from error
    assert isinstance(mapping, dict)
    return {str(key): value for key, value in mapping.items()}


def missing(config: DictConfig, known: DictConfig | None = None) -> list[str]:
    """A sentence for each value that is still missing (`???`).

    A placeholder replaces it, so that references to it can be resolved.

    Args:
        config: The config, changed in place.
        known: A config that has some of the values.

    Raises:
        ConfigError: A value refers to one that does not exist.
    """
    try:
        keys = sorted(OmegaConf.missing_keys(config))
    except OmegaConfBaseException as error:  # a value refers to one that does not exist
        raise ConfigError(f"The config cannot be read: {_first_line(error)}") from error
    absent: list[str] = []
    for key in keys:
        value = None if known is None else OmegaConf.select(known, key)
        OmegaConf.update(config, key, "missing" if value is None else value)
        if value is None:
            absent.append(missing_sentence(key))
    return absent


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
