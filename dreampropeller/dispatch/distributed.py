"""One process per device, on one machine or many, over `torch.distributed` (SPMD).

Every rank runs the same solver. The update is deterministic, so only drifts are sent.
The ranks form a mesh of rows and columns (`views`): slot i of a window is evaluated by
row ``i mod rows``, each rank of a row takes its share of the step's views. The shards
of a row are gathered and added up in their order, then the drifts of all rows are
gathered. No rank is reserved as a driver. Rank 0 decides the stride and when to stop.
Faults: `dreampropeller.dispatch.ranks`.
"""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dreampropeller.dispatch import process_group, wire
from dreampropeller.dispatch.base import Dispatcher
from dreampropeller.dispatch.gathering import Axis, Layout, gather
from dreampropeller.dispatch.ranks import Meeting, Ranks
from dreampropeller.strides import flattened, restored
from dreampropeller.trajectory import Trajectory
from dreampropeller.tree import Aux, Nest, State, decode, device_of, encode


class DistributedDispatcher(Dispatcher):
    """Spreads the window over the ranks of a process group.

    Run the program under `torchrun`, or start it with
    `dreampropeller.launch_workers`. An existing process group is used and kept.
    Otherwise one is made from torchrun's environment and closed at the end: gloo
    on CPU, NCCL between GPUs. Inline and distributed solves are equal bit for bit on
    CPU at the same thread count (`test_dispatch.py`). If a machine has more ranks than
    GPUs, the ranks share them over gloo. NCCL has been run on a single GPU only.

    Args:
        trajectory: Trajectory whose drifts are evaluated. Its initial state must be the
            same on every rank, on the rank's own device.
        timeout: Seconds that ranks wait for one that is alive; more than the slowest
            drift takes.
        threads: CPU threads per rank, the same number everywhere, as results depend on
            it. One by default, so that ranks do not compete for cores.
        fingerprint_every: Number of iterations between two comparisons of the accepted
            states of all ranks; with 1, no state of a rank that has come apart is ever
            recorded. None: no comparison (devices of different models).
        heartbeat: Seconds without a sign of life after which a rank counts as lost;
            None: no heartbeat. More than any call of a drift that holds Python's
            interpreter lock takes.
        views: Number of ranks that share the views of a step, a divisor of the number
            of ranks; needs the trajectory's `make_shard`. Equal to the whole step up
            to the rounding of a sum in another order, and bitwise to every mesh of as
            many columns.

    Attributes:
        num_bytes: Bytes of drifts that this rank has received so far.
    """

    def __init__(
        self,
        trajectory: Trajectory[Any],
        *,
        timeout: float = 600.0,
        threads: int = 1,
        fingerprint_every: int | None = 1,
        heartbeat: float | None = 10.0,
        views: int = 1,
    ) -> None:
        super().__init__(trajectory, views=views)
        if timeout <= 0:
            raise ValueError(f"`timeout` is {timeout}: write a number of seconds > 0.")
        if threads < 1:
            raise ValueError(f"`threads` is {threads}: write at least 1.")
        if heartbeat is not None and heartbeat <= 0:
            raise ValueError(
                f"`heartbeat` is {heartbeat}: write a number of seconds > 0, or None."
            )
        self._timeout = datetime.timedelta(seconds=timeout)
        self._silence = heartbeat
        self._threads = threads
        self._fingerprint_every = fingerprint_every
        self._num_calls = 0
        self.num_bytes = 0
        self._owns_group = False
        self._previous_threads = torch.get_num_threads()

    def __enter__(self) -> DistributedDispatcher:
        if not dist.is_initialized():
            process_group.join(self._timeout)
            self._owns_group = True
        try:
            self._rows, self._columns = process_group.mesh(self.views, self._timeout)
        except BaseException:
            self._close_group()
            raise
        self.num_workers = len(self._rows.ranks)
        self._index = self._columns.index
        self._previous_threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        self._ranks = Ranks(self._timeout, self._silence)
        self._layout = Layout(self._ranks)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback_: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback_)
        try:
            self._ranks.leave(error)
        finally:
            torch.set_num_threads(self._previous_threads)
            self._ranks.close()
            if not self._owns_group:
                process_group.close_axes(self._rows, self._columns)
            self._close_group()

    def _close_group(self) -> None:
        if self._owns_group:
            process_group.close_group()
            self._owns_group = False

    def evaluate(
        self, steps: Sequence[int], ys: Sequence[State]
    ) -> list[tuple[State, Aux]]:
        """Evaluate this rank's slots, then gather those of all ranks.

        Raises:
            WorkerError: A rank failed or was lost, or the ranks' anchors differ.
        """
        mine = range(self._rows.index, len(steps), self.num_workers)
        with self.timer.phase("drift"), self._ranks.interruptible():
            results = [self._evaluate_one(i, steps[i], ys[i]) for i in mine]
        device = device_of(ys[0])
        if self.views > 1:
            with self.timer.phase("communication"):
                shards = self._gather(
                    results, steps, device, self._columns, Meeting.JOIN
                )
            with self.timer.phase("drift"):
                results = [
                    self._join_one(steps[slot], parts)
                    for slot, *parts in zip(mine, *shards, strict=False)
                ]
        if self.num_workers == 1 < self.views:
            return results
        with self.timer.phase("communication"):
            rows = self._gather(results, steps, device, self._rows, Meeting.EVALUATE)
        n = self.num_workers
        return [rows[slot % n][slot // n] for slot in range(len(steps))]

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """The numbers of rank 0, on every rank."""
        with self.timer.phase("communication"):
            return self._ranks.meet(Meeting.AGREE, *numbers)[0]

    def share(self, y: State, carry: Nest) -> tuple[State, Nest]:
        """The state and carry of rank 0, on every rank, after a jump."""
        self._layout.entries.clear()  # shapes have changed: exchanged again
        self._ranks.meet(Meeting.SHARE)
        structure, leaves = encode((y, carry))
        first = self._ranks.rank == 0
        flat = [flattened(leaf.detach()) for leaf in leaves] if first else []
        places = [
            (str(leaf.device.type), str(leaf.dtype), list(leaf.shape), order)
            for leaf, order in flat
        ]
        structure, places = self._ranks.gather_json([structure, places])[0]
        device = device_of(leaves)
        received: list[Tensor] = []
        for index, (kind, dtype, shape, order) in enumerate(places):
            if first:
                leaf, _ = flat[index]
            else:
                where = torch.device("cpu") if kind == "cpu" else device
                name = dtype.removeprefix("torch.")
                leaf = torch.empty(shape, dtype=getattr(torch, name), device=where)
            # As bytes: not every backend supports every type.
            self._ranks.collective(dist.broadcast, wire.as_bytes(leaf), 0)
            received.append(restored(leaf, order))
        return decode(structure, received)

    def _evaluate_one(self, slot: int, step: int, y: State) -> tuple[State, Aux]:
        try:
            drift = self.shard(y, self._index)
            # A part of a step cannot be left out of the sum.
            slot = slot if self.views == 1 else 0
            return self._guesses.evaluate(drift, slot, step, y)
        except Exception:
            self._ranks.report_failure(traceback.format_exc(), step)

    def _join_one(
        self, step: int, parts: Sequence[tuple[State, Aux]]
    ) -> tuple[State, Aux]:
        try:
            return self.trajectory.join_shards(parts)
        except Exception:
            self._ranks.report_failure(traceback.format_exc(), step)

    def _gather(
        self,
        results: list[tuple[State, Aux]],
        steps: Sequence[int],
        device: torch.device,
        axis: Axis,
        meeting: Meeting,
    ) -> list[list[tuple[State, Aux]]]:
        """The results of every rank of an axis; the layout first if it is new."""
        slots = [wire.entries(drift, aux) for drift, aux in results]
        results.clear()  # the gathered copies are used, here as on the other ranks
        new = self._layout.new(slots)
        heard = self._ranks.meet(meeting, steps[0], len(steps), len(new))
        self._ranks.require_same([numbers[:2] for numbers in heard], "window")
        if any(count for _, _, count in heard):
            self._layout.learn(new)
        per_rank = -(-len(steps) // self.num_workers)
        found, received = gather(
            self._ranks, axis, self._layout, slots, per_rank, device
        )
        self.num_bytes += received
        return found

    def confirm(self, step: int, y: State) -> None:
        """Fail if the accepted states of the ranks differ, before one is recorded.

        Raises:
            WorkerError: They differ, or a rank failed.
        """
        self._num_calls += 1
        every = self._fingerprint_every
        if every is not None and (self._num_calls - 1) % every == 0:
            with self.timer.phase("communication"):
                heard = self._ranks.meet(Meeting.COMPARE, step, wire.fingerprint(y))
            advice = (
                "Seed every process before it makes the model: "
                "`torch.manual_seed(0)`, the first line of the function that they run."
                if self._num_calls == 1
                else "For devices of different makes pass `fingerprint_every=None`."
            )
            self._ranks.require_same(heard, "state", advice)
