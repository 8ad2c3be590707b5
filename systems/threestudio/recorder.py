"""Records a run in threestudio's folder layout, and loads what it resumes from."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

import dreampropeller as dp
from dreampropeller import checkpoint, identity
from dreampropeller.adapters.threestudio import ThreestudioTrajectory
from systems.runs import recorder
from systems.runs.stopping import STOP, forget
from systems.settings.reader import ConfigError, to_section
from systems.threestudio.config import BackendConfig

_STATES = "dreampropeller"
"""Folder in `ckpts/` of the states that a run resumes from."""


def load_state(path: str) -> dp.SolverState[Any]:
    """The solver state that a run resumes from.

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


def check_state(state: dp.SolverState[Any], trajectory: ThreestudioTrajectory) -> None:
    """Refuse to resume with other settings, before anything is written.

    Raises:
        ConfigError: Names the settings that differ.
    """
    found, wanted = dict(state.problem), trajectory.fingerprint()
    if found.get("num_steps", 0) <= wanted["num_steps"]:
        found["num_steps"] = wanted["num_steps"]  # a run may be prolonged
    differ = identity.differences(found, wanted) if state.problem else ""
    if differ:
        raise ConfigError(
            f"The run to resume had other settings: {differ}. Write them as they were "
            "(`--config RUN/configs/parsed.yaml`), or start a new run without `resume`."
        )


class Recorder(recorder.Recorder):
    """Records a run in threestudio's folder layout.

    Args:
        trajectory: The trajectory that is solved.
        cfg: threestudio's config.
        lightning: The Lightning module that the checkout imports.
        ours: Our sections of the config.
        leads: Whether this rank records the run.
        stop: A file that requests a stop, besides the run folder's `stop`.
    """

    def __init__(
        self,
        trajectory: ThreestudioTrajectory,
        cfg: Any,
        lightning: Any,
        ours: BackendConfig,
        leads: bool,
        stop: Path | None,
    ) -> None:
        self._folder = Path(cfg.trial_dir)
        files = [file for file in (self._folder / STOP, stop) if file is not None]
        super().__init__(files if leads else None)
        self._ours = ours
        self._trajectory, self._cfg, self._lightning = trajectory, cfg, lightning
        self._loggers: list[Any] = []
        self._workers = dist.get_world_size() if dist.is_initialized() else 1
        self._every = int(cfg.trainer.get("val_check_interval") or 0)
        self._saves = int(cfg.checkpoint.get("every_n_train_steps") or 0)

    def snapshot(self, path: Path, run: str) -> None:
        """Write the config and the command where `--test` looks for them.

        Args:
            path: The config's file.
            run: Name of the run that is resumed; empty: a new one.

        Raises:
            ConfigError: The folder holds another run.
            CheckpointError: Another process runs in the folder.
        """
        configs = self._folder / "configs"
        configs.mkdir(parents=True, exist_ok=True)
        checkpoint.lock(self._folder)
        forget(self._folder)
        other = checkpoint.run_of(self._folder / "ckpts" / _STATES)
        parsed = configs / "parsed.yaml"
        unsaved = not other and not run and parsed.exists()
        if other not in ("", run) or (unsaved and self._differs(parsed)):
            raise ConfigError(
                f"`{self._folder}` holds another run: leave `use_timestamp` on, name "
                f"another `tag`, or write `resume={self._folder}`."
            )
        OmegaConf.save(self._cfg, parsed)
        if path != (configs / "raw.yaml").resolve():
            shutil.copyfile(path, configs / "raw.yaml")
        command = "python " + " ".join(sys.argv) + "\n"
        (self._folder / "cmd.txt").write_text(command)
        loggers: Any = importlib.import_module("pytorch_lightning.loggers")
        for kind, name in (("TensorBoardLogger", "tb_logs"), ("CSVLogger", "csv_logs")):
            self._loggers.append(getattr(loggers, kind)(str(self._folder), name=name))

    def _differs(self, parsed: Path) -> bool:
        """Whether a config that was written before is of another problem."""
        sections: list[Any] = [OmegaConf.load(parsed), self._cfg]
        one, other = (
            [OmegaConf.to_container(cfg[name]) for name in ("system", "data")]
            for cfg in sections
        )
        return one != other

    def record(self, state: dp.SolverState[Any], iteration: dp.Iteration) -> None:
        """Log an iteration; validate and save when due."""
        for offset, aux in enumerate(iteration.aux):
            for logger in self._loggers:
                logger.log_metrics(aux, step=iteration.begin + offset)
        told = {"stride": float(iteration.stride), **iteration.diagnostics}
        if iteration.threshold is not None:
            told["threshold"] = iteration.threshold
        for board in self._loggers[:1]:  # not the table, which has a row for each step
            names = {f"solver/{name}": value for name, value in told.items()}
            board.log_metrics(names, step=state.step)
        if self.due(self._every, iteration) or self.due(self._saves, iteration):
            self.save(state)
        if self.due(self._every, iteration):
            self._evaluate("validate", state.step, state.y)

    def save(self, state: dp.SolverState[Any]) -> None:
        """Write a checkpoint to resume from."""
        checkpoint.save(self._folder / "ckpts" / _STATES, state)

    def finish(self, solution: dp.Solution[Any]) -> None:
        """Write checkpoints for threestudio, its test images, and the cost of the run.

        A run that stopped early is saved, but not tested.
        """
        step, folder = solution.state.step, self._folder / "ckpts"
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
            "solver": to_section(self._ours.solver),
        }
        text = json.dumps({**report, **settings}, indent=2) + "\n"
        (self._folder / "report.json").write_text(text)
        print(f"{self._folder}: {json.dumps(report)}")
        if self.interrupted is None:
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
            accelerator=trajectory.host.device.type,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            inference_mode=False,
        )
        system.set_resume_status(0, step)
        # Some systems read the trainer's step count, which only `fit` increments.
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
        loop.manual_optimization.optim_step_progress.total.completed = step
        getattr(trainer, stage)(
            system, datamodule=trajectory.host.shim.datamodule, verbose=False
        )
        trajectory.host.attach()
