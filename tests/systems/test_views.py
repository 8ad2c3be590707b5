"""A step's views shared by several workers, for every kind of system."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dreampropeller as dp
import launch
from dreampropeller.dispatch.batched import deviation
from systems import build, build_problem, make_system
from systems.guidance.sds import ScoreDistillation
from systems.guidance.vsd import VariationalScoreDistillation
from systems.settings.config import load
from systems.settings.reader import ConfigError
from tests.helpers import tree_equal
from tests.systems.prolific import tiny as prolific
from tests.systems.scenes import SMALL, TOYBOX, small
from tests.systems.test_priors import second as second
from tests.systems.test_priors import stable_diffusion as stable_diffusion
from tests.systems.test_zero123 import make as image_to_3d
from tests.systems.test_zero123 import rendered

CPU = torch.device("cpu")
ROUNDING = 1e-4
"""Of a gradient's norm; 3e-5 on the worst machine so far, behind an autoencoder."""
"""Largest deviation of a step's gradient in shards from that of the whole step, in
single precision, as a fraction of its norm (documented in docs/views.md)."""
TERMS = [f"system.loss.lambda_{one}" for one in ("orient=0.1", "sparsity=0.2")]
SIDES = [f"data.{name}=12" for name in ("width", "height")]
PROMPT = "system.prompt_processor.prompt=a red mushroom"
VIEWS = "data.batch_size=3"
FEW = [setting for setting in SMALL if "batch_size" not in setting]
SPLATS = [
    *("system.geometry.num_splats=40", "system.loss.lambda_sparsity=0.2"),
    *(PROMPT, "trainer.max_steps=40", VIEWS, *SIDES),
]


def of_an_image(kind: str, folder: Path, second: Path) -> Any:
    image = rendered(folder / "mug.png")
    more = ["data.random_camera.batch_size=3"]
    return image_to_3d(kind, image, second, *more)


def systems(folder: Path, second: Path, stable_diffusion: Path) -> dict[str, Any]:
    """Functions that make small systems, with three views per step."""
    return {
        "voxels": lambda: small(*TERMS, *SIDES, VIEWS),
        "signed distance": lambda: small(
            *FEW, VIEWS, *SIDES, config="configs/textmesh-toybox.yaml"
        ),
        "splats": lambda: make_system("configs/dreamgaussian-toybox.yaml", *SPLATS),
        "latent, with a LoRA": lambda: prolific(
            stable_diffusion,
            "data.batch_size=[3,2]",
            "system.guidance.lora_n_timestamp_samples=2",
        ),
        "image, voxels": lambda: of_an_image("voxels", folder, second),
        "image, splats": lambda: of_an_image("splats", folder, second),
    }


KINDS = [
    *("voxels", "signed distance", "splats", "latent, with a LoRA"),
    *("image, voxels", "image, splats"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_a_step_add_up_to_it(
    kind: str,
    tmp_path: Path,
    second: Path,
    stable_diffusion: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole step's numbers to the bit; gradients, statistics, logs to a rounding.

    Three views: two and one of two shards, one each of three.
    """
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    trajectory = systems(tmp_path, second, stable_diffusion)[kind]().trajectory()
    y, carry = trajectory.init()
    whole = trajectory.make_drift(CPU)
    y, carry = trajectory.update(0, y, carry, whole(0, y)[0])
    asked: list[tuple[Tensor, ...]] = []
    owners = (ScoreDistillation, VariationalScoreDistillation)
    for owner, direction in [(one, one.direction) for one in owners]:

        def spied(
            self: Any,
            x: Tensor,
            cameras: Any,
            t: Tensor,
            noise: Tensor,
            own: Any = direction,
        ) -> Tensor:
            asked.append((cameras.azimuth, t, noise))
            return own(self, x, cameras, t, noise)

        monkeypatch.setattr(owner, "direction", spied)
    wanted, logged = whole(1, y)
    assert asked or kind.startswith("image")  # whose step 1 looks at the image alone
    numbers = asked.pop() if asked else ()
    asked.clear()
    for count in (2, 3):
        drifts = [trajectory.make_shard(CPU, index, count) for index in range(count)]
        parts = [drift(1, y) for drift in drifts]
        for several, alone in zip(zip(*asked, strict=True), numbers, strict=True):
            assert torch.equal(torch.cat(several), alone)
        asked.clear()
        found, aux = trajectory.join_shards(parts)
        assert found.keys() == wanted.keys()
        off = max(
            deviation({n: found[n]}, {n: v})
            for n, v in wanted.items()
            if v.is_floating_point() and float(v.abs().max()) > 1e-6
        )
        assert off < ROUNDING, (count, off)
        assert aux == pytest.approx(logged, rel=1e-4, abs=1e-6)
        assert not any("renderer.occupancy.value" in one for one, _ in parts[1:])
    if "splats" in kind:
        assert tree_equal(found["seen/count"], wanted["seen/count"])
        assert tree_equal(found["seen/size"], wanted["seen/size"])


@pytest.mark.long
def test_a_run_in_shards_is_the_run_up_to_rounding() -> None:
    """Six steps of the voxels, the occupancy grid included, in one process."""
    system = small(*TERMS, *SIDES, VIEWS, "trainer.max_steps=6")
    whole = dp.solve(system.trajectory(), dp.Sequential()).value
    inline = functools.partial(dp.InlineDispatcher, views=2)
    split = dp.solve(system.trajectory(), dp.Sequential(), inline).value
    views = system.cameras.turntable(1)
    images = [system.render(y, views)[0] for y in (whole, split)]
    assert float((images[0] - images[1]).abs().max()) < 1e-3
    solver = dp.PicardSolver(dp.SlidingWindow(3), dp.FixedThreshold(0), "momentum")
    assert tree_equal(dp.solve(system.trajectory(), solver, inline).value, split)


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "too many": (
        TOYBOX,
        [PROMPT, "data.batch_size=2", "dispatch.num_workers=3", "dispatch.views=3"],
        r"a step has 2 view\(s\) \(`data.batch_size`\): write at most 2",
    ),
    "no divisor": (
        TOYBOX,
        [PROMPT, "dispatch.num_workers=3", "dispatch.views=2"],
        r"there are 3 worker\(s\).*write `num_workers=4`, or `views=1`",
    ),
    "ray": (
        TOYBOX,
        [PROMPT, "dispatch.backend=ray", "dispatch.views=2", "dispatch.num_workers=2"],
        "write `backend=processes`",
    ),
    "images": (
        "configs/sample-toybox.yaml",
        [PROMPT, "dispatch.num_workers=2", "dispatch.views=2"],
        "have no views to split: write `dispatch.views=1`",
    ),
    "a LoRA of one's own": (
        "configs/prolificdreamer-toybox.yaml",
        [
            *(PROMPT, "system.guidance.lora=local"),
            *("dispatch.num_workers=2", "dispatch.views=2"),
        ],
        "write `dispatch.views=1`, or `system.guidance.lora=shared`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_by_name(name: str) -> None:
    config, settings, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        build_problem(load(config, settings))


def test_normals_beside_are_refused(tmp_path: Path, second: Path) -> None:
    """Their shifts are drawn for all samples at once, whose number nobody knows."""
    image = rendered(tmp_path / "mug.png")
    settings = [
        "system.loss.lambda_3d_normal_smooth=1",
        "system.renderer.return_normal_perturb=true",
    ]
    system = image_to_3d("voxels", image, second, *settings)
    with pytest.raises(ConfigError, match=r"or `system.loss.lambda_3d_normal_smooth=0"):
        system.check_views(2)


def test_an_automatic_window_has_a_step_per_row() -> None:
    auto = "solver.window={name: auto}"
    settings = [PROMPT, auto, "dispatch.num_workers=4", "dispatch.views=2"]
    window: Any = load(TOYBOX, settings).solver.window
    assert window.smallest == 2
    assert isinstance(build(load(TOYBOX, settings)).solver(), dp.PicardSolver)


@pytest.mark.long  # two processes; tests/test_mesh.py has four of a small problem
def test_two_workers_share_the_views_of_the_main_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a run of two columns goes on in one process."""
    settings = [*FEW, VIEWS, "trainer.max_steps=6", f"exp_root_dir={tmp_path}"]
    settings += ["system.guidance.max_step_percent=0.9"]  # not by the length of the run
    both = ["dispatch.num_workers=2", "dispatch.views=2"]
    assert launch.main(["--config", TOYBOX, "--train", *settings, *both]) == 0
    (folder,) = (tmp_path / "dreamfusion-toybox").iterdir()
    more = [f"resume={folder}", "trainer.max_steps=8", "dispatch.num_workers=1"]
    more += ["dispatch.views=1"]
    assert launch.main(["--config", TOYBOX, "--train", *settings, *more]) == 0
    assert "PSNR" in capsys.readouterr().out
