"""threestudio's own single-image configs, unmodified, on a tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import launch
from dreampropeller import checkpoint
from dreampropeller.tree import all_finite
from tests.systems.test_upstream import CHECKOUT, ROOT
from tests.systems.test_zero123 import rendered
from tests.systems.zero123_models import tiny

SMALL = (
    *(f"data.{side}=[16,24,32]" for side in ("height", "width")),
    *(f"data.random_camera.{side}=[16,24,32]" for side in ("height", "width")),
    *(f"data.random_camera.eval_{side}=32" for side in ("height", "width")),
    "data.random_camera.batch_size=[2,2,2]",
    "data.random_camera.n_test_views=2",
    "system.geometry.isosurface_resolution=16",
    "system.geometry.pos_encoding_config.log2_hashmap_size=8",
    "system.geometry.pos_encoding_config.n_levels=2",
    "system.renderer.num_samples_per_ray=32",
    "trainer.max_steps=2",
)


@pytest.mark.skipif(CHECKOUT is None, reason="THREESTUDIO_ROOT names no checkout")
@pytest.mark.parametrize("name", ["zero123", "stable-zero123"])
def test_their_image_configs_run_from_end_to_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny().save_pretrained(tmp_path / "model")
    picture = rendered(tmp_path / "mug.png", size=32)
    model = "system.guidance.pretrained_model_name_or_path"
    arguments = ["--config", f"{CHECKOUT}/configs/{name}.yaml", "--train", *SMALL]
    arguments += [f"data.image_path={picture}", f"{model}={tmp_path / 'model'}"]
    assert launch.main([*arguments, f"exp_root_dir={tmp_path / 'outputs'}"]) == 0
    (folder,) = (tmp_path / "outputs").glob("*/*@*")
    report = json.loads((folder / "report.json").read_text())
    assert report["steps"] == 2
    assert report["reference"]["iou"] > 0.1, "at the camera of the image"
    assert report["mesh_quality"]["faces"] > 50
    for artefact in ("mesh.glb", "mesh.obj", "reference.png", "turntable.mp4"):
        assert (folder / artefact).stat().st_size > 0, artefact
    state = checkpoint.load(folder / "ckpts")
    assert state.step == 2
    assert all_finite([state.y])[0]
