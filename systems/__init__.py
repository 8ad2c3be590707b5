"""Everything that knows 3D or diffusion."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from systems.base import System

SYSTEMS = {
    "dreamfusion-system": "systems.dreamfusion.DreamFusion",
    "dreamgaussian-system": "systems.dreamgaussian.DreamGaussian",
}
"""Systems by the names configs use. Imported when asked for: they are heavy."""


def make_system(config: str, *overrides: str) -> System:
    """A system from a config file, for scripts and notebooks.

    Args:
        config: Path of a YAML file.
        *overrides: Such as ``"system.prompt_processor.prompt=a red mushroom"``.

    Raises:
        ConfigError: A setting cannot be used; the message says what to write instead.
    """
    from systems.settings.config import load

    return build(load(config, overrides))


def build(config: object) -> System:
    """The system of a config that was read.

    Raises:
        ConfigError: A setting cannot be used.
    """
    import importlib

    from systems.settings.config import Config
    from systems.settings.reader import ConfigError, choose

    assert isinstance(config, Config)
    path = choose(SYSTEMS, config.system_type, "system_type")
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)(config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
