"""Recorded calls of a pipeline's loop to its U-Net and its scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_ANSWERS = torch.Generator().manual_seed(1)


@dataclass
class UNetCall:
    """One call of a U-Net.

    Attributes:
        inputs: Input of the U-Net, shape ``(batch, channels, height, width)``.
        timestep: The timestep, a scalar or one per image.
        conditions: Further arguments of the U-Net by name.
        output: Random numbers that replace its output.
        wants_dict: Whether the caller expects the output by name.
    """

    inputs: Tensor
    timestep: Any
    conditions: dict[str, Any]
    output: Tensor
    wants_dict: bool

    @classmethod
    def of(cls, unet: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> UNetCall:
        """Sort a call's arguments by the signature of the U-Net's own class."""
        own = getattr(unet, "_orig_mod", unet)  # behind `torch.compile`
        bound = inspect.signature(type(own).forward).bind(own, *args, **kwargs)
        given = dict(list(bound.arguments.items())[1:])
        given |= given.pop("kwargs", {})
        wants_dict = given.pop("return_dict", True)
        (_, inputs), (_, timestep), *conditions = given.items()
        shape = (len(inputs), own.config["out_channels"], *inputs.shape[2:])
        output = torch.randn(shape, generator=_ANSWERS).to(inputs)
        return cls(inputs, timestep, dict(conditions), output, wants_dict)

    def answer(self) -> Any:
        """The output in the form that the caller expects."""
        return (
            SimpleNamespace(sample=self.output) if self.wants_dict else (self.output,)
        )


@dataclass
class RecordedStep:
    """One step of a loop: a U-Net call, then the scheduler's `step`.

    Attributes:
        call: The call of the U-Net.
        x: The latents.
        timestep: Timestep passed to the scheduler.
        generator: Source of the scheduler's noise.
        settings: Further arguments of the scheduler by name.
    """

    call: UNetCall
    x: Tensor
    timestep: Any
    generator: Any
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self._drawn = _states(self.generator)

    def difference(self, first: RecordedStep) -> str:
        """The difference to the first step; empty if there is none."""
        if not _same_time(self.call.timestep, self.timestep):
            return "the U-Net's timestep away from the scheduler's"
        for name in {**self.call.conditions, **first.call.conditions}:
            pair = self.call.conditions.get(name), first.call.conditions.get(name)
            if not same(*pair):
                return f"`{name}`"
        if not same(self.settings, first.settings):
            return "the scheduler's settings"
        if not same(self._drawn, first._drawn):
            return "the state of its generator"
        return ""


class LoopBar:
    """A progress bar that the loop sees and the solver advances."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self.total: int | None = bar.total

    def update(self, count: float = 1) -> None:
        """Ignore the update: a recorded step is not progress."""
        del count

    def advance(self, count: int) -> None:
        """Advance by a number of solved steps."""
        self._bar.update(count)

    def __enter__(self) -> LoopBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __iter__(self) -> Iterator[Any]:
        yield from self._bar.iterable
        self._bar.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


def same(a: Any, b: Any) -> bool:
    """Whether two nests of tensors and other values are equal, bit for bit."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
        return tensors and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _same_time(a: Any, b: Any) -> bool:
    return bool((torch.as_tensor(a).double() == torch.as_tensor(b).double()).all())


def _states(generator: Any) -> list[Tensor]:
    """The states of the generators of a loop's noise."""
    if generator is None:
        return []
    sources = generator if isinstance(generator, list) else [generator]
    return [source.get_state() for source in sources]
