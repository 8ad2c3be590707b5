"""A LightningModule driven without a Trainer is its Trainer's run, bit for bit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from dreampropeller import (
    FixedThreshold,
    PicardSolver,
    Sequential,
    SlidingWindow,
    solve,
)
from dreampropeller.adapters.lightning import LightningTrajectory
from tests.adapters.regression import Regression, Seeds, data
from tests.helpers import tree_equal
from tests.rank_pool import RankPool

NUM_STEPS = 30


def make(**options: Any) -> LightningTrajectory:
    return LightningTrajectory(Regression(), data(), NUM_STEPS, seed=1, **options)


def fit(module: Regression, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=NUM_STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Seeds(1)],
        **options,
    )
    trainer.fit(module, data())
    return trainer


@pytest.mark.filterwarnings("ignore")  # what Lightning says about workers
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_sequential_is_the_trainers_run(options: dict[str, Any]) -> None:
    module = Regression()
    trainer = fit(module, **options)
    solution = solve(make(**options), Sequential())
    state = module.state_dict()
    assert tree_equal(solution.value, {name: state[name] for name in solution.value})
    assert set(state) - set(solution.value) == {"frozen.weight", "frozen.bias"}
    (optimizer,) = trainer.optimizers
    (memory,) = solution.carry["optimizers"]
    lrs = [group["lr"] for group in optimizer.param_groups]
    assert [group["lr"] for group in memory["groups"]] == lrs
    theirs = optimizer.state[module.outer.weight]
    assert tree_equal(memory["state"]["outer.weight"], theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("interval", "frequency"), [("step", 3), ("epoch", 1), ("epoch", 2)]
)
def test_schedulers_move_when_the_trainer_moves_them(
    interval: str, frequency: int
) -> None:
    module = Regression(interval, frequency)
    fit(module)
    trajectory = LightningTrajectory(
        Regression(interval, frequency), data(), NUM_STEPS, seed=1
    )
    solution = solve(trajectory, Sequential())
    state = module.state_dict()
    assert tree_equal(solution.value, {name: state[name] for name in solution.value})


def test_threshold_zero_is_sequential() -> None:
    sequential = solve(make(), Sequential())
    for window in (2, 7):  # wider than the run: tests/test_picard.py
        solver = PicardSolver(SlidingWindow(window), FixedThreshold(0), "momentum")
        solution = solve(make(), solver)
        assert tree_equal(solution.value, sequential.value)
        assert tree_equal(solution.carry, sequential.carry)


def test_a_loose_threshold_needs_fewer_iterations() -> None:
    solver = PicardSolver(SlidingWindow(6), FixedThreshold(1e-3), "momentum")
    assert solve(make(), solver).stats.num_iterations < NUM_STEPS / 2


def test_a_drift_does_not_depend_on_the_order_of_evaluations() -> None:
    trajectory = make()
    y, _ = trajectory.init()
    drift = trajectory.make_drift(torch.device("cpu"))
    forward = [drift(step, y) for step in range(8)]
    backward = [drift(step, y) for step in reversed(range(8))][::-1]
    for (g, aux), (again, aux_again) in zip(forward, backward, strict=True):
        assert tree_equal(g, again)
        assert aux == aux_again
    assert forward[0][1].keys() == {"loss", "train/loss"}


def test_global_streams_and_the_state_stay_as_they_are() -> None:
    trajectory = make()
    y, _ = trajectory.init()
    before, stream = {n: t.clone() for n, t in y.items()}, torch.get_rng_state()
    trajectory.make_drift(torch.device("cpu"))(9, y)
    assert tree_equal(before, y)
    assert torch.equal(stream, torch.get_rng_state())


def test_resume_is_uninterrupted() -> None:
    solver = PicardSolver(SlidingWindow(4), FixedThreshold(1e-4), "momentum")
    whole = solve(make(), solver)
    part = solve(make(), solver, max_iterations=4, throw=False)
    rest = solve(make(), solver, state=part.state)
    assert tree_equal(whole.value, rest.value)
    assert whole.stats.strides == rest.stats.strides


def on_a_rank() -> Any:
    from dreampropeller import DistributedDispatcher

    solver = PicardSolver(SlidingWindow(5), FixedThreshold(1e-4), "momentum")
    return solve(make(), solver, DistributedDispatcher).value


def test_two_ranks_are_one(two_ranks: RankPool) -> None:
    solver = PicardSolver(SlidingWindow(5), FixedThreshold(1e-4), "momentum")
    inline = solve(make(), solver).value
    for value in two_ranks(on_a_rank):
        assert tree_equal(value, inline)


def test_shuffled_data_is_keyed_by_the_step() -> None:
    def seen(order: list[int]) -> dict[int, Tensor]:
        trajectory = LightningTrajectory(Regression(), data(True), NUM_STEPS)
        return {step: trajectory.host.batch(step)[0] for step in order}

    forward, backward = seen([*range(14)]), seen([*reversed(range(14))])
    assert all(torch.equal(forward[step], backward[step]) for step in range(14))
    (whole,) = data().dataset[:][:1]
    for epoch in (range(7), range(7, 14)):  # each example once an epoch
        rows = torch.cat([forward[step] for step in epoch])
        assert torch.equal(rows.sort(0).values, whole.sort(0).values)
    assert not torch.equal(forward[0], forward[7])


def test_settle_writes_the_state_into_the_module() -> None:
    trajectory = make()
    solution = solve(trajectory, Sequential())
    trajectory.settle(NUM_STEPS, solution.value)
    state = trajectory.module.state_dict()
    assert all(torch.equal(state[n], t) for n, t in solution.value.items())
    assert trajectory.module.global_step == NUM_STEPS


@pytest.mark.filterwarnings("ignore:Detected call of `lr_sch")  # the loop's overflow
def test_half_precision_scales_its_loss_as_torch_does() -> None:
    """Against a loop with `GradScaler`, through an overflow at step 3."""

    class Half(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)["loss"]
            return loss * (1e36 if self.global_step == 3 else 1.0)

    trajectory = LightningTrajectory(Half(), data(), 12, seed=1, precision="16-mixed")
    solution = solve(trajectory, Sequential())

    module, scaler = Half(), torch.amp.GradScaler("cpu")
    steps = LightningTrajectory(module, data(), 12)  # for its shim and batches
    configured = Half.configure_optimizers(module)
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
    for step in range(12):
        steps.host.shim.global_step = step
        with Seeds(1).random.scope(step):
            batch = steps.host.batch(step)
            module.on_train_batch_start(batch, step % 7)
            with torch.autocast("cpu", dtype=torch.float16):
                loss = module.training_step(batch, step % 7)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule["scheduler"].step()
    exponent = int(solution.value["precision/scale"][0])
    assert scaler.get_scale() == 2.0**exponent < 2.0**16
    for name, parameter in module.named_parameters():
        if name in solution.value:
            assert torch.equal(parameter, solution.value[name]), name


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Regression):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.inner.parameters(), 0.1) for _ in range(2)]


class Closure(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.inner.parameters())


class Plateau(Regression):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.inner.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)]


class OwnWarmUp(Regression):
    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)


class OwnOptimizer(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.inner.optimizer = torch.optim.SGD(self.outer.parameters(), 0.1)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Manual, "optimises by hand"),
        (TwoOptimizers, "groups of one"),
        (Closure, "closure"),
        (Plateau, "metric"),
        (OwnWarmUp, "scheduler of interval `step`"),
        (OwnOptimizer, r"`inner\.optimizer` is an optimizer of its own"),
    ],
)
def test_what_cannot_be_evaluated_ahead_is_refused(kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LightningTrajectory(kind(), data(), 3)


class Clamping(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.inner.weight.clamp_(-0.1, 0.1)
        return super().training_step(batch, batch_idx)


class ClampingAfterwards(Regression):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.inner.weight.clamp_(-0.1, 0.1)


class Averaging(Regression):
    """Keeps a moving average of its weights as frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.average = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.average.lerp_(self.inner.weight.mean(), 0.1)


class Asking(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.trainer.fit_loop.epoch_loop


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Clamping, ValueError, "changed parameter `inner.weight` itself"),
        (ClampingAfterwards, ValueError, "Clamp it where it is read"),
        (Averaging, ValueError, "`average`, a parameter that no optimizer holds"),
        (Asking, AttributeError, "asked its trainer for `fit_loop`"),
    ],
)
def test_a_step_that_goes_behind_our_back_is_heard(
    kind: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        solve(LightningTrajectory(kind(), data(), 3), Sequential())


def test_bad_arguments_are_refused() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(TypeError, match="pass a LightningModule"):
        LightningTrajectory(nn.Linear(1, 1), data(), 3)
    with pytest.raises(ValueError, match="function of the step"):
        LightningTrajectory(Regression(), DataLoader(Endless()), 3)
    with pytest.raises(TypeError, match="pass a `DataLoader`"):
        LightningTrajectory(Regression(), 7, 3)
    with pytest.raises(ValueError, match="write at least 1"):
        LightningTrajectory(Regression(), data(), 0)
    with pytest.raises(ValueError, match="`precision` is '8'"):
        make(precision=8)
    with pytest.raises(ValueError, match="write `norm` or `value`"):
        make(gradient_clip_algorithm="l1")
    with pytest.raises(ValueError, match="one step per worker"):
        make().make_shard(torch.device("cpu"), 0, 2)
