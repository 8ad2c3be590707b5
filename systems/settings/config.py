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
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf

import dreampropeller as dp
from dreampropeller.precision import Precision
from systems.settings.checks import at_least, one_of
from systems.settings.reader import (
    ConfigError,
    apply,
    missing,
    open_yaml,
    read,
    to_mapping,
)
from systems.settings.upstream import DATA_TYPES, resolvers, translate


@dataclass(frozen=True)
class WindowConfig:
    """`solver.window`.

    Args:
        size: Steps tried at once; "auto" takes one for each worker, and up to four when
            the strides pay for them. `load` puts the numbers in its place, so that our
            own runs go on with the window they began with.
        max_size: The window follows the strides between `size` and this; null keeps it
            at `size`.
        multiple: Of what the sizes in between are multiples.
    """

    size: int | Literal["auto"] = 8
    max_size: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.size == "auto":
            if self.max_size is not None or self.multiple != 1:
                raise ValueError(
                    "`size` is `auto`, which sets `max_size` and `multiple` itself: "
                    "leave them out, or write a number for `size`."
                )
            return
        if self.size < 1:
            raise ValueError(
                f"`size` is {self.size}: a window holds at least 1 step. Write "
                "`solver.window.size=8`, or `solver.name=sequential` for the plain "
                "loop."
            )
        if self.max_size is None and self.multiple != 1:
            raise ValueError(
                f"`multiple` is {self.multiple}, without effect on a window of one "
                "size: write `max_size` too, or leave it out."
            )
        if self.max_size is not None and self.max_size < self.size:
            raise ValueError(
                f"`max_size` is {self.max_size}, less than `size`, {self.size}: write "
                "at least that, or null to keep the size."
            )
        self.build()

    def resolved(self, num_workers: int) -> WindowConfig:
        """The same with numbers for "auto"."""
        if self.size != "auto":
            return self
        return WindowConfig(num_workers, 4 * num_workers, num_workers)

    def build(self) -> dp.Window:
        """The core's window."""
        assert isinstance(self.size, int), "`load` resolves `auto`"
        if self.max_size is None:
            return dp.SlidingWindow(self.size)
        return dp.AdaptiveWindow(self.size, self.max_size, self.multiple)


@dataclass(frozen=True)
class ThresholdConfig:
    """`solver.threshold`: what error of a step counts as converged.

    Args:
        name: "drift" bounds the relative error of the drift, "paper" is the published
            rule, "fixed" a fixed error.
        value: With "drift", the share of itself that a drift may be off by (default
            0.2). With "paper", the first threshold (default 5e-6), and with "fixed"
            the only one, a mean square over all entries; no default. With "drift" and
            "fixed", 0 is the sequential run bit for bit (on CPU).
        warmup: With "drift": steps at the start judged by a quarter of `value`.
        relative: With "fixed": `value` counts squared updates of the optimizer.
        ema_decay: Of the published rule.
        adaptivity: Of the published rule: "median" or "mean" error of a window.
    """

    name: str = "drift"
    value: float | None = None
    warmup: int = 0
    relative: bool = False
    ema_decay: float = 0.9
    adaptivity: str = "median"

    def __post_init__(self) -> None:
        one_of("name", self.name, ("drift", "paper", "fixed"))
        if self.name == "fixed" and self.value is None:
            raise ValueError(
                "`value` is missing: write `value=0` for the sequential run bit for "
                "bit, a mean squared error, or `name=drift`, which needs none."
            )
        if self.relative and self.name != "fixed":
            raise ValueError(
                f"`relative` has no effect on `{self.name}`: write `name=fixed`, or "
                "leave it out."
            )
        if self.warmup and self.name != "drift":
            raise ValueError(
                f"`warmup` has no effect on `{self.name}`: write `name=drift`, or "
                "leave it out."
            )
        one_of("adaptivity", self.adaptivity, ("median", "mean"))
        self.build()

    def build(self) -> dp.Threshold:
        """The core's threshold."""
        if self.name == "drift":
            value = dp.DriftThreshold.value if self.value is None else self.value
            return dp.DriftThreshold(value, warmup=self.warmup)
        if self.name == "fixed":
            assert self.value is not None
            return dp.FixedThreshold(self.value, self.relative)
        adaptivity: Any = self.adaptivity
        return dp.EMAThreshold(
            5e-6 if self.value is None else self.value, self.ema_decay, adaptivity
        )


@dataclass(frozen=True)
class AccelerationConfig:
    """`solver.acceleration`: what is learnt from past iterations.

    Args:
        name: "none"; "secant", drifts corrected to the states they are used at; or
            "anderson", guesses corrected, for smooth deterministic gradients or
            samplers.
        memory: Of Anderson: past iterations used.
        order: Of Anderson: updates from a guess to the state it is compared with; null:
            from the last accepted step.
    """

    name: str = "none"
    memory: int = 2
    order: int | None = None

    def __post_init__(self) -> None:
        one_of("name", self.name, ("none", "secant", "anderson"))
        if self.name != "anderson" and (self.memory, self.order) != (2, None):
            raise ValueError(
                f"`memory` and `order` have no effect on `{self.name}`: write "
                "`name=anderson`, or leave them out."
            )
        self.build()

    def build(self) -> dp.Secant | dp.Anderson | None:
        """The core's acceleration."""
        if self.name == "anderson":
            return dp.Anderson(self.memory, self.order)
        return dp.Secant() if self.name == "secant" else None


@dataclass(frozen=True)
class SolverConfig:
    """`solver`: how the steps are solved.

    Args:
        name: "picard", or "sequential" for the plain loop. With `--sample` also
            "piadm-ode" (with DDIM) and "piadm-sde" (with DDPM): blocks of
            `window.size` steps, each iterated `depth` times.
        depth: Iterations of a block of PIADM.
        window: How many steps are tried.
        threshold: What counts as converged.
        predictor: First guess of a new step: "momentum", "repeat_last", or "auto", as
            much of momentum's way as has proved right of late.
        non_finite: "raise", or "skip" steps whose gradient is not finite.
        acceleration: How drifts or guesses are corrected.
    """

    name: str = "picard"
    depth: int = 4
    window: WindowConfig = field(default_factory=WindowConfig)
    threshold: ThresholdConfig = field(default_factory=ThresholdConfig)
    predictor: str = "momentum"
    non_finite: str = "raise"
    acceleration: AccelerationConfig = field(default_factory=AccelerationConfig)

    def __post_init__(self) -> None:
        one_of("name", self.name, ("picard", "sequential", "piadm-ode", "piadm-sde"))
        at_least("depth", self.depth, 1)
        one_of("predictor", self.predictor, ("momentum", "repeat_last", "auto"))
        one_of("non_finite", self.non_finite, ("raise", "skip"))
        if self.window.size == "auto":
            self.resolved(1)
        else:
            self.build()  # what does not go together is refused here

    def resolved(self, num_workers: int) -> SolverConfig:
        """The same with numbers for "auto"."""
        if self.window.size != "auto":
            return self
        return replace(self, window=self.window.resolved(num_workers))

    def build(self) -> dp.Solver:
        """The core's solver."""
        non_finite: Any = self.non_finite
        if self.name == "sequential":
            return dp.Sequential(non_finite=non_finite)
        if self.name.startswith("piadm"):
            size: Any = self.window.size
            return dp.PicardSolver(
                dp.BlockWindow(size, self.depth), dp.FixedThreshold(0)
            )
        return dp.PicardSolver(
            self.window.build(),
            self.threshold.build(),
            predictor=self.predictor,
            non_finite=non_finite,
            acceleration=self.acceleration.build(),
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
        system_type: A key of `systems.SYSTEMS`.
        system: The system's own section, read by its class.
        data: Cameras; read by the system.
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


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, threestudio's too, and apply dotted overrides.

    Settings of threestudio that change nothing here are named on standard error.

    Args:
        path: A YAML file.
        overrides: Such as ``"solver.window.size=4"``.

    Raises:
        ConfigError: The file cannot be read, or a setting cannot be used.
    """
    config = open_yaml(path)
    override(config, overrides)
    with resolvers():
        absent = missing(config)
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
    """Change settings of a file; numbers of its threshold are not those of another.

    Raises:
        ConfigError: An override is no `key=value`.
    """
    after = copy.deepcopy(config)
    apply(after, overrides)
    if _threshold_of(config) != _threshold_of(after):
        OmegaConf.update(config, "solver.threshold", {}, merge=False)
    apply(config, overrides)


def _threshold_of(config: DictConfig) -> Any:
    mapping = OmegaConf.to_container(config)  # not resolved
    solver = mapping.get("solver") if isinstance(mapping, dict) else None
    section = solver.get("threshold") if isinstance(solver, dict) else None
    name = section.get("name") if isinstance(section, dict) else None
    return name or ThresholdConfig.name
