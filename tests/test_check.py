"""What is not a function of step and state is refused before the run, by name."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dreampropeller as dp
from dreampropeller.tree import copy_nest
from dreampropeller.verification import NotReproducible
from tests.helpers import TOYS, tree_equal

EXACT = dp.PicardSolver(dp.SlidingWindow(4), dp.FixedThreshold(0))
Loss = Callable[[int, Any], Any]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))


def error(module: nn.Module, x: Tensor) -> Tensor:
    return (module(x) - x.sum(1, keepdim=True)).square().mean()


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params.values(), lr=0.05)


def solved(loss: Loss, module: nn.Module | None = None, **options: Any) -> Any:
    settings = {"optimizer": sgd, "num_steps": 8, **options}
    made = dp.OptimizationTrajectory.from_module(module or net(), loss, **settings)
    return dp.solve(made, EXACT)


DATA = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
GENERATOR = torch.Generator().manual_seed(0)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(DATA), batch_size=5)


def next_batch() -> Loss:
    state = {"iterator": iter(loader())}
    return lambda step, m: error(m, next(state["iterator"])[0])


def cycled() -> Loss:
    batches = itertools.cycle([row[None] for row in DATA])
    return lambda step, m: error(m, next(batches))


def own_generator() -> Loss:
    generator = torch.Generator().manual_seed(0)
    return lambda step, m: error(m, torch.randn(8, 4, generator=generator))


def global_generator() -> Loss:
    return lambda step, m: error(m, torch.randn(8, 4, generator=GENERATOR))


def numpy_generator() -> Loss:
    rng = np.random.default_rng(0)
    return lambda step, m: error(m, torch.from_numpy(rng.normal(size=(8, 4))).float())


def bound_generator() -> Loss:
    class Task:
        def __init__(self) -> None:
            self.python = random.Random(0)

        def loss(self, step: int, module: nn.Module) -> Tensor:
            return error(module, DATA * self.python.random())

    return Task().loss


def partial_generator() -> Loss:
    def loss(generator: torch.Generator, step: int, module: nn.Module) -> Tensor:
        return error(module, torch.randn(8, 4, generator=generator))

    return functools.partial(loss, torch.Generator().manual_seed(0))


def clock() -> Loss:
    return lambda step, m: error(m, DATA) * (time.perf_counter_ns() % 1009)


def teacher() -> Loss:
    average = copy.deepcopy(net()).requires_grad_(False)

    def loss(step: int, module: nn.Module) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(
                average.parameters(), module.parameters(), strict=True
            ):
                slow.lerp_(fast, 0.1)
        return (module(DATA) - average(DATA)).square().mean() + module(DATA).mean()

    return loss


def counted() -> Loss:
    count = 0

    def loss(step: int, module: nn.Module) -> Tensor:
        nonlocal count
        count += 1
        return error(module, DATA) * count

    return loss


def counted_for_later() -> Loss:
    calls = {"count": 0}

    def loss(step: int, module: nn.Module) -> Tensor:
        calls["count"] += 1
        return error(module, DATA) * (1 if calls["count"] < 1000 else 2)

    return loss


def norm_of_data() -> Loss:
    norm = nn.BatchNorm1d(4)  # outside of the module, in training mode
    return lambda step, m: error(m, norm(DATA * (1 + step)) + norm.running_mean)


IMPURE: dict[Callable[[], Loss], str] = {
    next_batch: r"refers to an iterator, `state`",
    cycled: r"refers to an iterator, `batches`",
    own_generator: r"changed `generator`, which the loss refers to",
    global_generator: r"changed `GENERATOR`",
    numpy_generator: r"changed `rng`",
    bound_generator: r"changed `self\.python`",
    partial_generator: r"changed `argument 0`",
    clock: r"Something besides step and state decides",
    teacher: r"changed `average\.0\.bias`, `average\.0\.weight`",
    counted: r"changed `count`",
    counted_for_later: r"`calls\.count` changed although step 1",
    norm_of_data: r"changed `norm\.num_batches_tracked`",
}


@pytest.mark.parametrize("make", IMPURE, ids=lambda make: make.__name__)
def test_a_loss_that_is_no_function_of_step_and_state(make: Callable[[], Loss]) -> None:
    with pytest.raises(NotReproducible, match=IMPURE[make]):
        solved(make())


class Remembering(nn.Module):
    """A module whose plain attributes remember something of earlier steps."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.kind = nn.Linear(4, 1), kind
        self.count, self.mean = 0, torch.zeros(())
        self.queue: Any = collections.deque([torch.zeros(())], maxlen=3)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.kind == "a counter":
            self.count += 1
            return y * self.count
        if self.kind == "a counter for later":
            self.count += 1
            return y * (1 if self.count < 1000 else 2)
        if self.kind == "an average":
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean()
            return y - self.mean
        if self.kind == "an average in place":
            self.mean.lerp_(y.detach().mean(), 0.1)
            return y - self.mean
        if self.kind == "a queue":
            self.queue.append(y.detach().mean())
            return y - sum(self.queue)
        return y + torch.randn(1, generator=self.generator)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("a counter", "count"),
        ("a counter for later", "count"),
        ("an average", "mean"),
        ("an average in place", "mean"),
        ("a queue", "queue"),
        ("a generator", "generator"),
    ],
)
def test_a_module_that_remembers(kind: str, name: str) -> None:
    with pytest.raises(NotReproducible, match=f"`{name}`"):
        solved(lambda step, m: error(m, DATA), Remembering(kind))


def thaw(step: int, module: Any) -> Tensor:
    if step == 5:
        module[0].requires_grad_(True)
    return error(module, DATA)


def freeze(step: int, module: Any) -> Tensor:
    module[0].requires_grad_(step < 5)
    return error(module, DATA)


def evaluate(step: int, module: Any) -> Tensor:
    if step == 5:
        module[1].eval()
    return error(module, DATA)


def train(step: int, module: Any) -> Tensor:
    return error(module.train(step >= 5), DATA)


def replace(step: int, module: Any) -> Tensor:
    if step == 5:
        module[1].weight = nn.Parameter(module[1].weight.detach() * 2)
    return error(module, DATA)


@pytest.mark.parametrize(
    ("loss", "frozen", "message"),
    [
        (thaw, True, r"switched `0\.weight\.requires_grad` to True"),
        (freeze, False, r"switched `0\.weight\.requires_grad` to False"),
        (evaluate, False, r"switched `1` to `eval\(\)`"),
        (train, False, r"switched the module to `eval\(\)`"),
        (replace, False, r"replaced parameter `1\.weight`"),
    ],
)
def test_a_switch_during_the_run(loss: Loss, frozen: bool, message: str) -> None:
    module: Any = net()
    module[0].requires_grad_(not frozen)
    with pytest.raises(ValueError, match=message):
        solved(loss, module)
    assert all(one.training for one in module.modules())
    assert module[0].weight.requires_grad is not frozen


def test_the_ways_out_of_a_switch_equal_their_loops() -> None:
    """A layer that joins at step 5, and a mode that is put back."""

    def loss(step: int, module: Any) -> Tensor:
        first, second = module
        module.train(step >= 3)
        hidden = first(DATA)
        found = (second(hidden if step >= 5 else hidden.detach()) - 1).square().mean()
        module.train(True)
        return found

    def thawed(step: int, module: Any) -> Tensor:
        module[0].requires_grad_(step >= 5)
        return (module(DATA) - 1).square().mean()

    module = net()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for step in range(8):
        optimizer.zero_grad()
        thawed(step, module).backward()
        optimizer.step()
    found = solved(loss, optimizer=lambda p: torch.optim.Adam(p.values(), lr=0.05))
    assert tree_equal(found.value, dict(module.state_dict()))


def test_unseeded_randomness_is_refused() -> None:
    with pytest.raises(NotReproducible, match="seeded for each step"):
        solved(lambda step, m: error(m, torch.randn(4, 4)), seed=None)


def test_a_write_through_data_is_refused() -> None:
    def loss(step: int, module: Any) -> Tensor:
        module[0].weight.data.clamp_(-0.1, 0.1)
        return error(module, DATA)

    with pytest.raises(NotReproducible, match=r"wrote into `0\.weight` of the state"):
        solved(loss)


def forgetful(params: Any) -> torch.optim.Optimizer:
    """An optimizer that counts in its factory's closure."""
    seen: list[int] = []

    class Forgetful(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append(0)
            for group in self.param_groups:
                group["lr"] = 0.1 / len(seen)
            super().step(closure)

    return Forgetful(params.values(), lr=0.1)


def noisy(params: Any) -> torch.optim.Optimizer:
    """An optimizer that draws from the operating system."""

    class Noisy(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(random.SystemRandom().random())

    return Noisy(params.values(), lr=0.1)


def counting_hook(params: Any) -> torch.optim.Optimizer:
    """A hook that counts in its closure."""
    one, calls = torch.optim.SGD(params.values(), lr=0.1), []

    def hook(optimizer: Any, *_: Any) -> None:
        calls.append(0)
        optimizer.param_groups[0]["lr"] = 0.1 / len(calls)

    one.register_step_pre_hook(hook)
    return one


@pytest.mark.parametrize("factory", [forgetful, noisy, counting_hook])
def test_an_optimizer_that_remembers_elsewhere(factory: Any) -> None:
    with pytest.raises(NotReproducible, match="The update of step"):
        solved(lambda step, m: error(m, DATA), optimizer=factory)


def test_a_solve_tells_what_was_verified_and_leaves_no_trace() -> None:
    module: Any = net()
    module.last, module.level = 0.0, torch.zeros(2)
    losses: list[float] = []
    generator = torch.Generator().manual_seed(3)
    module[0].weight.grad = torch.ones(4, 4)

    def loss(step: int, module: Any) -> Tensor:
        generator.manual_seed(step)  # its own, but a function of the step
        found = error(module, torch.randn(8, 4, generator=generator))
        losses.append(found.item())
        module.last, module.born = found.item(), step
        return found

    before = copy_nest(dict(module.state_dict()))
    stream = torch.get_rng_state()
    made = dp.OptimizationTrajectory.from_module(module, loss, sgd, 8)
    found = dp.solve(made, EXACT)
    assert found.checked is not None
    assert found.checked.whole
    assert found.checked.steps == (0, 1)
    assert tree_equal(dict(module.state_dict()), before)
    assert torch.equal(module[0].weight.grad, torch.ones(4, 4))
    assert module.last == 0
    assert not hasattr(module, "born")
    assert torch.equal(torch.get_rng_state(), stream)
    assert found.stats == dp.solve(made, EXACT, check=False).stats
    assert dp.solve(made, EXACT, check=False).checked is None
    half = dp.solve(made, EXACT, max_iterations=2, throw=False).state
    resumed = dp.solve(made, EXACT, state=half)
    assert resumed.checked is not None
    assert resumed.checked.steps[0] == half.step
    assert tree_equal(resumed.value, found.value)


def test_one_evaluation_in_500_is_repeated() -> None:
    ticks = iter(range(10**6))  # whose place cannot be read

    def loss(step: int, module: Any) -> Tensor:
        calls = next(ticks)
        return error(module, DATA[:2]) * (1 + 1e-3 * calls * (calls > 400))

    with pytest.raises(NotReproducible, match="twice in a row"):
        solved(loss, num_steps=600)


@pytest.mark.parametrize("name", TOYS)
def test_other_trajectories_are_evaluated_again(name: str) -> None:
    found = dp.solve(TOYS[name].make(), dp.Sequential())
    assert found.checked is not None
    assert not found.checked.whole


def test_an_evaluation_that_fails_is_left_to_the_run() -> None:
    def loss(step: int, module: Any) -> Tensor:
        raise KeyError(step)

    with pytest.raises(KeyError):
        solved(loss)


def test_a_solve_that_gains_nothing_says_so() -> None:
    found = solved(lambda step, m: error(m, torch.randn(8, 4)), num_steps=12)
    assert max(found.stats.strides) == 1
    assert "12 iterations took 12 steps: at threshold 0" in found.note
    steep = dp.OptimizationTrajectory(
        lambda step, y: (y["x"] + torch.randn(8)).square().sum(),
        {"x": torch.ones(8)},
        lambda params: torch.optim.SGD(params.values(), 0.9),
        40,
    )
    gained_nothing = dp.solve(steep, dp.PicardSolver(dp.SlidingWindow(8)))
    assert "drifts change too much" in gained_nothing.note
    for other in (dp.Sequential(), dp.PicardSolver(dp.SlidingWindow(1))):
        made = dp.OptimizationTrajectory.from_module(
            net(), lambda step, m: error(m, DATA), sgd, 12
        )
        assert dp.solve(made, other).note == ""
