"""Systems: guidance built at fit start, and VSD with a LoRA group."""

from __future__ import annotations

from typing import Any

from tests.adapters.standin import find, register
from tests.adapters.standin.base import BaseLift3DSystem


class Distillation(BaseLift3DSystem):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.renderer(batch)
        loss: Any = 0.0
        for name, value in self.guidance(out["comp_rgb"], batch).items():
            self.log(f"train/{name}", value)
            if name.startswith("loss_"):
                loss = loss + value * self.C(
                    self.cfg.loss[name.replace("loss_", "lambda_")]
                )
        sparsity = (out["opacity"] ** 2 + 0.01).sqrt().mean()
        self.log("train/loss_sparsity", sparsity)
        return {"loss": loss + self.C(self.cfg.loss.lambda_sparsity) * sparsity}


@register("dreamfusion-like")
class DreamFusionLike(Distillation):
    def on_fit_start(self) -> None:
        self.guidance = find("toy-guidance")(self.cfg.guidance)


@register("prolificdreamer-like")
class ProlificDreamerLike(Distillation):
    def configure(self) -> None:
        super().configure()
        self.guidance = find("toy-vsd-guidance")(self.cfg.guidance)
