"""The main job on a CUDA device: `pytest -m gpu`. Skipped where there is none."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import dreampropeller as dp
from dreampropeller import StepRandom
from dreampropeller.adapters.diffusers import sample
from dreampropeller.dispatch.batched import TOLERANCE, deviation
from systems import quality
from systems.dreamfusion import DreamFusion
from systems.extras import probe
from systems.scene.fields.hash_grid import HashGridConfig, _make_encoding
from systems.scene.renderers.volume import VolumeRenderer, _can_march
from systems.settings.config import load
from systems.toybox import pipeline as toybox
from tests.systems.scenes import SMALL, TOYBOX, small

pytestmark = pytest.mark.gpu


def test_a_gpu_makes_the_same_object_as_the_cpu() -> None:
    """Not bitwise: half-precision prior, nerfacc's marching, atomic additions."""
    found = {}
    for device in (torch.device("cuda"), torch.device("cpu")):
        system = DreamFusion(load(TOYBOX, [*SMALL, "data.batch_size=4"]), device)
        solution = dp.solve(system.trajectory(), system.solver())
        wanted = quality.truth_of(system)
        assert wanted is not None
        found[device.type] = quality.against_truth(system, solution.value, wanted)
    assert found["cuda"].psnr == pytest.approx(found["cpu"].psnr, abs=1.5)
    assert found["cuda"].iou == pytest.approx(found["cpu"].iou, abs=0.1)


def test_threshold_zero_stays_near_the_sequential_run() -> None:
    """Not bitwise: a grid's gradient is added up atomically, in any order."""
    plain = dp.solve(small().trajectory(), dp.Sequential())
    solver = dp.PicardSolver(dp.SlidingWindow(6), dp.FixedThreshold(0), "momentum")
    exact = dp.solve(small().trajectory(), solver)
    assert all(tensor.is_cuda for tensor in plain.value.values())
    system = small()
    views = system.cameras.turntable(4)
    images = [system.render(s.value, views, grey=0.5)[0] for s in (plain, exact)]
    # 0.009 where one step is missing.
    assert float((images[0] - images[1]).abs().mean()) < 0.002


def test_half_precision_makes_the_same_object() -> None:
    """Under autocast, with a loss scale; `opaque` is refused in half precision."""
    settings = ("system.loss.lambda_opaque=0.1", "system.loss.lambda_sparsity=0.1")
    found = []
    for precision in ("32-true", "16-mixed", "bf16-mixed"):
        system = small(*settings, f"trainer.precision={precision}")
        solution = dp.solve(system.trajectory(), system.solver())
        views = system.cameras.turntable(4)
        found.append(system.render(solution.value, views, grey=0.5)[0])
    for half in found[1:]:
        assert float((half - found[0]).abs().mean()) < 0.01


@pytest.mark.parametrize("half", [False, True])
def test_a_batch_of_steps_is_close_to_single_ones(half: bool) -> None:
    """Not bitwise: kernels differ with the batch size, and half precision rounds."""
    system = small(f"system.guidance.half_precision_weights={half}".lower())
    trajectory = system.trajectory()
    y, _ = trajectory.init()
    drift: Any = trajectory.make_drift(torch.device("cuda"))
    steps = [3, 8, 9]
    for step, (found, _) in zip(steps, drift.batch(steps, [y] * 3), strict=True):
        assert deviation(found, drift(step, y)[0]) < (TOLERANCE if half else 1e-3)
    solver = dp.PicardSolver(dp.SlidingWindow(4), dp.FixedThreshold(1e-8), "momentum")
    plain = dp.solve(trajectory, dp.Sequential())
    window = dp.solve(trajectory, solver, dp.BatchedDispatcher)
    views = system.cameras.turntable(4)
    images = [system.render(s.value, views, grey=0.5)[0] for s in (plain, window)]
    assert float((images[0] - images[1]).abs().mean()) < 0.01


@pytest.mark.parametrize("batched", [False, True])
def test_a_window_of_samples_is_the_pipelines_own(batched: bool) -> None:
    """Not bitwise: kernels differ with the batch size."""
    pipeline = toybox.load().to("cuda")

    def draw(call: Any, **options: Any) -> Any:
        dice = torch.Generator("cuda").manual_seed(0)
        many = {"num_inference_steps": 8, "generator": dice, "output_type": "np"}
        return torch.from_numpy(call("a blue mug", **many, **options).images)

    dispatcher = dp.BatchedDispatcher if batched else dp.InlineDispatcher
    window = functools.partial(sample, pipeline, window=4, tolerance=0.0)
    drawn = draw(window, dispatcher=dispatcher)
    assert float((drawn - draw(pipeline)).abs().max()) < 0.02


def test_marching_sees_what_the_cut_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways to find samples, over one state and the same views."""
    if not _can_march():
        pytest.skip("nerfacc's CUDA code is not built here")
    system = small()
    solution = dp.solve(system.trajectory(), dp.Sequential())
    views = system.cameras.turntable(4)
    marched = system.render(solution.value, views, grey=0.5)[0]
    monkeypatch.setattr(VolumeRenderer, "_march", lambda self, rays, _: self._cut(rays))
    cut = system.render(solution.value, views, grey=0.5)[0]
    assert float((marched - cut).abs().mean()) < 0.02


def test_tiny_cuda_nn_has_our_shape() -> None:
    found, reason = probe("tinycudann", needs_cuda=True)
    if found is None:
        pytest.skip(reason)
    config = HashGridConfig()
    encoding = _make_encoding(config).cuda()
    points = torch.rand(64, 3, generator=StepRandom(0).generator(0, "points")).cuda()
    code = encoding(points)
    assert code.shape == (64, config.n_levels * config.n_features_per_level)
