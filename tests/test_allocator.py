"""Freed memory of large states is used again during a solve, and given back."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dreampropeller import allocator

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="a property of glibc"
)
SIZE = 12_000_000  # floats: 48 MB, more than glibc keeps by itself


def page_faults(size: int = SIZE) -> int:
    """Fresh pages that five copies of a large tensor cost."""
    x = torch.ones(size)
    x.clone()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        x.clone()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def copies_of_large_tensors_cost_no_fresh_pages_inside() -> None:
    state = {"x": torch.ones(SIZE)}
    plain, held = page_faults(), resident()
    with allocator.reused(state), allocator.reused(state):
        # Blocks find their places in a few rounds.
        inside = min(page_faults() for _ in range(8))
        kept = resident()
    assert plain > 5 * 4 * SIZE / 4096 * 0.9
    assert inside < plain / 50
    # Where later copies lie is glibc's affair: perhaps in a gap of the heap.
    assert resident() < held + 1000 < kept, "it was given back"


def smaller_tensors_are_as_quick_afterwards_as_before() -> None:
    size = SIZE // 3  # 16 MB, which glibc keeps once it has seen a few
    before = min(page_faults(size) for _ in range(4))
    with allocator.reused({"x": torch.ones(SIZE)}):
        page_faults()
    assert min(page_faults(size) for _ in range(4)) <= before + 100


def small_states_change_nothing() -> None:
    with allocator.reused({"x": torch.ones(10), "n": torch.tensor(3)}):
        assert page_faults() > 5 * 4 * SIZE / 4096 * 0.9


@pytest.mark.parametrize(
    "claim",
    [
        copies_of_large_tensors_cost_no_fresh_pages_inside,
        smaller_tensors_are_as_quick_afterwards_as_before,
        small_states_change_nothing,
    ],
)
def test_in_a_process_whose_heap_holds_nothing_yet(claim: Callable[[], None]) -> None:
    process = multiprocessing.get_context("spawn").Process(target=claim)
    process.start()
    process.join()
    assert process.exitcode == 0
