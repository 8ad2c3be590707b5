"""What a solve counts otherwise than the loop is refused, wherever it is kept."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset

import dreampropeller as dp
from dreampropeller.counters import Counters, lengthened
from dreampropeller.verification import NotReproducible
from tests.helpers import tree_equal

STEPS = 9
EXACT = dp.PicardSolver(dp.SlidingWindow(3), dp.FixedThreshold(0), "momentum")
Loss = Callable[[int, Any], Any]
LATER = 40
"""Evaluations after which a count decides: far more than any check makes."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


def error(step: int, module: nn.Module) -> Tensor:
    x = torch.randn(8, 4)
    return (module(x) - x.sum(1, keepdim=True)).square().mean()


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params.values(), lr=0.05)


def made(loss: Loss, module: nn.Module | None = None, **options: Any) -> Any:
    settings = {"optimizer": adam, "num_steps": STEPS, **options}
    return dp.OptimizationTrajectory.from_module(module or net(), loss, **settings)


def solved(loss: Loss, module: nn.Module | None = None, **options: Any) -> Any:
    return dp.solve(made(loss, module, **options), EXACT)


def hand_written(
    loss: Loss, module: nn.Module, factory: Any = adam, schedule: Any = None
) -> dict[str, Tensor]:
    named, keyed = dict(module.named_parameters()), dp.StepRandom(0)
    optimizer = factory(named)
    scheduler = schedule(optimizer) if schedule else None
    for step in range(STEPS):
        optimizer.zero_grad()
        with keyed.scope(step):
            found = loss(step, module)
            if found.requires_grad:
                found.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
    return {name: one.detach() for name, one in named.items()}


class Meter:
    """The average that every training script has."""

    def __init__(self) -> None:
        self.count, self.sum = 0, 0.0

    def add(self, value: float) -> int:
        self.count, self.sum = self.count + 1, self.sum + value
        return self.count


class Metered(nn.Module):
    def __init__(self, decides: bool) -> None:
        super().__init__()
        self.net, self.meter, self.decides = net(), Meter(), decides

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        count = self.meter.add(y.mean().item())
        return y * 2 if self.decides and count > LATER else y


class Listing(nn.Module):
    """Reads its own log once it is long."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.log = net(), [0.0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        self.log.append(y.mean().item())
        return y * self.log[-2] if len(self.log) > LATER else y


class Straight(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        Straight.calls += 1
        return gradients[0] * (2 if Straight.calls > LATER else 1)


def in_a_class() -> Loss:
    class Progress:
        calls = 0

    def loss(step: int, module: nn.Module) -> Tensor:
        Progress.calls += 1
        return error(step, module) * (2 if Progress.calls > LATER else 1)

    return loss


def in_an_object() -> Loss:
    config = types.SimpleNamespace(calls=0)

    def loss(step: int, module: nn.Module) -> Tensor:
        config.calls += 1
        return error(step, module) * (2 if config.calls > LATER else 1)

    return loss


def in_a_function() -> Loss:
    def loss(step: int, module: nn.Module) -> Tensor:
        kept: Any = loss
        kept.calls = getattr(kept, "calls", 0) + 1
        return error(step, module) * (2 if kept.calls > LATER else 1)

    return loss


def in_a_data_set() -> Loss:
    class Curriculum(Dataset[Tensor]):
        seen = 0

        def __getitem__(self, index: int) -> Tensor:
            self.seen += 1
            return torch.ones(4) * (2 if self.seen > LATER else 1)

    data = Curriculum()
    return lambda step, module: module(data[step]).square().sum()


def in_a_backward_pass() -> Loss:
    return lambda step, module: Straight.apply(error(step, module))


def in_an_average_of_weights() -> Loss:
    kept: dict[str, Any] = {"average": AveragedModel(net())}

    def loss(step: int, module: nn.Module) -> Tensor:
        if step > 5:  # a warm-up
            kept["average"].update_parameters(module)
        return error(step, module)

    return loss


def in_a_list() -> Loss:
    losses: list[float] = []

    def loss(step: int, module: nn.Module) -> Tensor:
        found = error(step, module)
        if len(losses) > LATER:
            found = found * losses[-1] / losses[-5]
        losses.append(found.item())
        return found

    return loss


def in_a_list_of_the_first_steps() -> Loss:
    means: list[Tensor] = []

    def loss(step: int, module: nn.Module) -> Tensor:
        y = module(torch.randn(8, 4))
        if step < 4:
            means.append(y.detach().mean())
        return (y - torch.stack(means).mean()).square().mean() if step > 4 else y.mean()

    return loss


def in_what_the_first_step_left() -> Loss:
    """A scale that every rank would take from another step."""
    first: dict[str, Tensor] = {}

    def loss(step: int, module: nn.Module) -> Tensor:
        found = error(step, module)
        return found / first.setdefault("loss", found.detach())

    return loss


def in_two_closures_of_one_name() -> Loss:
    def counter() -> Callable[[], int]:
        count = 0

        def call() -> int:
            nonlocal count
            count += 1
            return count

        return call

    def still() -> Callable[[], int]:
        count = 0
        return lambda: count

    calls, constant = counter(), still()

    def loss(step: int, module: nn.Module) -> Tensor:
        late = calls() + constant() > LATER
        return error(step, module) * (2 if late else 1)

    return loss


def in_slots() -> Loss:
    @dataclasses.dataclass(slots=True)
    class Slotted:
        calls: int = 0

    progress = Slotted()

    def loss(step: int, module: nn.Module) -> Tensor:
        progress.calls += 1
        return error(step, module) * (2 if progress.calls > LATER else 1)

    return loss


def in_a_cached_function() -> Loss:
    calls = itertools.count()

    @functools.lru_cache(maxsize=1)
    def scale(call: int) -> float:
        return 2.0 if call > LATER else 1.0

    return lambda step, module: error(step, module) * scale(next(calls))


def in_a_set() -> Loss:
    seen: set[object] = set()

    def loss(step: int, module: nn.Module) -> Tensor:
        seen.add(object())
        return error(step, module) * (2 if len(seen) > LATER else 1)

    return loss


def in_two_lists_of_one_name() -> Loss:
    def meter() -> Callable[[float], float]:
        losses: list[float] = []

        def mean(value: float) -> float:
            losses.append(value)
            return sum(losses) / len(losses)

        return mean

    def log() -> Callable[[float], None]:
        losses: list[float] = []
        return losses.append

    mean, note = meter(), log()

    def loss(step: int, module: nn.Module) -> Tensor:
        found = error(step, module)
        note(found.item())
        scale = mean(found.item()) if step > 5 else 1.0
        return found * scale

    return loss


COUNTS: dict[Callable[[], Loss], str] = {
    in_a_class: r"`Progress\.calls` changed although",
    in_an_object: r"`config\.calls`",
    in_a_function: r"`loss\.calls`",
    in_a_data_set: r"`data\.seen`",
    in_a_backward_pass: r"`Straight\.calls`",
    in_an_average_of_weights: r"`kept\.average.*although step 8",
    in_two_closures_of_one_name: r"`count` changed",
    in_slots: r"`progress\.calls`",
    in_a_cached_function: r"`calls`",
    in_a_set: r"`seen` changed",
    in_two_lists_of_one_name: r"with a longer `losses`",
    in_a_list: r"with a longer `losses`",
    in_a_list_of_the_first_steps: r"Step 8 .* with a longer `means`",
    in_what_the_first_step_left: r"Step 8 .* left in `first`",
}


@pytest.mark.parametrize("make", COUNTS, ids=lambda make: make.__name__)
def test_a_count_that_decides_later(make: Callable[[], Loss]) -> None:
    with pytest.raises(NotReproducible, match=COUNTS[make]):
        solved(make())


@pytest.mark.parametrize("module", [Metered(decides=True), Listing()])
def test_a_count_inside_of_a_module(module: nn.Module) -> None:
    with pytest.raises(NotReproducible, match=r"`meter\.count`, `meter\.sum`|`log`"):
        solved(error, module)


def test_a_log_that_nothing_reads_passes() -> None:
    losses: list[float] = []

    def loss(step: int, module: nn.Module) -> Tensor:
        losses.append(error(step, module).item())
        return error(step, module)

    assert tree_equal(solved(loss).value, hand_written(loss, net()))
    assert losses


@pytest.mark.parametrize("ignore", [("meter",), ("meter.count", "meter.sum")])
def test_the_way_out_for_a_count_that_nothing_reads(ignore: tuple[str, ...]) -> None:
    wanted = hand_written(error, Metered(decides=False))
    found = solved(error, Metered(decides=False), ignore=ignore)
    assert tree_equal(found.value, wanted)
    assert found.checked.whole


class Counting(nn.Module):
    def __init__(self, used: bool) -> None:
        super().__init__()
        self.net, self.used, self.calls = net(), used, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) * (self.calls if self.used else 1)


def test_what_is_ignored_is_left_alone_and_still_may_not_decide() -> None:
    module = Counting(used=False)
    solved(error, module, ignore=("calls",))
    assert module.calls > STEPS, "it counts the evaluations of the solve"
    with pytest.raises(NotReproducible, match="evaluated twice at the same state"):
        solved(error, Counting(used=True), ignore=("calls",))
    with pytest.raises(NotReproducible, match="`ignore` names `cals`"):
        solved(error, Counting(used=False), ignore=("calls", "cals"))
    with pytest.raises(TypeError, match='`ignore=\\("calls",\\)`'):
        made(error, Counting(used=False), ignore="calls")


def averaging(params: Any) -> torch.optim.Optimizer:
    one, model = adam(params), net()
    average = AveragedModel(model)
    one.register_step_post_hook(lambda *_: average.update_parameters(model))
    return one


def counting(params: Any) -> torch.optim.Optimizer:
    one, calls = adam(params), {"count": 0}

    def hook(optimizer: Any, *_: Any) -> None:
        calls["count"] += 1
        if calls["count"] > LATER:
            optimizer.param_groups[0]["lr"] = 0.0

    one.register_step_pre_hook(hook)
    return one


class Shared(torch.optim.SGD):
    calls = 0

    def step(self, closure: Any = None) -> Any:
        Shared.calls += 1
        self.param_groups[0]["lr"] = 0.1 if Shared.calls < LATER else 0.0
        return super().step(closure)


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        (averaging, r"`average\.n_averaged`"),
        (counting, r"`calls\.count`"),
        (lambda params: Shared(params.values(), lr=0.1), r"`Shared\.Shared\.calls`"),
    ],
)
def test_an_update_that_counts_elsewhere(factory: Any, name: str) -> None:
    with pytest.raises(NotReproducible, match=rf"An update changed {name}"):
        solved(error, optimizer=factory)


def test_a_schedule_that_counts_elsewhere() -> None:
    calls = {"count": 0}

    def factor(_: int) -> float:
        calls["count"] += 1
        return 1.0 if calls["count"] < LATER else 0.1

    with pytest.raises(NotReproducible, match=r"An update changed `calls\.count`"):
        solved(error, scheduler=lambda one: LambdaLR(one, factor))


def test_the_way_out_for_a_schedule_that_only_counts() -> None:
    calls = {"count": 0}

    def factor(_: int) -> float:
        calls["count"] += 1
        return 1.0

    def schedule(one: Any) -> LambdaLR:
        return LambdaLR(one, factor)

    found = solved(error, scheduler=schedule, ignore=("calls.count",))
    assert tree_equal(found.value, solved(error).value)


def test_a_log_of_images_is_not_copied_a_thousand_times() -> None:
    images = [torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]
    with lengthened([(images, 1)]):
        assert len(images) > 1000
        assert len({id(image) for image in images}) == 2
    assert len(images) == 2


def test_a_large_view_of_few_entries_is_sampled_where_it_lies() -> None:
    wide = torch.zeros(20000, 1).expand(20000, 5000)  # 400 MB if it were copied
    before = Counters({"loss": {"wide": wide}})
    assert not before.changed(before.again())
    wide[0, 0] = 1.0
    assert before.changed(before.again()) == ["loss.wide"]
