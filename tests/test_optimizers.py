"""Optimizers and schedulers equal their loop wherever they keep what they remember."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, LRScheduler, SequentialLR

import dreampropeller as dp
from dreampropeller import checkpoint
from tests.helpers import tree_equal

STEPS = 9
EXACT = dp.PicardSolver(dp.SlidingWindow(4), dp.FixedThreshold(0), "momentum")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def error(step: int, module: nn.Module) -> torch.Tensor:
    return (module(torch.randn(8, 3)) - 1).square().mean()


Factory = Callable[[Any], Any]


def hand_written(optimizer: Factory, scheduler: Factory | None) -> dict[str, Any]:
    module, keyed = net(), dp.StepRandom(0)
    named = dict(module.named_parameters())
    one = optimizer(named)
    schedule = scheduler(one) if scheduler else None
    for step in range(STEPS):
        one.zero_grad()
        with keyed.scope(step):  # the optimizer's noise belongs to the step
            error(step, module).backward()
            one.step()
            if schedule is not None:
                schedule.step()
    return {name: parameter.detach() for name, parameter in named.items()}


def trajectory(
    optimizer: Factory, scheduler: Factory | None = None, steps: int = STEPS
) -> dp.OptimizationTrajectory:
    return dp.OptimizationTrajectory.from_module(
        net(), error, optimizer, steps, scheduler=scheduler
    )


def check(
    optimizer: Factory, scheduler: Factory | None = None, folder: Path | None = None
) -> None:
    """Solved twice, by two solvers, and resumed from a file, it is the loop."""
    wanted = hand_written(optimizer, scheduler)
    made = trajectory(optimizer, scheduler)
    for solver in (dp.Sequential(), EXACT, dp.Sequential()):
        assert tree_equal(dp.solve(made, solver).value, wanted), solver
    if folder is not None:
        half = dp.solve(made, EXACT, max_iterations=3, throw=False).state
        checkpoint.save(folder, half)
        other = trajectory(optimizer, scheduler)
        resumed = dp.solve(other, EXACT, state=checkpoint.load(folder))
        assert tree_equal(resumed.value, wanted)


def parameters(optimizer: Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        yield from (p for p in group["params"] if p.grad is not None)


class Remembering(SGD):
    """Scales its gradients by the number of its steps, wherever that is kept."""

    def count(self) -> float:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        scale = 1 / (1 + self.count())
        for parameter in parameters(self):
            parameter.add_(parameter.grad, alpha=-0.1 * scale)


class UnderAKey(Remembering):
    def count(self) -> float:
        shared: Any = self.state
        shared["steps"] = n = shared.get("steps", 0) + 1
        return n


class InAnAttribute(Remembering):
    n = 0

    def count(self) -> float:
        self.n += 1
        return self.n


class InItsDefaults(Remembering):
    def count(self) -> float:
        self.defaults["n"] = n = self.defaults.get("n", 0) + 1
        return n


class InAGroup(Remembering):
    def count(self) -> float:
        group = self.param_groups[0]
        group["born"] = n = group.get("born", 0) + 1
        return n


class Counter:
    def __init__(self) -> None:
        self.seen = {"steps": [0]}

    def __call__(self, step: int = 0) -> float:
        self.seen["steps"][0] += 1
        return 1 / self.seen["steps"][0]


class InAnObject(Remembering):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.counter = Counter()

    def count(self) -> float:
        return self.counter()


class InContainers(Remembering):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.recent: Any = collections.deque(maxlen=3)
        self.known: set[int] = set()
        self.norms = np.zeros(2)

    def count(self) -> float:
        self.recent.append(torch.ones(()) * len(self.known))
        self.known.add(len(self.known))
        self.norms[0] += 1
        return float(sum(self.recent)) + self.norms[0]


class ByParameter(Remembering):
    """Slow weights in a dict of its own, as look-ahead keeps them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        owned = [p for group in self.param_groups for p in group["params"]]
        self.slow = {p: p.detach().clone() for p in owned}
        self.number = {id(p): 0 for p in owned}

    def step(self, closure: Any = None) -> None:
        for parameter in [*parameters(self)]:
            self.number[id(parameter)] += 1
            self.slow[parameter].lerp_(parameter.detach(), 0.5)
            if self.number[id(parameter)] % 3 == 0:
                parameter.data.copy_(self.slow[parameter])
        SGD.step(self, closure)


class Wrapper(Optimizer):
    """Holds the optimizer that does the work, and shares its groups."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.steps = inner, 0
        self.defaults, self.state = inner.defaults, collections.defaultdict(dict)
        self._optimizer_step_pre_hooks = collections.OrderedDict()
        self._optimizer_step_post_hooks = collections.OrderedDict()

    @property
    def param_groups(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.inner.step()
        self.steps += 1
        for parameter in parameters(self):
            slow = self.state[parameter].setdefault("slow", parameter.clone())
            if self.steps % 3 == 0:
                parameter.copy_(slow.lerp_(parameter, 0.5))


class Noisy(SGD):
    """Langevin's noise, from the global generators."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for parameter in parameters(self):
            noise = torch.randn_like(parameter) + np.random.rand()
            parameter.add_(noise, alpha=0.01)


class OwnGenerators(Noisy):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.generator = torch.Generator().manual_seed(0)
        self.python, self.numpy = random.Random(0), np.random.default_rng(0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        SGD.step(self, closure)
        for parameter in parameters(self):
            noise = torch.randn(parameter.shape, generator=self.generator)
            parameter.add_(noise * self.python.gauss(0, 1), alpha=self.numpy.random())


class WritesLater(SGD):
    """Writes into gradients from its fourth step on, as schedule-free RAdam does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in parameters(self):
            state = self.state[parameter]
            state["n"] = state.get("n", 0) + 1
            if state["n"] > 3:
                parameter.grad.mul_(0.5)
            parameter.add_(parameter.grad, alpha=-0.1)


class Rebinds(SGD):
    def step(self, closure: Any = None) -> None:
        for parameter in parameters(self):
            parameter.data = parameter.data - 0.1 * parameter.grad


def sgd(kind: type[SGD], **options: Any) -> Factory:
    return lambda params: kind(params.values(), lr=0.1, **options)


def hooked(params: Any) -> Optimizer:
    """Clips in a hook, which counts its calls in the optimizer's state."""
    one = torch.optim.Adam(params.values(), lr=0.1)

    def clip(optimizer: Any, *_: Any) -> None:
        optimizer.calls = getattr(optimizer, "calls", 0) + 1
        nn.utils.clip_grad_norm_(parameters(optimizer), 0.1 * optimizer.calls)

    one.register_step_pre_hook(clip)
    return one


OPTIMIZERS: dict[str, Factory] = {
    **{
        kind.__name__: sgd(kind)
        for kind in (UnderAKey, InAnAttribute, InItsDefaults, InAGroup, InAnObject)
    },
    **{kind.__name__: sgd(kind) for kind in (InContainers, ByParameter, Noisy)},
    **{kind.__name__: sgd(kind) for kind in (OwnGenerators, WritesLater, Rebinds)},
    "Wrapper": lambda p: Wrapper(torch.optim.AdamW(p.values(), lr=0.1)),
    "wrapped twice": lambda p: Wrapper(Wrapper(sgd(InAnAttribute, momentum=0.9)(p))),
    "hooked": hooked,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_is_carried_wherever_it_is(name: str, tmp_path: Path) -> None:
    check(OPTIMIZERS[name], folder=tmp_path)


class Nested(LRScheduler):
    """A warm-up around another scheduler."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.inner = ExponentialLR(optimizer, 0.8)
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        self._step_count = getattr(self, "_step_count", 0) + 1
        if self._step_count > 3:
            self.inner.step()

    def get_lr(self) -> Any:
        return [group["lr"] for group in self.optimizer.param_groups]


class Bare:
    """No scheduler of torch's, as libraries write them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.counter, self.base = optimizer, Counter(), []
        self.base = [group["lr"] for group in optimizer.param_groups]

    def step(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = lr * self.counter()


SCHEDULERS: dict[str, Factory] = {
    "holds a scheduler": Nested,
    "holds an object": Bare,
    "a factor that counts": lambda o: LambdaLR(o, Counter()),
    "nested ones in a sequence": lambda o: SequentialLR(
        o, [LambdaLR(o, Counter()), ExponentialLR(o, 0.5)], [4]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_carry_what_they_hold(name: str, tmp_path: Path) -> None:
    check(sgd(SGD, momentum=0.9), SCHEDULERS[name], folder=tmp_path)


class Iterating(Remembering):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scales = iter([1.0] * 99)

    def count(self) -> float:
        return next(self.scales)


class Logging(Remembering):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.log = open(__file__)  # noqa: SIM115


class ByObject(Remembering):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.found = {object(): 1}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Iterating, r"`Iterating\.scales` is a `list_iterator`"),
        (Logging, r"`Logging\.log` is a `TextIOWrapper`"),
        (ByObject, r"`ByObject\.found` has a key that is a `object`"),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_cannot_be_put_back_is_refused_by_name(
    kind: type[SGD], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        trajectory(sgd(kind))


def test_rare_types_are_stored(tmp_path: Path) -> None:
    """Safetensors knows fewer types than torch."""

    class Rare(SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for parameter in parameters(self):
                state = self.state[parameter]
                state["complex"] = torch.full((2,), 1 + 2j, dtype=torch.complex128)
                state["single"] = torch.tensor(1 + 2j, dtype=torch.complex64)
                state["counter"] = torch.tensor([7, 8], dtype=torch.uint16)
                state["large"] = torch.tensor([9], dtype=torch.uint64)
                state["eighth"] = torch.ones(4).to(torch.float8_e4m3fnuz)

    state = dp.solve(trajectory(sgd(Rare)), dp.Sequential()).state
    checkpoint.save(tmp_path, state)
    assert tree_equal(checkpoint.load(tmp_path), state)
