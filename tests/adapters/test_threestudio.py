"""Unmodified threestudio systems, on a stand-in that keeps the awkward parts."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dreampropeller import (
    DistributedDispatcher,
    EMAThreshold,
    FixedThreshold,
    PicardSolver,
    Sequential,
    SlidingWindow,
    Solution,
    solve,
)
from dreampropeller.adapters.lightning import NotReproducible
from dreampropeller.adapters.threestudio import (
    ThreestudioTrajectory,
    accelerate,
)
from dreampropeller.checkpoint import load, save
from dreampropeller.identity import AnotherProblem
from tests.adapters import standin
from tests.adapters.recording import tensors_of
from tests.adapters.standin.systems import DreamFusionLike
from tests.adapters.threestudio_runs import (
    NUM_STEPS,
    SYSTEMS,
    build,
    fit,
    make,
)
from tests.helpers import tree_equal
from tests.rank_pool import RankPool

LOOSE = PicardSolver(SlidingWindow(5), EMAThreshold(5e-6, 0.9, "median"), "momentum")


def exact(window: int) -> PicardSolver:
    return PicardSolver(SlidingWindow(window), FixedThreshold(0), "momentum")


@functools.cache
def loose(name: str) -> Solution[Any]:
    """A run at a loose threshold; several tests compare with it."""
    return solve(make(name), LOOSE)


@pytest.mark.filterwarnings("ignore")  # what Lightning says about data loaders
@pytest.mark.parametrize("name", SYSTEMS)
def test_sequential_is_the_systems_own_run(name: str) -> None:
    """Its Trainer's batches and random streams replayed: equal after 60 steps."""
    system, recording, trainer = fit(name)
    trajectory = make(name, random=recording, batches=recording.batch)
    begun, _ = trajectory.init()
    solution = solve(trajectory, Sequential())
    assert tree_equal(solution.value, tensors_of(system))
    (theirs,) = trainer.optimizers
    (ours,) = solution.carry["optimizers"]
    rates = [group["lr"] for group in theirs.param_groups]
    assert [group["lr"] for group in ours["groups"]] == rates
    for parameter, memory in theirs.state.items():
        (owner,) = [n for n, p in system.named_parameters() if p is parameter]
        assert tree_equal(ours["state"][owner], memory)

    # The run went through what makes it hard.
    sizes = {batch["size"] for batch in recording.batches}
    assert sizes == {4, 6}, "a resolution milestone"
    if name == "growing-like":
        assert len(solution.value["geometry._xyz"]) > 2 * len(begun["geometry._xyz"])
        lost = NUM_STEPS - int(ours["state"]["geometry._xyz"]["step"])
        assert lost == sum(map(trajectory.host.jumps, range(NUM_STEPS))), "lost updates"  # pyright: ignore
    else:
        grid = "renderer.estimator.binaries"
        assert not torch.equal(begun[grid], solution.value[grid]), "a grid update"
        mask = trajectory.module.geometry.encoding.mask
        assert mask.sum() > 4, "mask growth"


@pytest.mark.parametrize(
    "name",
    [
        # Its changes are those of `prolificdreamer-like`, which trains its guidance.
        pytest.param(name, marks=[pytest.mark.long] * (name == "dreamfusion-like"))
        for name in SYSTEMS
    ],
)
def test_threshold_zero_is_sequential_across_every_change(name: str) -> None:
    """The window straddles milestones, grid updates and growth steps."""
    sequential = solve(make(name), Sequential())
    seen: list[Any] = []
    solution = solve(make(name), exact(9), on_iteration=lambda _, it: seen.append(it))
    assert tree_equal(solution.value, sequential.value)
    assert tree_equal(solution.carry, sequential.carry)
    assert solution.stats.num_iterations < NUM_STEPS
    for change in (12,) if name == "growing-like" else (11, 12, 16, 32):
        assert any(it.begin < change < it.begin + it.window for it in seen)


@pytest.mark.parametrize("name", SYSTEMS)
def test_drifts_do_not_depend_on_their_order(name: str) -> None:
    trajectory = make(name, verify=True)
    y, _ = trajectory.init()
    drift = trajectory.make_drift(torch.device("cpu"))
    steps = [step for step in range(40) if step not in (8, 10, 16, 20, 24, 30, 32)]
    forward = {step: drift(step, y) for step in steps}
    shuffled = random.Random(0).sample(steps, len(steps))
    for step in shuffled:
        g, aux = drift(step, y)
        assert tree_equal(g, forward[step][0]), step
        assert aux == forward[step][1]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.long) if n.startswith("prolific") else n
        for n in SYSTEMS
    ],
)
def test_a_loose_run_is_short_and_its_resume_uninterrupted(
    name: str, tmp_path: Path
) -> None:
    whole = loose(name)
    assert whole.stats.num_iterations < NUM_STEPS / 2
    part = solve(make(name), LOOSE, max_iterations=5, throw=False)
    assert 8 < part.state.step < NUM_STEPS
    save(tmp_path, part.state)
    rest = solve(make(name), LOOSE, state=load(tmp_path))
    assert tree_equal(whole.value, rest.value)
    assert tree_equal(whole.carry, rest.carry)
    assert whole.stats.strides == rest.stats.strides


def on_a_rank() -> Any:
    found = [solve(make(name), LOOSE, DistributedDispatcher) for name in SYSTEMS]
    return [(solution.value, solution.carry) for solution in found]


def test_two_ranks_are_one(two_ranks: RankPool) -> None:
    inline = [loose(name) for name in SYSTEMS]
    for found in two_ranks(on_a_rank):
        for (value, carry), expected in zip(found, inline, strict=True):
            assert tree_equal(value, expected.value)
            assert tree_equal(carry, expected.carry)


def test_each_accepted_step_is_counted_once() -> None:
    """Gaussians that do not move have one set of statistics, at any threshold."""
    still = {**SYSTEMS["growing-like"]["geometry"], "lr": {"xyz": 0.0, "color": 0.0}}
    changes = {"geometry": {**still, "prune_from_iter": 99, "densify_until_iter": 20}}

    def statistics(solver: Any) -> Any:
        parts = build("growing-like", **changes)
        trajectory = ThreestudioTrajectory(*parts, num_steps=NUM_STEPS)
        return solve(trajectory, solver).carry["statistics"]

    loose = PicardSolver(SlidingWindow(5), FixedThreshold(1e9), "momentum")
    expected = statistics(Sequential())
    assert tree_equal(statistics(loose), expected)
    assert expected["denom"].max() == NUM_STEPS - 17  # since the growth step 16


def test_accelerate_leaves_the_result_in_the_system() -> None:
    system, datamodule = build("dreamfusion-like")
    solution = accelerate(system, datamodule, num_steps=20, window=4)
    assert tree_equal(solution.value, tensors_of(system))
    assert system.global_step == 20
    assert system.material.ambient_only is False


class Counting(DreamFusionLike):
    """A counter in a closure: no attribute holds it."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        count = 0

        def bump() -> int:
            nonlocal count
            count += 1
            return count

        self.bump = bump

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = super().training_step(batch, batch_idx)
        return {"loss": out["loss"] * self.bump()}


class Remembering(DreamFusionLike):
    """A running mean in a plain attribute, read by the next step."""

    mean = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = super().training_step(batch, batch_idx)
        out["loss"] = out["loss"] * self.mean
        self.mean = 0.9 * self.mean + 0.1
        self.mean += float(out["loss"].detach())
        return out


class Unkeyed(DreamFusionLike):
    """Draws a number of times that depends on the calls so far."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        _CALLS.append(batch_idx)
        for _ in _CALLS:
            random.random()
        return super().training_step(batch, batch_idx)


_CALLS: list[int] = []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Counting, r"drift of `geometry\.encoding\.table`"),
        (Remembering, r"step before had changed: .*`mean`"),
        (Unkeyed, r"differ in: random stream of Python's `random`"),
    ],
)
def test_verify_names_what_differs(kind: Any, message: str) -> None:
    _, datamodule = build("dreamfusion-like")
    system = kind(SYSTEMS["dreamfusion-like"])
    with pytest.raises(NotReproducible, match=message):
        ThreestudioTrajectory(system, datamodule, num_steps=NUM_STEPS, verify=True)


@pytest.mark.filterwarnings("ignore")
def test_verify_names_the_batch() -> None:
    source = torch.Generator().manual_seed(0)
    _, recording, _ = fit("dreamfusion-like")

    def batches(step: int) -> Any:
        batch = recording.batch(step)
        return {**batch, "light": torch.randn(batch["light"].shape, generator=source)}

    with pytest.raises(NotReproducible, match="differ in: batch entry `light`"):
        make("dreamfusion-like", batches=batches, verify=True)


def refused(
    change: Any = None, message: str = "", config: Any = None, steps: Any = 5
) -> None:
    system, datamodule = build("dreamfusion-like")
    if change is not None:
        change(system)
    with pytest.raises(ValueError, match=message):
        ThreestudioTrajectory(system, datamodule, config, num_steps=steps)


def test_refusals_say_why_and_what_to_do() -> None:
    def manual(system: Any) -> None:
        system.automatic_optimization = False

    def proposal(system: Any) -> None:
        optimizer = torch.optim.Adam(system.background.parameters())
        system.renderer.prop_optim = optimizer

    def inner(system: Any) -> None:
        system.material.helper = torch.optim.Adam(system.background.parameters())

    def editing(system: Any) -> None:
        system.edit_frames = {}

    refused(manual, "optimises by hand")
    refused(proposal, "estimator: occgrid")
    refused(inner, r"`material\.helper` is an optimizer of its own")
    refused(editing, "edits its own training images")
    refused(None, "data.batch_size", {"trainer": {"accumulate_grad_batches": 2}})
    refused(None, "trainer.max_steps", steps=None)
    _, datamodule = build("dreamfusion-like")
    with pytest.raises(TypeError, match="LightningTrajectory"):
        ThreestudioTrajectory(torch.nn.Linear(1, 1), datamodule, num_steps=3)


def test_growth_refuses_a_scaled_loss() -> None:
    with pytest.raises(ValueError, match=r"trainer\.precision=32-true"):
        make("growing-like", precision="16-mixed")


class TwiceStepping(standin.find("growing-like")):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = super().training_step(batch, batch_idx)
        self.optimizers().step()
        return out


class SelfPruning(standin.find("growing-like")):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 2:
            self.geometry.prune()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TwiceStepping, "stepped its optimizer 2 times at step 0"),
        (SelfPruning, "Step 2 changed the number of Gaussians"),
    ],
)
def test_growth_that_the_config_does_not_name_is_refused(
    kind: Any, message: str
) -> None:
    _, datamodule = build("growing-like")
    trajectory = ThreestudioTrajectory(
        kind(SYSTEMS["growing-like"]), datamodule, num_steps=5
    )
    with pytest.raises(ValueError, match=message):
        solve(trajectory, Sequential())


def test_settings_come_from_the_config() -> None:
    config = {"trainer": {"max_steps": 7, "precision": "bf16-mixed"}, "seed": 3}
    trajectory = ThreestudioTrajectory(*build("dreamfusion-like"), config)
    assert trajectory.num_steps == 7
    assert not trajectory.host.precision.scales
    other = ThreestudioTrajectory(*build("dreamfusion-like"), {**config, "seed": 4})
    y, _ = trajectory.init()
    (g, _), (h, _) = trajectory.host.evaluate(5, y), other.host.evaluate(5, y)
    assert not tree_equal(g, h), "another seed, other cameras"


def half_way(**changes: Any) -> Any:
    system, datamodule = build("dreamfusion-like", **changes)
    trajectory = ThreestudioTrajectory(system, datamodule, num_steps=12)
    return solve(trajectory, LOOSE, max_iterations=2, throw=False).state


PROMPT = {"prompt_processor": {"prompt": "a cup", "spawn": True}}


@pytest.mark.parametrize(
    ("changes", "data", "seed", "message"),
    [
        (
            {"prompt_processor": {"prompt": "a car"}},
            {},
            0,
            r"`about\.system\.prompt_processor\.prompt` was 'a cup' and is 'a car'",
        ),
        (
            {**PROMPT, "loss": {"lambda_sds": 2.0, "lambda_sparsity": 0.5}},
            {},
            0,
            r"`about\.system\.loss\.lambda_sds` was 1\.0 and is 2\.0",
        ),
        (
            {**PROMPT, "guidance": {"max_step_percent": 0.5}},
            {},
            0,
            r"guidance\.max_step_percent",
        ),
        (PROMPT, {"sizes": [4, 8]}, 0, r"`about\.data\.sizes\.1` was 6 and is 8"),
        (PROMPT, {}, 1, "`seed` was 0 and is 1"),
    ],
)
def test_a_state_belongs_to_its_settings(
    changes: Any, data: Any, seed: int, message: str
) -> None:
    state = half_way(**PROMPT)
    system, datamodule = build("dreamfusion-like", **changes)
    datamodule.cfg.update(data)
    other = ThreestudioTrajectory(system, datamodule, num_steps=12, seed=seed)
    with pytest.raises(AnotherProblem, match=message):
        solve(other, LOOSE, state=state)


def test_what_does_not_change_the_training_may_differ() -> None:
    """Logs, validation, the cache of prompts, more steps, another solver."""
    state = half_way(**PROMPT)
    system, datamodule = build(
        "dreamfusion-like",
        prompt_processor={**PROMPT["prompt_processor"], "spawn": False},
        loggers={"wandb": {"enable": True}},
    )
    datamodule.cfg.update(eval_width=64, n_test_views=7)
    other = ThreestudioTrajectory(system, datamodule, num_steps=20)
    assert solve(other, Sequential(), state=state).state.step == 20


def test_accelerate_resumes_its_own_problem_alone() -> None:
    state = half_way(**PROMPT)
    system, datamodule = build("dreamfusion-like", **PROMPT)
    assert accelerate(system, datamodule, num_steps=12, state=state).state.step == 12
    system, datamodule = build("dreamfusion-like")
    with pytest.raises(AnotherProblem, match="'a cup' and is 'absent'"):
        accelerate(system, datamodule, num_steps=12, state=state)
