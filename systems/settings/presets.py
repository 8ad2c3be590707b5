"""Presets: settings that a config file offers beside its defaults.

A config's `fast` section lists overrides for a first look (`--fast`). What the command
line says itself comes after them and wins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from systems.settings.reader import ConfigError
from systems.settings.yaml_files import open_yaml

FAST = "fast"


def fast(path: Path | None) -> list[str]:
    """The overrides of a config's `fast` section.

    Raises:
        ConfigError: There is no config, or it has no such section.
    """
    if path is None:
        raise ConfigError(
            "`--fast` chooses the settings of a new run: name its config (`--config "
            "configs/dreamfusion-toybox.yaml`), or leave `--fast` out."
        )
    found = take(open_yaml(path))
    if found is None:
        raise ConfigError(
            f"`{path}` has no `fast` section: leave `--fast` out and write a smaller "
            "`trainer.max_steps=…`, or take `configs/dreamfusion-toybox.yaml`, which "
            "has one."
        )
    return found


def take(config: DictConfig) -> list[str] | None:
    """Remove the `fast` section from a config, and return it; None if it has none.

    Raises:
        ConfigError: The section is no list of `key=value`.
    """
    section: Any = config.get(FAST)
    if OmegaConf.is_config(section):
        section = OmegaConf.to_container(section)
    config.pop(FAST, None)
    if section is None:
        return None
    if not isinstance(section, list) or not all(isinstance(x, str) for x in section):
        raise ConfigError(
            f"`{FAST}` must be a list of overrides, such as `- trainer.max_steps=60`."
        )
    return section
