"""Torch optimizers and schedulers whose memory is an argument and a result."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dreampropeller.belongings import Belongings
from dreampropeller.counters import Counters
from dreampropeller.identity import Fingerprint, plain
from dreampropeller.lending import lent
from dreampropeller.tree import Nest, State, copy_nest
from dreampropeller.verification import NotReproducible, listed, names

Params: TypeAlias = dict[str, nn.Parameter]
OptimizerFactory: TypeAlias = Callable[[Params], Optimizer | Sequence[Optimizer]]
SchedulerFactory: TypeAlias = Callable[[Optimizer], Any]


_PARAMETERS = frozenset(("params", "param_names"))
"""Keys of a group that name its parameters."""


@functools.cache
def _declared() -> frozenset[str]:
    """Attributes of every optimizer; state and groups are kept by name, defaults too.

    Not at import: torch loads its compiler with its first optimizer, in two seconds.
    """
    plain = vars(Optimizer([nn.Parameter(torch.zeros(1))], {})).keys()
    return frozenset(plain - {"defaults"}) | {"step", "_opt_called"}


class Optimizers:
    """Optimizers that are lent their memory and parameters for one step.

    `Optimizer.load_state_dict` aliases the tensors it is given (torch ≥ 2.1), so a
    saved state would change with the optimizer. Here the carry *is* the memory: it is
    lent to the optimizers for one step, so a carry must be copied to be kept.

    Args:
        params: The parameters by name; outside of a step they keep their own values.
        optimizer: Factory of one optimizer or several, called with the parameters.
        scheduler: Factory of a scheduler, or one per optimizer.
        private: Whether the parameters belong to nobody else.
        known: Objects whose memory is kept elsewhere (the module's own).
    """

    def __init__(
        self,
        params: Params,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | Sequence[SchedulerFactory | None] | None,
        private: bool = True,
        known: Iterable[object] = (),
    ) -> None:
        self._params = dict(params)
        made = optimizer(dict(self._params))
        several = isinstance(made, Sequence)
        self._optimizers = list(made) if several else [made]
        self._sizes = [_sizes(one) for one in map(_optimizer, self._optimizers)]
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
        owners = [*self._optimizers, *filter(None, self._schedulers), *known]
        self._belongings = Belongings(self._params, owners)
        self._private = private
        self._trusted = all(_is_plain(one) for one in self._optimizers)
        self.load(copy_nest(self.export()))  # what cannot be restored fails here

    @property
    def count(self) -> int:
        """The number of optimizers."""
        return len(self._optimizers)

    @property
    def may_draw(self) -> bool:
        """Whether a step may draw random numbers; torch's own classes do not."""
        return not self._trusted or not all(
            type(one).__module__.startswith("torch.optim.")
            for one in filter(None, self._schedulers)
        )

    def export(self) -> Nest:
        """The memory of optimizers and schedulers, not copied."""
        self._belongings.begin()
        return {
            "optimizers": [
                self._export_one(optimizer, names)
                for optimizer, names in zip(self._optimizers, self._names, strict=True)
            ],
            "schedulers": [
                None
                if scheduler is None
                else self._belongings.read_attributes(
                    scheduler, type(scheduler).__name__, ()
                )
                for scheduler in self._schedulers
            ],
        }

    def _export_one(self, optimizer: Optimizer, names: Sequence[str]) -> Nest:
        title = type(optimizer).__name__
        if _sizes(optimizer) not in self._sizes:
            raise ValueError(
                f"The groups of `{title}` changed during the run. Steps are not "
                "evaluated in order, so all parameters have to be in their groups from "
                "the start: set a learning rate of 0 by a scheduler until a group "
                "joins, or leave its parameters without a gradient (`.detach()`)."
            )
        read, state = self._belongings.read, optimizer.state
        plain = _is_plain(optimizer)
        memory: dict[str, Any] = {
            "state": {
                name: state[parameter]
                if plain
                else read(state[parameter], f"{title}.state[{name!r}]")
                for name in names
                if (parameter := self._params[name]) in state
            },
            "groups": [
                {
                    key: value if plain else read(value, f"{title}'s group[{key!r}]")
                    for key, value in group.items()
                    if key not in _PARAMETERS
                }
                for group in optimizer.param_groups
            ],
        }
        if not plain:
            shared = {k: v for k, v in state.items() if not isinstance(k, Tensor)}
            if shared:
                memory["shared"] = read(shared, f"{title}.state")
            memory["attributes"] = self._belongings.read_attributes(
                optimizer, title, _declared()
            )
        return memory

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

    ignored: Collection[str] = ()
    """Names to ignore that the last `observed` met."""

    @contextlib.contextmanager
    def observed(
        self, host: nn.Module | None, ignore: Collection[str] = ()
    ) -> Iterator[None]:
        """Refuse that updates inside the block change what the carry does not hold.

        Raises:
            NotReproducible: A number or tensor that a function or class of the
                optimizers or schedulers refers to has changed.
        """
        owners = [*self._optimizers, *filter(None, self._schedulers)]
        roots = {type(one).__name__: one for one in owners}
        before = Counters(roots, host, carried=True, ignore=ignore)
        yield
        self.ignored = before.met
        changed = before.changed(before.again())
        if changed:
            raise NotReproducible(
                f"An update changed {names(changed)}, outside of the attributes of the "
                "optimizer or scheduler: a solve makes more updates than the loop, and "
                "cannot take them back. Keep it in `self` of the optimizer, such as an "
                "average of the weights, or compute it from the step. If it only "
                f"counts or logs, write `ignore={listed(changed)}`."
            )

    def shares(self, other: Optimizers) -> bool:
        """Whether an optimizer is one of another's: made outside of the factory."""
        return any(one in other._optimizers for one in self._optimizers)

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
        self.load(carry)
        # Torch's own move what has a gradient; others may decay every parameter.
        names = list(gradients) if self._trusted else list(self._params)
        values = {name: y[name].clone() for name in names}
        own = {name: parameter.grad for name, parameter in self._params.items()}
        self._set_gradients({})  # before the values: a jump changes shapes
        lends = lent({n: self._params[n] for n in names}, values, self._private)
        try:
            with lends as written:
                self._set_gradients(gradients)
                self.step_in_place(skip, due)
                params = {name: self._params[name].data for name in names}
                params |= {name: params[name].clone() for name in written}
                self._set_gradients({})
        finally:
            self._set_gradients({})
            for name, gradient in own.items():
                self._params[name].grad = gradient
        return params, self.export()

    def step_in_place(
        self, skip: bool = False, due: Sequence[bool] | None = None
    ) -> None:
        """Step the optimizers and schedulers on what the parameters hold."""
        for optimizer in [] if skip else self._optimizers:
            optimizer.step()
        for index, scheduler in enumerate(self._schedulers):
            if scheduler is not None and (due is None or due[index]):
                scheduler.step()

    def _set_gradients(self, gradients: State) -> None:
        for name, parameter in self._params.items():
            gradient = gradients.get(name)
            if gradient is not None and not self._trusted:
                gradient = gradient.clone()  # some optimizers write into it
            parameter.grad = gradient

    def load(self, carry: Nest) -> None:
        """Put the optimizers and schedulers into a state; consumes the carry."""
        self._belongings.begin()
        for optimizer, memory in zip(
            self._optimizers, carry["optimizers"], strict=True
        ):
            self._load_one(optimizer, memory)
        for scheduler, memory in zip(
            self._schedulers, carry["schedulers"], strict=True
        ):
            if scheduler is not None:
                self._belongings.write_attributes(scheduler, memory, ())

    def _load_one(self, optimizer: Optimizer, memory: Nest) -> None:
        plain, write = _is_plain(optimizer), self._belongings.write
        live = dict(optimizer.state)
        optimizer.state.clear()  # in place: a wrapper may share it
        for name, state in memory["state"].items():
            parameter = self._params[name]
            optimizer.state[parameter] = (
                state if plain else write(state, live.get(parameter))
            )
        for group, values in zip(optimizer.param_groups, memory["groups"], strict=True):
            for key in group.keys() - values.keys() - _PARAMETERS:
                del group[key]  # born in a later step
            for key, value in values.items():
                group[key] = value if plain else write(value, group.get(key))
        if "shared" in memory:  # in the order of `_export_one`
            shared = {k: v for k, v in live.items() if not isinstance(k, Tensor)}
            optimizer.state.update(write(memory["shared"], shared))
        if "attributes" in memory:
            self._belongings.write_attributes(
                optimizer, memory["attributes"], _declared()
            )


def _optimizer(made: Any) -> Optimizer:
    """Refuse what is not an optimizer of torch's kind."""
    if not isinstance(made, Optimizer):
        raise TypeError(
            f"`optimizer` returned a `{type(made).__name__}`, which is not a "
            "`torch.optim.Optimizer`. Return the optimizer inside of it, and let a "
            "scheduler (`scheduler=`) set the learning rate; or derive the class from "
            "`torch.optim.Optimizer`."
        )
    return made


def _sizes(optimizer: Optimizer) -> list[int]:
    """The number of parameters of each group."""
    return [len(group["params"]) for group in optimizer.param_groups]


def _is_plain(optimizer: Optimizer) -> bool:
    """Whether an optimizer is torch's own, without hooks: what it does is known."""
    step = vars(optimizer).get("step")
    return (
        type(optimizer).__module__.startswith("torch.optim.")
        and (step is None or hasattr(step, "_wrapped_by_lr_sched"))
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
    )


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
) -> list[Any]:
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
