"""A module's trajectory against the loop that it stands for, on the module itself.

Two steps of the loop are made in the module's own memory: the loss, `backward()`, the
optimizer of a second call of the factory, fed with the drift's gradients, and its
scheduler. Gradients, parameters and buffers are compared by name, and afterwards the
module is as before. What an evaluation adds to (an iterator, a line of a log) cannot
always be taken back.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from dreampropeller.count_check import Lists, accumulation, refuse_growing
from dreampropeller.counters import Counters
from dreampropeller.guard import displaced
from dreampropeller.host import ModuleHost
from dreampropeller.optimizers import Optimizers
from dreampropeller.precision import Precision
from dreampropeller.reachable import Reachable
from dreampropeller.tree import State, copy_nest
from dreampropeller.verification import (
    NotReproducible,
    Probe,
    names,
    refuse_written,
    require_equal,
)

Backward = Callable[[int, State], State]
"""The loop's step up to its gradients, on what the module holds: gradients by name."""


class ModuleLoop:
    """The loop on the module itself.

    Args:
        host: The module's host.
        loss: The body of the loop, as the user gave it.
        backward: Evaluates it, and goes backward.
        clip: Clips the gradients of parameters, in place.
        optimizers: Makes the optimizers and schedulers anew.
        last: The last step.

    Attributes:
        captured: What the loss refers to.
        reached: Optimizers among it, by path.

    Raises:
        NotReproducible: The loss refers to a `GradScaler`.
    """

    def __init__(
        self,
        host: ModuleHost,
        loss: Callable[..., Any],
        backward: Backward,
        clip: Callable[[list[Tensor]], None],
        optimizers: Callable[[], Optimizers],
        last: int,
    ) -> None:
        self._host, self._backward, self._clip = host, backward, clip
        self._make, self._last = optimizers, last
        self.elsewhere: Collection[str] = ()
        self.captured = Reachable(loss, host.module)
        bound = isinstance(loss, types.MethodType)
        self._roots = {"": host.module, "self" if bound else "loss": loss}
        met = self._counters()
        self.reached = met.optimizers
        _refuse_scalers(met)

    def _counters(self) -> Counters:
        host = self._host
        return Counters(self._roots, host.module, ignore=host.ignore)

    def cause(self) -> str:
        """What evaluations have changed, as a sentence."""
        changed = self.captured.changed()
        if changed:
            return accumulation(changed, self._counters()) or (
                f"An evaluation changed {names(changed)}, which the loss refers to: a "
                "step must not depend on the evaluations before it. Draw from torch's "
                "global generators, which are seeded for each step, take counts from "
                "`step`, and register what evolves as a buffer of the module."
            )
        met = self._counters()
        live = [*met.optimizers, *met.schedulers]
        if live:
            return _READS.format(names=names(live))
        suspects = self.captured.suspects()
        if suspects:
            return (
                f"The loss refers to an iterator, {names(suspects)}, whose next item "
                "depends on the evaluations before. Take batches by the step's index, "
                "such as `batches[step % len(batches)]`."
            )
        return ""

    def compare(
        self,
        found: Probe,
        carry: Any,
        draws: Callable[[int], Any],
        fresh: Optimizers | None,
    ) -> None:
        """Make the steps of a probe on the module itself, and compare.

        Args:
            found: The drifts and updates to compare with.
            carry: The carry at the first step.
            draws: Scope of a step's random streams.
            fresh: At the start of a run, the optimizers of the trajectory: those of
                the second call of the factory start as they are made, unless it
                returns the same ones.

        Raises:
            NotReproducible: Names what differs, and why.
        """
        host = self._host
        self.captured.restore()
        with host.untouched():
            host.write(found.states[0])
            optimizers = self._make()
            if fresh is None or optimizers.shares(fresh):
                optimizers.load(copy_nest(carry))
            for index, step in enumerate(found.steps):
                if index and host.on_gpu:
                    host.write(found.states[index])
                host.clear_gradients()
                with draws(step):
                    self._compare_step(index, step, found, optimizers)
            self._refuse_counters(found, draws)
        self.captured.restore()

    def _compare_step(
        self, index: int, step: int, found: Probe, optimizers: Optimizers
    ) -> None:
        host, drift = self._host, found.drifts[index]
        gradients = self._backward(step, found.states[index])
        expected = {name: drift[name] for name in host.parameters if name in drift}
        require_equal(
            expected,
            gradients,
            f"The gradients of step {step} were compared with `backward()` on the "
            "module itself",
            found.noise,
            self.cause_in_module,
        )
        if index >= len(found.after):
            return
        for name, parameter in host.parameters.items():
            parameter.grad = expected[name].clone() if name in expected else None
        self._clip([p for p in host.parameters.values() if p.grad is not None])
        with torch.no_grad():
            optimizers.step_in_place(skip=Precision.overflowed(drift))
        now = {**host.parameters, **host.buffers()}
        after = found.after[index][0]
        on_gpu = dict.fromkeys(host.buffers(), 0.0) if host.on_gpu else {}
        require_equal(
            {name: after[name] for name in now},
            {name: tensor.detach() for name, tensor in now.items()},
            f"The update of step {step} was compared with the optimizer's own step "
            "from the same gradients",
            on_gpu,
            lambda: (
                "The optimizer or scheduler remembers something outside of its "
                "attributes (a function's closure, a global name): keep it in `self`."
            ),
        )

    def cause_in_module(self) -> str:
        """What the module's loop has changed, as a sentence."""
        changed = self._host.attributes.changed()
        if changed:
            return (
                f"The module's {names(changed)} changed in the steps before, and the "
                "next step depends on it: register it as a buffer, or compute it "
                "from `step`."
            )
        return self.cause()

    def _refuse_counters(self, found: Probe, draws: Callable[[int], Any]) -> None:
        """Refuse numbers that grow with each evaluation, though not used yet."""
        state = found.states[-1]
        grown: Lists = {}
        for step in dict.fromkeys((found.steps[-1], self._last)):
            again = self._repeated(step, state, draws)
            try:
                if step != found.steps[-1]:
                    again()  # what this step alone changes
                grown = self._refuse_growing(step, again, found.noise, grown)
                self._refuse_memory(step, again, found.noise)
            except NotReproducible:
                raise
            except Exception:  # of the loss: the run will meet it, or not
                return

    def _refuse_memory(
        self, step: int, again: Callable[[], State], noise: Mapping[str, float]
    ) -> None:
        """Refuse that a step sees what an earlier one has kept."""
        changed = self.captured.changed()
        if step != self._last or not changed:
            return
        after, alone = again(), None
        self.captured.restore()
        with contextlib.suppress(Exception):  # which is a difference, too
            alone = again()
        require_equal(
            after,
            alone or {},
            f"Step {step} was evaluated after others, and without them",
            noise,
            lambda: (
                f"It sees what an earlier step has left in {names(changed)}: compute "
                "that before the solve, or from the step."
            ),
        )

    def _repeated(
        self, step: int, state: State, draws: Callable[[int], Any]
    ) -> Callable[[], State]:
        """An evaluation of the loop's step, which may be repeated."""
        host = self._host

        def evaluate() -> State:
            host.write(state)
            host.clear_gradients()
            with draws(step), torch.enable_grad():
                gradients = copy_nest(self._backward(step, state))
            now = {name: one.detach() for name, one in host.parameters.items()}
            refuse_written(step, now, state)
            return gradients

        return evaluate

    def _refuse_growing(
        self,
        step: int,
        again: Callable[[], State],
        noise: Mapping[str, float],
        lists: Lists,
    ) -> Lists:
        after, grown = refuse_growing(
            step, self._counters, again, noise, lists, self.elsewhere
        )
        live = [*after.optimizers, *after.schedulers]
        if live:
            gradients = again()
            with displaced(after.optimizers.values(), after.schedulers.values()):
                other = again()
            require_equal(
                gradients,
                other,
                f"Step {step} was evaluated again with other settings of {names(live)}",
                noise,
                lambda: _READS.format(names=names(live)),
            )
        return grown


_READS = (
    "The loss refers to {names}: what it reads there belongs to another step than the "
    "one that is evaluated. Compute the learning rate, or what else it is, from `step`."
)


def _refuse_scalers(met: Counters) -> None:
    for path, one in met.others.items():
        if isinstance(one, torch.amp.GradScaler) and one.is_enabled():
            raise NotReproducible(
                f"The loss refers to a `GradScaler`, `{path}`, whose scale changes "
                "with each update. Return the loss itself, and write "
                '`precision="16-mixed"`, which scales as it does.'
            )
