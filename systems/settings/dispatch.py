"""Where gradients are evaluated: the `dispatch` section of a config."""

from __future__ import annotations

import os
from dataclasses import dataclass

from systems.settings.checks import at_least, one_of


@dataclass(frozen=True)
class DispatchConfig:
    """`dispatch`: where gradients are evaluated.

    Args:
        num_workers: Number of processes, one per device (further processes share
            GPUs); `launch.py` starts them.
        threads: CPU threads per process; null: all cores for a single process, one
            thread for each of several.
        timeout: Seconds that processes wait for one that is alive but has not finished;
            with Ray, for a first worker that is ready.
        heartbeat: Seconds without a sign of life after which a process counts as lost,
            and an actor of Ray is replaced; null: no heartbeat.
        max_restarts: Number of times that all processes are started again after one
            failed; they resume from the last checkpoint. (`torchrun` has its own
            `--max-restarts`.)
        backend: "processes", or "ray": actors of a Ray cluster, which are replaced
            when they die.
        ray_address: Ray cluster to join, such as "auto"; null: one is started on this
            machine.
        batch: Evaluation of a window on one device in one batched call, which is close
            to step by step and not bitwise equal: "never"; "auto": the window of 2, 4
            or 8 steps that was measured to pay, else the sequential run (measured once
            per device and config, and recorded beside the runs); "always": the
            solver's own window.
        elastic: Whether a guess that a dead actor leaves behind shortens the window
            instead of being evaluated again; Ray only.
        views: Number of processes that share the views of each step, a divisor of
            `num_workers`; the others take further steps of the window: `num_workers`
            is steps × views. Equal to the whole step up to rounding. `--plan` predicts
            what pays.
    """

    num_workers: int = 1
    threads: int | None = None
    timeout: float = 600.0
    heartbeat: float | None = 10.0
    max_restarts: int = 0
    backend: str = "processes"
    ray_address: str | None = None
    elastic: bool = False
    batch: str = "never"
    views: int = 1

    def __post_init__(self) -> None:
        one_of("backend", self.backend, ("processes", "ray"))
        if self.backend == "processes" and (self.elastic or self.ray_address):
            raise ValueError(
                "`elastic` and `ray_address` have no effect on processes: write "
                "`backend=ray`, or leave them out."
            )
        if self.backend == "ray" and self.max_restarts:
            raise ValueError(
                "`max_restarts` has no effect with `backend=ray`, which replaces its "
                "workers by itself: leave it out."
            )
        one_of("batch", self.batch, ("never", "auto", "always"))
        if self.batch != "never" and (self.backend == "ray" or self.count > 1):
            raise ValueError(
                f"`batch={self.batch}` puts a window on one device, and there are "
                "several workers: choose one."
            )
        at_least("num_workers", self.num_workers, 1)
        at_least("timeout", self.timeout, 1)
        at_least("max_restarts", self.max_restarts, 0)
        at_least("views", self.views, 1)
        if self.views > 1 and self.backend == "ray":
            raise ValueError(
                f"`views={self.views}` needs processes: write `backend=processes`, or "
                "`views=1`."
            )
        if self.count % self.views:
            raise ValueError(
                f"`views` is {self.views}, and there are {self.count} worker(s): their "
                "number is steps × views, so write "
                f"`num_workers={self.views * -(-self.count // self.views)}`, or "
                "`views=1`."
            )
        if self.heartbeat is not None:
            at_least("heartbeat", self.heartbeat, 1)
        if self.threads is not None:
            at_least("threads", self.threads, 1)

    @property
    def steps(self) -> int:
        """Number of steps that are evaluated at the same time."""
        return self.count // self.views

    @property
    def count(self) -> int:
        """Number of processes: those of torchrun, or those that `launch.py` starts."""
        return int(os.environ["WORLD_SIZE"]) if is_rank() else self.num_workers


def is_rank() -> bool:
    """Whether this process was started as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
