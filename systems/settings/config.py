"""The settings that every config shares, and reading them from a file.

A config is a YAML file in threestudio's vocabulary, with two additional sections:
`solver` and `dispatch`. Dotted overrides are applied after the file is read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePath
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dreampropeller.precision import Precision
from systems.settings.checks import at_least, between, one_of
from systems.settings.dispatch import DispatchConfig
from systems.settings.notes import note
from systems.settings.presets import take
from systems.settings.reader import ConfigError, read, section_name
from systems.settings.solver import SolverConfig, refuse_idle
from systems.settings.upstream import DATA_TYPES, resolvers, translate
from systems.settings.yaml_files import apply, missing, open_yaml, to_mapping


@dataclass(frozen=True)
class TrainerConfig:
    """`trainer`: length, logging and precision of the run.

    Args:
        max_steps: Number of optimisation steps.
        val_check_interval: Number of steps between two previews.
        log_every_n_steps: Number of steps between two records of the metrics.
        precision: Precision of the scene and its loss: "32-true", "bf16-mixed" or
            "16-mixed" (with a loss scale). That of the pretrained model is set by
            `half_precision_weights`.
    """

    max_steps: int = 10000
    val_check_interval: int = 200
    log_every_n_steps: int = 1
    precision: str | int = "32-true"

    def __post_init__(self) -> None:
        for name in ("max_steps", "val_check_interval", "log_every_n_steps"):
            at_least(name, getattr(self, name), 1)
        Precision(str(self.precision), torch.device("cpu"))  # refuses other names


@dataclass(frozen=True)
class CheckpointConfig:
    """`checkpoint`: saving the state of the run.

    A run that resumes from a full checkpoint equals the uninterrupted run bit for bit
    (CPU). A lean one holds no guesses, which makes it several times smaller; the
    strides of a run that resumes from it differ, and at threshold 0 its result does
    not. Stopping and failing runs write a full one.

    Args:
        every_n_train_steps: Number of steps between two full checkpoints.
        every_n_iterations: Number of iterations between two full checkpoints; null:
            only steps count. 1 loses at most one iteration, and suits small problems.
        lean_every_n_seconds: Seconds between two lean checkpoints, stretched so that
            they take less than 2 % of the time; null: none.
        keep: Number of full checkpoints to keep; older ones are deleted.
    """

    every_n_train_steps: int = 100
    every_n_iterations: int | None = None
    lean_every_n_seconds: float | None = 60.0
    keep: int = 2

    def __post_init__(self) -> None:
        at_least("every_n_train_steps", self.every_n_train_steps, 1)
        if self.every_n_iterations is not None:
            at_least("every_n_iterations", self.every_n_iterations, 1)
        if self.lean_every_n_seconds is not None:
            at_least("lean_every_n_seconds", self.lean_every_n_seconds, 1)
        at_least("keep", self.keep, 1)


@dataclass(frozen=True)
class QualityConfig:
    """`quality`: what the result is compared with.

    Args:
        truth: Prompt of the toybox object that is the ground truth; null: the system's
            own prompt, if it has one.
        size: Side in pixels of the images compared with the ground truth: 32 or 64,
            as the toybox's classifiers see them.
        clip: CLIP model on the hub or in a local folder; null: no CLIP scores.
        prompts: Text file with the candidate prompts of R-precision, one per line.
    """

    truth: str | None = None
    size: int = 32
    clip: str | None = None
    prompts: str = "configs/prompts.txt"

    def __post_init__(self) -> None:
        if self.size not in (32, 64):
            raise ValueError(f"`size` is {self.size}: write 32 or 64.")


@dataclass(frozen=True)
class ExportConfig:
    """`export`: the mesh that a run writes.

    Args:
        texture: Side of a texture in texels that takes the place of vertex colours;
            0: vertex colours.
        max_faces: Number of faces that the mesh is simplified to, before it is
            unwrapped; 0: no simplification.
    """

    texture: int = 0
    max_faces: int = 0

    def __post_init__(self) -> None:
        at_least("texture", self.texture, 0)
        at_least("max_faces", self.max_faces, 0)
        if self.texture > 8192:
            raise ValueError(f"`texture` is {self.texture}: write 8192 or less.")


@dataclass(frozen=True)
class Config:
    """A whole run.

    Args:
        name: Name of the experiment; its folder in `exp_root_dir`.
        system_type: System to run; a key of `systems.PROBLEMS`.
        system: Settings of the system, read by its class.
        data: Settings of the cameras, read by the system.
        data_type: Kind of cameras.
        tag: Name of the run; `name/tag@time` is its folder.
        exp_root_dir: Root folder of all results.
        seed: Seed of all random numbers.
        resume: Run folder or checkpoint to resume from.
        viewer: Serve a live page while the run lasts, to this machine alone.
        viewer_port: Its port.
        solver: Solver of the trajectory.
        dispatch: Devices and processes that evaluate gradients.
        trainer: Number of steps, logging and precision.
        checkpoint: Saving of checkpoints.
        quality: CLIP scores of the result.
        export: Texture and number of faces of the mesh.
        problems: Errors found while reading the file; `systems.build` raises them,
            together with those that the system finds.
    """

    name: str
    system_type: str
    system: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    data_type: str = "random-camera-datamodule"
    tag: str = ""
    exp_root_dir: str = "outputs"
    seed: int = 0
    resume: str | None = None
    viewer: bool = False
    viewer_port: int = 8080
    solver: SolverConfig = field(default_factory=SolverConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    problems: tuple[str, ...] = field(
        default=(), repr=False, metadata={"internal": True}
    )

    def __post_init__(self) -> None:
        one_of("data_type", self.data_type, DATA_TYPES)
        if self.solver.name == "sequential" and self.dispatch.batch != "never":
            raise ValueError(
                f"`dispatch.batch` is `{self.dispatch.batch}`, and the sequential run "
                "has no window to put into one call: leave one of them out."
            )
        between("viewer_port", self.viewer_port, 1, 2**16 - 1)
        inside = PurePath(self.name)
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError(
                f"`name` is `{self.name}`, which is no folder inside `exp_root_dir` "
                f"(`{self.exp_root_dir}`): write a plain name, such as "
                "`name=mushrooms`, and another place as `exp_root_dir=…`."
            )


def load(
    path: str | Path, overrides: Sequence[str] = (), known: Path | None = None
) -> Config:
    """Read a config file, ours or threestudio's, and apply dotted overrides.

    Settings of threestudio that have no effect here are named on standard error.

    Args:
        path: A YAML file.
        overrides: Dotted overrides, such as ``"solver.window.size=4"``.
        known: Another config, for values that the first leaves open (`???`).

    Raises:
        ConfigError: The file cannot be read, or a setting cannot be used.
    """
    config = open_yaml(path)
    take(config)
    override(config, overrides)
    with resolvers():
        absent = missing(config, open_yaml(known) if known else None)
        try:
            settings = to_mapping(config)
        except ConfigError as error:
            raise ConfigError(*absent, *error.problems) from error
    found = translate(settings)
    problems = (*absent, *found.unsupported)
    try:
        config = read(Config, found.settings, "")
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from error
    refuse_idle(config.solver, overrides)
    if found.ignored and not problems:
        names = ", ".join(f"`{name}`" for name in found.ignored)
        note(f"without effect here: {names}.")
    solver = config.solver.resolved(config.dispatch.steps)
    return replace(config, solver=solver, problems=problems)


def override(config: DictConfig, overrides: Sequence[str]) -> None:
    """Apply dotted overrides; a new `name` drops the fields of the old one.

    Raises:
        ConfigError: An override is not of the form `key=value`.
    """
    sections = {
        f"solver.{entry.name}": section_name(entry, entry.default)
        for entry in fields(SolverConfig)
        if "names" in entry.metadata
    }
    for key in sections:
        written = _written(config, key)
        if isinstance(written, str):
            OmegaConf.update(config, key, {"name": written}, merge=False)
    after = copy.deepcopy(config)
    apply(after, overrides)
    for key, default in sections.items():
        if _name(_written(config, key), default) != _name(
            _written(after, key), default
        ):
            OmegaConf.update(config, key, {}, merge=False)
    apply(config, overrides)


def _written(config: DictConfig, key: str) -> Any:
    """A section as written in the file, unresolved; None if it is missing."""
    node: Any = OmegaConf.to_container(config)
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _name(section: Any, default: str) -> str:
    written = section.get("name") if isinstance(section, dict) else section
    return str(written or default)
