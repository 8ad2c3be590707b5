"""Refusal of modules that cannot be evaluated ahead of time, with advice."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dreampropeller.adapters.lightning import trainer
from dreampropeller.attributes import Attributes

_REFUSED_HOOKS = {
    "optimizer_step": "compute the learning rate with a scheduler of interval `step`",
    "lr_scheduler_step": "use a scheduler that depends on the step alone",
    "optimizer_zero_grad": "leave gradients to the solver",
    "configure_gradient_clipping": "pass `gradient_clip_val`",
    "on_train_epoch_start": "do it in `training_step`, from `self.global_step`",
    "on_train_epoch_end": "do it in `training_step`, from `self.global_step`",
}


def check_module(module: Any) -> None:
    """Refuse a module whose training is more than one loss per step.

    Raises:
        TypeError: The module is not a LightningModule.
        ValueError: The module optimises manually, or hooks into the trainer's loop.
    """
    if not isinstance(module, nn.Module) or not all(
        hasattr(module, name) for name in ("training_step", "configure_optimizers")
    ):
        raise TypeError(
            f"`module` is a `{type(module).__name__}`: pass a LightningModule, or "
            "wrap a plain loop with `OptimizationTrajectory.from_module`."
        )
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            f"`{type(module).__name__}` optimises by hand "
            "(`automatic_optimization = False`), so its gradients never leave "
            "`training_step`. Return the loss instead, or write the step as an "
            "`OptimizationTrajectory`."
        )
    for name, advice in _REFUSED_HOOKS.items():
        if trainer.overrides(module, name):
            raise ValueError(
                f"`{type(module).__name__}.{name}` belongs to the trainer's loop, "
                f"which does not run here; remove it and {advice}."
            )


def check_optimizers(attributes: Attributes, owned: Collection[int]) -> None:
    """Refuse optimizers that the module keeps to itself.

    Args:
        attributes: The module's objects.
        owned: Identities of the optimizers that `configure_optimizers` returned.

    Raises:
        ValueError: There is another optimizer.
    """
    for path, owner in attributes.objects():
        for name, value in vars(owner).items():
            if isinstance(value, Optimizer) and id(value) not in owned:
                where = f"{path}.{name}" if path else name
                raise ValueError(
                    f"`{where}` is an optimizer of its own, which "
                    "`configure_optimizers` does not return: what it trains depends "
                    "on the order of evaluations. Return its parameters from "
                    "`configure_optimizers`, or choose a setting without it."
                )


def check_stop(step: int, stops: bool) -> None:
    """Refuse that a step ends the run: it is evaluated ahead, at guesses too.

    Raises:
        ValueError: It does.
    """
    if stops:
        raise ValueError(
            f"Step {step} set `trainer.should_stop`. Steps are evaluated ahead of "
            "time: give `num_steps`, or `solve(..., on_iteration=f)`, whose `f(state, "
            "iteration)` sees what was accepted and returns True to stop."
        )
