"""`Updateable`, `BaseModule`, `BaseSystem`, `BaseLift3DSystem`: the protocol."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf
from torch import nn

from tests.adapters import standin


def C(value: Any, step: int) -> float:
    if isinstance(value, (int, float)):
        return value
    start, v0, v1, end = value
    return v0 + (v1 - v0) * max(min(1.0, (step - start) / (end - start)), 0.0)


class Updateable:
    def do_update_step(self, epoch: int, step: int, on_load: bool = False) -> None:
        for name in self.__dir__():  # every public attribute, alphabetical for modules
            if name.startswith("_"):
                continue
            try:
                child = getattr(self, name)
            except Exception:
                continue
            if isinstance(child, Updateable):
                child.do_update_step(epoch, step, on_load)
        self.update_step(epoch, step, on_load)

    def do_update_step_end(self, epoch: int, step: int) -> None:
        for name in self.__dir__():
            if name.startswith("_"):
                continue
            try:
                child = getattr(self, name)
            except Exception:
                continue
            if isinstance(child, Updateable):
                child.do_update_step_end(epoch, step)
        self.update_step_end(epoch, step)

    def update_step(self, epoch: int, step: int, on_load: bool = False) -> None: ...

    def update_step_end(self, epoch: int, step: int) -> None: ...


class BaseModule(nn.Module, Updateable):
    def __init__(self, cfg: Any, **parts: Any) -> None:
        super().__init__()
        self.cfg = OmegaConf.create(cfg)
        self.configure(**parts)
        self.register_buffer("_dummy", torch.zeros(0), persistent=False)

    def configure(self, **parts: Any) -> None: ...


class BaseSystem(pl.LightningModule, Updateable):
    geometry: Any
    material: Any
    background: Any
    renderer: Any
    guidance: Any

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = OmegaConf.create(cfg)
        self._resumed_eval: dict[str, int] | None = None
        self.configure()

    def configure(self) -> None: ...

    @property
    def true_global_step(self) -> int:
        return self._resumed_eval["step"] if self._resumed_eval else self.global_step

    def C(self, value: Any) -> float:
        return C(value, self.true_global_step)

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": getattr(self, name).parameters(), "name": name, "lr": lr}
            for name, lr in self.cfg.optimizer.params.items()
        ]
        kind = getattr(torch.optim, self.cfg.optimizer.name)
        optimizer = kind(groups, **self.cfg.optimizer.args)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_batch_start(self, batch: Any, batch_idx: int, unused: int = 0) -> None:
        self.dataset = self.trainer.train_dataloader.dataset  # pyright: ignore
        self.dataset.do_update_step(self.current_epoch, self.true_global_step)
        self.do_update_step(self.current_epoch, self.true_global_step)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.dataset = self.trainer.train_dataloader.dataset  # pyright: ignore
        self.dataset.do_update_step_end(self.current_epoch, self.true_global_step)
        self.do_update_step_end(self.current_epoch, self.true_global_step)


class BaseLift3DSystem(BaseSystem):
    def configure(self) -> None:
        cfg = self.cfg
        self.geometry = standin.find(cfg.geometry_type)(cfg.geometry)
        self.material = standin.find("material")(cfg.material)
        self.background = standin.find("background")({})
        self.renderer = standin.find(cfg.renderer_type)(
            cfg.renderer,
            geometry=self.geometry,
            material=self.material,
            background=self.background,
        )
