"""Several processes train one prior: local SGD.

Every worker takes its own steps on its own batches, and at intervals of time, not of
steps, all continue from the average of their weights, each weighing as many steps as
it took (S. U. Stich, 2019, arXiv 1805.09767). A core that other work slows down thus
makes nobody wait. AdamW's moments and the moving average of the weights are averaged
alike. Start it with `torchrun --nproc-per-node 2 -m systems.toybox train`.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from systems.toybox.train import Run

INTERVAL = 30.0
"""Seconds between two averages."""


class LocalSGD:
    """The averages of a run over the workers that `torchrun` started.

    Args:
        interval: Seconds between two averages.
    """

    def __init__(self, interval: float = INTERVAL) -> None:
        started = int(os.environ.get("WORLD_SIZE") or 1) > 1
        if started and not dist.is_initialized():
            dist.init_process_group("gloo")
        self.rank = dist.get_rank() if started else 0
        self._alone = not started
        self.interval = interval
        self._last, self._step = time.monotonic(), 0

    @property
    def leads(self) -> bool:
        """Whether this worker writes the files."""
        return self.rank == 0

    def begin(self, run: Run) -> None:
        """Count steps and time from here on."""
        self._last, self._step = time.monotonic(), run.step

    def due(self) -> bool:
        """Whether it is time for the next average; without other workers always."""
        return self._alone or time.monotonic() - self._last >= self.interval

    def average(self, run: Run, ends: bool, batch: int) -> bool:
        """Average the run over the workers.

        Args:
            run: Changed in place: weights, moments, and the numbers of steps and
                images.
            ends: Whether this worker's part of the run is over.
            batch: Number of examples per step.

        Returns:
            Whether any worker's part is over.
        """
        if self._alone:
            return ends
        taken = run.step - self._step
        counts = torch.tensor([float(taken), float(ends)], dtype=torch.float64)
        dist.all_reduce(counts)
        share = taken / max(1.0, float(counts[0]))
        mean = torch.cat([t.flatten() for t in _tensors(run)]).mul_(share)
        dist.all_reduce(mean)
        with torch.no_grad():
            parts = mean.split([t.numel() for t in _tensors(run)])
            for tensor, part in zip(_tensors(run), parts, strict=True):
                tensor.copy_(part.view(tensor.shape))
        run.images += (int(counts[0]) - taken) * batch
        step = torch.tensor(run.step)
        # The largest, so that no worker draws a batch twice.
        dist.all_reduce(step, dist.ReduceOp.MAX)
        run.step = int(step)
        self.begin(run)
        return bool(counts[1])


def _tensors(run: Run) -> list[Tensor]:
    """Everything of a run that is averaged, in the same order for all workers."""
    weights = list(run.model.parameters())
    moments = [
        run.optimizer.state[weight][name]
        for weight in weights
        for name in ("exp_avg", "exp_avg_sq")
        if weight in run.optimizer.state
    ]
    return weights + moments + list(run.average.parameters())
