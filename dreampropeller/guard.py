"""Detection of evaluations that write into parameters, or set the optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Guard:
    """Refuses writes into parameters: a drift is a function of step and state.

    It uses torch's version counters: a write through `.data` is only seen where it
    gives the parameter another memory, and a tensor made under `torch.inference_mode`
    has no counter.

    Args:
        parameters: Parameters by name, before the evaluation.
        trainable: Names of the parameters that an optimizer holds.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], trainable: Collection[str]
    ) -> None:
        self._seen = {
            name: (tensor, tensor._version, tensor.data_ptr())
            for name, tensor in parameters.items()
            if not tensor.is_inference()
        }
        self._trainable = trainable

    def check(self) -> None:
        """Check the parameters after the evaluation.

        Raises:
            ValueError: A parameter was written into; the message says what to do.
        """
        for name, (tensor, version, pointer) in self._seen.items():
            if tensor._version == version and tensor.data_ptr() == pointer:
                continue
            if name in self._trainable:
                raise ValueError(
                    f"The step changed parameter `{name}` itself, which only the "
                    "optimizer may do; a parameter's guess must stay as it is. Clamp "
                    "it where it is read, or in the optimizer's `step`."
                )
            raise ValueError(
                f"The step changed `{name}`, a parameter that no optimizer holds, so "
                "it is not part of the state, and another step would see its value. "
                "Register it as a buffer, or keep an average of the weights in the "
                "optimizer's state."
            )


class GroupGuard:
    """Refuses that an evaluation sets the groups of an optimizer.

    Args:
        optimizers: The optimizers that a loss refers to, by path.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self._seen = [
            (path, one, [_kept(group) for group in one.param_groups])
            for path, one in optimizers.items()
        ]

    def check(self, step: int) -> None:
        """Check the groups after the evaluation of a step.

        Raises:
            ValueError: A setting was changed.
        """
        for path, one, before in self._seen:
            for group, settled in zip(one.param_groups, before, strict=False):
                for key, value in settings(group).items():
                    if same_setting(value, settled.get(key)):
                        continue
                    raise ValueError(
                        f"Step {step} set `{key}` of the optimizer `{path}`. Steps are "
                        "evaluated ahead of the optimizer, so this would be lost. Set "
                        "it by a scheduler: `scheduler=lambda optimizer: torch.optim."
                        "lr_scheduler.LambdaLR(optimizer, lambda step: factor)`."
                    )


@contextlib.contextmanager
def displaced(
    optimizers: Iterable[Optimizer], schedulers: Iterable[object]
) -> Iterator[None]:
    """Other values for the settings of optimizers and schedulers, inside the block."""
    tables = [group for one in optimizers for group in one.param_groups]
    tables += [vars(one) for one in schedulers]
    saved = [(table, dict(table)) for table in tables]
    for table in tables:
        table.update({key: _displaced(one) for key, one in settings(table).items()})
    try:
        yield
    finally:
        for table, values in saved:
            table.update(values)


def _displaced(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_displaced, value))
    if isinstance(value, bool):
        return value
    return value + 1 if isinstance(value, int) else value * 0.5 + 0.125


def settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an optimizer's group."""
    return {
        key: value
        for key, value in dict.items(group)  # pyright: ignore[reportArgumentType]
        if _is_number(value)
        or (isinstance(value, (tuple, list)) and value and all(map(_is_number, value)))
    }


def same_setting(one: Any, two: Any) -> bool:
    """Whether two settings, of `settings` or None, have the same values."""
    if one is None or two is None:
        return one is two
    return torch.equal(setting_tensor(one), setting_tensor(two))


def setting_tensor(value: Any) -> Tensor:
    """The numbers of a setting."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return torch.tensor([float(one) for one in values], dtype=torch.float64)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (bool, int, float))


def _kept(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a group as they are now; tensors may change in place."""
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in settings(group).items()
    }
