"""One process per device, on one machine or many, over `torch.distributed` (SPMD).

Every rank runs the same solver. The update is deterministic, so only drifts are sent.
Slot i of a window is evaluated on rank ``i mod n``, then all drifts are gathered. No
rank is reserved as a driver. Rank 0 decides the stride and when to stop.

Ranks meet before anything is exchanged. At a meeting each rank announces its next
action and whether it failed, so a failure anywhere is raised everywhere, with its step,
rank and traceback, and no rank is left waiting. A rank that dies closes its
connections; one that is stopped or unreachable is noticed by its heartbeat
(`dispatch.heartbeat`), however long a drift takes. Either way the others raise an error
that names it. (GPUs: a rank that is lost in the middle of an NCCL transfer is noticed
after `timeout`.)
"""

from __future__ import annotations

import contextlib
import datetime
import enum
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dreampropeller.dispatch import process_group, wire
from dreampropeller.dispatch.base import Dispatcher, WorkerError
from dreampropeller.dispatch.heartbeat import Heartbeat, Interrupted
from dreampropeller.trajectory import Trajectory
from dreampropeller.tree import Aux, Nest, State, decode, device_of, encode


class _Meeting(enum.IntEnum):
    """The next action of a rank."""

    EVALUATE = 1
    AGREE = 2
    SHARE = 3
    LEAVE = 4
    COMPARE = 5
    FAIL = 6


_WORD = 8
"""Number of integers in a meeting's message."""


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
    """

    def __init__(
        self,
        trajectory: Trajectory[Any],
        *,
        timeout: float = 600.0,
        threads: int = 1,
        fingerprint_every: int | None = 1,
        heartbeat: float | None = 10.0,
    ) -> None:
        super().__init__(trajectory)
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
        self._heartbeat: Heartbeat | None = None
        self._threads = threads
        self._fingerprint_every = fingerprint_every
        self._num_calls = 0
        self._entries: list[wire.Entry] = []
        self._owns_group = False
        self._previous_threads = torch.get_num_threads()
        self._error_was_raised = False

    def __enter__(self) -> DistributedDispatcher:
        if not dist.is_initialized():
            process_group.join(self._timeout)
            self._owns_group = True
        self.rank = dist.get_rank()
        self.num_workers = dist.get_world_size()
        self._previous_threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        if self._silence is not None and self.num_workers > 1:
            store = process_group.own_store()
            self._heartbeat = Heartbeat(
                store, self.rank, self.num_workers, self._silence
            )
            self._heartbeat.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback_: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback_)
        try:
            if error is None:
                self._meet(_Meeting.LEAVE)  # learn of a rank that failed at the end
            elif not self._error_was_raised:
                lines = traceback.format_exception(kind, error, traceback_)
                self._report_failure("".join(lines), step=None)
        except WorkerError:
            if error is None:
                raise
        finally:
            torch.set_num_threads(self._previous_threads)
            if self._heartbeat is not None:
                if self._heartbeat.lost:
                    process_group.hang_up()  # closing the group would wait for it
                self._heartbeat.stop()
                self._heartbeat = None
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
        mine = range(self.rank, len(steps), self.num_workers)
        with self.timer.phase("drift"), self._interruptible():
            results = [self._evaluate_one(steps[slot], ys[slot]) for slot in mine]
        with self.timer.phase("communication"):
            device = device_of(ys[0])
            return self._gather(results, steps, device)

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """The numbers of rank 0, on every rank."""
        with self.timer.phase("communication"):
            return self._meet(_Meeting.AGREE, *numbers)[0]

    def share(self, y: State, carry: Nest) -> tuple[State, Nest]:
        """The state and carry of rank 0, on every rank, after a jump."""
        self._entries = []  # shapes have changed: layouts are exchanged again
        self._meet(_Meeting.SHARE)
        structure, leaves = encode((y, carry))
        places = [(str(t.device.type), str(t.dtype), list(t.shape)) for t in leaves]
        (message, *_) = self._gather_text(json.dumps([structure, places]))
        structure, places = json.loads(message)
        device = device_of(leaves)
        received: list[Tensor] = []
        for index, (kind, dtype, shape) in enumerate(places):
            if self.rank == 0:
                leaf = leaves[index].detach().clone().contiguous()
            else:
                where = torch.device("cpu") if kind == "cpu" else device
                name = dtype.removeprefix("torch.")
                leaf = torch.empty(shape, dtype=getattr(torch, name), device=where)
            # As bytes: not every backend supports every type.
            self._collective(dist.broadcast, wire.as_bytes(leaf), 0)
            received.append(leaf)
        return decode(structure, received)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """A block that ends with an error when another rank is lost."""
        if self._heartbeat is None:
            yield
            return
        try:
            with self._heartbeat.interruptible():
                yield
        except Interrupted:
            self._raise_lost(self._heartbeat.lost)

    def _evaluate_one(self, step: int, y: State) -> tuple[State, Aux]:
        try:
            return self.drift(y)(step, y)
        except Exception:
            self._report_failure(traceback.format_exc(), step)

    def _gather(
        self,
        results: list[tuple[State, Aux]],
        steps: Sequence[int],
        device: torch.device,
    ) -> list[tuple[State, Aux]]:
        """All ranks' drifts, in slot order, through one flat buffer per rank.

        The layout is sent first if a rank has a new entry, then a mask of the entries
        present in each slot, shape ``(slots_per_rank, entries)``, then the bytes.
        """
        slots = [wire.entries(drift, aux) for drift, aux in results]
        results.clear()  # the gathered copies are used, here as on the other ranks
        known = set(self._entries)
        entries = dict.fromkeys(entry for slot in slots for entry in slot)
        new = [entry for entry in entries if entry not in known]
        heard = self._meet(_Meeting.EVALUATE, steps[0], len(steps), len(new))
        self._require_same([numbers[:2] for numbers in heard], "window")
        if any(count for _, _, count in heard):
            self._learn(new)

        per_rank = -(-len(steps) // self.num_workers)
        mask = torch.zeros(per_rank, len(self._entries), dtype=torch.uint8)
        for row, slot in enumerate(slots):
            mask[row] = torch.tensor([entry in slot for entry in self._entries])
        masks = [torch.empty_like(mask) for _ in range(self.num_workers)]
        self._collective(dist.all_gather, masks, mask)
        present = [
            [
                [entry for entry, here in zip(self._entries, row, strict=True) if here]
                for row in rows.tolist()
            ]
            for rows in masks
        ]

        sizes = [wire.size(rows) for rows in present]
        parts = torch.empty(sum(sizes), dtype=torch.uint8, device=device).split(sizes)
        wire.pack(present[self.rank], slots, parts[self.rank])
        slots.clear()
        # A broadcast from each rank directly into its slot: on gloo an all-gather
        # copies everything twice more (measured: 2.8 times the seconds at 2 × 200 MB).
        pending = [
            self._start(dist.broadcast, part, rank)
            for rank, part in enumerate(parts)
            if part.numel()
        ]
        for work in pending:
            self._finish(work, device.type == "cuda")
        found = [wire.unpack(*pair) for pair in zip(present, parts, strict=True)]
        n = self.num_workers
        return [found[slot % n][slot // n] for slot in range(len(steps))]

    def _learn(self, new: Sequence[wire.Entry]) -> None:
        """Agree on the layout of entries that are new to a rank."""
        rows = [[e.name, e.is_aux, e.dtype, list(e.shape)] for e in new]
        for text in self._gather_text(json.dumps(rows)):
            for name, is_aux, dtype, shape in json.loads(text):
                entry = wire.Entry(name, is_aux, dtype, tuple(shape))
                if entry not in self._entries:
                    self._entries.append(entry)

    def confirm(self, step: int, y: State) -> None:
        """Fail if the accepted states of the ranks differ, before one is recorded.

        Raises:
            WorkerError: They differ, or a rank failed.
        """
        self._num_calls += 1
        every = self._fingerprint_every
        if every is not None and (self._num_calls - 1) % every == 0:
            with self.timer.phase("communication"):
                heard = self._meet(_Meeting.COMPARE, step, wire.fingerprint(y))
            advice = (
                "Seed every process before it makes the model: "
                "`torch.manual_seed(0)`, the first line of the function that they run."
                if self._num_calls == 1
                else "For devices of different makes pass `fingerprint_every=None`."
            )
            self._require_same(heard, "state", advice)

    def _meet(self, meeting: _Meeting, *numbers: int) -> list[list[int]]:
        """Announce the next action with a few numbers; return those of all ranks."""
        word = [int(meeting), len(numbers), *numbers]
        mine = torch.tensor(word + [0] * (_WORD - len(word)), dtype=torch.int64)
        heard = [torch.empty_like(mine) for _ in range(self.num_workers)]
        self._collective(dist.all_gather, heard, mine)
        words = [word.tolist() for word in heard]
        if any(word[0] == _Meeting.FAIL for word in words):
            self._raise_failure("")
        self._require_same([[_Meeting(word[0]).name] for word in words], "next action")
        return [word[2 : 2 + word[1]] for word in words]

    def _require_same(self, heard: list[Any], what: str, advice: str = "") -> None:
        different = [rank for rank, said in enumerate(heard) if said != heard[0]]
        if not different:
            return
        self._error_was_raised = True
        raise WorkerError(
            f"The ranks have come apart: rank {different[0]} has another {what} than "
            f"rank 0 ({heard[different[0]]}, not {heard[0]}). Every rank must call "
            "`solve` with the same arguments, from the same state, with the same "
            f"versions and thread count. {advice}".rstrip()
        )

    def _report_failure(self, text: str, step: int | None) -> NoReturn:
        """Report this rank's failure to the other ranks, and raise it here too."""
        word = torch.tensor([int(_Meeting.FAIL), *[0] * (_WORD - 1)])
        heard = [torch.empty_like(word) for _ in range(self.num_workers)]
        self._collective(dist.all_gather, heard, word)
        where = f"rank {self.rank}" + ("" if step is None else f", step {step}")
        self._raise_failure(f"On {where}:\n{text}")

    def _raise_failure(self, text: str) -> NoReturn:
        """Exchange the failed ranks' texts and raise them everywhere."""
        texts = [text for text in self._gather_text(text) if text]
        self._error_was_raised = True
        raise WorkerError("\n".join(["A worker failed.", *texts]))

    def _gather_text(self, text: str) -> list[str]:
        mine = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.num_workers)]
        self._collective(dist.all_gather, lengths, torch.tensor([mine.numel()]))
        size = max(int(length) for length in lengths)
        padded = torch.full((size,), ord(" "), dtype=torch.uint8)
        padded[: mine.numel()] = mine
        received = [torch.empty_like(padded) for _ in range(self.num_workers)]
        self._collective(dist.all_gather, received, padded)
        return [bytes(block.tolist()).decode().strip() for block in received]

    def _collective(self, operation: Callable[..., Any], *arguments: Any) -> None:
        """Run a collective; a lost rank raises an error that names it."""
        on_gpu = any(isinstance(one, Tensor) and one.is_cuda for one in arguments)
        self._finish(self._start(operation, *arguments), on_gpu)

    def _start(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """Start a collective."""
        try:
            return operation(*arguments, async_op=True)
        except (RuntimeError, ValueError) as error:
            self._raise_lost(self._diagnose(), error)

    def _finish(self, work: Any, on_gpu: bool) -> None:
        """Wait for a collective, as long as every rank is alive."""
        # NCCL gives a collective up when a wait with a time of its own ends.
        heartbeat = None if on_gpu else self._heartbeat
        try:
            while heartbeat is not None and not heartbeat.lost:
                try:
                    work.wait(datetime.timedelta(seconds=heartbeat.interval))
                    return
                except RuntimeError:  # noqa: PERF203, once per interval
                    if work.is_completed():
                        raise
            if heartbeat is None:
                work.wait()
                return
        except (RuntimeError, ValueError) as error:
            self._raise_lost(self._diagnose(), error)
        self._raise_lost(heartbeat.lost)

    def _diagnose(self) -> str:
        return "" if self._heartbeat is None else self._heartbeat.diagnose()

    def _raise_lost(self, who: str, cause: Exception | None = None) -> NoReturn:
        """Raise the loss of a rank on this one."""
        self._error_was_raised = True
        seconds = self._timeout.total_seconds()
        who = who or (
            "it died, or did not answer within "
            f"`timeout` = {seconds:g} s (raise it if a drift takes longer)"
        )
        reason = f" Cause: {str(cause).splitlines()[0]}" if str(cause or "") else ""
        raise WorkerError(
            f"Rank {self.rank} lost contact with another rank: {who}. The last "
            f"checkpoint is intact.{reason}"
        ) from cause
