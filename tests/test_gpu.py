"""The core on a CUDA device: `pytest -m gpu`. Skipped where there is none.

A network without atomic additions gives the same bits at every call, on a GPU too, so
that threshold 0 can be held against the sequential run bit for bit.
"""

from __future__ import annotations

import pytest
import torch

from dreampropeller import (
    FixedThreshold,
    InlineDispatcher,
    PicardSolver,
    Sequential,
    SlidingWindow,
    launch_workers,
    solve,
)
from dreampropeller.precision import LOSS_SCALE
from tests import ranks
from tests.helpers import State, make_growing, tree_equal

pytestmark = pytest.mark.gpu

EXACT = PicardSolver(SlidingWindow(5), FixedThreshold(0), "momentum")


def plain_loop(precision: str) -> State:
    """As a training script is written, with autocast and `GradScaler`."""
    net = ranks.network().cuda()
    half = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision)
    scaler = torch.amp.GradScaler("cuda", enabled=half is torch.float16)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for step in range(ranks.STEPS):
        optimizer.zero_grad()
        with torch.autocast("cuda", half, enabled=half is not None):
            loss = ranks.network_loss(step, net)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return {name: tensor.detach() for name, tensor in net.named_parameters()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_threshold_zero_equals_the_loop_by_hand_bit_for_bit(precision: str) -> None:
    trajectory = ranks.network_trajectory(precision)
    expected = plain_loop(precision)
    for solver in (Sequential(), EXACT):
        value = solve(trajectory, solver, InlineDispatcher).value
        value = {name: t for name, t in value.items() if name != LOSS_SCALE}
        assert all(tensor.is_cuda for tensor in value.values())
        assert tree_equal(value, expected)


@pytest.mark.parametrize("name", ["network", "growing"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_ranks_on_gpus_equal_one_process(num_workers: int, name: str) -> None:
    """Over NCCL where each rank has a GPU, over gloo where they share one."""
    toy = make_growing("cuda") if name == "growing" else None
    alone = solve(toy or ranks.network_trajectory("32-true"), Sequential()).value
    for answer in launch_workers(ranks.solve_on_gpu, name, num_workers=num_workers):
        assert tree_equal(answer, {key: tensor.cpu() for key, tensor in alone.items()})
