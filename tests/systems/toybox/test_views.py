from pathlib import Path

import numpy as np
import pytest
import torch

from systems.scene.cameras import Cameras
from systems.toybox import examples
from systems.toybox.captions import HELD_OUT
from systems.toybox.conditions import CAMERA, cameras_of, labels, ray_maps
from systems.toybox.finishes import FINISHES
from systems.toybox.objects import COLOURS, OBJECTS
from systems.toybox.reader import read
from systems.toybox.render import render
from systems.toybox.views import (
    ViewSet,
    build_shard,
    layers,
    open_shards,
    paint,
    random_cameras,
    render_shards,
)


@pytest.fixture(scope="module")
def views() -> ViewSet:
    parts = [build_shard(i, per_object=2, size=8) for i in range(2)]
    shards = tuple(part[0] for part in parts)
    return ViewSet(shards, torch.cat([part[1] for part in parts]))


@pytest.mark.parametrize("name", ["mug", "teapot", "house", "robot"])
@pytest.mark.parametrize("finish", FINISHES)
def test_painted_layers_are_the_ground_truths_render(name: str, finish: str) -> None:
    """Exact but for the order of sums; stored as bytes, within one of 255 levels."""
    cameras = random_cameras(3, torch.Generator().manual_seed(1))
    exact = render(name, "red", cameras, 32, finish=finish, second="cyan")
    traced = layers(name, cameras, 32)
    red, cyan = (torch.tensor([COLOURS[c]] * 3) for c in ("red", "cyan"))
    kind = torch.full((3,), list(FINISHES).index(finish))
    painted = paint(traced, red, cyan, kind)
    torch.testing.assert_close(painted, exact.rgb, atol=1e-6, rtol=0)
    stored = (traced * 255).round() / 255
    assert (paint(stored, red, cyan, kind) - exact.rgb).abs().max() < 1 / 255
    assert torch.equal(traced[:, 6:7], exact.mask)
    normals = (exact.normal + exact.mask) / 2
    torch.testing.assert_close(traced[:, 7:], normals, atol=1e-6, rtol=0)


def test_shards_are_rendered_once_and_read_back(
    tmp_path: Path, views: ViewSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from systems.toybox import views as module

    def small(shard: int, per_object: int) -> tuple[torch.Tensor, torch.Tensor]:
        return build_shard(shard, per_object, size=8)

    monkeypatch.setattr(module, "build_shard", small)
    with pytest.raises(ValueError, match=r"holds no views.*systems.toybox views"):
        open_shards(tmp_path)
    render_shards(tmp_path, 1, per_object=2)
    before = (tmp_path / "layers-000.npy").stat().st_mtime_ns
    render_shards(tmp_path, 2, per_object=2)  # the same seed, the same bytes
    assert (tmp_path / "layers-000.npy").stat().st_mtime_ns == before
    read_back = open_shards(tmp_path)
    for ours, theirs in zip(read_back.shards, views.shards, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert torch.equal(read_back.cameras, views.cameras)
    index = torch.tensor([3, 60, 7])
    assert torch.equal(read_back.layers(index), views.layers(index))


def test_views_know_their_object_and_find_others_of_it(views: ViewSet) -> None:
    index = torch.arange(len(views))
    objects = views.objects(index)
    assert objects.bincount().tolist() == [4] * len(OBJECTS)
    camera = Cameras(*views.cameras[[10]].unbind(-1))
    name = list(OBJECTS)[int(objects[10])]
    traced = layers(name, camera, 8)
    assert torch.equal((traced * 255).round(), views.layers(index[10:11]) * 255)
    other = views.other_views(index, torch.Generator().manual_seed(0))
    assert torch.equal(views.objects(other), objects)
    assert (other != index).double().mean() > 0.5


def test_no_example_shows_or_names_a_held_out_pair(views: ViewSet) -> None:
    objects = views.objects(torch.arange(len(views))).repeat(100)
    looks = examples.random_looks(objects, torch.Generator().manual_seed(0))
    names, colours = list(OBJECTS), list(COLOURS)
    shown = {
        (colours[c], names[o])
        for o, c in zip(objects.tolist(), looks.colour.tolist(), strict=True)
    }
    assert not shown & set(HELD_OUT)
    assert len(shown) == 26 * 10 - len(HELD_OUT)
    assert (looks.second != looks.colour).all()
    made = examples.draw(views, 400, torch.Generator().manual_seed(0))
    named = {(a.colour, a.name) for a in map(read, made.captions)}
    assert not named & set(HELD_OUT)


def test_conditions_are_mixed_and_left_out_as_documented(views: ViewSet) -> None:
    made = examples.draw(views, 3000, torch.Generator().manual_seed(0))
    captioned = torch.tensor([bool(text) for text in made.captions])
    absolute, relative = made.labels[:, 0] > 0, made.labels[:, 1 + CAMERA] > 0
    image = made.labels[:, -1] > 0

    def share(which: torch.Tensor) -> float:
        return float(which.double().mean())

    assert not (absolute & relative).any()
    assert not (relative & ~image).any()
    assert share(captioned) == pytest.approx(0.9 * 0.9, abs=0.03)
    assert share(image) == pytest.approx(0.1 * 0.9 + 0.05, abs=0.03)
    assert share(absolute) == pytest.approx((0.85 + 0.025) * 0.85, abs=0.03)
    assert share(relative) == pytest.approx((0.1 * 0.9 + 0.025) * 0.85, abs=0.03)
    # Whatever is not given is zero, and nothing else is.
    given = made.references.abs().amax((1, 2, 3)) > 0
    assert torch.equal(given, image)
    assert (made.labels[~absolute][:, : 1 + CAMERA] == 0).all()
    assert (made.labels[~relative][:, 1 + CAMERA : -1] == 0).all()
    normals = sum("normal map" in text for text in made.captions) / len(made.captions)
    assert normals == pytest.approx(0.85 * 0.9 * 0.12, abs=0.02)


def test_a_reference_shows_the_same_object_over_the_same_background(
    views: ViewSet,
) -> None:
    made = examples.draw(views, 64, torch.Generator().manual_seed(2))
    shown = (made.labels[:, -1] > 0).nonzero()[:, 0]
    images, references = made.images[shown], made.references[shown]
    # The corner of an 8×8 render is background in nearly every view.
    same = (images[:, :, 0, 0] - references[:, :, 0, 0]).abs().amax(1) < 1e-6
    assert same.double().mean() > 0.9


def test_a_batch_is_drawn_from_its_generator_alone(views: ViewSet) -> None:
    first = examples.draw(views, 8, torch.Generator().manual_seed(3))
    torch.rand(5)  # the global generator has no say
    again = examples.draw(views, 8, torch.Generator().manual_seed(3))
    for name in ("images", "references", "captions", "labels"):
        one, other = getattr(first, name), getattr(again, name)
        assert (
            torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        )


def test_labels_tell_a_zero_camera_from_none() -> None:
    zero = torch.zeros(1)
    middle = Cameras(zero, zero + 35, zero + 2.4, zero + 50)
    absolute, relative = labels(1, middle), labels(1, middle, middle, image=True)
    assert absolute.nonzero()[:, 1].tolist() == [0, 2, 4, 6]  # the flag, the cosines
    assert relative.nonzero()[:, 1].tolist() == [10, 12, 14, 16, 20]
    assert (labels(1) == 0).all()
    turned = Cameras(zero + 400, zero + 35, zero + 2.4, zero + 50)
    moved = Cameras(zero + 360, zero + 35, zero + 2.4, zero + 50)
    torch.testing.assert_close(
        labels(1, turned, moved), labels(1, Cameras(zero + 40, *_rest(middle)), middle)
    )


def _rest(camera: Cameras) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return camera.elevation, camera.distance, camera.fov


def test_rays_are_those_of_the_camera_in_either_frame() -> None:
    one = torch.ones(3)
    cameras = Cameras(torch.tensor([0.0, 50.0, 200.0]), 10 * one, 2.4 * one, 50 * one)
    found = ray_maps(cameras, 8)
    nearest, direction = found.split(3, 1)
    assert torch.allclose((nearest * direction).sum(1), torch.zeros(3, 8, 8), atol=1e-5)
    # The middle of the image looks at the centre.
    assert nearest[:, :, 3:5, 3:5].abs().max() < 0.2
    own = ray_maps(cameras, 8, cameras)
    assert torch.allclose(own, own[:1].expand_as(own), atol=1e-5)
    assert (own[:, 5] > 0.8).all()  # forward
    again = cameras_of(labels(3, cameras))
    assert torch.allclose(ray_maps(again, 8), found, atol=1e-5)
