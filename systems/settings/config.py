"""What a run is: the settings every config shares, and reading one from a file.

A config is a YAML file in threestudio's vocabulary, with two blocks of ours: `solver`
and `dispatch`; dotted overrides come after it.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePath
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import dreampropeller as dp
from dreampropeller.precision import Precision
from dreampropeller.predictor import PREDICTORS
from systems.settings.checks import at_least, one_of
from systems.settings.reader import (
    ConfigError,
    apply,
    missing,
    named,
    open_yaml,
    read,
    section_name,
    to_mapping,
)
from systems.settings.upstream import DATA_TYPES, resolvers, translate


@dataclass(frozen=True)
class AutoWindow:
    """`solver.window.name=auto`: one step for each worker, up to four where they pay.

    `load` puts an `AdaptiveWindow` instead, so that a run that resumes keeps the window
    it began with.
    """

    def resolved(self, num_workers: int) -> dp.AdaptiveWindow:
        """The window for so many workers."""
        return dp.AdaptiveWindow(num_workers, 4 * num_workers, num_workers)


WINDOWS = {
    "sliding": dp.SlidingWindow,
    "adaptive": dp.AdaptiveWindow,
    "auto": AutoWindow,
}
THRESHOLDS = {
    "drift": dp.DriftThreshold,
    "ema": dp.EMAThreshold,
    "fixed": dp.FixedThreshold,
}
ACCELERATIONS = {"none": type(None), "secant": dp.Secant, "anderson": dp.Anderson}


@dataclass(frozen=True)
class SolverConfig:
    """`solver`: how the steps are solved.

    A section holds a `name` and the arguments of the core's class of that name.

    Args:
        name: "picard", or "sequential" for one step after the other. With `--sample`
            also "piadm-ode" (with DDIM) and "piadm-sde" (with DDPM): blocks of
            `window.size` steps, each iterated `depth` times.
        depth: Iterations of a block of PIADM.
        window: How many steps are tried: "sliding", "adaptive" or "auto".
        threshold: What error counts as converged: "drift", "ema" or "fixed".
        predictor: First guess of a new step: "momentum", "repeat_last", or "auto",
            along the momentum direction by a fraction fitted to recent iterations.
        non_finite: "raise", or "skip" steps whose gradient is not finite.
        acceleration: What is learnt from past iterations: "none", "secant" or
            "anderson".
    """

    name: str = "picard"
    depth: int = 4
    window: dp.Window[Any] | AutoWindow = field(
        default=dp.SlidingWindow(8), metadata=named(WINDOWS)
    )
    threshold: dp.Threshold[Any] = field(
        default=dp.DriftThreshold(), metadata=named(THRESHOLDS)
    )
    predictor: dp.Predictor[Any] = field(
        default=dp.Momentum(), metadata=named(PREDICTORS)
    )
    non_finite: str = "raise"
    acceleration: dp.Acceleration[Any] | None = field(
        default=None, metadata=named(ACCELERATIONS)
    )

    def __post_init__(self) -> None:
        one_of("name", self.name, ("picard", "sequential", "piadm-ode", "piadm-sde"))
        at_least("depth", self.depth, 1)
        if self.depth != SolverConfig.depth and not self.name.startswith("piadm"):
            raise ValueError(
                f"`depth` has no effect on `{self.name}`: write `name=piadm-ode` or "
                "`piadm-sde`, or leave it out."
            )
        one_of("non_finite", self.non_finite, ("raise", "skip"))
        self.resolved(1).build()  # what does not go together is refused here

    def resolved(self, num_workers: int) -> SolverConfig:
        """The same with a window of numbers for "auto"."""
        if not isinstance(self.window, AutoWindow):
            return self
        return replace(self, window=self.window.resolved(num_workers))

    def build(self) -> dp.Solver:
        """The core's solver."""
        non_finite: Any = self.non_finite
        if self.name == "sequential":
            return dp.Sequential(non_finite=non_finite)
        assert isinstance(self.window, dp.Window), "`load` resolves `auto`"
        if self.name.startswith("piadm"):
            size = self.window.length(self.window.init(), sys.maxsize)
            return dp.PicardSolver(
                dp.BlockWindow(size, self.depth), dp.FixedThreshold(0)
            )
        return dp.PicardSolver(
            self.window,
            self.threshold,
            predictor=self.predictor,
            non_finite=non_finite,
            acceleration=self.acceleration,
        )


@dataclass(frozen=True)
class DispatchConfig:
    """`dispatch`: where gradients are evaluated.

    Args:
        num_workers: Processes, one per device (more share GPUs); started by `launch.py`
            itself.
        threads: CPU threads of each process; null: all cores for one process, one for
            each of several.
        timeout: Seconds after which a silent process counts as lost.
    """

    num_workers: int = 1
    threads: int | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        at_least("num_workers", self.num_workers, 1)
        at_least("timeout", self.timeout, 1)
        if self.threads is not None:
            at_least("threads", self.threads, 1)

    @property
    def count(self) -> int:
        """Processes of this run: torchrun's, or those `launch.py` starts."""
        return int(os.environ["WORLD_SIZE"]) if is_rank() else self.num_workers


def is_rank() -> bool:
    """Whether this process was started as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@dataclass(frozen=True)
class TrainerConfig:
    """`trainer`.

    Args:
        max_steps: Steps of the optimisation.
        val_check_interval: Steps between two previews.
        log_every_n_steps: Steps between two entries of the metrics.
        precision: "32-true", "bf16-mixed" or "16-mixed" (with a loss scale) for the
            scene and its loss; the pretrained model has `half_precision_weights`.
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
    """`checkpoint`.

    Args:
        every_n_train_steps: Steps between two checkpoints.
        keep: How many to keep.
    """

    every_n_train_steps: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        at_least("every_n_train_steps", self.every_n_train_steps, 1)
        at_least("keep", self.keep, 1)


@dataclass(frozen=True)
class QualityConfig:
    """`quality`: who judges an object whose truth is not known.

    Args:
        clip: A CLIP model, on the hub or in a local folder; null: nobody judges.
        prompts: A text file of prompts that the right one is picked from.
    """

    clip: str | None = None
    prompts: str = "configs/prompts.txt"


@dataclass(frozen=True)
class Config:
    """A whole run.

    Args:
        name: Of the experiment: a folder in `exp_root_dir`.
        system_type: A key of `systems.PROBLEMS`.
        system: The system's own section, read by its class.
        data: Cameras; read by the system.
        data_type: Kind of the cameras.
        tag: Of the run: `name/tag@time` is its folder.
        exp_root_dir: Where results go.
        seed: Of everything random.
        resume: A run folder or a checkpoint to go on from.
        solver: How.
        dispatch: Where.
        trainer: How long.
        checkpoint: What is kept.
        quality: Who judges the object.
        problems: What was found while reading the file; `systems.build` refuses it,
            together with what the system finds.
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
    solver: SolverConfig = field(default_factory=SolverConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    problems: tuple[str, ...] = field(
        default=(), repr=False, metadata={"internal": True}
    )

    def __post_init__(self) -> None:
        one_of("data_type", self.data_type, DATA_TYPES)
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
    """Read a config file, threestudio's too, and apply dotted overrides.

    Settings of threestudio that change nothing here are named on standard error.

    Args:
        path: A YAML file.
        overrides: Such as ``"solver.window.size=4"``.
        known: Another config, for values that the first leaves open (`???`).

    Raises:
        ConfigError: The file cannot be read, or a setting cannot be used.
    """
    config = open_yaml(path)
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
    if found.ignored and not problems:
        _tell(found.ignored)
    solver = config.solver.resolved(config.dispatch.count)
    return replace(config, solver=solver, problems=problems)


@functools.cache
def _tell(ignored: tuple[str, ...]) -> None:
    """Say once, and on one rank, what was accepted and does nothing."""
    if os.environ.get("RANK", "0") == "0":
        names = ", ".join(f"`{name}`" for name in ignored)
        print(f"note: without effect here: {names}.", file=sys.stderr)


def override(config: DictConfig, overrides: Sequence[str]) -> None:
    """Change settings of a file; a new `name` drops the fields of the old one.

    Raises:
        ConfigError: An override is no `key=value`.
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
    """A section as it is written, not resolved; None where there is none."""
    node: Any = OmegaConf.to_container(config)
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _name(section: Any, default: str) -> str:
    written = section.get("name") if isinstance(section, dict) else section
    return str(written or default)
