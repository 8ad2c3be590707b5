r"""The tensors of somebody's module, lent the values of a state.

A state is evaluated in the module's own tensors, so that everything that refers to them
(hooks, activation checkpointing, captured and marked parameters, compiled parts) works
as in the loop the module comes from. One state at a time: afterwards the module holds
its own values again, also after an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor, nn

from dreampropeller.attributes import Attributes
from dreampropeller.buffers import buffer_drift
from dreampropeller.lending import lent, overlapping
from dreampropeller.optimizers import dense
from dreampropeller.tree import State


def names_of(ignore: Collection[str]) -> tuple[str, ...]:
    """Names to ignore.

    Raises:
        TypeError: They are one string.
    """
    if isinstance(ignore, str):
        raise TypeError(f'`ignore` is a string: write `ignore=("{ignore}",)`.')
    return tuple(ignore)


class ModuleHost:
    """A module whose trainable parameters and buffers are a state.

    Args:
        module: The module.
        ignore: Plain attributes that are left alone, by name or path.

    Attributes:
        module: The module.
        ignore: Likewise.
        parameters: Its trainable parameters, by name.
        watch: Told which attributes an evaluation has changed; whether to keep them.
        left: Names and a record of those kept last.

    Raises:
        ValueError: No parameter requires gradients, or one or a buffer has no
            shape yet, or a buffer is a view of one.
    """

    watch: Callable[[list[str]], bool] | None = None
    left: tuple[list[str], Attributes] | None = None

    def __init__(self, module: nn.Module, ignore: Collection[str] = ()) -> None:
        self.module, self.ignore = module, names_of(ignore)
        named = dict(module.named_parameters())
        tensors = {**named, **self.buffers()}
        lazy = [n for n, one in tensors.items() if nn.parameter.is_lazy(one)]
        if lazy:
            kind = "Parameter" if lazy[0] in named else "Buffer"
            raise ValueError(
                f"{kind} `{lazy[0]}` has no shape yet: call the module once, as "
                "before an optimizer is made."
            )
        self.parameters = {n: p for n, p in named.items() if p.requires_grad}
        if not self.parameters:
            raise ValueError("No parameter of `module` requires gradients.")
        self.frozen = {n: p for n, p in named.items() if n not in self.parameters}
        refuse_views(self.parameters, self.buffers())
        self.record()

    @property
    def on_gpu(self) -> bool:
        """Whether the parameters are on a GPU."""
        return next(iter(self.parameters.values())).device.type != "cpu"

    def record(self) -> None:
        """Record flags and plain attributes, which an evaluation must leave alone."""
        self._flags = Flags(self.module)
        self.attributes = self._attributes()
        self.watch, self.left = None, None

    def _attributes(self) -> Attributes:
        """A record of the attributes as they are now."""
        state = [*self.module.parameters(), *self.module.buffers()]
        skip = ("training", *self.ignore)
        return Attributes({"": self.module}, skip=skip, state=state)

    def buffers(self) -> dict[str, Tensor]:
        """The buffers by name, as the module holds them now."""
        return dict(self.module.named_buffers())

    @contextlib.contextmanager
    def holding(self, y: State) -> Iterator[None]:
        """Lend the module the values of a state.

        Inside the block, gradients are those of the block alone. After it, values,
        gradients, buffers and plain attributes are as before.
        """
        self._flags.check("Between two evaluations")
        named = {**self.parameters, **self.frozen}
        gradients = {name: parameter.grad for name, parameter in named.items()}
        own, buffers = self._registered(), self.buffers()
        values = {name: y[name] for name in self.parameters}
        values |= {name: y[name].detach().clone() for name in buffers}
        try:
            with lent({**self.parameters, **buffers}, values):
                self.clear_gradients()
                yield
                self._flags.check("The step")
        finally:
            for name, parameter in named.items():
                parameter.grad = gradients[name]
            for owner, key, buffer in own:
                owner._buffers[key] = buffer
            self._put_back()
            self._flags.restore()

    def _put_back(self) -> None:
        """Put the attributes back; record first what is left in them, if asked for."""
        touched = self.attributes.touched()
        if touched and self.watch is not None:
            changed = self.attributes.changed(touched)
            if changed and self.watch(changed):
                self.left = changed, self._attributes()
        self.attributes.restore(touched)

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Put back values, gradients, flags and attributes after the block."""
        named = {**self.parameters, **self.frozen}
        gradients = {name: parameter.grad for name, parameter in named.items()}
        tensors = [*self.parameters.values(), *self.buffers().values()]
        saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
        own = self._registered()
        try:
            yield
        finally:
            for owner, key, buffer in own:
                owner._buffers[key] = buffer
            for tensor, value in saved:
                tensor.data.copy_(value)
            for name, parameter in named.items():
                parameter.grad = gradients[name]
            self.attributes.restore()
            self._flags.restore()

    def write(self, y: State) -> None:
        """Write a state into the module's own memory."""
        for name, tensor in {**self.parameters, **self.buffers()}.items():
            tensor.data.copy_(y[name])

    def clear_gradients(self) -> None:
        """Remove the gradients of all parameters."""
        for parameter in self.module.parameters():
            parameter.grad = None

    def _registered(self) -> list[tuple[nn.Module, str, Tensor | None]]:
        return [
            (owner, key, buffer)
            for owner in self.module.modules()
            for key, buffer in owner._buffers.items()
        ]

    def gradients(self) -> State:
        """The gradients of the trainable parameters; absent ones are left out."""
        return {  # not zero: a zero would make AdamW decay the parameter
            name: dense(name, parameter.grad).detach()
            for name, parameter in self.parameters.items()
            if parameter.grad is not None
        }

    def buffer_drift(self, y: State) -> State:
        """Changes of the buffers by the evaluation at a state (Eq. 19).

        Raises:
            ValueError: The evaluation registered a buffer.
        """
        after = {name: buffer.detach() for name, buffer in self.buffers().items()}
        born = sorted(after.keys() - y.keys())
        if born:
            raise ValueError(
                f"The step registered buffer `{born[0]}`; register it when the module "
                "is built, so that it is part of the state."
            )
        changed = buffer_drift({name: y[name] for name in after}, after)
        # The module gets its memory back, and the drift must not follow.
        return {
            name: value.clone() if after.get(name) is value else value
            for name, value in changed.items()
        }


def refuse_views(
    parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> None:
    """Refuse a buffer that moves with a parameter."""
    shared = overlapping(parameters, buffers)
    if shared is not None:
        raise ValueError(
            f"Buffer `{shared[1]}` is a view of parameter `{shared[0]}` and would move "
            "with it, but a state holds each by itself. Compute it from the parameter "
            "where it is read, or register a copy (`.clone()`)."
        )


class Flags:
    """The switches of a module: training mode, `requires_grad`, which parameters.

    Args:
        module: The module, whose switches are recorded.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modes = [(n, one, one.training) for n, one in module.named_modules()]
        self._parameters = [
            (f"{path}.{key}" if path else key, owner, key, one, one.requires_grad)
            for path, owner in module.named_modules()
            for key, one in owner._parameters.items()
            if one is not None
        ]

    def check(self, who: str) -> None:
        """Refuse a changed switch: the next step would not see it.

        Raises:
            ValueError: Names the switch, and what to do instead.
        """
        for name, one, mode in self._modes:
            if one.training is not mode:
                shown = f"`{name}`" if name else "the module"
                raise ValueError(
                    f"{who} switched {shown} to `{_MODES[one.training]}()`. Steps are "
                    "not evaluated in order, so a switch that stays on does not reach "
                    "the next one. Choose the mode in every step from its index, and "
                    f"write `{_MODES[mode]}()` again before the step returns."
                )
        for name, owner, key, parameter, flag in self._parameters:
            if owner._parameters.get(key) is not parameter:
                raise ValueError(
                    f"{who} replaced parameter `{name}` by another object, which no "
                    "optimizer holds. Write into its values in the optimizer's `step`, "
                    "or make the replacement before the solve."
                )
            if parameter.requires_grad is not flag:
                raise ValueError(
                    f"{who} switched `{name}.requires_grad` to "
                    f"{parameter.requires_grad}. Steps are not evaluated in order, so "
                    "a switch that stays on does not reach the next one. Leave it True "
                    "from the start, and use `.detach()` in the steps that must not "
                    f"train it, for `{name}` or for what is computed from it: a "
                    "parameter without a gradient is not moved."
                )

    def restore(self) -> None:
        """Put every switch back."""
        for _, one, mode in self._modes:
            if one.training is not mode:
                one.training = mode
        for _, owner, key, parameter, flag in self._parameters:
            if owner._parameters.get(key) is not parameter:
                owner._parameters[key] = parameter
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)


@contextlib.contextmanager
def steady(module: nn.Module) -> Iterator[None]:
    """Refuse that a step changes a module's switches, and put them back."""
    flags = Flags(module)
    try:
        yield
        flags.check("The step")
    finally:
        flags.restore()


_MODES: Mapping[bool, str] = {True: "train", False: "eval"}
