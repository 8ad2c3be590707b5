"""What people do around optimizer and loss is the loop's result, or is refused."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

import dreampropeller as dp
from dreampropeller.verification import NotReproducible
from tests.helpers import tree_equal
from tests.test_counters import (
    EXACT,
    STEPS,
    adam,
    error,
    hand_written,
    made,
    net,
    solved,
)


def held() -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """A factory, and where it leaves its optimizer."""
    kept: dict[str, Any] = {}

    def factory(params: Any) -> Any:
        kept["optimizer"] = adam(params)
        return kept["optimizer"]

    return kept, factory


def test_a_learning_rate_set_by_hand_is_refused_when_it_is_set() -> None:
    kept, factory = held()

    def loss(step: int, module: nn.Module) -> Tensor:
        if step == 6:
            kept["optimizer"].param_groups[0]["lr"] *= 0.1
        return error(step, module)

    with pytest.raises(ValueError, match=r"Step 6 set `lr` of .*`kept\.optimizer`"):
        solved(loss, optimizer=factory)


@pytest.mark.parametrize("constant", [True, False])
def test_a_loss_that_reads_the_learning_rate_is_refused(constant: bool) -> None:
    """Also one that is constant at first."""
    kept, factory = held()

    def loss(step: int, module: Any) -> Tensor:
        lr = kept["optimizer"].param_groups[0]["lr"]
        return error(step, module) + lr * module[0].weight.square().sum()

    def schedule(one: Any) -> Any:
        steps = LambdaLR(one, lambda step: 0.1 if step > 5 else 1.0)
        return steps if constant else ExponentialLR(one, 0.9)

    with pytest.raises(NotReproducible, match=r"The loss refers to `kept\.optimizer`"):
        solved(loss, optimizer=factory, scheduler=schedule)


def test_an_optimizer_that_the_loss_only_clears_passes() -> None:
    kept, factory = held()

    def loss(step: int, module: nn.Module) -> Tensor:
        kept["optimizer"].zero_grad()
        return error(step, module)

    wanted = hand_written(loss, net(), factory)
    assert tree_equal(solved(loss, optimizer=factory).value, wanted)


def test_an_optimizer_made_outside_of_its_factory_is_the_loops() -> None:
    def schedule(one: Any) -> Any:
        return ExponentialLR(one, 0.8)

    wanted = hand_written(error, net(), schedule=schedule)
    for solver in (dp.Sequential(), EXACT):
        module = net()
        kept: list[Any] = [torch.optim.Adam(module.parameters(), lr=0.05)]
        kept += [schedule(*kept)]
        one = made(
            error,
            module,
            optimizer=lambda _, kept=kept: kept[0],
            scheduler=lambda _, kept=kept: kept[1],
        )
        for _ in range(2):
            found = dp.solve(one, solver)
            assert tree_equal(found.value, wanted)
            assert found.checked is not None


def test_a_loss_that_goes_backward_itself_and_returns_a_number() -> None:
    def loss(step: int, module: nn.Module) -> Tensor:
        found = error(step, module)
        found.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        return found.detach()

    assert tree_equal(solved(loss).value, hand_written(loss, net()))

    def apart(step: int, y: Any) -> Tensor:
        part = (y["w"] * torch.rand(3)).square().sum()
        part.backward()
        return y["w"].sum()

    def together(step: int, y: Any) -> Tensor:
        return (y["w"] * torch.rand(3)).square().sum() + y["w"].sum()

    values = [
        dp.solve(
            dp.OptimizationTrajectory(one, {"w": torch.ones(3)}, adam, STEPS),
            dp.Sequential(),
        ).value
        for one in (apart, together)
    ]
    assert torch.allclose(values[0]["w"], values[1]["w"], atol=1e-6)


def rebinding(step: int, module: Any) -> Tensor:
    if step == 6:
        module[0].weight.data = module[0].weight.data.clamp(-0.1, 0.1)
    return error(step, module)


def scaled(step: int, module: Any) -> Tensor:
    error(step, module).backward()
    return error(step, module)


SCALER = torch.amp.GradScaler("cpu")


def by_hand(step: int, module: Any) -> Tensor:
    return SCALER.scale(error(step, module))


class Growing(torch.optim.SGD):
    late: Any

    def step(self, closure: Any = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 6:
            self.add_param_group({"params": [self.late], "lr": 0.1})
        return super().step(closure)


def growing(params: Any) -> torch.optim.Optimizer:
    *first, last = params.values()
    one: Any = Growing(first, lr=0.1)
    one.late = last
    return one


class Warmed:
    """A wrapper as it is often written."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner


def accumulating(steps: int) -> Callable[[int, Any], Tensor]:
    accelerate: Any = importlib.import_module("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)

    def loss(step: int, module: nn.Module) -> Tensor:
        with accelerator.accumulate(module):
            found = error(step, module)
            accelerator.backward(found)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(module.parameters(), 0.5)
        return found.detach()

    return loss


def test_accumulation_of_accelerate_is_the_loops_or_is_refused() -> None:
    wanted = hand_written(accumulating(1), net())
    assert tree_equal(solved(accumulating(1)).value, wanted)
    with pytest.raises(
        NotReproducible, match=r"`accelerator\.accumulate`.* after 2 of"
    ):
        solved(accumulating(2))


class Accelerator:
    """No more than a name in common with that of `accelerate`."""

    step = 0

    def count(self) -> None:
        self.step += 1


def test_a_count_of_a_namesake_is_refused() -> None:
    accelerator = Accelerator()

    def loss(step: int, module: nn.Module) -> Tensor:
        accelerator.count()
        return error(step, module)

    with pytest.raises(NotReproducible, match=r"accelerator\.step"):
        solved(loss)


class Waiting(nn.Module):
    """A buffer gets its shape from the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = net(), nn.LazyBatchNorm1d(affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x))


def test_a_buffer_without_a_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Buffer `norm\.running_mean` has no shape"):
        solved(error, Waiting())


class Contrast(nn.Module):
    """A queue of keys with a place, as momentum contrast keeps it."""

    queue: Tensor
    place: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.register_buffer("queue", torch.randn(3, 8))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        keys = self.layer(x)
        found = (keys @ self.queue.clone()).logsumexp(1).mean() - keys.mean()
        with torch.no_grad():
            place = int(self.place)
            self.queue[:, place : place + 4] = keys.T
            self.place[0] = (place + 4) % 8
        return found


def scattered(step: int, module: Any) -> Tensor:
    """Needs a matrix that is positive definite, as it is on the way."""
    weight = module[0].weight
    matrix = torch.eye(4) - weight.T @ weight
    return error(step, module) - torch.linalg.cholesky(matrix).diagonal().log().sum()


@pytest.mark.parametrize(
    ("loss", "module", "rate"),
    [
        (lambda step, module: module(torch.randn(4, 4)), Contrast, 0.01),
        (scattered, net, 0.08),
    ],
)
def test_what_fails_at_a_guess_alone_cuts_the_window(
    loss: Any, module: Any, rate: float, caplog: pytest.LogCaptureFixture
) -> None:
    def descent(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params.values(), rate, momentum=0.9)

    wanted = hand_written(loss, module(), descent)
    found = solved(loss, module(), optimizer=descent).value
    assert tree_equal({name: found[name] for name in wanted}, wanted)
    assert "failed at a guess" in caplog.text


class Alias(nn.Module):
    """A buffer in a parameter's memory."""

    def __init__(self, rows: slice) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        memory = torch.cat([self.layer.weight.data, torch.ones(4, 4)])
        self.layer.weight.data = memory[:4]
        self.register_buffer("rows", memory[rows])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


def test_a_buffer_that_moves_with_a_parameter_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Buffer `rows` is a view of .*layer\.weight`"
    ):
        solved(error, Alias(slice(3, 5)))
    module = Alias(slice(4, 6))  # its neighbour
    wanted = hand_written(error, copy.deepcopy(module))
    found = solved(error, module).value
    assert tree_equal({name: found[name] for name in wanted}, wanted)


@pytest.mark.parametrize("solver", [dp.Sequential(), EXACT])
@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (rebinding, {}, r"changed parameter `0\.weight` itself"),
        (scaled, {"precision": "16-mixed"}, "goes backward itself, and the loss scale"),
        (by_hand, {}, 'GradScaler`, `SCALER`.*`precision="16-mixed"`'),
        (error, {"optimizer": growing}, "groups of `Growing` changed during the run"),
        (error, {"optimizer": lambda p: Warmed(adam(p))}, "returned a `Warmed`"),
        (lambda t, m: error(t, m).detach(), {}, "depends on no parameter"),
    ],
)
def test_other_habits_are_refused(
    loss: Any, options: Any, message: str, solver: Any
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        dp.solve(made(loss, copy.deepcopy(net()), **options), solver)
