"""Everything that knows 3D or diffusion."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from systems.base import System
    from systems.problem import Problem
    from systems.settings.config import Config
    from systems.settings.reader import ConfigError

OTHERWISE = (
    "What this workspace lacks, threestudio itself can do, with this solver: write "
    "`backend=threestudio threestudio.root=<checkout>` (docs/threestudio.md)."
)
PROBLEMS = {
    "dreamfusion-system": "systems.dreamfusion.DreamFusion",
    "dreamgaussian-system": "systems.dreamgaussian.DreamGaussian",
    "textmesh-system": "systems.textmesh.TextMesh",
    "magic3d-system": "systems.magic3d.Magic3D",
    "prolificdreamer-system": "systems.prolificdreamer.ProlificDreamer",
    "texture-system": "systems.texture.Texture",
    "zero123-system": "systems.zero123.Zero123",
    "zero123-gaussian-system": "systems.zero123.Zero123Gaussians",
    "diffusion-sampling": "systems.sampling.Sampling",
}
"""Problems by their names in configs; imported on use, because they are heavy."""
_OWN = ("system", "data")
"""Sections of `Config` that a problem reads itself."""


def make_system(config: str, *overrides: str) -> System:
    """A system from a config file, for scripts and notebooks.

    Args:
        config: Path of a YAML file.
        *overrides: Dotted overrides, such as
            ``"system.prompt_processor.prompt=a red mushroom"``.

    Raises:
        ConfigError: A setting cannot be used; the message says what to write instead.
    """
    from systems.settings.config import load

    return build(load(config, overrides))


def build(config: Config) -> System:
    """The 3D system of a loaded config.

    Raises:
        ConfigError: A setting cannot be used, or the problem is not a 3D system.
    """
    from systems.base import System
    from systems.settings.reader import ConfigError

    problem = build_problem(config)
    if not isinstance(problem, System):
        raise ConfigError(
            f"A `{config.system_type}` makes no 3D object: write "
            f"`{problem.option}` for this config."
        )
    return problem


def problem_type(config: Config) -> type[Problem]:
    """The class of problem that a config names.

    Raises:
        ConfigError: There is no such class.
    """
    from systems.settings.reader import ConfigError, choose

    try:
        path = choose(PROBLEMS, config.system_type, "system_type")
    except ConfigError as error:
        own = [p for p in config.problems if not p.startswith("`system.")]
        raise _refusal([*error.problems, *own]) from error
    return _class_at(path)


def check_sections(config: Config) -> None:
    """Refuse a config with settings that cannot be used, without building anything.

    Raises:
        ConfigError: Names all of them.
    """
    kind = problem_type(config)
    problems = [*config.problems, *_problems(_sections(kind, config), config)]
    if kind.data_type not in (None, config.data_type):
        problems.append(
            f"`data_type` is `{config.data_type}`, and `{config.system_type}` reads "
            f"`{kind.data_type}`: write that."
        )
    if problems:
        raise _refusal(problems)


def build_problem(config: Config) -> Problem:
    """The problem of a loaded config.

    Raises:
        ConfigError: A setting cannot be used.
    """
    from systems.settings.reader import ConfigError

    check_sections(config)
    try:
        problem = problem_type(config)(config)
        if config.dispatch.views > 1:
            problem.check_views(config.dispatch.views)
        return problem
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def list_settings(section: str = "") -> str:
    """All settings, or those of a section, with type, default and meaning.

    Raises:
        ConfigError: There is no such section.
    """
    from systems.settings import describe
    from systems.settings.config import Config

    found = [s for s in describe.settings(Config, "") if s.name not in _OWN]
    for name, path in PROBLEMS.items():
        for where, kind in _class_at(path).section_types.items():
            found += describe.settings(kind, where, f"system_type={name}")
    return describe.text(found, section)


def _class_at(path: str) -> type[Problem]:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _sections(kind: type[Problem], config: Config) -> Mapping[str, type]:
    """The sections to check; not the views of another kind of data."""
    named = kind.section_types
    if kind.data_type in (None, config.data_type):
        return named
    return {name: section for name, section in named.items() if name != "data"}


def _problems(sections: Mapping[str, type], config: Config) -> list[str]:
    """Errors in the sections that a problem reads."""
    from systems.settings.reader import attempt, read

    found: list[str] = []
    for name, kind in sections.items():
        attempt(found, functools.partial(read, kind, getattr(config, name), name))
    return [problem for problem in found if problem not in config.problems]


def _refusal(problems: Sequence[str]) -> ConfigError:
    """An error that lists all problems, and names threestudio if it can help."""
    from systems.settings.reader import ConfigError, Foreign

    foreign = any(isinstance(problem, Foreign) for problem in problems)
    return ConfigError(*problems, advice=OTHERWISE if foreign else "")
