"""Drifts on Ray actors, which may die, be replaced, and join later.

One process runs the solver; each actor holds a replica of the trajectory. The guesses
of a window are sent nearest first, one to each idle worker, so that the step that all
others wait for never stands behind one that is further ahead, whatever the workers'
speeds. A guess whose worker died is sent again, and the worker is replaced.

Drifts are functions of step and state, so where and how often one is evaluated changes
nothing: equal to `InlineDispatcher` bit for bit on CPU (`test_ray.py`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from dreampropeller.dispatch import wire
from dreampropeller.dispatch.base import Dispatcher, WorkerError
from dreampropeller.dispatch.guesses import Guesses
from dreampropeller.dispatch.process_group import local_device
from dreampropeller.trajectory import Drift, Trajectory
from dreampropeller.tree import Aux, State, device_of

if TYPE_CHECKING:
    import numpy as np

_MOST_LOSSES = 3
"""Workers that may die of one guess before the solve fails."""
Message = tuple[list[wire.Entry], "np.ndarray"]


class _Replica:
    """An actor: evaluates drifts of its own replica of the trajectory."""

    def __init__(self, make: Callable[[], Trajectory[Any]], threads: int) -> None:
        torch.set_num_threads(threads)
        self._trajectory = make()
        self._device = local_device()
        self._drift: Drift | None = None
        self._guesses = Guesses()

    def ready(self) -> int:
        """The process, once the replica is built."""
        return os.getpid()

    def evaluate(self, slot: int, step: int, message: Message) -> Message:
        """The drift of a slot, from a guess."""
        y, _ = _unpacked(message, self._device)
        if self._drift is None:
            self._drift = self._trajectory.make_drift(self._device)
        return _packed(*self._guesses.evaluate(self._drift, slot, step, y))


class _Worker:
    """An actor as the solver sees it."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.starting = actor.ready.remote()


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

    Raises:
        ImportError: Ray is not installed.
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
    ) -> None:
        super().__init__(trajectory)
        for name, value in (("num_workers", num_workers), ("threads", threads)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}: write at least 1.")
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise ImportError(
                "`RayDispatcher` needs Ray: `pip install ray`, or use "
                "`DistributedDispatcher`, which needs nothing more."
            ) from error
        self._ray = ray
        self.num_workers = num_workers
        self._make = (lambda: trajectory) if make is None else make
        self._address = address
        self._elastic = elastic
        self._threads = threads
        self._num_gpus = num_gpus
        self._previous_threads = torch.get_num_threads()
        self._folder: str | None = None
        self._workers: list[_Worker] = []
        self._busy: dict[Any, _Worker] = {}

    def __enter__(self) -> RayDispatcher:
        torch.set_num_threads(self._threads)
        self._owns_cluster = not self._ray.is_initialized()
        if self._owns_cluster:
            self._start_cluster()
        gpus = float(torch.cuda.is_available())
        gpus = gpus if self._num_gpus is None else self._num_gpus
        self._actor = self._ray.remote(num_cpus=1, num_gpus=gpus)(_Replica)
        self._replica = self._ray.put(self._make)
        self._workers = [self._new_worker() for _ in range(self.num_workers)]
        return self

    def _start_cluster(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"log_to_driver": False, "configure_logging": False}
        if self._address is not None:
            self._ray.init(self._address, **quiet)
            return
        self._folder = tempfile.mkdtemp(prefix="dp-")  # a socket's path is short
        self._ray.init(
            num_cpus=self.num_workers,
            include_dashboard=False,
            object_store_memory=2**28,
            _node_ip_address="127.0.0.1",
            _temp_dir=self._folder,
            **quiet,
        )

    def _new_worker(self) -> _Worker:
        return _Worker(self._actor.remote(self._replica, self._threads))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        torch.set_num_threads(self._previous_threads)
        for worker in self._workers:
            with contextlib.suppress(Exception):  # it may have died
                self._ray.kill(worker.actor)
        self._workers, self._busy = [], {}
        if self._owns_cluster:
            self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def evaluate(
        self, steps: Sequence[int], ys: Sequence[State]
    ) -> list[tuple[State, Aux]]:
        """Evaluate the drifts, nearest first; fewer if elastic and a worker died.

        Raises:
            WorkerError: A drift failed, or its workers died again and again.
        """
        with self.timer.phase("drift"):
            window = _Window(steps, ys)
            while window.waiting or window.running:
                self._send(window)
                starting = [w.starting for w in self._workers if w.starting is not None]
                self._ray.wait([*self._busy, *starting], timeout=1.0)
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
            if not window.waiting:
                return
            if id(worker) not in at_work and self._is_ready(worker):
                slot = window.waiting.pop(0)
                guess = _packed(window.ys[slot], {})
                ref = worker.actor.evaluate.remote(slot, window.steps[slot], guess)
                self._busy[ref], window.running[ref] = worker, slot

    def _receive(self, ref: Any, window: _Window) -> None:
        """Take a result, or send its guess again if the worker died."""
        worker, slot = self._busy.pop(ref), window.running.pop(ref, None)
        step = None if slot is None else window.steps[slot]
        result = self._result(ref, worker, step)
        if slot is None:
            return  # of an earlier window, which was cut before it
        if result is not None:
            window.found[slot] = _unpacked(result, window.device)
            return
        window.losses[slot] += 1
        if window.losses[slot] >= _MOST_LOSSES:
            raise WorkerError(
                f"{_MOST_LOSSES} workers died while they evaluated step {step}, one "
                "after the other: they may lack memory. Use fewer workers, or a "
                "smaller problem. The last checkpoint is intact."
            )
        if self._elastic and slot > 0:
            window.cut(slot)
        else:
            window.waiting = sorted([*window.waiting, slot])

    def _is_ready(self, worker: _Worker) -> bool:
        """Whether a worker's replica is built."""
        if worker.starting is not None:
            if not self._ray.wait([worker.starting], timeout=0)[0]:
                return False
            self._result(worker.starting, worker, None, replace=False)
            worker.starting = None
        return True

    def _result(
        self, ref: Any, worker: _Worker, step: int | None, replace: bool = True
    ) -> Any:
        """What a worker returned; None if it died, after which it is replaced.

        Raises:
            WorkerError: The drift raised, or a replica cannot be built.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except errors.RayTaskError as error:
            where = "A worker failed" + ("" if step is None else f", step {step}")
            raise WorkerError(f"{where}:\n{error}") from None
        except errors.RayError as error:
            if not replace:
                raise WorkerError(
                    f"A worker could not build its replica of the trajectory:\n{error}"
                ) from None
            self._workers.remove(worker)
            self._workers.append(self._new_worker())
            return None


def _packed(drift: State, aux: Aux) -> Message:
    """A drift, or a state, as one array of bytes."""
    slot = wire.entries(drift, aux)
    row = list(slot)
    buffer = torch.empty(wire.size([row]), dtype=torch.uint8)
    wire.pack([row], [slot], buffer)
    return row, buffer.numpy()


def _unpacked(message: Message, device: torch.device) -> tuple[State, Aux]:
    """The tensors of a message, in memory that torch has aligned."""
    row, content = message
    buffer = torch.empty(len(content), dtype=torch.uint8)
    buffer.numpy()[:] = content
    ((drift, aux),) = wire.unpack([row], buffer)
    return {name: value.to(device) for name, value in drift.items()}, aux
