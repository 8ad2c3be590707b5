"""The optimizer of a config, with a learning rate for each part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from systems.settings.checks import one_of
from systems.settings.reader import ConfigError

OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "RMSprop": torch.optim.RMSprop,
}


_NO_RATE = "`args` has no learning rate: write `args.lr=0.01`."


def _check_rate(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(
            f"`{name}` is `{value}`: write a learning rate, such as 0.01; 0 for none."
        )


def _check_finite(name: str, value: Any) -> None:
    numbers = value if isinstance(value, Sequence) else [value]
    for number in numbers:
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"`{name}` is `{value}`: write finite numbers.")


@dataclass(frozen=True)
class OptimizerConfig:
    """`system.optimizer`, in threestudio's form.

    Args:
        name: Optimizer; a class of `torch.optim`.
        args: Arguments of the optimizer; a null argument is left out. The learning rate
            may be missing if `params` has one for every part.
        params: Arguments of single parts of the scene by name, such as `background:
            {lr: 0.001}` or `geometry.encoding: {lr: 0.01}`. The longest matching name
            counts; other parts use `args`.
    """

    name: str = "Adam"
    args: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("name", self.name, list(OPTIMIZERS))
        if self.args.get("lr") is None and not self.params:
            raise ValueError(_NO_RATE)
        for part, arguments in {"args": self.args, **self._parts()}.items():
            for name, value in arguments.items():
                _check_finite(f"{part}.{name}", value)
            if arguments.get("lr") is not None:
                _check_rate(f"{part}.lr", arguments["lr"])

    def _parts(self) -> dict[str, Mapping[str, Any]]:
        """Sections of `params` by name.

        Raises:
            ValueError: One of the entries is not a section.
        """
        for part, arguments in self.params.items():
            if not isinstance(arguments, Mapping):
                raise ValueError(
                    f"`params.{part}` is `{arguments}`: write a section, such as "
                    f"`params.{part}.lr=0.001`."
                )
        return {f"params.{part}": section for part, section in self.params.items()}

    def check(self, scene: nn.Module) -> None:
        """Refuse arguments unknown to the optimizer, and parts that do not exist.

        Raises:
            ConfigError: Names the arguments and parts.
        """
        parts = [
            name
            for name, module in scene.named_modules()
            if name and ("." not in name or any(True for _ in module.parameters()))
        ]
        # A tensor of its own, too, where a part has tensors that are no parts.
        parts += [name for name, _ in scene.named_parameters() if name not in parts]
        for name in self.params:
            if name not in parts:
                raise ConfigError(
                    f"There is no setting `system.optimizer.params.{name}`. "
                    f"Known here: {', '.join(parts)}."
                )
        if self.args.get("lr") is None:
            for name, tensor in scene.named_parameters():
                rate = self.params.get(self._part_of(name), {}).get("lr")
                if tensor.requires_grad and rate is None:
                    raise ConfigError(
                        f"In `system.optimizer`: {_NO_RATE} Without it, `{name}` has "
                        "none in `params` either."
                    )
        probe = {
            f"{name}.probe": nn.Parameter(torch.zeros(1)) for name in (*parts, "rest")
        }
        try:
            self.build(probe)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"In `system.optimizer`: {error}. What the config sets and "
                f"`{self.name}` does not take goes with `system.optimizer.args.NAME="
                "null`."
            ) from error

    def _part_of(self, name: str) -> str:
        """The part whose arguments count for a tensor; empty if there is none."""
        fits = [part for part in self.params if f"{name}.".startswith(f"{part}.")]
        return max(fits, key=len, default="")

    def rate(self, name: str) -> float | None:
        """The learning rate of a part or tensor; None: there is none."""
        own = self.params.get(self._part_of(name), {})
        return own.get("lr", self.args.get("lr"))

    def build(self, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """The optimizer of named parameters."""
        groups: dict[str, list[Tensor]] = {}
        for name, tensor in parameters.items():
            groups.setdefault(self._part_of(name), []).append(tensor)
        arguments: Any = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in self.args.items()
            if value is not None
        }
        return OPTIMIZERS[self.name](
            [
                {"params": tensors, **self.params.get(part, {})}
                for part, tensors in groups.items()
            ],
            **arguments,
        )
