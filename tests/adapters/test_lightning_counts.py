"""Counts, averages and switches of the trainer in a LightningModule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import dreampropeller as dp
from dreampropeller.adapters.lightning import LightningTrajectory
from tests.adapters.test_lightning_habits import EXACT, STEPS, Plain, fit, ordered
from tests.helpers import tree_equal


class Counts(Plain):
    calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        return super().training_step(batch, batch_idx)


class AveragesAside(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.aside = [copy.deepcopy(self.net)]  # not registered

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.aside[0].weight.lerp_(self.net.weight, 0.1)


class Stops(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trainer.should_stop = self.global_step == 9
        return super().training_step(batch, batch_idx)


class AddsAGroup(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([self.net.weight], lr=1e-2)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 9:
            added: Any = {"params": [self.net.bias]}
            self.trainer.optimizers[0].add_param_group(added)


class SetsAWeight(Plain):
    weight = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 9:
            self.weight = 3.0
        return super().training_step(batch, batch_idx) * self.weight


class KeepsItsBest(Plain):
    best = 1e9

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        found = super().training_step(batch, batch_idx)
        self.best = min(self.best, found.item())
        return found * (2 if self.best < 3 else 1)


@pytest.mark.filterwarnings("ignore")
def test_a_count_that_nothing_reads_is_named_and_may_be_ignored() -> None:
    wanted = fit(Counts(), ordered())
    made = LightningTrajectory(Counts(), ordered(), STEPS, ignore=("calls",))
    assert tree_equal(dp.solve(made, EXACT).value, wanted)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Counts, r'`calls` changed .*`ignore=\("calls",\)`'),
        (AveragesAside, r"`aside\[0\]\.weight` changed"),
        (Stops, r"set `trainer\.should_stop`"),
        (AddsAGroup, "added or removed a group of the optimizer"),
        (SetsAWeight, "earlier ones have left in `weight`"),
        (KeepsItsBest, "the step before had changed: `best`"),
    ],
)
def test_what_a_solve_would_do_otherwise_is_refused(
    kind: type[Plain], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dp.solve(LightningTrajectory(kind(), ordered(), STEPS), EXACT)
