"""`backend=threestudio`: threestudio's own configs, systems and folders, in parallel.

Everything but the training loop is threestudio's: it reads the config, builds the
system, renders and writes. It is imported from a checkout, which stays as it is.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

import dreampropeller as dp
from dreampropeller import checkpoint
from dreampropeller.adapters.threestudio import ThreestudioTrajectory, make_trajectory
from systems import workers
from systems.config import (
    DispatchConfig,
    SolverConfig,
    is_rank,
    override,
)
from systems.reader import ConfigError, read
from systems.recorder import STOP
from systems.stopping import Stop

_OURS = ("backend", "threestudio", "solver", "dispatch")
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
_STATES = "dreampropeller"
"""Folder in `ckpts/` for what a run goes on from."""


@dataclass(frozen=True)
class CheckoutConfig:
    """`threestudio`: where it is.

    Args:
        root: A checkout; null: threestudio can be imported as it is.
        verify: Check before the run that no step depends on the order of evaluation.
    """

    root: str | None = None
    verify: bool = True


@dataclass(frozen=True)
class BackendConfig:
    """Our part of a config; all the rest is threestudio's.

    Args:
        backend: "threestudio".
        threestudio: Where it is.
        solver: How.
        dispatch: Where.
    """

    backend: str = "threestudio"
    threestudio: CheckoutConfig = field(default_factory=CheckoutConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)


def is_asked(overrides: Sequence[str]) -> bool:
    """Whether the command line asks for threestudio."""
    return "backend=threestudio" in overrides


def run(path: Path | None, trains: bool, overrides: Sequence[str]) -> int:
    """Train a system of threestudio.

    Args:
        path: threestudio's YAML file; it may hold `solver` and `dispatch` blocks.
        trains: Whether `--train` was asked for, the one task there is.
        overrides: `key=value`, ours and threestudio's.

    Raises:
        ConfigError: A setting or the environment cannot be used; says what to do.
    """
    if not trains:
        raise ConfigError(
            "`backend=threestudio` only trains: what it writes is threestudio's own. "
            "In the checkout, run `python launch.py --config RUN/configs/parsed.yaml "
            "--test resume=RUN/ckpts/last.ckpt` (or `--export`, `--validate`)."
        )
    if path is None or not path.is_file():
        raise ConfigError(f"There is no config `{path}`: name a YAML of threestudio.")
    ours, theirs, dotted = split(path, overrides)
    count = ours.dispatch.num_workers
    asked: Any = OmegaConf.merge(theirs, OmegaConf.from_dotlist(dotted))
    if asked.get("timestamp") is None and asked.get("use_timestamp", True):
        # Several processes share one folder: ranks of `torchrun` ask rank 0.
        now = datetime.now().strftime("@%Y%m%d-%H%M%S")
        theirs.timestamp = None if is_rank() else now
    text = OmegaConf.to_yaml(theirs)
    job = (ours, text, dotted, path.resolve())
    if count == 1 or is_rank():
        return work(*job, None)
    with tempfile.TemporaryDirectory() as scratch:  # the run folder has no name yet
        stop = Path(scratch) / STOP
        return workers.start(work, *job, stop, num_workers=count, stop=stop)


def split(
    path: Path, overrides: Sequence[str]
) -> tuple[BackendConfig, DictConfig, list[str]]:
    """Take our settings out of a config: ours, the file's rest, dotted settings."""
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise ConfigError(f"`{path}` must hold `key: value` lines.")
    blocks = OmegaConf.create({k: config.pop(k) for k in _OURS if k in config})
    own = [o for o in overrides if o.split("=")[0].split(".")[0] in _OURS]
    override(blocks, own)
    section = OmegaConf.to_container(blocks, resolve=True)
    ours = read(BackendConfig, section, "")
    return (
        replace(ours, solver=ours.solver.resolved(ours.dispatch.count)),
        config,
        [setting for setting in overrides if setting not in own],
    )


def work(
    ours: BackendConfig, text: str, dotted: list[str], path: Path, stop: Path | None
) -> int:
    """What each rank does; a file `stop`, here or in the run folder, ends it."""
    rank = join(ours)
    leads = rank == 0
    torch.set_num_threads(ours.dispatch.threads or 1)
    load_config, find = import_threestudio(ours.threestudio.root)
    lightning: Any = importlib.import_module("pytorch_lightning")
    if (
        rank is not None and "timestamp: null" in text
    ):  # torchrun: rank 0 knows the time
        now = [datetime.now().strftime("@%Y%m%d-%H%M%S")]
        dist.broadcast_object_list(now, 0, device=torch.device("cpu"))
        text = text.replace("timestamp: null", f"timestamp: '{now[0]}'")
    resume = [o.removeprefix("resume=") for o in dotted if o.startswith("resume=")]
    dotted = [o for o in dotted if not o.startswith("resume=")]
    cfg = load_config(text, cli_args=dotted, from_string=True, n_gpus=1)
    state = load_state(resume[-1]) if resume else None
    lightning.seed_everything(cfg.seed, workers=True)  # the same on every rank

    def build() -> ThreestudioTrajectory:
        datamodule = find(cfg.data_type)(cfg.data)
        system = find(cfg.system_type)(cfg.system, resumed=False)
        system.set_save_dir(os.path.join(cfg.trial_dir, "save"))
        return make_trajectory(system, datamodule, cfg, verify=ours.threestudio.verify)

    # Rank 0 first: it fills the cache of prompt embeddings that the others read. (Where
    # threestudio meets at a barrier of its own while loading them, the two pair up.)
    if not leads and rank is not None:
        dist.barrier()
    trajectory = build()
    if leads and dist.is_initialized():
        dist.barrier()
    run = _Run(trajectory, cfg, lightning, ours, leads=leads or rank is None)
    if run.leads:
        run.snapshot(path)
    dispatcher = dp.InlineDispatcher if rank is None else spread(ours.dispatch)
    solver = ours.solver.build()
    with run.listening(stop):
        try:
            solution = dp.solve(
                trajectory, solver, dispatcher, state=state, on_iteration=run
            )
        except dp.NotConverged as error:
            if run.leads:
                run.save(error.solution.state)
            raise
    if run.leads:
        run.finish(solution)
    if dist.is_initialized():
        dist.barrier()  # rank 0 renders its pictures in peace
        dist.destroy_process_group()
    return 128 + run.stop.signal if run.stop.signal else 0


def join(ours: BackendConfig) -> int | None:
    """Join the ranks, before threestudio is imported; None: this process is alone.

    threestudio picks devices by these variables, so they go; each rank sees one GPU.
    """
    if not is_rank():
        return None
    rank = int(os.environ["RANK"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(local + 1)]
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[local % len(devices)]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Rank 0 renders validation and test pictures while the others wait for it.
    timeout = timedelta(seconds=ours.dispatch.timeout)
    dist.init_process_group(backend, timeout=timeout)
    for name in _RANKS:
        os.environ.pop(name, None)
    return rank


def spread(config: DispatchConfig) -> Callable[[Any], dp.Dispatcher]:
    """The dispatcher of several ranks."""
    return functools.partial(
        dp.DistributedDispatcher, threads=config.threads or 1, timeout=config.timeout
    )


def import_threestudio(root: str | None) -> tuple[Any, Any]:
    """Its `load_config` and `find`, custom extensions registered.

    Raises:
        ConfigError: It is not there, or a package it needs is missing.
    """
    if root is not None:
        if not (Path(root) / "threestudio").is_dir():
            raise ConfigError(
                f"`threestudio.root` is `{root}`, which holds no `threestudio` folder; "
                "name a checkout of https://github.com/threestudio-project/threestudio."
            )
        os.chdir(root)  # it reads `load/` and `custom/` from where it is started
        sys.path.insert(0, os.getcwd())
    try:
        threestudio: Any = importlib.import_module("threestudio")
        config: Any = importlib.import_module("threestudio.utils.config")
    except ImportError as error:
        missing = error.name or str(error)
        raise ConfigError(
            f"threestudio cannot be imported: `{missing}` is missing ({error}). "
            + (
                "Write `threestudio.root=<checkout>`."
                if missing == "threestudio"
                else "Run this command with the Python in which threestudio itself "
                "trains, and install dreampropeller there."
            )
        ) from error
    version = importlib.import_module("pytorch_lightning").__version__
    if int(version.split(".")[0]) < 2:
        raise ConfigError(
            f"pytorch-lightning is {version}, whose training step differs; threestudio "
            "asks for 2.0: `pip install lightning==2.0.0`."
        )
    for extension in sorted(Path("custom").glob("*")):
        import_extension(extension)
    return config.load_config, threestudio.find


def import_extension(path: Path) -> None:
    """Register a custom extension as threestudio's launcher does."""
    file = path / "__init__.py" if path.is_dir() else path
    if file.suffix != ".py" or not file.is_file() or path.name.endswith("_disabled"):
        return
    name = str(path.with_suffix("")) if path.is_file() else str(path)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception:  # an extension nobody asked for must not stop the run
        print(f"warning: `{path}` could not be imported:", file=sys.stderr)
        traceback.print_exc()


def load_state(path: str) -> dp.SolverState[Any]:
    """What a run goes on from.

    Raises:
        ConfigError: `path` is a checkpoint of threestudio, which lacks the guesses.
    """
    if path.endswith(".ckpt"):
        raise ConfigError(
            f"`resume={path}` is threestudio's checkpoint. To go on, name the run: "
            "`--config RUN/configs/parsed.yaml resume=RUN`; to start from its weights, "
            "write `system.weights=…`."
        )
    folder = Path(path)
    inner = folder / "ckpts" / _STATES
    return checkpoint.load(inner if inner.is_dir() else folder)


class _Run:
    """Writes a run down where threestudio would; called after each iteration."""

    def __init__(
        self,
        trajectory: ThreestudioTrajectory,
        cfg: Any,
        lightning: Any,
        ours: BackendConfig,
        leads: bool,
    ) -> None:
        self.leads, self._ours = leads, ours
        self._trajectory, self._cfg, self._lightning = trajectory, cfg, lightning
        self._folder = Path(cfg.trial_dir)
        self._loggers: list[Any] = []
        self._workers = dist.get_world_size() if dist.is_initialized() else 1
        self._every = int(cfg.trainer.get("val_check_interval") or 0)
        self._saves = int(cfg.checkpoint.get("every_n_train_steps") or 0)
        self.stop = Stop(None)

    @contextmanager
    def listening(self, file: Path | None) -> Iterator[None]:
        """Hear signals and files that ask to stop, during a solve."""
        if self.leads:
            own = self._folder / STOP
            self.stop = Stop([own] if file is None else [own, file])
        with self.stop.listening():
            yield

    def snapshot(self, path: Path) -> None:
        """The config and the command, in the places `--test` looks for them."""
        configs = self._folder / "configs"
        configs.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self._cfg, configs / "parsed.yaml")
        if path != (configs / "raw.yaml").resolve():
            shutil.copyfile(path, configs / "raw.yaml")
        command = "python " + " ".join(sys.argv) + "\n"
        (self._folder / "cmd.txt").write_text(command)
        loggers: Any = importlib.import_module("pytorch_lightning.loggers")
        for kind, name in (("TensorBoardLogger", "tb_logs"), ("CSVLogger", "csv_logs")):
            self._loggers.append(getattr(loggers, kind)(str(self._folder), name=name))

    def __call__(self, state: dp.SolverState[Any], iteration: dp.Iteration) -> bool:
        if not self.leads:
            return False
        for offset, aux in enumerate(iteration.aux):
            for logger in self._loggers:
                logger.log_metrics(aux, step=iteration.begin + offset)
        told = {"stride": float(iteration.stride), **iteration.diagnostics}
        if iteration.threshold is not None:
            told["threshold"] = iteration.threshold
        for board in self._loggers[:1]:  # not the table, which has a row for each step
            names = {f"solver/{name}": value for name, value in told.items()}
            board.log_metrics(names, step=state.step)
        if self._due(self._every, iteration) or self._due(self._saves, iteration):
            self.save(state)
        if self._due(self._every, iteration):
            self._evaluate("validate", state.step, state.y)
        return self.stop.asked()

    def save(self, state: dp.SolverState[Any]) -> None:
        """Write down what the run can go on from."""
        checkpoint.save(self._folder / "ckpts" / _STATES, state)

    @staticmethod
    def _due(every: int, iteration: dp.Iteration) -> bool:
        end = iteration.begin + iteration.stride
        return every > 0 and iteration.begin // every < end // every

    def finish(self, solution: dp.Solution[Any]) -> None:
        """Checkpoints for threestudio, its test pictures, and what the run cost.

        Stopped early it is saved, but not tested.
        """
        step, folder = solution.state.step, self._folder / "ckpts"
        self.save(solution.state)
        self._trajectory.settle(step, solution.value)
        system = self._trajectory.module
        content = {
            "epoch": 0,
            "global_step": step,
            "pytorch-lightning_version": self._lightning.__version__,
            "state_dict": system.state_dict(),
            "callbacks": {},
        }
        system.on_save_checkpoint(content)
        torch.save(content, folder / f"epoch=0-step={step}.ckpt")
        torch.save(content, folder / "last.ckpt")
        for logger in self._loggers:
            logger.save()
            logger.finalize("success")
        stats = solution.stats
        report = {
            "steps": step,
            "iterations": stats.num_iterations,
            "evaluations": stats.num_evaluations,
            "steps_per_iteration": step / stats.num_iterations,
            "result": solution.result.value,
        }
        settings = {
            "workers": self._workers,
            "solver": asdict(self._ours.solver),
        }
        text = json.dumps({**report, **settings}, indent=2) + "\n"
        (self._folder / "report.json").write_text(text)
        print(f"{self._folder}: {json.dumps(report)}")
        if self.stop.signal is None:
            self._evaluate("test", step, solution.value)
            return
        print(
            f"Stopped at step {step}. To go on: `python launch.py --config "
            f"{self._folder}/configs/parsed.yaml --train backend=threestudio "
            f"resume={self._folder}`, with the other settings of this run's command."
        )

    def _evaluate(self, stage: str, step: int, y: dp.State) -> None:
        """Render with threestudio's own validation or test."""
        trajectory = self._trajectory
        trajectory.settle(step, y)
        system, given = trajectory.module, dict(self._cfg.trainer)
        trainer = self._lightning.Trainer(
            **{**given, "enable_progress_bar": False},
            accelerator=trajectory.device.type,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            inference_mode=False,
        )
        system.set_resume_status(0, step)
        # Some systems read the trainer's own count, which only `fit` would raise.
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
        loop.manual_optimization.optim_step_progress.total.completed = step
        getattr(trainer, stage)(
            system, datamodule=trajectory.shim.datamodule, verbose=False
        )
        trajectory.attach()
