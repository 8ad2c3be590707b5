"""The front door: what a run leaves behind, stopping, resuming, and every refusal."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

import launch
from dreampropeller import checkpoint
from dreampropeller.error_growth import Growths
from systems import artefacts, build
from systems.runs.folders import folder_of
from systems.runs.report.runs import open_run
from tests.helpers import tree_equal
from tests.processes import rank_environ
from tests.rank_pool import RankPool
from tests.systems.scenes import SMALL, TOYBOX

ROOT = Path(__file__).parent.parent.parent
PROMPT = SMALL[0]
FEW = (*SMALL, "trainer.max_steps=12", "trainer.val_check_interval=4")
FILES = {
    ".lock",
    "config.yaml",
    "command.txt",
    "environment.json",
    "metrics.jsonl",
    "tensorboard",
    "ckpts",
    "preview.png",
    "turntable.mp4",
    "truth.png",
    "report.json",
}


@pytest.fixture(autouse=True)
def _quiet_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def train(out: Path, *overrides: str, config: str = TOYBOX) -> int:
    arguments = ["--config", config, "--train", *FEW, f"exp_root_dir={out}"]
    return launch.main([*arguments, "dispatch.threads=1", *overrides])


def run_folder(out: Path) -> Path:
    (folder,) = out.glob("*/*@*")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; look at it, do not change it."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert train(out) == 0
    return run_folder(out)


@contextmanager
def started(out: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """A run of many steps in a process group of its own, which ends with the test."""
    command = [sys.executable, "launch.py", "--config", TOYBOX, "--train", *SMALL]
    process = subprocess.Popen(
        [*command, f"exp_root_dir={out}", "trainer.max_steps=4000", *overrides],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        process_group=0,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_steps(out: Path, process: subprocess.Popen[str] | None = None) -> Path:
    for _ in range(2400):
        for metrics in out.glob("*/*@*/metrics.jsonl"):
            if len(metrics.read_text().splitlines()) > 10:
                return metrics.parent
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("The run did not start.")


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    assert finished.name.startswith("a_red_mushroom@")
    assert {path.name for path in finished.iterdir()} == {
        *FILES,
        "mesh.glb",
        "mesh.obj",
        "viewer.html",
    }
    report = json.loads((finished / "report.json").read_text())
    assert report["steps"] == 12
    assert report["iterations"] < 12 <= report["evaluations"]
    assert set(report["quality"]) >= {"psnr", "ssim", "iou", "right_colour"}
    assert set(report["mesh_quality"]) >= {"iou_3d", "chamfer", "bodies", "level"}
    assert report["environment"]["packages"]["torch"]
    lines = [
        json.loads(x) for x in (finished / "metrics.jsonl").read_text().split("\n") if x
    ]
    assert [line["step"] for line in lines if "step" in line] == list(range(12))
    strides = [line["stride"] for line in lines if "stride" in line]
    assert sum(strides) == 12
    assert by_hand(finished) == {name: report[name] for name in by_hand(finished)}
    assert len(strides) == report["iterations"]
    # The first step alone, then the steps evaluated again say how good guesses were.
    assert strides[0] == 1
    assert any(line.get("measured_drift_error", 0) > 0 for line in lines)
    rates = [line.get("growth") for line in lines if "stride" in line]
    growth = Growths.over(rates, strides)
    assert growth is not None
    assert report["growth"]["mean"] == pytest.approx(growth.mean, rel=1e-3)
    assert report["growth"]["says"].endswith("in linear approximation.")
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    assert settings["system"]["prompt_processor"]["prompt"] == "a red mushroom"
    assert settings["system"]["guidance"]["max_step_percent"][3] == 12  # resolved
    assert "problems" not in settings


def test_the_resolved_config_is_a_config(finished: Path, tmp_path: Path) -> None:
    """And gives the same object again."""
    again = ["--config", str(finished / "config.yaml"), "--train"]
    assert launch.main([*again, f"exp_root_dir={tmp_path}"]) == 0
    values = [
        checkpoint.load(folder / "ckpts").y
        for folder in (finished, run_folder(tmp_path))
    ]
    assert tree_equal(*values)


def test_test_and_export_look_at_a_finished_run(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for name in ("turntable.mp4", "truth.png", "mesh.glb", "mesh.obj"):
        (copy / name).unlink()
    assert launch.main(["--test", f"resume={copy}"]) == 0  # the run's own config
    assert (copy / "turntable.mp4").exists()
    assert (copy / "truth.png").exists()
    assert not (copy / "mesh.glb").exists()
    (newest,) = (copy / "ckpts").glob("*.safetensors")
    assert launch.main(["--export", f"resume={newest}"]) == 0
    assert (copy / "mesh.glb").exists()
    empty = "system.geometry.isosurface_threshold=1e9"
    assert launch.main(["--export", f"resume={copy}", empty]) == 1


@pytest.mark.long  # below the front door: tests/systems/test_dreamfusion.py
def test_sequential_is_the_plain_loop_and_threshold_zero_equals_it(
    tmp_path: Path,
) -> None:
    exact = ("solver.threshold.name=fixed", "solver.threshold.value=0")
    values = []
    for name, settings in (("a", ("solver.name=sequential",)), ("b", exact)):
        assert train(tmp_path / name, *settings) == 0
        values.append(checkpoint.load(run_folder(tmp_path / name) / "ckpts").y)
    assert tree_equal(*values)


def test_a_run_is_not_resumed_in_half_precision_from_full(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "config.yaml").read_text()
    half = "trainer.precision=16-mixed"
    assert launch.main(["--train", f"resume={finished}", half]) == 2
    assert "write the precision it began with" in capsys.readouterr().err
    assert (finished / "config.yaml").read_text() == before


def by_hand(folder: Path) -> dict[str, Any]:
    """The numbers of a report, from its metrics alone."""
    made: dict[int, dict[str, Any]] = {}
    seconds = 0.0
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        seconds = line.get("elapsed", seconds)
        if "iteration" in line:
            made = {n: old for n, old in made.items() if n < line["iteration"]}
            made[line["iteration"]] = line
    lines = [made[n] for n in range(1, len(made) + 1)]
    phases = {name for line in lines for name in line["seconds"]}
    strides = [line["stride"] for line in lines]
    return {
        "steps": sum(strides),
        "iterations": len(lines),
        "strides": strides,
        "steps_per_iteration": round(sum(strides) / len(lines), 3),
        "evaluations": lines[-1]["evaluations"],
        "seconds": round(seconds, 2),
        "solving_seconds": round(lines[-1]["solving"], 3),
        "device_seconds": round(lines[-1]["solving"], 3),  # one worker
        "seconds_by_phase": {
            phase: round(sum(line["seconds"].get(phase, 0) for line in lines), 3)
            for phase in phases
        },
    }


def test_resumed_run_equals_the_undisturbed_one(tmp_path: Path) -> None:
    """In mixed precision: the scale of the loss is part of the state."""
    settings = (
        "checkpoint.every_n_train_steps=1",
        "checkpoint.keep=100",
        "trainer.precision=16-mixed",
    )
    assert train(tmp_path / "whole", *settings) == 0
    whole = run_folder(tmp_path / "whole")
    end = checkpoint.load(whole / "ckpts").y
    files = sorted((whole / "ckpts").glob("step-*"))
    for file in files[len(files) // 2 :]:
        file.unlink()
    assert train(tmp_path / "unused", *settings, f"resume={whole}") == 0
    assert tree_equal(checkpoint.load(whole / "ckpts").y, end)
    assert len((whole / "command.txt").read_text().splitlines()) == 2
    # What was made twice counts once; the seconds are those of both parts.
    report = json.loads((whole / "report.json").read_text())
    assert by_hand(whole) == {name: report[name] for name in by_hand(whole)}
    assert report["solving_seconds"] > 0
    assert open_run(whole).seconds_at(12) == pytest.approx(
        report["solving_seconds"], abs=1e-3
    )
    # Nothing is left to do; nothing is forgotten.
    assert launch.main(["--train", f"resume={whole}"]) == 0
    again = json.loads((whole / "report.json").read_text())
    assert {**again, "seconds": 0} == {**report, "seconds": 0}
    assert again["seconds"] >= report["seconds"]
    assert by_hand(whole) == {name: again[name] for name in by_hand(whole)}
    assert folder_of(str(files[0])) == whole


def test_two_ranks_write_one_run_and_equal_one(
    finished: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    """They are there, with torchrun's environment, when the front door opens."""
    arguments = ["--config", TOYBOX, "--train", *FEW, f"exp_root_dir={tmp_path}"]
    assert two_ranks(launch.main, arguments) == [0, 0]
    folder = run_folder(tmp_path)
    values = [checkpoint.load(one / "ckpts").y for one in (folder, finished)]
    assert tree_equal(*values)
    assert json.loads((folder / "report.json").read_text())["workers"] == 2


@pytest.mark.chaos
@pytest.mark.parametrize("when", ["starting", "running"])
def test_ctrl_c_on_two_workers_saves_and_exports(tmp_path: Path, when: str) -> None:
    """The workers that the front door starts itself."""
    with started(tmp_path, "dispatch.num_workers=2") as process:
        if when == "running":
            folder = wait_for_steps(tmp_path, process)
        else:
            while not list(tmp_path.rglob("command.txt")):
                assert process.poll() is None
                time.sleep(0.01)
            folder = run_folder(tmp_path)
            time.sleep(0.5)  # the handler is installed right after
        os.killpg(process.pid, signal.SIGINT)  # a terminal tells the whole group
        output, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "iterations" in output
    report = json.loads((folder / "report.json").read_text())
    assert 0 < report["steps"] < (4000 if when == "running" else 100)
    assert checkpoint.load(folder / "ckpts").step == report["steps"]
    assert (folder / "turntable.mp4").exists()


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "a file"])
def test_a_request_to_stop_saves_and_leaves(tmp_path: Path, how: str) -> None:
    def ask() -> None:
        folder = wait_for_steps(tmp_path)
        if how == "a file":
            (folder / "stop").touch()
        else:
            os.kill(os.getpid(), getattr(signal, how))

    asking = threading.Thread(target=ask)
    asking.start()
    code = train(tmp_path, "trainer.max_steps=4000")
    asking.join()
    folder = run_folder(tmp_path)
    assert code == (143 if how == "SIGTERM" else 130)
    report = json.loads((folder / "report.json").read_text())
    assert 0 < report["steps"] < 4000
    assert checkpoint.load(folder / "ckpts").step == report["steps"]
    # SIGTERM leaves little time: rendering can be done later.
    assert (folder / "turntable.mp4").exists() == (how != "SIGTERM")
    assert not (folder / "stop").exists()


def test_no_space_left_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on file sizes stands in for the full disk: checkpoints do not fit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        code = train(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    errors = capsys.readouterr().err
    assert "error: The checkpoint of step" in errors
    assert "Free some space" in errors
    assert "Traceback" not in errors


def test_full_disk_while_measuring(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`/dev/full` is a disk without space: the metrics go there."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").symlink_to("/dev/full")
    before = checkpoint.load(copy / "ckpts").step
    arguments = ["--config", str(copy / "config.yaml"), "--train", f"resume={copy}"]
    assert launch.main([*arguments, "trainer.max_steps=24"]) == 2
    assert checkpoint.load(copy / "ckpts").step > before  # what was accepted is saved
    said = capsys.readouterr().err
    assert f"`{copy / 'metrics.jsonl'}` cannot be written" in said
    assert "Free some space" in said


def test_each_artefact_by_itself(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No ffmpeg, and no room for the obj: everything else is written."""
    from systems.settings.config import load

    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "part-mesh.obj").symlink_to("/dev/full")
    system = build(load(finished / "config.yaml", ["quality.clip=/nowhere"]))
    y = checkpoint.load(finished / "ckpts").y
    y["geometry.grid"] = torch.full_like(y["geometry.grid"], 9.0)  # all is full
    report = artefacts.write(out, system, y)
    assert {path.name for path in out.iterdir()} == {
        "mesh.glb",
        "preview.png",
        "truth.png",
    }
    assert "pip install imageio-ffmpeg" in report["turntable"]
    assert f"`{out / 'mesh.obj'}` cannot be written: No space left" in report["mesh"]
    assert "Free some space" in report["mesh"]
    assert report["quality"]["psnr"] > 0
    unused, collapsed = report["notes"]
    assert "`quality.clip` was not used: the ground truth" in unused
    assert collapsed.startswith("Collapsed, or not there yet")
    assert report["mesh_quality"]["bodies"] == 1
    said = "\n".join(system.summary(report))
    assert "Turntable failed: videos need ffmpeg" in said
    assert "Mesh failed: " in said
    assert "3D IoU" in said


def test_preview_shows_the_mesh_below_the_volume(finished: Path) -> None:
    from PIL import Image

    image = Image.open(finished / "preview.png")
    assert image.size == (4 * 16, 2 * 16)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).reshape(2, -1, 3)
    assert all(float(row.float().std()) > 10 for row in pixels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", TOYBOX, "--train"], "The prompt is missing"),
        (["system.prompt_processor.prompt="], "is empty: write a text"),
        (["system.prompt_processor.prompt=' '"], "say what to make"),
        (["system.prompt_processor.prompt=a red mushrom"], "`mushrom` (nearest"),
        (["system.prompt_processor.prompt=a zebra"], "does not know `zebra`"),
        (["name=../../x"], "`name` is `../../x`, which is no folder inside"),
        (["name=/x"], "write a plain name"),
        (["system.geometry.resolutio=3"], "Did you mean `resolution`?"),
        (["sistem.geometry.resolution=3"], "Did you mean `system`?"),
        (["trainer.max_step=3"], "Did you mean `max_steps`?"),
        (["trainer.max_steps=many"], "`trainer.max_steps` is `many`: write a whole"),
        (["trainer.max_steps=0"], "`max_steps` is 0: write 1 or more"),
        (["trainer.precision=64"], "write one of `32-true`"),
        (["data.elevation_range=[10]"], "write [a number, a number]"),
        (["data.elevation_range=[80,-10]"], "`[low, high]`"),
        (["solver.window.size=-1"], "In `solver.window`: `size` is -1: write"),
        (["solver.window.size=1.5"], "write a whole number"),
        (["solver.name=picardy"], "write picard or sequential"),
        (["solver.threshold.value=-1"], "threshold"),
        (["dispatch.num_workers=0"], "`num_workers` is 0: write 1 or more"),
        (["system_type=dreamfusion"], "write one of `dreamfusion-system`"),
        (["system.geometry_type=mesh"], "write one of `voxel-grid`"),
        (["system.geometry.radius=2.0", "system.renderer.radius=1.0"], "radius"),
        (["system.loss.lambda_sds=[0,1]"], "`[start, v0, v1, end]`"),
        (["system.guidance.guidance_rescale=2"], "`guidance_rescale`"),
        (["system.guidance.pretrained_model_name_or_path=./no"], "no folder `./no`"),
        (["system.optimizer.name=LBFGS"], "write Adam or"),
        (["system.optimizer.args.lr=fast"], "In `system.optimizer`"),
        (["system.optimizer.args.lr=nan"], "write a learning rate, such as 0.01"),
        (["system.optimizer.args.lr=.inf"], "write finite numbers"),
        (["system_type=latentnerf-system"], "`backend=threestudio threestudio.root="),
        (["system.optimizer.args.momentum=0.9"], "In `system.optimizer`"),
        (["system.optimizer.params.geo.lr=0.1"], "system.optimizer.params.geo"),
        (["tag"], "`tag` is no setting: write `key=value`"),
        (["--epochs=3"], "is no setting: write `key=value`"),
        (["tag=[1"], "cannot be read"),
        (["resume=/nowhere"], "nothing to resume at `/nowhere`"),
        (["resume="], "nothing to resume at ``. Name a run folder"),
        ([f"resume={'x' * 5000}"], f"nothing to resume at `{'x' * 100}…`"),
        ([f"exp_root_dir={'x' * 5000}"], f"written to `{'x' * 100}…`: File name too"),
        (["exp_root_dir=/proc/none"], "Results cannot be written to"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_mistakes_are_answered_in_a_few_lines(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if arguments[0] != "--config":
        here = (
            [] if arguments[0].startswith("exp_root") else [f"exp_root_dir={tmp_path}"]
        )
        arguments = ["--config", TOYBOX, "--train", PROMPT, *here, *arguments]
    assert launch.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error) < 900
    assert not list(tmp_path.iterdir())  # refused before anything was made


def test_a_resumed_run_knows_its_prompt(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a config is named, which leaves the prompt open."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    small = [setting for setting in FEW if setting != PROMPT]
    arguments = ["--config", TOYBOX, "--train", f"resume={copy}", *small]
    assert launch.main([*arguments, "system.geometry.isosurface_threshold=2"]) == 0
    said = capsys.readouterr().out
    assert "12 steps" in said
    assert f"Look into {copy}" in said
    assert "Resume" not in said


def test_a_wrong_key_is_said_once_by_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks of torchrun write their errors side by side, one folder per rank."""
    for name, value in rank_environ(0, 2, 29500).items():
        monkeypatch.setenv(name, value)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{tmp_path}/{rank}/error.json")
        assert launch.main(["--config", TOYBOX, "--train", PROMPT, "dta.width=3"]) == 2
    assert capsys.readouterr().err.count("error: There is no setting `dta`") == 1


def names_of(section: Any, before: str = "") -> list[str]:
    if not isinstance(section, dict):
        return [before.removesuffix(".")]
    return [n for k, v in section.items() for n in names_of(v, f"{before}{k}.")]


def test_settings_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--settings"]) == 0
    text = capsys.readouterr().out
    known = set(re.findall(r"^([\w.]+): .* \[.*\]$", text, re.M))
    known |= {name.removesuffix(".name") for name in known}  # a name alone will do
    assert "solver.window.name: sliding or adaptive or auto [sliding]" in text
    assert "With solver.threshold.name=ema:" in text
    assert "trainer.max_steps: a whole number [10000]" in text
    for path in (ROOT / "configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        own = config.pop("stages", {}).values()
        config.pop("fast", None)  # overrides, and no setting
        named = set(names_of(config)).union(*map(names_of, own)) - {"config"}
        free = ("system.optimizer.args.", "system.optimizer.params.", "data")
        assert {n for n in named if not n.startswith(free)} <= known, path
    # Every setting says what it is.
    bare = re.findall(r"^[\w.]+: .* \[.*\]\n(?!    )", text, re.M)
    assert [line for line in bare if "_type" not in line] == []
    assert launch.main(["--settings", "solver.window"]) == 0
    shown = re.findall(r"^([\w.]+): ", capsys.readouterr().out, re.M)
    assert set(shown) >= {"solver.window.name", "solver.window.size"}
    assert all(name.startswith("solver.window.") for name in shown)
    assert launch.main(["--settings", "solver.widow"]) == 2
    assert "Did you mean `solver.window`" in capsys.readouterr().err


def test_help_keeps_its_line_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch.main(["--help"])
    text = capsys.readouterr().out
    assert "--train \\\n        system.prompt_processor.prompt=" in text
    assert "--settings [SECTION]" in text


def test_mistakes_in_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [1\n")
    words = tmp_path / "words.yaml"
    words.write_text("- a list\n")
    half = tmp_path / "half"
    (half / "ckpts").mkdir(parents=True)
    (whole,) = (finished / "ckpts").glob("step-*")
    (half / "ckpts" / whole.name).write_bytes(whole.read_bytes()[:5000])
    config = ["--config", str(finished / "config.yaml")]
    other = "system.geometry.resolution=9"
    mug, short = "system.prompt_processor.prompt=a blue mug", "trainer.max_steps=1"
    before = (finished / "config.yaml").read_text()
    cases: list[tuple[list[str], str]] = [
        (["--config", "configs/dreamfuson-toybox.yaml", "--train"], "Did you mean"),
        (["--config", str(broken), "--train"], "no YAML that can be read"),
        (["--config", str(words), "--train"], "must hold `key: value` lines"),
        ([*config, "--test", f"resume={half}"], "no checkpoint that can be read"),
        ([*config, "--test", f"resume={tmp_path}"], "no checkpoint that can be read"),
        ([*config, "--test", f"resume={finished}", other], "does not fit this config"),
        ([*config, "--train", f"resume={finished}", mug], "made another thing"),
        ([*config, "--train", f"resume={finished}", short], "is a run of 12 steps"),
        ([*config, "--export"], "Nothing to look at: name a run"),
        (["--train"], "Which config?"),
        (["--config", "nope.yaml", "--train"], "`configs/dreamfusion-toybox.yaml`"),
        (["--train", "backend=threestudio"], "name a YAML of threestudio"),
        (
            ["--config", "nope.yaml", "--train", "backend=threestudio"],
            "There is no config `nope.yaml`",
        ),
    ]
    for arguments, message in cases:
        with pytest.warns() if "half" in str(arguments) else _nothing():
            assert launch.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, (arguments, error)
        assert len(error) < 900
    assert (finished / "config.yaml").read_text() == before


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def model_without_weights(folder: Path) -> str:
    """A setting that only loading the model refuses."""
    folder.mkdir()
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return f"system.guidance.pretrained_model_name_or_path={folder}"


@pytest.mark.parametrize("option", ["--train", "--compare", "stages"])
def test_a_refused_run_leaves_no_folder(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = model_without_weights(tmp_path / "model")
    out, words = tmp_path / "out", [*FEW, name]
    config = TOYBOX
    if option == "stages":
        section = {"config": str(ROOT / TOYBOX), **OmegaConf.from_dotlist(words)}
        stages = OmegaConf.create({"name": "both", "stages": {"one": section}})
        OmegaConf.save(stages, config := str(tmp_path / "both.yaml"))
        option, words = "--train", []
    words = ["--config", config, option, f"exp_root_dir={out}", *words]
    assert launch.main(words) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not list(out.iterdir())


@pytest.mark.long  # that all hear of it: tests/test_dispatch.py
def test_a_rank_that_fails_says_why_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's folder has an index and no weights, which only loading finds out."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = tmp_path / "model"
    name = model_without_weights(model)
    assert train(tmp_path / "out", name, "dispatch.num_workers=2") == 2
    error = capsys.readouterr().err
    assert f"The model `{model}` cannot be loaded" in error
    assert "Traceback" not in error


def test_the_front_door_is_short() -> None:
    assert len((ROOT / "launch.py").read_text().splitlines()) < 130
    assert torch.get_num_threads() == 1
