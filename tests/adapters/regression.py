"""A LightningModule that is not 3D: a small network with everything that remembers."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dreampropeller.rng import StepRandom


class Regression(pl.LightningModule):
    """Dropout, batch statistics, a mask that only grows, Python's `random`."""

    def __init__(self, interval: str = "step", frequency: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.inner = nn.Linear(4, 12)
            self.norm = nn.BatchNorm1d(12)
            self.outer = nn.Linear(12, 1)
            self.frozen = nn.Linear(4, 1)
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.mask = torch.zeros(12)
        self.interval, self.frequency = interval, frequency

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.mask[: 6 + self.global_step] = 1.0
        self.born_later = batch_idx

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        x, target = batch
        self.seen += len(x)  # in place
        hidden = self.norm(self.inner(x + 0.01 * torch.randn_like(x)))
        hidden = torch.dropout(torch.relu(hidden) * self.mask, 0.2, True)
        loss = (self.outer(hidden) + self.frozen(x) - target).square().mean()
        if random.random() < 0.5:
            loss = loss + 1e-3 * self.inner.weight.square().sum()
        self.log("train/loss", loss, prog_bar=True)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.inner.parameters(), "lr": 0.02, "name": "inner"},
            {"params": [*self.norm.parameters(), *self.outer.parameters()]},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        schedule = {
            "scheduler": scheduler,
            "interval": self.interval,
            "frequency": self.frequency,
        }
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def data(shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(28, 4, generator=generator)
    target = x.sin().sum(1, keepdim=True)
    return DataLoader(TensorDataset(x, target), batch_size=4, shuffle=shuffle)


class Seeds(pl.Callback):
    """Keys the Trainer's random streams by the step, as a drift's are."""

    def __init__(self, seed: int) -> None:
        self.random = StepRandom(seed)
        self.scope: Any = None

    def on_train_batch_start(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        self.scope = self.random.scope(trainer.global_step)
        self.scope.__enter__()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.scope.__exit__(None, None, None)
