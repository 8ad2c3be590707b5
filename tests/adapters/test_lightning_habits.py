"""What people do by hand in a LightningModule is the Trainer's run, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, DistributedSampler, Sampler, TensorDataset

import dreampropeller as dp
from dreampropeller import verification
from dreampropeller.adapters.lightning import LightningTrajectory
from dreampropeller.adapters.lightning.trainer import KeyedLoader
from dreampropeller.verification import NotReproducible
from tests.adapters.regression import Seeds
from tests.helpers import tree_equal

STEPS = 14
EXACT = dp.PicardSolver(dp.SlidingWindow(4), dp.FixedThreshold(0), "momentum")
X = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))


def ordered() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X), batch_size=4)


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)

    def groups(self) -> Any:
        return self.trainer.optimizers[0].param_groups

    def warm(self) -> float:
        return 1e-2 * min(1.0, (self.global_step + 1) / 10)


class Decaying(Plain):
    def configure_optimizers(self) -> Any:
        optimizer: Any = super().configure_optimizers()
        schedule = {"scheduler": ExponentialLR(optimizer, 0.8), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Warm(Plain):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for group in self.groups():
            group["lr"] = self.warm()


class WarmBeforeStep(Plain):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.warm()


class OwnReference(Plain):
    def configure_optimizers(self) -> Any:
        self.opt: Any = super().configure_optimizers()
        self.group = self.opt.param_groups[0]
        return self.opt

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step % 2:
            self.group["lr"] = self.warm()
        else:
            self.opt.param_groups[0]["lr"] = self.warm()
        return super().training_step(batch, batch_idx)


class Momentum(Plain):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        for group in self.groups():
            group["betas"] = (0.9 - 0.01 * self.global_step, 0.99)


class Reads(Decaying):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        lr = self.groups()[0]["lr"]
        penalty = 100 * lr * self.net.weight.square().sum()
        return super().training_step(batch, batch_idx) + penalty


class ReadsScheduler(Decaying):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        schedule: Any = self.lr_schedulers()
        (lr,) = schedule.get_last_lr()
        penalty = 100 * lr * self.net.weight.square().sum()
        return super().training_step(batch, batch_idx) + penalty


class Drops(Decaying):
    """Divides the learning rate now and then, on top of a schedule."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step in (1, 9):
            for group in self.groups():
                group["lr"] *= 0.3


class ReadsWhatItSet(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 0:
            self.groups()[0]["lr"] = 0.1
        return super().training_step(batch, batch_idx) * self.groups()[0]["lr"]


class Slowing(torch.optim.SGD):
    """Counts in its group, where the count is born in the first step."""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        (group,) = self.param_groups
        group["count"] = group.get("count", 0) + 1
        group["lr"] = 0.1 / group["count"]
        return found


class CountsInAGroup(Plain):
    def configure_optimizers(self) -> Any:
        return Slowing(self.parameters(), lr=0.1)


HABITS = [
    CountsInAGroup,
    Warm,
    WarmBeforeStep,
    OwnReference,
    Momentum,
    Reads,
    ReadsScheduler,
    Drops,
]
HABITS += [ReadsWhatItSet]


def fit(module: pl.LightningModule, data: Any) -> dict[str, Any]:
    trainer = pl.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Seeds(0)],
    )
    trainer.fit(module, data)
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HABITS)
def test_settings_by_hand_are_the_trainers(kind: type[Plain]) -> None:
    wanted = fit(kind(), ordered())
    for solver in (dp.Sequential(), EXACT):
        module = kind()
        before = copy.deepcopy(dict(module.state_dict()))
        trajectory = LightningTrajectory(module, ordered(), STEPS)
        found = dp.solve(trajectory, solver)
        assert tree_equal(found.value, wanted)
        assert found.checked is not None
        assert found.checked.whole
        assert tree_equal(dict(module.state_dict()), before)


class Multiplies(Plain):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for group in self.groups():
            group["lr"] *= 0.9


class SetsLate(Plain):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.groups()[0]["lr"] = self.warm()


class AveragesLate(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(1, 4))
        self.average: torch.Tensor

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.average.lerp_(self.net.weight.detach(), 0.1)


class ReadsMoments(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        memory = self.trainer.optimizers[0].state[self.net.weight]
        return super().training_step(batch, batch_idx) * (1 + len(memory))


class FreezesItself(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            self.net.bias.requires_grad_(False)
        return super().training_step(batch, batch_idx)


class GoesToSleep(Plain):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.net.eval()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FreezesItself, r"switched `net.bias.requires_grad` to False"),
        (GoesToSleep, r"switched `net` to `eval\(\)`"),
        (Multiplies, "reads `lr` of the optimizer, which an earlier step has set"),
        (SetsLate, "`on_train_batch_end` changed a setting of the optimizer"),
        (AveragesLate, "`on_train_batch_end` changed the buffer `average`"),
        (ReadsMoments, "reads the optimizer's `state`"),
    ],
)
def test_what_depends_on_earlier_steps_is_refused(
    kind: type[Plain], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dp.solve(LightningTrajectory(kind(), ordered(), STEPS), EXACT)


class Tires(Plain):
    """Forgets to learn after a number of evaluations, whatever their steps."""

    evaluations = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        type(self).evaluations += 1
        weight = 1.0 if self.evaluations < 40 else 1.0 / self.evaluations
        return super().training_step(batch, batch_idx) * weight


def test_an_evaluation_is_repeated_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What begins to differ after the check at the start is noticed during the run."""
    monkeypatch.setattr(verification, "_EVERY", 3)
    Tires.evaluations = 0
    made = LightningTrajectory(Tires(), ordered(), STEPS, ignore=("evaluations",))
    with pytest.raises(NotReproducible, match="evaluated twice in a row"):
        dp.solve(made, EXACT)


class AveragesEarly(AveragesLate):
    """The way out that its refusal names."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.average.lerp_(self.net.weight.detach(), 0.1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.filterwarnings("ignore")
def test_an_average_at_the_start_of_a_step_is_the_trainers() -> None:
    wanted = fit(AveragesEarly(), ordered())
    found = dp.solve(LightningTrajectory(AveragesEarly(), ordered(), STEPS), EXACT)
    assert tree_equal(found.value, wanted)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"interval": "steps"}, "`interval` of a scheduler is 'steps'"),
        ({"intervall": "step"}, "with the key `intervall`"),
        ({"frequency": 0}, "`frequency` of a scheduler is 0"),
        ({"monitor": "loss"}, "with `monitor`: a metric"),
    ],
)
def test_schedules_that_lightning_refuses(schedule: Any, message: str) -> None:
    class Misspelt(Plain):
        def configure_optimizers(self) -> Any:
            optimizer: Any = super().configure_optimizers()
            made = {"scheduler": ExponentialLR(optimizer, 0.8), **schedule}
            return {"optimizer": optimizer, "lr_scheduler": made}

    class Misnamed(Plain):
        def configure_optimizers(self) -> Any:
            return {"optimizer": super().configure_optimizers(), "scheduler": None}

    with pytest.raises(ValueError, match=message):
        LightningTrajectory(Misspelt(), ordered(), STEPS)
    with pytest.raises(ValueError, match="with the key `scheduler`"):
        LightningTrajectory(Misnamed(), ordered(), STEPS)


class Rolled(Sampler[int]):
    """Remembers how far it has got, and draws from a generator of its own."""

    def __init__(self) -> None:
        self.turns, self.generator = 0, torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return len(X)

    def __iter__(self) -> Iterator[int]:
        self.turns += 1
        order = torch.randperm(len(X), generator=self.generator)
        yield from order.roll(self.turns).tolist()


def own_generator() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(X)
    return DataLoader(data, batch_size=4, shuffle=True, generator=generator)


def own_sampler() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X), batch_size=4, sampler=Rolled())


def told_epochs() -> DataLoader[Any]:
    data: Any = TensorDataset(X)
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    return DataLoader(data, batch_size=4, sampler=sampler)


def own_generator_alone() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(X), batch_size=4, generator=generator)


LOADERS = [own_generator, own_sampler, told_epochs, own_generator_alone]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", LOADERS, ids=lambda make: make.__name__)
def test_loaders_draw_the_trainers_batches(make: Callable[[], Any]) -> None:
    wanted = fit(Plain(), make())
    for solver in (dp.Sequential(), EXACT):
        trajectory = LightningTrajectory(Plain(), make(), STEPS)
        assert tree_equal(dp.solve(trajectory, solver).value, wanted)


@pytest.mark.parametrize("make", LOADERS, ids=lambda make: make.__name__)
def test_batches_do_not_depend_on_the_order_of_asking(make: Callable[[], Any]) -> None:
    def seen(order: list[int]) -> dict[int, Any]:
        keyed = KeyedLoader(make(), 0)
        return {step: keyed(step)[0] for step in order}

    forward, backward = seen([*range(17)]), seen([16, 3, 9, *range(17)][::-1])
    assert all(torch.equal(forward[step], backward[step]) for step in range(17))
    if make is not own_generator_alone:
        assert not torch.equal(forward[0], forward[5])


def test_a_data_set_with_a_generator_of_its_own_is_refused() -> None:
    class Jittered(TensorDataset):
        def __init__(self) -> None:
            super().__init__(X)
            self.generator = torch.Generator().manual_seed(0)

        def __getitem__(self, index: Any) -> Any:
            return (X[index] + torch.randn(4, generator=self.generator),)

    loader = DataLoader(Jittered(), batch_size=4)
    with pytest.raises(NotReproducible, match=r"`dataset\.generator`"):
        dp.solve(LightningTrajectory(Plain(), loader, STEPS), EXACT)
