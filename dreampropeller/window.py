"""Windows: the steps to evaluate at once, and the steps to accept."""

from __future__ import annotations

import abc
import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dreampropeller.checks import is_whole
from dreampropeller.component import Component, M, Memory
from dreampropeller.rollout import Evaluation, Rollout
from dreampropeller.trajectory import Parents
from dreampropeller.tree import State


class Window(Component[M], abc.ABC):
    """The slots of an iteration; the window slides by the accepted steps (Eq. 5)."""

    reads_errors = True
    """Whether the stride depends on the errors of the slots."""

    @abc.abstractmethod
    def length(self, memory: M, step: int, remaining: int) -> int:
        """Steps to evaluate.

        Args:
            memory: The memory.
            step: The anchor's step.
            remaining: Number of steps before the next jump or the end.
        """

    def stride(self, memory: M, passed: Sequence[bool]) -> int:
        """Steps to accept; default: up to and including the first failure.

        At least 1, unless the whole window is to be iterated again: with 0 the anchor
        stays, and all new states are guesses of the next iteration. A window that
        returns 0 must return more after finitely many iterations.

        Args:
            memory: The memory after `before`.
            passed: Whether each slot's error passed, shape ``(window,)``, not empty.
        """
        del memory
        for slot, ok in enumerate(passed):
            if not ok:
                return slot + 1  # the anchor's own drift is exact: never stall
        return len(passed)


@dataclass(frozen=True)
class SlidingWindow(Window[None]):
    """A window of fixed size that slides by the accepted steps (Eq. 5).

    The stride is the index of the first failure plus one: the state behind the
    failed slot was rolled out from exact drifts, so it is accepted although its guess
    was wrong. Size 1 is `Sequential` (`test_picard.py`).

    Args:
        size: Number of steps evaluated at once. One per device is a good start; more is
            possible.

    References:
        Shih et al. 2023, arXiv 2305.16317, Algorithm 1.
    """

    size: int

    def __post_init__(self) -> None:
        if not is_whole(self.size) or self.size < 1:
            raise ValueError(
                f"`size` is {self.size!r}: write a whole number, at least 1, as "
                "`SlidingWindow(8)`. `Sequential()` is the sequential run, and "
                "`AdaptiveWindow(8, 32)` follows the strides."
            )

    def length(self, memory: None, step: int, remaining: int) -> int:
        """The size, cut by what remains."""
        del memory, step
        return min(self.size, remaining)


@dataclass(frozen=True)
class AdaptiveMemory(Memory):
    """Memory of an `AdaptiveWindow`.

    Attributes:
        mean_stride: Running mean of the strides, in steps.
    """

    mean_stride: float


@dataclass(frozen=True)
class AdaptiveWindow(Window[AdaptiveMemory]):
    r"""A window that adapts its size to the strides (ours, Eq. 14).

    After an iteration with stride $s$, the mean stride
    $\bar s \leftarrow (\bar s + s) / 2$ makes the next size
    $\mathrm{round}(2 \bar s / n)\, n$ within the bounds: a step is then evaluated
    about twice. The window grows while more than half of it is accepted, and shrinks
    while less is. Windows cut by a jump or the end are ignored. Slots beyond the
    number of devices cost rounds of evaluations; whether their longer strides pay for
    these depends on the problem, so compare seconds, not iterations.

    Args:
        smallest: Smallest size; rounded to a multiple, also the initial size.
        largest: Largest number of steps evaluated at once.
        multiple: The number n that sizes are multiples of; use the number of devices.
            The bounds themselves are not rounded.
    """

    smallest: int
    largest: int
    multiple: int = 1

    def __post_init__(self) -> None:
        for name in ("smallest", "largest", "multiple"):
            number = getattr(self, name)
            if not is_whole(number) or number < 1:
                raise ValueError(
                    f"`{name}` is {number!r}: write a whole number, at least 1, "
                    "as `AdaptiveWindow(8, 32, 8)`."
                )
        if self.largest < self.smallest:
            raise ValueError(
                f"`largest` is {self.largest}, less than the smallest size "
                f"{self.smallest}: write at least that."
            )
        calm = AdaptiveMemory(min(self.smallest, self.largest / 2))  # when all passes
        if self.size(calm) == self.smallest < self.largest:
            raise ValueError(
                f"`multiple` is {self.multiple}, too coarse for sizes from "
                f"{self.smallest} to {self.largest}: the window would never grow. "
                "Write a smaller one (1 always grows), or a larger `largest`."
            )

    def init(self) -> AdaptiveMemory:
        """A mean stride that gives the smallest size."""
        return AdaptiveMemory(self.smallest / 2)

    def size(self, memory: AdaptiveMemory) -> int:
        """The size that follows from the mean stride."""
        wanted = round(2 * memory.mean_stride / self.multiple) * self.multiple
        return min(max(wanted, self.smallest), self.largest)

    def length(self, memory: AdaptiveMemory, step: int, remaining: int) -> int:
        """The size, cut by what remains."""
        del step
        return min(self.size(memory), remaining)

    def after(self, memory: AdaptiveMemory, rollout: Rollout) -> AdaptiveMemory:
        """Follow the stride, unless the window was cut by a jump or the end."""
        if rollout.length < self.size(memory):
            return memory
        # Bounded, so that a long run of full strides does not delay the next change.
        mean = (memory.mean_stride + rollout.stride) / 2
        return AdaptiveMemory(min(max(mean, self.smallest / 2), self.largest / 2))

    def jumped(
        self, memory: AdaptiveMemory, y: State, parents: Parents | None
    ) -> AdaptiveMemory:
        """Keep the mean stride."""
        del y, parents
        return memory


@dataclass(frozen=True)
class SequentialStart(Window[Any]):
    """The first steps one after another, then another window.

    A warm start for guesses that improve with the first steps, such as those of
    `CleanImage`.

    Args:
        window: The window after them: `SlidingWindow` or `AdaptiveWindow`.
        steps: Number of the first steps.

    Raises:
        ValueError: The number is out of range, or the window has blocks.
    """

    window: Window[Any]
    steps: int

    def __post_init__(self) -> None:
        if not is_whole(self.steps) or self.steps < 0:
            raise ValueError(f"`steps` is {self.steps!r}: write a whole number from 0.")
        if not self.window.reads_errors:
            raise ValueError(
                f"`{type(self.window).__name__}` has blocks of its own: write "
                "`SlidingWindow(8)` in its place."
            )

    def init(self) -> Any:
        """The window's memory."""
        return self.window.init()

    def length(self, memory: Any, step: int, remaining: int) -> int:
        """One, or the window's steps."""
        return 1 if step < self.steps else self.window.length(memory, step, remaining)

    def stride(self, memory: Any, passed: Sequence[bool]) -> int:
        """The window's stride."""
        return self.window.stride(memory, passed)

    def before(self, memory: Any, evaluation: Evaluation) -> Any:
        """The window's memory."""
        return self.window.before(memory, evaluation)

    def after(self, memory: Any, rollout: Rollout) -> Any:
        """The window's memory, which follows no stride of the first steps."""
        if rollout.steps[0] < self.steps:
            return memory
        return self.window.after(memory, rollout)

    def jumped(self, memory: Any, y: State, parents: Parents | None) -> Any:
        """The window's memory."""
        return self.window.jumped(memory, y, parents)


@dataclass(frozen=True)
class BlockMemory(Memory):
    """Memory of a `BlockWindow`.

    Attributes:
        rounds: Iterations of the current block.
    """

    rounds: int = 0


@dataclass(frozen=True)
class BlockWindow(Window[BlockMemory]):
    """Whole blocks of steps, each iterated a fixed number of times (PIADM).

    A jump ends a block. Errors are not used: a block of m steps is accepted after
    min(depth, m) iterations. With a depth of at least m it is exact, because the first
    k steps are exact after k iterations. With depth 1 all steps of a block use the
    score at its start.

    Args:
        boundaries: Steps at which blocks end, ascending, as
            `DiffusionTrajectory.boundaries`; one more block follows the last boundary.
            Or a single number: the length of equal blocks.
        depth: Number of iterations per block, K.

    References:
        Chen et al. 2024, arXiv 2405.15986, Algorithms 1 and 2.
    """

    boundaries: Sequence[int] | int
    depth: int
    reads_errors = False

    def __post_init__(self) -> None:
        if not is_whole(self.depth) or self.depth < 1:
            raise ValueError(
                f"`depth` is {self.depth!r}: write a whole number, at least 1."
            )
        if isinstance(self.boundaries, int):
            ends = [0] if self.boundaries < 1 else [0, self.boundaries]
        else:
            ends = [0, *self.boundaries]
        if len(ends) == 1 or any(b <= a for a, b in itertools.pairwise(ends)):
            raise ValueError(
                f"`boundaries` are {self.boundaries!r}: write ascending steps above 0, "
                "as [20, 40, 60], or the length of all blocks, as 20."
            )

    def init(self) -> BlockMemory:
        """The memory at the start of the first block."""
        return BlockMemory()

    def length(self, memory: BlockMemory, step: int, remaining: int) -> int:
        """The steps to the end of the block, cut by what remains."""
        del memory
        if isinstance(self.boundaries, int):
            return min(self.boundaries - step % self.boundaries, remaining)
        at = bisect.bisect_right(self.boundaries, step)
        if at == len(self.boundaries):
            return remaining
        return min(self.boundaries[at] - step, remaining)

    def stride(self, memory: BlockMemory, passed: Sequence[bool]) -> int:
        """Zero until the depth is reached, then the whole block."""
        return len(passed) if memory.rounds + 1 >= min(self.depth, len(passed)) else 0

    def after(self, memory: BlockMemory, rollout: Rollout) -> BlockMemory:
        """Count the iteration, or begin the next block."""
        return BlockMemory() if rollout.stride else BlockMemory(memory.rounds + 1)
