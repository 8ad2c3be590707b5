"""Parts built on first use, and data sets that draw only at milestones."""

from __future__ import annotations

import bisect
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dreampropeller import (
    FixedThreshold,
    PicardSolver,
    Sequential,
    SlidingWindow,
    solve,
)
from dreampropeller.adapters.lightning import NotReproducible
from dreampropeller.adapters.threestudio import ThreestudioTrajectory
from dreampropeller.trajectory import Drift
from tests.adapters.recording import tensors_of
from tests.adapters.standin.data import RandomCameraData, RandomCameras
from tests.adapters.standin.parts import Volume
from tests.adapters.standin.systems import DreamFusionLike
from tests.adapters.threestudio_runs import SYSTEMS, Recording, build
from tests.helpers import tree_equal

NUM_STEPS = 14
EXACT = PicardSolver(SlidingWindow(6), FixedThreshold(0), "momentum")


# --- parts that are built on first use ----------------------------------------------


class Helper(nn.Module):
    """Constant buffers, as upstream's grid of an isosurface."""

    vertices: torch.Tensor

    def __init__(self, vertices: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("vertices", vertices, persistent=False)
        self.cached: torch.Tensor | None = None  # a plain attribute, filled later


class Lazy(Volume):
    """A geometry that builds its helper in the first step that needs it."""

    first_step = 0
    built = 0

    def configure(self, **parts: Any) -> None:
        super().configure(**parts)
        self.helper: Helper | None = None

    def vertices(self) -> torch.Tensor:
        return torch.linspace(-0.5, 0.5, 15).view(5, 3)

    def surface(self) -> torch.Tensor:
        if self.helper is None:
            self.built += 1
            Lazy.built += 1
            self.helper = Helper(self.vertices())
        if self.helper.cached is None:
            self.helper.cached = self.helper.vertices * 0.5
        density, _ = self(self.helper.vertices + self.helper.cached)
        return density.square().mean()


class Direct(Lazy):
    """Registers the buffer on the geometry itself."""

    grid: torch.Tensor

    def surface(self) -> torch.Tensor:
        if not hasattr(self, "grid"):
            self.register_buffer("grid", self.vertices())
        return self(self.grid)[0].square().mean()


class OfState(Lazy):
    """The helper is made of the parameters as they are at the first call."""

    def vertices(self) -> torch.Tensor:
        return super().vertices() * float(self.network[0].weight.detach().norm())


class Changing(Lazy):
    """A running mean in a buffer that a step registers."""

    def surface(self) -> torch.Tensor:
        loss = super().surface()
        assert self.helper is not None
        self.helper.vertices.mul_(0.99)
        return loss


class Drawn(Lazy):
    """The helper is drawn at random."""

    def vertices(self) -> torch.Tensor:
        return torch.rand(5, 3) - 0.5


class Later(Lazy):
    """The helper is needed from step 7 on."""

    first_step = 7


class WithSurface(DreamFusionLike):
    """A loss on the surface of a lazy geometry."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = super().training_step(batch, batch_idx)
        if self.global_step >= self.geometry.first_step:
            out["loss"] = out["loss"] + self.geometry.surface()
        return out


def parts(geometry: type[Volume]) -> tuple[Any, Any]:
    _, datamodule = build("dreamfusion-like")
    cfg = SYSTEMS["dreamfusion-like"]
    system = WithSurface(cfg)
    system.geometry = geometry(cfg["geometry"])
    vars(system.renderer)["geometry"] = system.geometry
    return system, datamodule


def own_run(system: Any, datamodule: Any) -> Recording:
    """The system's own run under Lightning."""
    recording = Recording()
    trainer = pl.Trainer(
        max_steps=NUM_STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[recording],
    )
    trainer.fit(system, datamodule=datamodule)
    return recording


def own_tensors(system: Any) -> dict[str, Any]:
    """What the state holds: all but the constants that were born in a step."""
    found = tensors_of(system)
    return {n: t for n, t in found.items() if "helper" not in n and "grid" not in n}


@pytest.mark.filterwarnings("ignore")  # what Lightning says about data loaders
@pytest.mark.parametrize("geometry", [Lazy, Direct, Later])
def test_parts_built_on_first_use_are_constants(geometry: Any) -> None:
    """Equal to the system's own run, and to itself in parallel."""
    system, datamodule = parts(geometry)
    recording = own_run(system, datamodule)
    replayed = ThreestudioTrajectory(
        *parts(geometry),
        num_steps=NUM_STEPS,
        random=recording,
        batches=recording.batch,
    )
    assert tree_equal(solve(replayed, Sequential()).value, own_tensors(system))

    trajectory = ThreestudioTrajectory(
        *parts(geometry), num_steps=NUM_STEPS, verify=True
    )
    sequential = solve(trajectory, Sequential())
    fresh = ThreestudioTrajectory(*parts(geometry), num_steps=NUM_STEPS)
    assert tree_equal(solve(fresh, EXACT).value, sequential.value)
    assert not any("helper" in name or "grid" in name for name in sequential.value)


def test_a_part_is_built_at_two_states_and_then_kept() -> None:
    """The second state shows that it is a constant."""
    trajectory = ThreestudioTrajectory(*parts(Lazy), num_steps=NUM_STEPS)
    Lazy.built = 0
    solve(trajectory, Sequential())
    built = Lazy.built
    assert built >= 2
    solve(trajectory, Sequential())
    assert Lazy.built == built


@pytest.mark.parametrize("geometry", [OfState, Changing])
def test_what_is_born_in_a_step_and_no_constant_is_refused(geometry: Any) -> None:
    trajectory = ThreestudioTrajectory(*parts(geometry), num_steps=NUM_STEPS)
    message = r"Buffer `geometry\.helper\.vertices` was registered during a step and"
    with pytest.raises(ValueError, match=message):
        solve(trajectory, Sequential())


def test_a_part_that_is_drawn_at_random_is_refused() -> None:
    trajectory = ThreestudioTrajectory(*parts(Drawn), num_steps=NUM_STEPS)
    with pytest.raises(ValueError, match=r"not a constant|random stream"):
        solve(trajectory, Sequential())


# --- data sets that draw at milestones ----------------------------------------------


class OneImage(RandomCameras):
    """Rays jittered once per resolution, as upstream's single image."""

    def __init__(self, cfg: Any) -> None:
        self.resolution_milestones = [-1, *cfg.resolution_milestones]
        self.heights, self.height = cfg.heights, 0
        self.reads = 0
        super().__init__(cfg)

    def update_step(self, epoch: int, step: int, on_load: bool = False) -> None:
        super().update_step(epoch, step, on_load)
        index = bisect.bisect_right(self.resolution_milestones, step) - 1
        if self.heights[index] == self.height:
            return
        self.height = self.heights[index]
        self.reads += 1
        self.jitter = 0.05 * torch.randn(3)

    def collate(self, batch: Any) -> dict[str, Any]:
        found = super().collate(batch)
        return {**found, "rays_d": found["rays_d"] + self.jitter}


class ByCount(OneImage):
    """Draws again at every third call."""

    calls = 0

    def update_step(self, epoch: int, step: int, on_load: bool = False) -> None:
        super().update_step(epoch, step, on_load)
        _CALLS.append(step)
        if len(_CALLS) % 3 == 0:
            self.jitter = 0.05 * torch.randn(3)


_CALLS: list[int] = []


class OneImageData(RandomCameraData):
    kind: Any = OneImage

    def setup(self, stage: str | None = None) -> None:
        self.train_dataset = self.kind(self.cfg)

    def train_dataloader(self) -> DataLoader[Any]:
        collate = self.train_dataset.collate
        return DataLoader(self.train_dataset, batch_size=None, collate_fn=collate)


def with_image(
    kind: Any = OneImage, milestones: tuple[int, ...] = (5, 9)
) -> tuple[Any, Any]:
    system, datamodule = build("dreamfusion-like")
    data = OneImageData(
        {
            **datamodule.cfg,
            "resolution_milestones": list(milestones),
            "heights": list(range(4, 5 + len(milestones))),
            "sizes": [4, 6, 4, 6],
            "batch_sizes": [1, 1, 1, 1],
        }
    )
    data.kind = kind
    return system, data


@pytest.mark.filterwarnings("ignore")
def test_a_draw_at_a_milestone_is_made_once() -> None:
    """Equal to the system's own run, and in any order of evaluation."""
    system, datamodule = with_image()
    recording = own_run(system, datamodule)
    assert datamodule.train_dataset.reads == 3
    replayed = ThreestudioTrajectory(
        *with_image(), num_steps=NUM_STEPS, random=recording, batches=recording.batch
    )
    assert tree_equal(solve(replayed, Sequential()).value, tensors_of(system))

    trajectory = ThreestudioTrajectory(*with_image(), num_steps=NUM_STEPS, verify=True)
    sequential = solve(trajectory, Sequential())
    fresh = ThreestudioTrajectory(*with_image(), num_steps=NUM_STEPS)
    assert tree_equal(solve(fresh, EXACT).value, sequential.value)


def test_the_steps_after_a_milestone_share_its_draw() -> None:
    trajectory = ThreestudioTrajectory(*with_image(), num_steps=NUM_STEPS)
    y, _ = trajectory.init()
    dataset = trajectory.host.shim.train_dataloader.dataset
    drift: Drift = trajectory.make_drift(torch.device("cpu"))
    jitters: dict[int, torch.Tensor] = {}
    for step in (13, 4, 9, 0, 5, 10, 7, 8, 9, 13):
        drift(step, y)
        jitter = dataset.jitter.clone()
        assert torch.equal(jitter, jitters.setdefault(step, jitter)), step
    for same in ((0, 4), (5, 7, 8), (9, 10, 13)):
        assert all(torch.equal(jitters[same[0]], jitters[step]) for step in same)
    assert not torch.equal(jitters[4], jitters[5])
    assert not torch.equal(jitters[8], jitters[9])


@pytest.mark.parametrize("milestones", [(), (1, 2, 13), (40,)])
def test_milestones_anywhere(milestones: tuple[int, ...]) -> None:
    """At the first and last step, behind the end, or nowhere."""
    found = with_image(milestones=milestones)
    trajectory = ThreestudioTrajectory(*found, num_steps=NUM_STEPS, verify=True)
    exact = solve(trajectory, EXACT)
    assert tree_equal(exact.value, solve(trajectory, Sequential()).value)


def test_a_draw_that_no_milestone_names_is_refused() -> None:
    with pytest.raises(NotReproducible, match=r"random stream of torch on CPU|rays_d"):
        ThreestudioTrajectory(*with_image(ByCount), num_steps=NUM_STEPS, verify=True)
