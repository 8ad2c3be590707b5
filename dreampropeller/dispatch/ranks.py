"""What the ranks of a process group say to each other, and how they hear of faults.

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
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dreampropeller.dispatch import process_group
from dreampropeller.dispatch.base import WorkerError
from dreampropeller.dispatch.heartbeat import Heartbeat, Interrupted


class Meeting(enum.IntEnum):
    """The next action of a rank."""

    EVALUATE = 1
    AGREE = 2
    SHARE = 3
    LEAVE = 4
    COMPARE = 5
    FAIL = 6
    JOIN = 7


_WORD = 8
"""Number of integers in a meeting's message."""


class Ranks:
    """The ranks of the default process group, as one of them sees them.

    Args:
        timeout: Time that ranks wait for one that is alive.
        silence: Seconds without a sign of life after which a rank counts as lost;
            None: no heartbeat.

    Attributes:
        rank: This rank.
        size: Number of ranks.
        error_was_raised: Whether the other ranks know of this rank's failure.
    """

    def __init__(self, timeout: datetime.timedelta, silence: float | None) -> None:
        self._timeout = timeout
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.error_was_raised = False
        self._heartbeat: Heartbeat | None = None
        if silence is not None and self.size > 1:
            store = process_group.own_store()
            self._heartbeat = Heartbeat(store, self.rank, self.size, silence)
            self._heartbeat.start()

    def leave(self, error: BaseException | None) -> None:
        """Learn of a rank that failed at the end, or report this rank's failure.

        Raises:
            WorkerError: Another rank failed.
        """
        try:
            if error is None:
                self.meet(Meeting.LEAVE)
            elif not self.error_was_raised:
                lines = traceback.format_exception(error)
                self.report_failure("".join(lines), step=None)
        except WorkerError:
            if error is None:
                raise

    def close(self) -> None:
        """Stop the heartbeat."""
        if self._heartbeat is not None:
            if self._heartbeat.lost:
                process_group.hang_up()  # closing the group would wait for it
            self._heartbeat.stop()
            self._heartbeat = None

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that ends with an error when another rank is lost."""
        if self._heartbeat is None:
            yield
            return
        try:
            with self._heartbeat.interruptible():
                yield
        except Interrupted:
            self._raise_lost(self._heartbeat.lost)

    def meet(self, meeting: Meeting, *numbers: int) -> list[list[int]]:
        """Announce the next action with a few numbers; return those of all ranks."""
        word = [int(meeting), len(numbers), *numbers]
        mine = torch.tensor(word + [0] * (_WORD - len(word)), dtype=torch.int64)
        heard = [torch.empty_like(mine) for _ in range(self.size)]
        self.collective(dist.all_gather, heard, mine)
        words = [word.tolist() for word in heard]
        if any(word[0] == Meeting.FAIL for word in words):
            self._raise_failure("")
        self.require_same([[Meeting(word[0]).name] for word in words], "next action")
        return [word[2 : 2 + word[1]] for word in words]

    def require_same(self, heard: list[Any], what: str, advice: str = "") -> None:
        """Fail if the ranks have said different things."""
        different = [rank for rank, said in enumerate(heard) if said != heard[0]]
        if not different:
            return
        self.error_was_raised = True
        raise WorkerError(
            f"The ranks have come apart: rank {different[0]} has another {what} than "
            f"rank 0 ({heard[different[0]]}, not {heard[0]}). Every rank must call "
            "`solve` with the same arguments, from the same state, with the same "
            f"versions and thread count. {advice}".rstrip()
        )

    def report_failure(self, text: str, step: int | None) -> NoReturn:
        """Report this rank's failure to the other ranks, and raise it here too."""
        word = torch.tensor([int(Meeting.FAIL), *[0] * (_WORD - 1)])
        heard = [torch.empty_like(word) for _ in range(self.size)]
        self.collective(dist.all_gather, heard, word)
        where = f"rank {self.rank}" + ("" if step is None else f", step {step}")
        self._raise_failure(f"On {where}:\n{text}")

    def _raise_failure(self, text: str) -> NoReturn:
        """Exchange the failed ranks' texts and raise them everywhere."""
        texts = [text for text in self.gather_text(text) if text]
        self.error_was_raised = True
        raise WorkerError("\n".join(["A worker failed.", *texts]))

    def gather_text(self, text: str) -> list[str]:
        """The texts of all ranks."""
        mine = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        self.collective(dist.all_gather, lengths, torch.tensor([mine.numel()]))
        size = max(int(length) for length in lengths)
        padded = torch.full((size,), ord(" "), dtype=torch.uint8)
        padded[: mine.numel()] = mine
        received = [torch.empty_like(padded) for _ in range(self.size)]
        self.collective(dist.all_gather, received, padded)
        return [bytes(block.tolist()).decode().strip() for block in received]

    def gather_json(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        return [json.loads(text) for text in self.gather_text(json.dumps(value))]

    def collective(self, operation: Callable[..., Any], *arguments: Any) -> None:
        """Run a collective; a lost rank raises an error that names it."""
        on_gpu = any(isinstance(one, Tensor) and one.is_cuda for one in arguments)
        self.finish([self.start(operation, *arguments)], on_gpu)

    def start(
        self, operation: Callable[..., Any], *arguments: Any, group: Any = None
    ) -> Any:
        """Start a collective of all ranks, or of those of a group."""
        try:
            return operation(*arguments, group=group, async_op=True)
        except (RuntimeError, ValueError) as error:
            self._raise_lost(self._diagnose(), error)

    def finish(self, works: Sequence[Any], on_gpu: bool) -> None:
        """Wait for collectives, as long as every rank is alive."""
        for work in works:
            self._finish(work, on_gpu)

    def _finish(self, work: Any, on_gpu: bool) -> None:
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
        self.error_was_raised = True
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
