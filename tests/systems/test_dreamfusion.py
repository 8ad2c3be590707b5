"""The main job's promises: pure drifts, exactness, right losses, files that open."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dreampropeller as dp
from dreampropeller import checkpoint
from systems import make_system, quality
from systems.dreamfusion import DreamFusion
from systems.images import save_video
from systems.settings.config import load
from systems.settings.reader import ConfigError
from systems.toybox.truth import truth
from tests.helpers import tree_equal
from tests.rank_pool import RankPool
from tests.systems.scenes import SMALL, TOYBOX, small, solve_exactly


@pytest.fixture(scope="module")
def sequential() -> dp.Solution[Any]:
    return dp.solve(small().trajectory(), dp.Sequential())


def test_drift_is_the_same_in_any_order(sequential: dp.Solution[Any]) -> None:
    """With the occupancy grid on, half way down the optimisation."""
    trajectory = small().trajectory()
    middle = dp.solve(trajectory, dp.Sequential(), max_iterations=20, throw=False)
    y = middle.value
    assert (y["renderer.occupancy.value"] > 0).any()
    drift = trajectory.make_drift(torch.device("cpu"))
    steps = (20, 33, 21, 4)
    first = {step: drift(step, y) for step in steps}
    other = small().trajectory().make_drift(torch.device("cpu"))
    for step in reversed(steps):
        for again in (drift(step, y), other(step, y)):
            assert tree_equal(again[0], first[step][0])
            assert again[1] == first[step][1]
    assert "renderer.occupancy.value" in first[20][0]  # a refresh is due
    assert "renderer.occupancy.value" not in first[21][0]
    del sequential


def test_threshold_zero_is_sequential(sequential: dp.Solution[Any]) -> None:
    solver = dp.PicardSolver(dp.SlidingWindow(6), dp.FixedThreshold(0), "momentum")
    solution = dp.solve(small().trajectory(), solver)
    assert tree_equal(solution.value, sequential.value)
    assert tree_equal(solution.carry, sequential.carry)


@pytest.mark.long  # at a threshold: tests/systems/test_launch.py
def test_two_ranks_equal_the_sequential_run(
    sequential: dp.Solution[Any], two_ranks: RankPool
) -> None:
    trajectory = small().trajectory()
    y, _ = trajectory.init()
    drift = trajectory.make_drift(torch.device("cpu"))
    for answer in two_ranks(solve_exactly, 5):
        assert tree_equal(answer["value"], sequential.value)
        for step, (gradient, aux) in answer["drifts"].items():
            own, own_aux = drift(step, y)
            assert tree_equal(gradient, own)
            assert aux == own_aux


def test_mixed_precision_keeps_its_loss_scale_in_the_state() -> None:
    settings = ("trainer.precision=16-mixed", "trainer.max_steps=8")
    system = small(*settings)
    plain = dp.solve(system.trajectory(), dp.Sequential())
    assert plain.value["precision/scale"].tolist() == [16, 8]
    solver = dp.PicardSolver(dp.SlidingWindow(4), dp.FixedThreshold(0))
    solution = dp.solve(small(*settings).trajectory(), solver)
    assert tree_equal(solution.value, plain.value)
    full = dp.solve(small("trainer.max_steps=8").trajectory(), dp.Sequential())
    own, others = (next(system.turntable(s.value)) for s in (plain, full))
    assert 0 < (own - others).abs().mean() < 0.01


def test_default_solver_keeps_the_picture_in_fewer_iterations(
    sequential: dp.Solution[Any],
) -> None:
    system = small("solver.window.size=4")
    solution = dp.solve(system.trajectory(), system.solver())
    assert solution.stats.num_iterations < 25
    images = [
        torch.stack(list(system.turntable(s.value))) for s in (solution, sequential)
    ]
    assert (images[0] - images[1]).abs().mean() < 0.02


def test_loss_is_the_weighted_sum_of_its_terms() -> None:
    weights = {"sds": 1.0, "orient": 0.5, "sparsity": 2.0, "opaque": 3.0}
    settings = [f"system.loss.lambda_{k}={v}" for k, v in weights.items()]
    trajectory = small(*settings).trajectory()
    y, _ = trajectory.init()
    _, aux = trajectory.make_drift(torch.device("cpu"))(3, y)
    total = sum(weight * aux[f"loss_{name}"] for name, weight in weights.items())
    assert aux["loss"] == pytest.approx(total, rel=1e-5)
    assert aux["loss_orient"] > 0
    assert aux["loss_opaque"] > 0


def test_schedule_of_a_weight_follows_the_step() -> None:
    trajectory = small("system.loss.lambda_sparsity=[0,0.0,100.0,10]").trajectory()
    y, _ = trajectory.init()
    drift = trajectory.make_drift(torch.device("cpu"))
    for step, weight in ((10, 100.0), (5, 50.0), (0, 0.0)):
        _, aux = drift(step, y)
        expected = aux["loss_sds"] + weight * aux["loss_sparsity"]
        assert aux["loss"] == pytest.approx(expected, rel=1e-5)


def test_learning_rates_of_the_parts() -> None:
    settings = [
        "system.background_type=solid-color-background",
        "system.background={learned: true}",
        "system.optimizer.params={background: {lr: 0.001}}",
        "system.optimizer.args={lr: 0.1}",
    ]
    system = small(*settings)
    names = dict(system.scene.named_parameters())
    optimizer = system.settings.optimizer.build(names)
    rates = {
        name: group["lr"]
        for group in optimizer.param_groups
        for name, tensor in names.items()
        if any(tensor is own for own in group["params"])
    }
    assert rates == {"geometry.grid": 0.1, "background.color": 0.001}


def test_learning_rates_of_parts_of_a_part() -> None:
    given = (
        "configs/dreamfusion-toybox-hashgrid.yaml",
        "system.prompt_processor.prompt=a red mug",
        "system.optimizer.args.lr=0.5",
    )

    def rates(*settings: str) -> set[tuple[float, int]]:
        system = make_system(*given, *settings)
        assert isinstance(system, DreamFusion)
        optimizer = system.settings.optimizer.build(
            dict(system.scene.named_parameters())
        )
        return {(g["lr"], len(g["params"])) for g in optimizer.param_groups}

    params = "system.optimizer.params="
    assert rates() == {(0.5, 1), (0.05, 2)}  # the config slows its networks down
    longest = "{geometry: {lr: 0.2}, geometry.encoding: {lr: 0.3}}"
    assert rates(params + longest) == {(0.3, 1), (0.2, 4)}
    with pytest.raises(ConfigError, match=r"no setting .*params.geometry.encodin`"):
        rates(params + "{geometry.encodin: {lr: 0.3}}")


def test_another_optimizer_takes_the_arguments_that_are_left() -> None:
    dropped = [f"system.optimizer.args.{name}=null" for name in ("betas", "eps")]
    settings = ["system.optimizer.name=SGD", "system.optimizer.args.momentum=0.9"]
    system = small(*settings, *dropped)
    optimizer = system.settings.optimizer.build(dict(system.scene.named_parameters()))
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.9
    with pytest.raises(ConfigError, match=r"`args` has no learning rate"):
        small(*settings, *dropped, "system.optimizer.args.lr=null")
    with pytest.raises(ConfigError, match="unexpected keyword argument 'betas'"):
        small(*settings)


# imageio's reader leaves its pipes to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_film_can_be_read_back(tmp_path: Path) -> None:
    import imageio.v3 as imageio

    frames = [torch.full((3, 64, 64), grey) for grey in (0.0, 0.5, 1.0)]
    save_video(frames, tmp_path / "film.mp4")
    film = imageio.imread(tmp_path / "film.mp4")
    assert film.shape == (3, 64, 64, 3)
    assert np.allclose(film.mean((1, 2, 3)), [0, 128, 255], atol=6)


@pytest.mark.parametrize(
    ("prompt", "size"),
    [("a green tree", 32), ("a green tree", 64), ("a white duck", 32)],
)
def test_quality_of_the_truth_itself_is_perfect(prompt: str, size: int) -> None:
    wanted = truth(prompt)
    views = quality.fixed_views()
    exact = wanted.render(views.cameras, size)
    goal = exact.over(torch.full((3,), quality.GREY))
    same = quality.measure(goal, exact.mask, goal, exact.mask, wanted)
    assert same.psnr >= 100
    assert same.ssim == pytest.approx(1.0)
    assert same.iou == 1.0
    assert same.right_colour == 1.0
    assert same.right_object >= 0.75
    shifted = (goal + 0.1).clamp(0, 1)
    nothing = quality.measure(shifted, 0 * exact.mask, goal, exact.mask, wanted)
    error = float((shifted - goal).square().mean())
    assert nothing.psnr == pytest.approx(-10 * math.log10(error))
    assert nothing.iou == 0.0
    inside = (shifted - goal)[(exact.mask > 0.5).expand_as(goal)].square().mean()
    assert nothing.union_psnr == pytest.approx(-10 * math.log10(float(inside)))
    other = quality.measure(goal, exact.mask, goal, exact.mask, truth("a red car"))
    assert other.right_colour == 0.0
    assert other.right_object < 0.2


def test_quality_sees_the_object_over_its_own_grey() -> None:
    """Whatever is behind it in training."""
    system = small(
        "system.background_type=solid-color-background",
        "system.background={color: [0.0, 1.0, 0.0]}",
    )
    y, _ = system.trajectory().init()
    found = quality.against_truth(system, y, truth("a red mushroom"))
    corner = found.images[:, :, 0, 0]
    assert torch.allclose(corner, torch.full_like(corner, quality.GREY))


def test_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    y, carry = small().trajectory().init()
    path = checkpoint.save(tmp_path, dp.Sequential().init(y, carry))
    y = checkpoint.load(path).y
    with pytest.raises(ConfigError, match=r"`geometry.grid` has shape .*config.yaml"):
        small("system.geometry.resolution=9").check_state(y, tmp_path)
    with pytest.raises(ConfigError, match=r"`geometry.grid` has shape nothing"):
        small().check_state({n: t for n, t in y.items() if n != "geometry.grid"}, "")
    half = small("trainer.precision=16-mixed")
    half.check_state(half.trajectory().init()[0], tmp_path)
    half.check_state(y, tmp_path)


def test_five_lines_of_a_notebook() -> None:
    system = make_system(TOYBOX, *SMALL)
    solution = dp.solve(system.trajectory(), system.solver())
    mesh = system.mesh(solution.value)
    frames = list(system.turntable(solution.value, 4))
    assert len(mesh.faces) > 50
    assert [tuple(frame.shape) for frame in frames] == [(3, 16, 16)] * 4


def test_the_main_job_as_shipped_runs_on_the_second_prior() -> None:
    """In small: what the other tests replace by the first prior, for their time."""
    own = load(TOYBOX, ["system.prompt_processor.prompt=a white duck"])
    prior = own.system["guidance"]["pretrained_model_name_or_path"]
    assert (prior, own.quality.size) == ("toybox2", 64)
    system = small(
        "system.prompt_processor.prompt=a white duck",
        f"system.guidance.pretrained_model_name_or_path={prior}",
        "quality.size=64",
        "trainer.max_steps=2",
    )
    solution = dp.solve(system.trajectory(), system.solver())
    found = quality.against_truth(system, solution.value, truth("a white duck"))
    assert found.images.shape[-1] == 64
