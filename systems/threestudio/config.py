"""A threestudio config, split into our sections and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from systems.settings.config import override
from systems.settings.dispatch import DispatchConfig
from systems.settings.reader import ConfigError, read
from systems.settings.solver import SolverConfig, refuse_idle, refuse_samplers
from systems.settings.yaml_files import open_yaml

_OURS = ("backend", "threestudio", "solver", "dispatch")


@dataclass(frozen=True)
class CheckoutConfig:
    """`threestudio`: the checkout of threestudio.

    Args:
        root: Folder of the checkout; null: threestudio is importable.
        verify: Check before the run that no step depends on the order of evaluation.
    """

    root: str | None = None
    verify: bool = True


@dataclass(frozen=True)
class BackendConfig:
    """Our sections of a config; the rest is threestudio's.

    Args:
        backend: Backend of the run: "threestudio".
        threestudio: The checkout of threestudio.
        solver: Solver of the trajectory.
        dispatch: Devices and processes that evaluate gradients.
    """

    backend: str = "threestudio"
    threestudio: CheckoutConfig = field(default_factory=CheckoutConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)


def is_asked(overrides: Sequence[str]) -> bool:
    """Whether the command line selects threestudio."""
    return "backend=threestudio" in overrides


def split(
    path: Path, overrides: Sequence[str]
) -> tuple[BackendConfig, DictConfig, list[str]]:
    """Split a config: our settings, the rest of the file, dotted settings."""
    config = open_yaml(path)
    blocks = OmegaConf.create({k: config.pop(k) for k in _OURS if k in config})
    own = [o for o in overrides if o.split("=")[0].split(".")[0] in _OURS]
    override(blocks, own)
    section = OmegaConf.to_container(blocks, resolve=True)
    ours = read(BackendConfig, section, "")
    refuse_idle(ours.solver, own)
    refuse_samplers(ours.solver)
    if ours.dispatch.batch != "never":
        raise ConfigError(
            "`dispatch.batch` has no effect on systems of threestudio, which are "
            "evaluated in their own tensors, one state at a time: leave it out."
        )
    return (
        replace(ours, solver=ours.solver.resolved(ours.dispatch.steps)),
        config,
        [setting for setting in overrides if setting not in own],
    )
