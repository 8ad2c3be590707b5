"""Everything that knows 3D or diffusion."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from systems.base import System
    from systems.settings.config import Config
    from systems.settings.reader import ConfigError

SYSTEMS = {"dreamfusion-system": "systems.dreamfusion.DreamFusion"}
"""Systems by the names configs use. Imported when asked for: they are heavy."""
OTHERWISE = (
    "What this workspace lacks, threestudio itself can do, with this solver: write "
    "`backend=threestudio threestudio.root=<checkout>` (docs/threestudio.md)."
)


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
    try:
        path = choose(SYSTEMS, config.system_type, "system_type")
    except ConfigError as error:
        own = [p for p in config.problems if not p.startswith("`system.")]
        raise _refusal([*error.problems, *own]) from error
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    problems = [*config.problems, *_problems(kind.SECTIONS, config)]
    if problems:
        raise _refusal(problems)
    try:
        return kind(config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _problems(sections: Mapping[str, type], config: Config) -> list[str]:
    """What cannot be used of the sections that a system reads."""
    from systems.settings.reader import attempt, read

    found: list[str] = []
    for name, kind in sections.items():
        attempt(found, functools.partial(read, kind, getattr(config, name), name))
    return [problem for problem in found if problem not in config.problems]


def _refusal(problems: Sequence[str]) -> ConfigError:
    """All problems; and the way out, where threestudio could do what is asked."""
    from systems.settings.reader import ConfigError, Foreign

    foreign = any(isinstance(problem, Foreign) for problem in problems)
    return ConfigError(*problems, advice=OTHERWISE if foreign else "")
