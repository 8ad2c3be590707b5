"""The promise itself: an unmodified checkout, in its own environment.

`THREESTUDIO_ROOT` names the checkout (`THREESTUDIO_3DGS_ROOT` the extension for growing
Gaussians), `THREESTUDIO_PYTHON` the interpreter of its environment, and
`THREESTUDIO_PATH` what else belongs on the path (stand-ins for CUDA packages).
`THREESTUDIO_EXTENSIONS` names further extensions for the table of configs in
`docs/threestudio.md`, which `THREESTUDIO_TABLE=write` writes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trimesh
import yaml

from tests.adapters.real_systems import configs, table

ROOT = Path(__file__).parent.parent.parent


needs_checkout = pytest.mark.skipif(
    "THREESTUDIO_ROOT" not in os.environ,
    reason="`THREESTUDIO_ROOT` does not name a checkout of threestudio",
)
EXTENSION = """
from dataclasses import dataclass
import threestudio
from threestudio.utils.base import BaseObject

@threestudio.register("no-prompts")
class NoPrompts(BaseObject):
    @dataclass
    class Config(BaseObject.Config):
        prompt: str = ""

    def __call__(self):
        return None
"""

# What `geometry_convert_from` does first, in upstream's `BaseLift3DSystem.configure`.
NEXT_STAGE = """
import os, sys
root, last = sys.argv[1:]
os.chdir(root)
sys.path[0] = root
import threestudio
from threestudio.utils.config import load_config
from threestudio.utils.misc import load_module_weights
cfg = load_config(os.path.join(os.path.dirname(last), "../configs/parsed.yaml"))
geometry = threestudio.find(cfg.system.geometry_type)(cfg.system.geometry)
weights, epoch, step = load_module_weights(last, "geometry", map_location="cpu")
assert step == 12
geometry.load_state_dict(weights)
geometry.do_update_step(epoch, step, on_load_weights=True)
"""


def start(*command: str, cwd: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
    path = [os.environ.get("THREESTUDIO_PATH", ""), str(ROOT), str(cwd)]
    return subprocess.Popen(
        [os.environ.get("THREESTUDIO_PYTHON", sys.executable), *command],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "OMP_NUM_THREADS": "1",
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def python(*command: str, cwd: Path = ROOT, **variables: str) -> str:
    run = start(*command, cwd=cwd, **variables)
    out, errors = run.communicate()
    assert run.returncode == 0, errors[-3000:]
    return out


def compare(case: str) -> dict[str, Any]:
    cuda = {"TS_FAKE_CUDA": "1"} if case == "3dgs" else {}
    out = python("-m", "tests.adapters.real_threestudio", case, cwd=ROOT, **cuda)
    return json.loads(out.strip().splitlines()[-1])


@needs_checkout
@pytest.mark.parametrize("case", ["dreamfusion", "prolificdreamer", "3dgs"])
def test_an_unmodified_checkout_is_driven_bit_for_bit(case: str) -> None:
    if case == "3dgs" and "THREESTUDIO_3DGS_ROOT" not in os.environ:
        pytest.skip("`THREESTUDIO_3DGS_ROOT` does not name threestudio-3dgs")
    found = compare(case)
    print(json.dumps(found))
    assert found["steps_compared"] >= {"dreamfusion": 40, "3dgs": 13}.get(case, 8)
    assert found["steps_equal"] == found["steps_compared"], found["first_difference"]
    assert found["threshold_zero_equal"]
    assert found["published"]["speed_up"] > 1
    assert found["default"]["speed_up"] >= 1
    assert found["sizes"] == [12, 16], "a resolution milestone"
    if case == "3dgs":
        rows = found["rows"]["geometry._xyz"]
        assert rows[1] > rows[0], "growth"
    else:
        assert "renderer.estimator.binaries" in found["changed_buffers"] or case != (
            "dreamfusion"
        ), "a grid update"


WRITE_MODEL = (
    "import sys; from pathlib import Path; from tests.adapters.tiny_sd import write;"
    "write(Path(sys.argv[1]))"
)
GUARD_ADVICE = 'put what it does under `if __name__ == "__main__":`'
BEGIN, END = "<!-- table of configs -->\n", "<!-- end of table -->\n"


def examine(names: list[str], **variables: str) -> list[dict[str, Any]]:
    out = python("-m", "tests.adapters.real_systems", *names, cwd=ROOT, **variables)
    return [
        json.loads(line) for line in out.splitlines() if line.startswith('{"config')
    ]


@needs_checkout
def test_the_table_of_configs_is_what_they_do() -> None:
    """Every config of the checkout and of the extensions: some twenty minutes."""
    given = os.environ.get("THREESTUDIO_EXTENSIONS", "").split(os.pathsep)
    extensions = [Path(one) for one in given if one]
    known = list(configs(Path(os.environ["THREESTUDIO_ROOT"]), extensions))
    found = examine([name for name in known if "threestudio-" not in name])
    others = [name for name in known if "threestudio-" in name]
    found += examine(others, TS_FAKE_CUDA="1") if others else []
    page = ROOT / "docs" / "threestudio.md"
    before, _, rest = page.read_text().partition(BEGIN)
    written, _, after = rest.partition(END)
    now = table(found)
    if os.environ.get("THREESTUDIO_TABLE") == "write":
        page.write_text(before + BEGIN + now + END + after)
        written = now
    rows = written.splitlines()
    assert [row for row in now.splitlines() if row not in rows] == []
    assert not [one for one in found if one["outcome"] in ("different", "failed")]


@needs_checkout
@pytest.mark.parametrize(
    "name", ["fantasia3d", "zero123", "experimental/imagecondition"]
)
def test_systems_that_build_or_draw_on_first_use_are_equal(name: str) -> None:
    (found,) = examine([name])
    assert found["outcome"] == "equal", found
    assert found["steps_equal"] == found["steps_compared"] == 6
    assert found["threshold_zero_equal"]
    assert found["sizes"] == [12, 16], "a resolution milestone"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The checkout with an extension of the user's in `custom/`."""
    place = tmp_path / "checkout"
    (place / "custom").mkdir(parents=True)
    for name in ("threestudio", "load", "configs", "launch.py", "extern"):
        (place / name).symlink_to(Path(os.environ["THREESTUDIO_ROOT"]) / name)
    (place / "custom" / "prompts.py").write_text(EXTENSION)
    config = yaml.safe_load((place / "configs" / "dreamfusion-sd.yaml").read_text())
    encoding = config["system"]["geometry"]["pos_encoding_config"]
    encoding.update(n_levels=4, log2_hashmap_size=10, base_resolution=8)
    config["system"]["renderer"]["num_samples_per_ray"] = 32
    config["system"] |= {
        "guidance_type": "toy-sds-guidance",
        "guidance": {},
        "prompt_processor_type": "no-prompts",
        "prompt_processor": {"prompt": "a pineapple"},
    }
    sizes = ("width", "height", "eval_width", "eval_height")
    config["data"].update({**dict.fromkeys(sizes, 12), "n_val_views": 1})
    config["data"]["n_test_views"] = 4  # upstream fails at 3
    config["trainer"].update(max_steps=12, val_check_interval=5, precision=32)
    config["solver"] = {"window": {"size": 3}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return place


def command(root: Path, *settings: str, tag: str) -> list[str]:
    return [
        "launch.py",
        "--config",
        str(root.parent / "run.yaml"),
        "--train",
        "backend=threestudio",
        f"threestudio.root={root}",
        f"exp_root_dir={root.parent / 'outputs'}",
        "use_timestamp=false",
        f"tag={tag}",
        *settings,
    ]


def launched(root: Path, *settings: str, tag: str = "one") -> Path:
    python(*command(root, *settings, tag=tag))
    return root.parent / "outputs" / "dreamfusion-sd" / tag


@needs_checkout
@pytest.mark.parametrize("guarded", [True, False])
def test_the_page_s_script_embeds_a_new_prompt(root: Path, guarded: bool) -> None:
    """As printed, but with three steps, a small scene and a tiny text encoder."""
    model = root / "tiny-sd"
    python("-c", WRITE_MODEL, str(model))
    config = yaml.safe_load((root.parent / "run.yaml").read_text())
    config["system"]["prompt_processor_type"] = "stable-diffusion-prompt-processor"
    config["system"]["prompt_processor"] = {
        "prompt": "???",
        "pretrained_model_name_or_path": str(model),
    }
    (root / "configs").unlink()
    (root / "configs").mkdir()
    (root / "configs" / "dreamfusion-sd.yaml").write_text(yaml.safe_dump(config))
    page = (ROOT / "docs" / "threestudio.md").read_text()
    (script,) = [
        block.partition("```")[0]
        for block in page.split("```python\n")[1:]
        if "import threestudio\n" in block
    ]
    script = script.replace("num_steps=10000", "num_steps=3")
    assert "num_steps=3" in script
    if not guarded:
        script = script.partition('if __name__ == "__main__":')[0] + "main()\n"
    (root / "train.py").write_text(script)
    run = start("train.py", cwd=root)
    out, errors = run.communicate()
    assert (run.returncode == 0) == guarded, errors[-3000:]
    if guarded:
        assert int(out.strip().splitlines()[-1]) <= 3
    assert (GUARD_ADVICE in errors) == (not guarded)


@needs_checkout
def test_launch_leaves_what_threestudio_leaves(root: Path) -> None:
    folder = launched(root)
    report = json.loads((folder / "report.json").read_text())
    assert report["steps"] == 12
    assert report["iterations"] < 12
    for name in ("configs/parsed.yaml", "configs/raw.yaml", "cmd.txt", "tb_logs"):
        assert (folder / name).exists(), name
    assert (folder / "ckpts" / "last.ckpt").exists()
    assert list((folder / "save").glob("it12-test*")), "test images"
    assert list((folder / "save").glob("it[0-9]*-0.png")), "validation images"
    metrics = next((folder / "csv_logs").rglob("metrics.csv")).read_text()
    assert len(metrics.splitlines()) == 13
    assert "train/loss_sds" in metrics.splitlines()[0]

    # threestudio's own `--test` reads it, from the checkout.
    (film,) = (folder / "save").glob("it12-test.mp4")
    film.unlink()
    place = (
        "import os, sys, runpy; os.chdir(sys.argv.pop(1)); sys.path[0] = os.getcwd()"
    )
    theirs = "runpy.run_path('launch.py', run_name='__main__')"
    where = [str(root), "--config", str(folder / "configs" / "parsed.yaml"), "--test"]
    last = str(folder / "ckpts" / "last.ckpt")
    python("-c", f"{place}; {theirs}", *where, f"resume={last}")
    assert film.exists()
    python("-c", NEXT_STAGE, str(root), last)

    # So does its `--export`; only textures would draw with nvdiffrast.
    undrawn = (
        "import threestudio.utils.rasterize as rasterize;"
        "rasterize.dr.RasterizeGLContext = lambda **_: None"
    )
    where[-1] = "--export"
    python(
        *("-c", f"{place}; {undrawn}; {theirs}", *where, f"resume={last}"),
        *("system.exporter_type=mesh-exporter", "system.exporter.fmt=obj"),
        *("system.exporter.save_uv=false", "system.exporter.save_texture=false"),
        *("system.geometry.isosurface_resolution=32",),
        "system.geometry.isosurface_threshold=auto",
    )
    (mesh,) = (folder / "save").rglob("*.obj")
    assert len(trimesh.load_mesh(mesh).faces) > 50


@needs_checkout
def test_launch_on_two_ranks_gives_the_same_object(root: Path) -> None:
    final = "ckpts/dreampropeller/step-00000012.safetensors"
    alone = launched(root) / final
    both = launched(root, "dispatch.num_workers=2", tag="two") / final
    assert alone.read_bytes() == both.read_bytes()


@needs_checkout
def test_launch_goes_on_from_a_run(root: Path) -> None:
    folder = launched(root)
    states = folder / "ckpts" / "dreampropeller"
    final = states / "step-00000012.safetensors"
    expected = final.read_bytes()
    final.unlink()  # the one before is of a validation
    launched(root, f"resume={folder}")
    assert final.read_bytes() == expected


@needs_checkout
@pytest.mark.parametrize("count", [1, 2])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(root: Path, count: int) -> None:
    many = ("trainer.max_steps=90", "trainer.val_check_interval=1000")
    many += ("checkpoint.every_n_train_steps=6", f"dispatch.num_workers={count}")
    final = "ckpts/dreampropeller/step-00000090.safetensors"
    expected = (launched(root, *many, tag="whole") / final).read_bytes()

    run = start(*command(root, *many, tag="stopped"))
    folder = root.parent / "outputs" / "dreamfusion-sd" / "stopped"
    while run.poll() is None and not (folder / "ckpts" / "dreampropeller").exists():
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    out, errors = run.communicate(timeout=300)
    assert run.returncode == 128 + signal.SIGTERM, errors[-3000:]
    assert f"resume={folder}" in out
    assert (folder / "ckpts" / "last.ckpt").exists()
    assert not (folder / final).exists()
    assert not list((folder / "save").glob("*test*"))

    launched(root, *many, f"resume={folder}", tag="stopped")
    assert (folder / final).read_bytes() == expected


@needs_checkout
@pytest.mark.skipif(
    "THREESTUDIO_3DGS_ROOT" not in os.environ,
    reason="`THREESTUDIO_3DGS_ROOT` does not name threestudio-3dgs",
)
def test_launch_grows_gaussians_of_an_extension(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TS_FAKE_CUDA", "1")
    extension = Path(os.environ["THREESTUDIO_3DGS_ROOT"])
    (root / "custom" / "threestudio-3dgs").symlink_to(extension)
    path = root.parent / "run.yaml"
    scene = yaml.safe_load(path.read_text())
    config = yaml.safe_load(
        (extension / "configs" / "gaussian_splatting.yaml").read_text()
    )
    config |= {"name": "dreamfusion-sd", "solver": scene["solver"]}
    config["data"].update(scene["data"])
    config["trainer"].update(scene["trainer"])
    names = ("guidance_type", "guidance", "prompt_processor_type", "prompt_processor")
    config["system"].update({name: scene["system"][name] for name in names})
    config["system"]["loss"].update(lambda_tv_loss=0.0, lambda_depth_tv_loss=0.0)
    config["system"]["geometry"].update(
        init_num_pts=64,
        densify_from_iter=3,
        densification_interval=4,
        prune_from_iter=3,
        prune_interval=5,
        densify_grad_threshold=1e-4,
        split_thresh=0.05,
    )
    path.write_text(yaml.safe_dump(config))
    one = launched(root)
    two = launched(root, "dispatch.num_workers=2", tag="two")
    final = "ckpts/dreampropeller/step-00000012.safetensors"
    assert (one / final).read_bytes() == (two / final).read_bytes()
    assert (one / "save" / "it12-test.mp4").exists()
    assert (one / "save" / "point_cloud.ply").stat().st_size > 64 * 14 * 4, "growth"
