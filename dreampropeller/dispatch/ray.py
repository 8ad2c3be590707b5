"""Drifts on Ray actors, which may die, be replaced, and join later.

One process runs the solver; each actor holds a replica of the trajectory. The guesses
of a window are sent nearest first, one to each idle worker, so that the step that all
others wait for never stands behind one that is further ahead, whatever the workers'
speeds. A guess whose worker died is sent again, and the worker is replaced. Workers are
pinged during a drift: one that is stopped, or whose machine has lost its network,
counts as dead after `heartbeat` seconds, however long the drift takes.

Drifts are functions of step and state, so where and how often one is evaluated changes
nothing: equal to `InlineDispatcher` bit for bit on CPU (`test_ray.py`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

from dreampropeller.dispatch import ray_cluster
from dreampropeller.dispatch.base import Dispatcher, WorkerError
from dreampropeller.dispatch.ray_replica import Replica, packed, unpacked
from dreampropeller.trajectory import Trajectory
from dreampropeller.tree import Aux, State, device_of

_MOST_LOSSES = 3
"""Workers that may die of one guess, or of one start, before the solve fails."""
_PARTS = 10
"""Looks at the workers per heartbeat."""
_PATIENCE = 30.0
"""Seconds without any worker after which a warning tells why nothing happens."""
_log = logging.getLogger(__name__)


class _Worker:
    """An actor as the solver sees it.

    Args:
        actor: The actor.
        replica: What builds its replica.
        losses: How many of its predecessors died while they started.

    Attributes:
        starting: Its process, as long as that is awaited.
        process: Its process, once the replica is built.
        ping: The sign of life that has been asked for.
        heard: When it gave the last one, or was given its guess; seconds.
    """

    def __init__(self, actor: Any, replica: Any, losses: int) -> None:
        self.actor = actor
        self.starting = actor.ready.remote(replica)
        self.losses = losses
        self.process = 0
        self.ping: Any = None
        self.heard = 0.0


class _Window:
    """The guesses of one evaluation: found, at work, and waiting to be sent."""

    def __init__(self, steps: Sequence[int], ys: Sequence[State]) -> None:
        self.steps, self.ys = steps, ys
        self.device = device_of(ys[0])
        self.waiting = list(range(len(steps)))
        self.running: dict[Any, int] = {}
        self.found: dict[int, tuple[State, Aux]] = {}
        self.losses = [0] * len(steps)

    def cut(self, end: int) -> None:
        """Leave out the guesses from one on."""
        self.waiting = [slot for slot in self.waiting if slot < end]
        self.running = {ref: slot for ref, slot in self.running.items() if slot < end}
        self.found = {slot: one for slot, one in self.found.items() if slot < end}


class RayDispatcher(Dispatcher):
    """Spreads the window over Ray actors.

    Args:
        trajectory: Trajectory whose drifts are evaluated.
        num_workers: Number of actors. The window never depends on how many of them are
            at hand.
        make: Builds a replica of the trajectory on an actor; default: the trajectory is
            pickled.
        address: Address of a running cluster (``"auto"``, ``"HOST:PORT"``). None: an
            embedded cluster on this machine, or the one that `ray.init` has joined.
        elastic: A guess that a dead worker leaves behind cuts the window there instead
            of being sent again (except the first). Strides then depend on such
            accidents; at threshold 0 the result does not.
        threads: CPU threads per actor, as results depend on it.
        num_gpus: GPUs per actor; default: one if this process has a GPU.
        timeout: Seconds to wait for a first worker that is ready.
        heartbeat: Seconds without a sign of life after which an actor that evaluates a
            drift is replaced; None: never. Code that holds the interpreter's lock for
            longer is taken for a lost actor.

    Raises:
        ImportError: Ray is not installed.
        OSError: Nothing listens at the address.
    """

    def __init__(
        self,
        trajectory: Trajectory[Any],
        *,
        num_workers: int = 2,
        make: Callable[[], Trajectory[Any]] | None = None,
        address: str | None = None,
        elastic: bool = False,
        threads: int = 1,
        num_gpus: float | None = None,
        timeout: float = 600.0,
        heartbeat: float | None = 10.0,
    ) -> None:
        super().__init__(trajectory)
        for name, value in (("num_workers", num_workers), ("threads", threads)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}: write at least 1.")
        if timeout <= 0:
            raise ValueError(f"`timeout` is {timeout}: write a positive number.")
        if heartbeat is not None and heartbeat <= 0:
            raise ValueError(
                f"`heartbeat` is {heartbeat}: write a positive number of seconds, or "
                "None for no heartbeat."
            )
        self._ray = ray_cluster.load()
        ray_cluster.check_address(address)
        self.num_workers = num_workers
        self._make = (lambda: trajectory) if make is None else make
        self._cluster = ray_cluster.Cluster(self._ray, address, num_workers)
        self._elastic = elastic
        self._threads = threads
        self._num_gpus = num_gpus
        self._timeout, self._silence = timeout, heartbeat
        self._interval = 1.0 if heartbeat is None else min(1.0, heartbeat / _PARTS)
        self._previous_threads = torch.get_num_threads()
        self._workers: list[_Worker] = []
        self._busy: dict[Any, _Worker] = {}
        self._looked, self._had_one, self._warned = 0.0, 0.0, False

    def __enter__(self) -> RayDispatcher:
        try:
            self._open()
        except BaseException:  # `__exit__` is not called, then
            self._close()
            raise
        return self

    def _open(self) -> None:
        torch.set_num_threads(self._threads)
        self._cluster.start()
        if self._num_gpus is None:
            self._num_gpus = float(torch.cuda.is_available())
        needs = {"num_cpus": 1, "num_gpus": self._num_gpus}
        groups = {"concurrency_groups": {"life": 1}}
        self._actor = self._ray.remote(**needs, **groups)(Replica)
        self._replica = self._ray.put(self._make)
        self._workers = [self._new_worker() for _ in range(self.num_workers)]

    def _new_worker(self, losses: int = 0) -> _Worker:
        return _Worker(self._actor.remote(self._threads), self._replica, losses)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._close()

    def _close(self) -> None:
        torch.set_num_threads(self._previous_threads)
        for worker in self._workers:
            with contextlib.suppress(Exception):  # it may have died
                self._ray.kill(worker.actor)
            self._cluster.end(worker.process)
        self._workers, self._busy = [], {}
        self._cluster.stop()

    def evaluate(
        self, steps: Sequence[int], ys: Sequence[State]
    ) -> list[tuple[State, Aux]]:
        """Evaluate the drifts, nearest first; fewer if elastic and a worker died.

        Raises:
            WorkerError: A drift failed, or its workers died again and again.
        """
        with self.timer.phase("drift"):
            window = _Window(steps, ys)
            self._looked = self._had_one = time.monotonic()
            while window.waiting or window.running:
                self._send(window)
                self._look(window)
                starting = [w.starting for w in self._workers if w.starting is not None]
                self._ray.wait([*self._busy, *starting], timeout=self._interval)
                refs = list(self._busy)
                if refs:
                    done, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
                    for ref in done:
                        self._receive(ref, window)
            return [window.found[slot] for slot in range(len(window.found))]

    def _send(self, window: _Window) -> None:
        """Send the nearest guesses to workers that are ready and idle."""
        at_work = {id(worker) for worker in self._busy.values()}
        for worker in list(self._workers):
            if not self._is_ready(worker) or id(worker) in at_work:
                continue
            if window.waiting:
                slot = window.waiting.pop(0)
                guess = packed(window.ys[slot], {})
                ref = worker.actor.evaluate.remote(slot, window.steps[slot], guess)
                worker.heard = time.monotonic()
                self._busy[ref], window.running[ref] = worker, slot

    def _look(self, window: _Window) -> None:
        """Replace workers that are silent, and fail if there are none.

        Raises:
            WorkerError: No worker is ready after `timeout`.
        """
        now = time.monotonic()
        if now - self._looked > _PARTS / 2 * self._interval:
            # This process itself was stopped: nobody else can be blamed for it.
            self._had_one = now
            for worker in self._busy.values():
                worker.heard = now
        self._looked = now
        for ref, worker in list(self._busy.items()):
            if self._silence is None:
                break
            if worker.ping is not None and self._is_done(worker.ping):
                worker.ping, worker.heard = None, now
            if worker.ping is None:
                if now - worker.heard >= self._interval:  # short drifts need no ping
                    ping = worker.actor.ping.options(concurrency_group="life")
                    worker.ping = ping.remote()
            elif now - worker.heard > self._silence:
                _log.warning(
                    "A worker has given no sign of life for %g s and is replaced. (If "
                    "a call of a drift holds Python's interpreter lock for longer, "
                    "raise `heartbeat`.)",
                    self._silence,
                )
                del self._busy[ref]
                self._cluster.end(worker.process)
                self._replace(worker)
                self._lose(window.running.pop(ref, None), window)
        if any(worker.starting is None for worker in self._workers):
            self._had_one = now
        self._wait_for_one(now - self._had_one)

    def _wait_for_one(self, seconds: float) -> None:
        """Say why no worker is ready, and fail after `timeout`."""
        if seconds > self._timeout:
            raise WorkerError(
                f"No worker was ready within {self._timeout:g} s: {self._asked()}. Ask "
                "for less, wait until the cluster is free, or raise `timeout` if a "
                "replica takes longer to build."
            )
        if seconds > _PATIENCE and not self._warned:
            self._warned = True
            _log.warning(
                "No worker is ready after %g s: %s. The run fails after %g s.",
                *(_PATIENCE, self._asked(), self._timeout),
            )

    def _asked(self) -> str:
        gpus = f" and {self._num_gpus:g} GPU" if self._num_gpus else ""
        return (
            f"each of {self.num_workers} asks Ray for 1 CPU{gpus}, and "
            f"{ray_cluster.resources(self._ray)}"
        )

    def _receive(self, ref: Any, window: _Window) -> None:
        """Take a result, or send its guess again if the worker died.

        Raises:
            WorkerError: The drift raised.
        """
        worker, slot = self._busy.pop(ref), window.running.pop(ref, None)
        try:
            result = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            step = "" if slot is None else f", step {window.steps[slot]}"
            raise WorkerError(f"A worker failed{step}:\n{error}") from None
        except self._ray.exceptions.RayError:
            self._replace(worker)
            self._lose(slot, window)
            return
        if slot is not None:  # of this window, and not of one that was cut before it
            window.found[slot] = unpacked(result, window.device)

    def _lose(self, slot: int | None, window: _Window) -> None:
        """Send a guess again whose worker died, or cut the window there.

        Raises:
            WorkerError: The workers of this guess died again and again.
        """
        if slot is None:
            return
        window.losses[slot] += 1
        if window.losses[slot] >= _MOST_LOSSES:
            raise WorkerError(
                f"{_MOST_LOSSES} workers died while they evaluated step "
                f"{window.steps[slot]}, one after the other: they may lack memory. Use "
                "fewer workers, or a smaller problem. (Or raise `heartbeat`, if it was "
                "warned about.) The last checkpoint is intact."
            )
        if self._elastic and slot > 0:
            window.cut(slot)
        else:
            window.waiting = sorted([*window.waiting, slot])

    def _is_done(self, ref: Any) -> bool:
        return bool(self._ray.wait([ref], timeout=0)[0])

    def _is_ready(self, worker: _Worker) -> bool:
        """Whether a worker's replica is built; one that dies meanwhile is replaced.

        Raises:
            WorkerError: A replica cannot be built, or workers die again and again.
        """
        if worker.starting is None:
            return True
        if not self._is_done(worker.starting):
            return False
        try:
            worker.process = self._ray.get(worker.starting)
        except self._ray.exceptions.RayTaskError as error:
            raise WorkerError(
                f"A worker could not build its replica of the trajectory:\n{error}"
            ) from None
        except self._ray.exceptions.RayError as error:
            losses = worker.losses + 1
            if losses >= _MOST_LOSSES:
                raise WorkerError(
                    f"{losses} workers died while they started, one after the other: "
                    "they may lack memory. Use fewer workers, or a smaller problem. "
                    f"Cause: {' '.join(str(error).split())}"
                ) from None
            self._replace(worker, losses)
            return False
        worker.starting = None
        return True

    def _replace(self, worker: _Worker, losses: int = 0) -> None:
        with contextlib.suppress(Exception):  # it may have died
            self._ray.kill(worker.actor)
        self._workers.remove(worker)
        self._workers.append(self._new_worker(losses))
