"""Torch optimizers and schedulers whose memory is an argument and a result."""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dreampropeller.identity import Fingerprint, plain
from dreampropeller.tree import Nest, State, copy_nest

Params: TypeAlias = dict[str, nn.Parameter]
OptimizerFactory: TypeAlias = Callable[[Params], Optimizer | Sequence[Optimizer]]
SchedulerFactory: TypeAlias = Callable[[Optimizer], LRScheduler | None]


class Optimizers:
    """Private optimizers, lent their memory for one step.

    `Optimizer.load_state_dict` aliases the tensors it is given (torch ≥ 2.1), so a
    saved state would change with the optimizer. Here the carry *is* the memory: it is
    lent to the optimizers for one step, so a carry must be copied to be kept.
    """

    def __init__(
        self,
        params: State,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | Sequence[SchedulerFactory | None] | None,
    ) -> None:
        self._params = {name: nn.Parameter(tensor) for name, tensor in params.items()}
        made = optimizer(dict(self._params))
        self._optimizers = [made] if isinstance(made, Optimizer) else list(made)
        names = {parameter: name for name, parameter in self._params.items()}
        self._names: list[list[str]] = []
        for one in self._optimizers:
            _refuse_closure(one)
            owned = [p for group in one.param_groups for p in group["params"]]
            if any(parameter not in names for parameter in owned):
                raise ValueError(
                    f"`{type(one).__name__}` holds a parameter that is not in `params`;"
                    " build it from the mapping the factory is given: "
                    "`lambda params: torch.optim.Adam(params.values(), lr=1e-2)`."
                )
            self._names.append([names[parameter] for parameter in owned])
        self.trainable = [
            n for n in self._params if any(n in owned for owned in self._names)
        ]
        self._schedulers = _make_schedulers(scheduler, self._optimizers)
        self._writes_gradients = False
        self._probed = False
        self._load(copy_nest(self.export()))  # what cannot be restored fails here

    @property
    def count(self) -> int:
        """The number of optimizers."""
        return len(self._optimizers)

    def export(self) -> Nest:
        """The memory of optimizers and schedulers, not copied."""
        return {
            "optimizers": [
                {
                    "state": {
                        name: optimizer.state[self._params[name]]
                        for name in names
                        if self._params[name] in optimizer.state
                    },
                    "groups": [
                        {
                            key: value
                            for key, value in group.items()
                            if key not in ("params", "param_names")
                        }
                        for group in optimizer.param_groups
                    ],
                }
                for optimizer, names in zip(self._optimizers, self._names, strict=True)
            ],
            "schedulers": [
                None if scheduler is None else _memory(scheduler.state_dict())
                for scheduler in self._schedulers
            ],
        }

    def fingerprint(self) -> Fingerprint:
        """Classes, groups and settings of optimizers and schedulers, as they are."""
        memory = self.export()
        return {
            "optimizers": [
                {
                    "class": type(optimizer).__qualname__,
                    "parameters": names,
                    "groups": plain(memory["optimizers"][index]["groups"]),
                    "sizes": [len(group["params"]) for group in optimizer.param_groups],
                }
                for index, (optimizer, names) in enumerate(
                    zip(self._optimizers, self._names, strict=True)
                )
            ],
            "schedulers": [
                {"class": type(scheduler).__qualname__, "state": plain(state)}
                for scheduler, state in zip(
                    self._schedulers, memory["schedulers"], strict=True
                )
            ],
        }

    def step(
        self,
        y: State,
        carry: Nest,
        gradients: State,
        due: Sequence[bool] | None = None,
        skip: bool = False,
    ) -> tuple[State, Nest]:
        """One step of every optimizer and of the schedulers; consumes the carry.

        Args:
            y: The state before the step.
            carry: The memory.
            gradients: Gradients by name; a parameter without one is not changed.
            due: Whether the scheduler of each optimizer steps; default: all do.
            skip: Skip the optimizers, as torch's `GradScaler` does on overflow.
        """
        self._load(carry)
        copy_gradients = self._writes_gradients or not self._probed
        for name, parameter in self._params.items():
            gradient = gradients.get(name)
            parameter.grad = None  # before the value: a jump changes shapes
            # Also without a gradient: some optimizers decay every parameter.
            parameter.data = y[name].clone()
            if gradient is not None:
                parameter.grad = gradient.clone() if copy_gradients else gradient
        lent = {n: p.grad for n, p in self._params.items() if p.grad is not None}
        versions = {name: gradient._version for name, gradient in lent.items()}
        before = {name: one._version for name, one in self._params.items()}
        for optimizer in [] if skip else self._optimizers:
            optimizer.step()
        for index, scheduler in enumerate(self._schedulers):
            if scheduler is not None and (due is None or due[index]):
                scheduler.step()
        written = [n for n, gradient in lent.items() if gradient._version > versions[n]]
        if written and not copy_gradients:
            raise RuntimeError(
                f"An optimizer changed the gradient of `{written[0]}` in place, which "
                "it did not do at its first step; a drift must not be changed."
            )
        if lent:
            self._probed, self._writes_gradients = True, bool(written)
        params = {
            name: parameter.data
            for name, parameter in self._params.items()
            if name in lent or parameter._version > before[name]
        }
        for parameter in self._params.values():
            parameter.grad = None
        return params, self.export()

    def _load(self, carry: Nest) -> None:
        for optimizer, memory in zip(
            self._optimizers, carry["optimizers"], strict=True
        ):
            optimizer.state = defaultdict(dict)
            for name, state in memory["state"].items():
                optimizer.state[self._params[name]] = state
            for group, values in zip(
                optimizer.param_groups, memory["groups"], strict=True
            ):
                group.update(values)
        for scheduler, memory in zip(
            self._schedulers, carry["schedulers"], strict=True
        ):
            if scheduler is not None:
                scheduler.load_state_dict(copy_nest(memory))


def dense(name: str, gradient: Tensor) -> Tensor:
    """A gradient, unless it is sparse.

    Raises:
        ValueError: The gradient is sparse; optimizers and distances read every entry.
    """
    if gradient.is_sparse:
        raise ValueError(
            f"The gradient of `{name}` is sparse; build the embedding with "
            "`sparse=False`."
        )
    return gradient


def _make_schedulers(
    scheduler: SchedulerFactory | Sequence[SchedulerFactory | None] | None,
    optimizers: Sequence[Optimizer],
) -> list[LRScheduler | None]:
    if scheduler is None or callable(scheduler):
        factories = [scheduler] * len(optimizers)
    else:
        factories = list(scheduler)
    if len(factories) != len(optimizers):
        raise ValueError(
            f"`scheduler` holds {len(factories)} factories for {len(optimizers)} "
            "optimizers: write one for each, None where there is no scheduler."
        )
    made = [
        None if factory is None else factory(optimizer)
        for factory, optimizer in zip(factories, optimizers, strict=True)
    ]
    for one in made:
        if one is not None and _required_arguments(type(one).step):
            raise ValueError(
                f"`{type(one).__name__}` is driven by a metric, which is not known "
                "ahead of time; use a scheduler that depends on the step alone, such "
                "as `torch.optim.lr_scheduler.CosineAnnealingLR`."
            )
    return made


def _refuse_closure(optimizer: Optimizer) -> None:
    if _required_arguments(type(optimizer).step):
        raise ValueError(
            f"`{type(optimizer).__name__}` evaluates the loss itself through a "
            "closure, so its gradients cannot be computed ahead of time; use an "
            "optimizer whose `step()` needs no argument, such as `torch.optim.Adam`."
        )


def _required_arguments(step: Callable[..., Any]) -> bool:
    arguments = list(inspect.signature(step).parameters.values())[1:]  # without self
    return any(
        argument.default is argument.empty
        and argument.kind in (argument.POSITIONAL_ONLY, argument.POSITIONAL_OR_KEYWORD)
        for argument in arguments
    )


def _memory(state: dict[str, Any]) -> dict[str, Any]:
    """The part of a scheduler's state that can change.

    Values that a nest cannot hold (functions, the counter of milestones) are settings
    and stay in the scheduler. Nested schedulers keep their state under `_schedulers`.
    """
    kept: dict[str, Any] = {}
    for key, value in state.items():
        if key == "_schedulers":
            kept[key] = [_memory(inner) for inner in value]
            continue
        with contextlib.suppress(TypeError):
            kept[key] = copy_nest(value)
    return kept
