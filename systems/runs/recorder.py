"""Records a run in progress, and stops it on request.

Metrics go to `metrics.jsonl` and TensorBoard, the current object to `preview.png`,
checkpoints to `ckpts/`. Ctrl-C, SIGTERM or a file named `stop` in the run folder end
the run after the current iteration. Only rank 0 writes and listens.
"""

from __future__ import annotations

import abc
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

import dreampropeller as dp
from dreampropeller import checkpoint
from dreampropeller.checkpoint import CheckpointError
from systems.files import named
from systems.images import save_image
from systems.problem import Problem
from systems.runs import folders, history, results, viewer
from systems.runs.last_state import LastState
from systems.runs.stopping import STOP, Stop

PATIENCE = 0.5
"""A pause lasts at most this share of the time that other processes wait."""
LEAN_SHARE = 0.018
"""Largest share of the time that lean checkpoints take."""


class Recorder(abc.ABC):
    """Records a run in progress; the `on_iteration` of its solve.

    Args:
        files: Files that request a stop. None: neither listen nor record (ranks other
            than 0).
        patience: Seconds that a pause lasts at most.
    """

    def __init__(
        self, files: Sequence[Path] | None, patience: float = math.inf
    ) -> None:
        self.leads = files is not None
        self._stop = Stop(files, patience)
        self._last = LastState()

    @property
    def interrupted(self) -> signal.Signals | None:
        """The signal that requested the stop, if any."""
        return self._stop.signal

    def run(self, solve: Callable[[Recorder], dp.Solution[Any]]) -> int:
        """Solve, record, and write the results; returns the exit code.

        Accepted steps are saved even if the solve fails: a drift that raises, a rank
        that is lost or a second Ctrl-C lose the iteration in progress, and no other.

        Args:
            solve: Solves the problem with the given `on_iteration`.

        Raises:
            NotConverged: The solve ended before its last step.
        """
        with self.recording():
            try:
                solution = solve(self)
            except dp.NotConverged as error:
                if self.leads:
                    self.save(error.solution.state)
                    self.stopped(error.solution.state.step)
                raise
            except BaseException as error:
                self._rescue(error)
                raise
            if self.leads:
                self.save(solution.state)
        if self.leads:
            self.finish(solution)
        return 128 + self.interrupted if self.interrupted else 0

    def _rescue(self, error: BaseException) -> None:
        """Save the last accepted state after an exception, and say what is saved."""
        state = self._last.intact()
        failed = isinstance(error, CheckpointError)
        if not self.leads or not self.saves or state is None or failed:
            return
        try:
            self.save(state)
        except CheckpointError as unsaved:
            print(f"note: {unsaved}", file=sys.stderr)
            return
        print(f"Saved up to step {state.step}, after an error.", file=sys.stderr)
        self.stopped(state.step)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Open files and signal handlers for the time of a solve."""
        with self._stop.listening():
            yield

    def __call__(self, state: dp.SolverState[Any], iteration: dp.Iteration) -> bool:
        """Record an iteration; True requests the solve to stop."""
        if not self.leads:
            return False
        self._last.keep(state)
        self.record(state, iteration)
        self._stop.wait()
        return self._stop.asked()

    @abc.abstractmethod
    def record(self, state: dp.SolverState[Any], iteration: dp.Iteration) -> None:
        """Record an iteration, and write what is due after it."""

    @property
    def saves(self) -> bool:
        """Whether the problem has checkpoints; default: yes."""
        return True

    @abc.abstractmethod
    def save(self, state: dp.SolverState[Any]) -> None:
        """Write a checkpoint."""

    def stopped(self, step: int) -> None:
        """Print what can be done with a run that failed after a step; default: none."""
        del step

    @abc.abstractmethod
    def finish(self, solution: dp.Solution[Any]) -> None:
        """Write the results at the end, and print a summary."""

    @staticmethod
    def due(interval: int, iteration: dp.Iteration) -> bool:
        """Whether an iteration crossed a multiple of an interval of steps."""
        return interval > 0 and iteration.begin // interval < iteration.end // interval


class FolderRecorder(Recorder):
    """Records a run in its folder: metrics, previews, checkpoints, and the results.

    Args:
        problem: The problem that is solved.
        folder: Folder to write to; None writes nothing (ranks other than 0).
        state: State that the run resumes from; None: a new run.

    Attributes:
        solving: Wall-clock seconds of the solve, without the recorder's own writing,
            saving and rendering. A resumed run includes the seconds before it.
    """

    def __init__(
        self,
        problem: Problem,
        folder: Path | None,
        state: dp.SolverState[Any] | None = None,
    ) -> None:
        dispatch = problem.config.dispatch
        alone = dispatch.count == 1 or dispatch.backend == "ray"
        patience = math.inf if alone else PATIENCE * dispatch.timeout
        super().__init__(None if folder is None else [folder / STOP], patience)
        self.problem = problem
        self.folder = folder
        self.config = problem.config
        self.started = time.perf_counter()
        self.solving = 0.0
        self._returned = self._written_at = self.started
        self._lean_seconds = 0.0
        self._begin = self._saved_at = state.step if state else 0
        self._elapsed_before = 0.0
        if folder is not None and state is not None:
            self._take_over(folder, state.stats.num_iterations)
        self._metrics: TextIO | None = None
        self._board: Any = None
        self._bar: Any = None
        self._so_far = ""  # quality at the last preview, where someone watches

    def _take_over(self, folder: Path, num_iterations: int) -> None:
        """Continue from the seconds of the earlier iterations."""
        lines = history.lines(folder)
        self._elapsed_before = history.elapsed(lines, num_iterations)
        for entry in history.iterations(lines):
            if entry["iteration"] == num_iterations:
                self.solving = entry["solving"]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Open files, progress bar and signal handlers for a solve."""
        with super().recording(), self._files():
            yield

    @contextmanager
    def _files(self) -> Iterator[None]:
        if self.folder is None:
            yield
            return
        from torch.utils.tensorboard import SummaryWriter

        self._metrics = open(self.folder / history.FILE, "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(self.folder / "tensorboard"))
        self._bar = tqdm(
            total=self.problem.num_steps,
            initial=self._begin,
            desc=self.problem.title[:40],
            unit="step",
            dynamic_ncols=True,
            disable=None,  # quiet where nobody watches: not a terminal
        )
        self._returned = time.perf_counter()
        try:
            yield
        finally:
            self._bar.close()
            with named(self.folder / "metrics.jsonl"):  # flushes the rest
                self._metrics.close()
            self._board.close()

    def __call__(self, state: dp.SolverState[Any], iteration: dp.Iteration) -> bool:
        """Record an iteration, and time the recording separately."""
        self.solving += time.perf_counter() - self._returned
        try:
            return super().__call__(state, iteration)
        finally:
            self._returned = time.perf_counter()

    def record(self, state: dp.SolverState[Any], iteration: dp.Iteration) -> None:
        """Write metrics of each iteration, previews and checkpoints when due."""
        assert self.folder is not None
        with named(self.folder / "metrics.jsonl"):
            self._write_metrics(state, iteration)
        strides = state.stats.strides
        self._bar.update(iteration.stride)
        if self.due(self.config.trainer.val_check_interval, iteration):
            self._preview(state)
        words = [
            f"stride {iteration.stride}/{iteration.window}",
            f"{sum(strides) / len(strides):.2f}x fewer iterations",
            self._so_far,
        ]
        self._bar.set_postfix_str(", ".join(filter(None, words)))
        settings = self.config.checkpoint
        every = settings.every_n_iterations
        if state.step - self._saved_at >= settings.every_n_train_steps or (
            every is not None and state.stats.num_iterations % every == 0
        ):
            self.save(state)
        elif self._lean_is_due():
            self._write(state, lean=True)

    def _lean_is_due(self) -> bool:
        """Whether a lean checkpoint is due, and takes a small share of the time."""
        every = self.config.checkpoint.lean_every_n_seconds
        since = time.perf_counter() - self._written_at
        return every is not None and since >= max(
            every, self._lean_seconds / LEAN_SHARE
        )

    @property
    def saves(self) -> bool:
        """Whether the problem has checkpoints."""
        return "checkpoint" in self.problem.sections

    def save(self, state: dp.SolverState[Any]) -> None:
        """Write a checkpoint."""
        self._write(state, lean=False)
        self._saved_at = state.step

    def _write(self, state: dp.SolverState[Any], lean: bool) -> None:
        if not self.saves:
            return
        assert self.folder is not None
        begin = time.perf_counter()
        checkpoint.save(
            self.folder / folders.CHECKPOINTS,
            state,
            keep=self.config.checkpoint.keep,
            lean=lean,
        )
        self._written_at = time.perf_counter()
        if lean:
            self._lean_seconds = self._written_at - begin

    def finish(self, solution: dp.Solution[Any]) -> None:
        """Write the results (not after SIGTERM) and the report."""
        assert self.folder is not None
        leaves = self.interrupted is signal.SIGTERM
        made = {} if leaves else self.problem.write(self.folder, solution.value)
        end = {"end": solution.stats.num_iterations, "elapsed": self._elapsed()}
        with open(self.folder / history.FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(end) + "\n")
        report = {
            "title": self.problem.title,
            **made,
            **results.report_of(self.folder, self.config, solution),
        }
        found = results.collapses(history.lines(self.folder), solution.value)
        report["notes"] = [*made.get("notes", []), *self.problem.notes, *found]
        viewer.add(self.folder, report, self.problem.title)
        folders.write_json(self.folder / "report.json", report)
        print(results.summary(self.folder, self.problem, report))

    def stopped(self, step: int) -> None:
        """Print how to resume or inspect a failed run."""
        assert self.folder is not None
        made = {"steps": step}
        print("\n".join(results.next_steps(self.folder, self.problem, made)))

    def _elapsed(self) -> float:
        """Wall-clock seconds of the run, loading and writing included."""
        since = time.perf_counter() - self.started
        return round(self._elapsed_before + since, 3)

    def _write_metrics(
        self, state: dp.SolverState[Any], iteration: dp.Iteration
    ) -> None:
        assert self._metrics is not None
        every = self.config.trainer.log_every_n_steps
        for offset, aux in enumerate(iteration.aux):
            step = iteration.begin + offset
            if step % every:
                continue
            entry = {"step": step, **{key: _rounded(v) for key, v in aux.items()}}
            self._metrics.write(json.dumps(entry) + "\n")
            for key, value in aux.items():
                self._board.add_scalar(f"train/{key}", value, step)
        entry = {
            "iteration": state.stats.num_iterations,
            "begin": iteration.begin,
            "window": iteration.window,
            "stride": iteration.stride,
            "errors": [_number(error) for error in iteration.errors],
            "threshold": iteration.threshold,
            **{name: _number(v) for name, v in iteration.diagnostics.items()},
            "seconds": {k: round(v, 4) for k, v in iteration.seconds.items()},
            "elapsed": self._elapsed(),
            "solving": round(self.solving, 4),
            "evaluations": state.stats.num_evaluations,
            "workers": self.config.dispatch.count,
        }
        self._metrics.write(json.dumps(entry) + "\n")
        self._metrics.flush()
        self._board.add_scalar("solver/stride", iteration.stride, state.step)
        if iteration.threshold is not None:
            self._board.add_scalar("solver/threshold", iteration.threshold, state.step)
        for name, value in iteration.diagnostics.items():
            self._board.add_scalar(f"solver/{name}", value, state.step)

    def _preview(self, state: dp.SolverState[Any]) -> None:
        assert self.folder is not None
        images = self.problem.preview(state.y)
        if images is None:
            return
        save_image(images, self.folder / "preview.png")
        if not self._bar.disable:
            self._so_far = self.problem.so_far(state.y)
        sheet = torch.cat(list(images), -1)
        self._board.add_image("preview", sheet.clamp(0, 1), state.step)


def _rounded(value: float) -> float | None:
    """Round to six decimals; None where not finite, as JSON has no such number."""
    return round(value, 6) if math.isfinite(value) else None


def _number(value: float) -> float | None:
    """Round to four digits; None where not finite, as JSON has no such number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
