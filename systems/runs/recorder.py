"""Writes a run down while it goes on, and listens whether to stop.

Metrics go to `metrics.jsonl` and TensorBoard, the object so far to `preview.png`,
checkpoints to `ckpts/`. Ctrl-C, SIGTERM or a file named `stop` in the run folder end
the run after the iteration at hand. Only rank 0 writes and listens.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

import dreampropeller as dp
from dreampropeller import checkpoint
from systems.base import System
from systems.files import named
from systems.images import save_picture
from systems.runs.folders import CHECKPOINTS
from systems.runs.stopping import Stop

PREVIEW_VIEWS = 4
STOP = "stop"
"""Name of the file in the run folder that asks to stop."""


class Recorder:
    """Writes a run down as it goes on; the `on_iteration` of its solve.

    Args:
        system: What runs.
        folder: Where to write; None writes nothing (ranks other than 0).
        begin: The step the run starts from.

    Attributes:
        seconds: Time by phase of the solve.
        solving: Wall-clock seconds of the solve, without what the recorder itself
            takes to write, save and render.
    """

    def __init__(self, system: System, folder: Path | None, begin: int) -> None:
        self.system = system
        self.folder = folder
        self.config = system.config
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()
        self.solving = 0.0
        self._returned = self.started
        self._stop = Stop(None if folder is None else [folder / STOP])
        self._begin = begin
        self._saved_at = begin
        self._metrics: TextIO | None = None
        self._board: Any = None
        self._bar: Any = None

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Open files, progress bar and signal handlers for a solve.

        Whatever ends it, what was accepted by then is saved.
        """
        with self._stop.listening(), self._files():
            yield self

    @property
    def interrupted(self) -> signal.Signals | None:
        """The signal that asked to stop, if one did."""
        return self._stop.signal

    @contextmanager
    def _files(self) -> Iterator[None]:
        if self.folder is None:
            yield
            return
        from torch.utils.tensorboard import SummaryWriter

        self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(self.folder / "tensorboard"))
        self._bar = tqdm(
            total=self.config.trainer.max_steps,
            initial=self._begin,
            desc=self.system.prompt[:40],
            unit="step",
            dynamic_ncols=True,
        )
        self._returned = time.perf_counter()
        try:
            yield
        finally:
            self._bar.close()
            with named(self.folder / "metrics.jsonl"):  # it writes what is left
                self._metrics.close()
            self._board.close()

    def __call__(self, state: dp.SolverState[Any], iteration: dp.Iteration) -> bool:
        """Write an iteration down; True asks the solve to stop."""
        self.solving += time.perf_counter() - self._returned
        try:
            return self._write(state, iteration)
        finally:
            self._returned = time.perf_counter()

    def _write(self, state: dp.SolverState[Any], iteration: dp.Iteration) -> bool:
        for phase, seconds in iteration.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        if self.folder is None:
            return False
        with named(self.folder / "metrics.jsonl"):
            self._write_metrics(state, iteration)
        strides = state.stats.strides
        self._bar.update(iteration.stride)
        self._bar.set_postfix_str(
            f"stride {iteration.stride}/{iteration.window}, "
            f"{sum(strides) / len(strides):.2f}x fewer iterations"
        )
        interval = self.config.trainer.val_check_interval
        if (state.step // interval) > ((state.step - iteration.stride) // interval):
            self._preview(state)
        if state.step - self._saved_at >= self.config.checkpoint.every_n_train_steps:
            self.save(state)
        return self._stop.asked()

    def save(self, state: dp.SolverState[Any]) -> None:
        """Write a checkpoint."""
        if self.folder is None:
            return
        checkpoint.save(
            self.folder / CHECKPOINTS, state, keep=self.config.checkpoint.keep
        )
        self._saved_at = state.step

    def _write_metrics(
        self, state: dp.SolverState[Any], iteration: dp.Iteration
    ) -> None:
        assert self._metrics is not None
        every = self.config.trainer.log_every_n_steps
        elapsed = round(time.perf_counter() - self.started, 3)
        for offset, aux in enumerate(iteration.aux):
            step = iteration.begin + offset
            if step % every:
                continue
            entry = {"step": step, **{key: round(v, 6) for key, v in aux.items()}}
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
            "elapsed": elapsed,
            "solving": round(self.solving, 4),
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
        pictures = torch.stack(list(self.system.turntable(state.y, PREVIEW_VIEWS)))
        save_picture(pictures, self.folder / "preview.png")
        sheet = torch.cat(list(pictures), -1)
        self._board.add_image("preview", sheet.clamp(0, 1), state.step)


def _number(value: float) -> float | None:
    """Four digits; JSON has no infinity and no NaN."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
