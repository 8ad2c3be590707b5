"""Score distillation whose guidance may learn a LoRA beside the scene.

With variational guidance the state is {scene θ, LoRA φ}: the gradient of θ reads φ,
that of φ reads the images of θ, and one optimizer moves both, each with its own
learning rate. With other guidance this adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import dreampropeller as dp
from systems.distillation import Distillation, Look
from systems.guidance.base import Guidance
from systems.guidance.priors import check
from systems.guidance.vsd import VSD_GUIDANCES
from systems.optimizer import OptimizerConfig
from systems.settings.schedules import value_at, values_of

LORA = "guidance."
"""Prefix of the LoRA's tensors in a state; its part in `optimizer.params`."""
LOCAL = (
    "`system.guidance.lora` is `local`: every worker trained a LoRA of its own, which "
    "is not saved, so the result depends on the number of workers and on resuming."
)
"""Note on a run with private copies of the LoRA."""


def check_weights(loss: Any, guidance_type: str) -> None:
    """Refuse weights that a guidance does not have, and a LoRA that never learns.

    Args:
        loss: Weights of the loss, with `lambda_sds`, `lambda_vsd` and `lambda_lora`.
        guidance_type: Name of the guidance.

    Raises:
        ValueError: Says what to write instead.
    """
    learns = guidance_type in VSD_GUIDANCES
    for name in ("lambda_sds",) if learns else ("lambda_vsd", "lambda_lora"):
        if getattr(loss, name) != getattr(type(loss), name):
            own = "lambda_vsd` and `lambda_lora" if learns else "lambda_sds"
            raise ValueError(
                f"`loss.{name}` has no effect with `guidance_type: {guidance_type}`, "
                f"whose weights are `{own}`: leave it out."
            )
    if learns and not any(values_of(loss.lambda_lora)):
        raise ValueError(
            "`loss.lambda_lora` is 0, so the LoRA never learns and stays the "
            "pretrained model: write a positive weight, or `guidance_type: "
            "csd-guidance`, which needs no LoRA."
        )


def check_rate(optimizer: OptimizerConfig, guidance_type: str) -> None:
    """Refuse a learning rate with which a LoRA never learns.

    Args:
        optimizer: Settings of the optimizer, whose part `guidance` is the LoRA.
        guidance_type: Name of the guidance.

    Raises:
        ValueError: Says what to write instead.
    """
    if guidance_type in VSD_GUIDANCES and optimizer.rate("guidance") == 0:
        raise ValueError(
            "The learning rate of the LoRA is 0, so it never learns and stays the "
            "pretrained model: write `optimizer.params.guidance.lr=0.0001`, or "
            "`guidance_type: csd-guidance`, which needs no LoRA."
        )


class Variational(Distillation):
    """A system whose guidance may be variational."""

    _module: nn.Module | None = None

    @property
    def is_variational(self) -> bool:
        """Whether the guidance learns a LoRA."""
        return self.settings.guidance_type in VSD_GUIDANCES

    def check_lora(self) -> None:
        """Refuse a LoRA whose base model is not available; note a local one."""
        if not self.is_variational:
            return
        adapted = self.settings.guidance.pretrained_model_name_or_path_lora
        if adapted is not None:
            check(adapted, [])
        if self.settings.guidance.lora == "local":
            self.notes.append(LOCAL)

    @property
    def is_reproducible(self) -> bool:
        """Not with `lora: local`: a worker's LoRA depends on what it evaluated."""
        return not self.is_variational or self.settings.guidance.lora != "local"

    def parts(self) -> nn.Module:
        """The parts with learning rates: those of the scene, and `guidance`."""
        if not self.is_variational:
            return self.scene
        return _SceneAndLora(self.scene, nn.Linear(1, 1))

    @property
    def module(self) -> nn.Module:
        """See `System.module`: scene and LoRA, once `trajectory` has loaded the model.

        With `lora: local` the scene alone.
        """
        return self.scene if self._module is None else self._module

    def load_guidance(self) -> Guidance:
        """See `Distillation.load_guidance`."""
        if not self.is_variational:
            return super().load_guidance()
        settings = self.settings
        kind, loss = VSD_GUIDANCES[settings.guidance_type], settings.loss
        guidance = kind.load(settings.guidance, self.prompts, self.device)
        guidance.lora.reset(self.random)
        guidance.weights = lambda step: (
            value_at(loss.lambda_vsd, step),
            value_at(loss.lambda_lora, step),
        )
        if settings.guidance.lora == "local":
            named = {LORA + n: p for n, p in guidance.parameters().items()}
            guidance.private = self.optimizer(named)
        else:
            self._module = _SceneAndLora(self.scene, guidance.lora)
        return guidance

    def weights(self, step: int) -> Mapping[str, float]:
        """See `Distillation.weights`; such a guidance weights its own two losses."""
        weights = dict(super().weights(step))
        return {**weights, "sds": 1.0} if self.is_variational else weights

    def losses(
        self, looks: Sequence[Look], guidance: Guidance
    ) -> list[tuple[Tensor, dict[str, Any]]]:
        """See `Distillation.losses`."""
        found = super().losses(looks, guidance)
        if self.is_variational:
            for _, log in found:
                del log["loss_sds"]  # the sum of `loss_vsd` and `loss_lora`
        return found

    def contribution(self, look: Any, guidance: Guidance) -> dp.Contribution | None:
        """See `Distillation.contribution`."""
        found = super().contribution(look, guidance)
        if found is None or not self.is_variational:
            return found
        log = {name: value for name, value in found.aux.items() if name != "loss_sds"}
        return replace(found, aux=log)

    def check_state(self, y: dp.State, where: str | Path) -> None:
        """See `System.check_state`; the LoRA's shapes are known once it is loaded."""
        super().check_state(scene_of(y) if self.module is self.scene else y, where)


def scene_of(y: dp.State) -> dp.State:
    """The part of a state that is the scene's: all that images need."""
    return {name: tensor for name, tensor in y.items() if not name.startswith(LORA)}


class _SceneAndLora(nn.Module):
    """The parts of a scene and a LoRA beside them, under the names of threestudio."""

    def __init__(self, scene: nn.Module, lora: nn.Module) -> None:
        super().__init__()
        for name, child in scene.named_children():
            self.add_module(name, child)
        self.guidance = lora
        self._scene = (scene,)  # not a child: its parts are

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self._scene[0](*arguments, **options)
