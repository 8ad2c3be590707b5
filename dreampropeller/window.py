"""How many steps to try at once, and how many of them to accept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dreampropeller.tree import Nest


@dataclass(frozen=True)
class SlidingWindow:
    """A window of fixed size that moves on by the accepted steps (Eq. 5).

    The stride is the position of the first failure plus one: the state behind the
    failed slot was rolled out from exact drifts, so it is accepted although its guess
    was wrong. Size 1 is `Sequential` (`test_picard.py`).

    Args:
        size: Steps tried at once. One per device is a good start; it may be more.

    References:
        Shih et al. 2023, arXiv 2305.16317, Algorithm 1.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(
                f"`window.size` is {self.size}: a window holds at least 1 step. Write "
                "`SlidingWindow(8)`, or use `Sequential()` for the plain loop."
            )

    def init(self) -> Nest:
        """The window's memory at the start of a solve: none, its size is fixed."""
        return None

    def length(self, memory: Nest, remaining: int) -> int:
        """Steps to try, with `remaining` steps before the next jump or the end."""
        del memory
        return min(self.size, remaining)

    def stride(self, passed: Sequence[bool]) -> int:
        """Steps to accept.

        Args:
            passed: Whether each slot's error passed, shape ``(window,)``, not empty.
        """
        for slot, ok in enumerate(passed):
            if not ok:
                return slot + 1  # the anchor's own drift is exact: never stall
        return len(passed)
