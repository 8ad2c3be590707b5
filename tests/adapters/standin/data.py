"""Cameras: an endless data set that draws while collating."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tests.adapters.standin import register
from tests.adapters.standin.base import Updateable


class RandomCameras(IterableDataset[Any], Updateable):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.milestones = [-1, *cfg.resolution_milestones]
        self.update_step(0, 0)

    def update_step(self, epoch: int, step: int, on_load: bool = False) -> None:
        index = bisect.bisect_right(self.milestones, step) - 1
        self.size, self.batch_size = self.cfg.sizes[index], self.cfg.batch_sizes[index]
        self.spread = min(1.0, step / (self.cfg.progressive_until + 1))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield {}

    def collate(self, batch: Any) -> dict[str, Any]:
        count = self.batch_size
        elevation = torch.rand(count) * 0.5
        if random.random() < 0.5:
            elevation = torch.asin(torch.rand(count) * 0.5)
        azimuth = (torch.rand(count) * 2 - 1) * math.pi * self.spread
        position = 2 * torch.stack(
            [
                elevation.cos() * azimuth.cos(),
                elevation.cos() * azimuth.sin(),
                elevation.sin(),
            ],
            -1,
        )
        rays: Tensor = torch.linspace(-0.4, 0.4, self.size)
        grid = torch.stack(torch.meshgrid(rays, rays, indexing="ij"), -1)
        side = torch.stack([-azimuth.sin(), azimuth.cos(), 0 * azimuth], -1)
        up = torch.linalg.cross(position / 2, side, dim=-1)
        directions = (
            -position[:, None, None] / 2
            + grid[None, ..., :1] * side[:, None, None]
            + grid[None, ..., 1:] * up[:, None, None]
        )
        self.last_azimuth = azimuth  # an attribute born while collating
        return {
            "rays_o": position[:, None, None].expand_as(directions),
            "rays_d": torch.nn.functional.normalize(directions, dim=-1),
            "light": position + 0.1 * torch.randn(count, 3),
            "azimuth": azimuth,
            "size": self.size,
        }


@register("cameras")
class RandomCameraData(pl.LightningDataModule):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = OmegaConf.create(cfg)

    def setup(self, stage: str | None = None) -> None:
        self.train_dataset = RandomCameras(self.cfg)

    def train_dataloader(self) -> DataLoader[Any]:
        collate = self.train_dataset.collate
        return DataLoader(self.train_dataset, batch_size=None, collate_fn=collate)
