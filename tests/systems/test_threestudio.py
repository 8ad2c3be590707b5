"""`backend=threestudio`: what it refuses, and what it takes out of a config."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dreampropeller as dp
import launch
from systems.settings.reader import ConfigError
from systems.threestudio.checkout import import_threestudio
from systems.threestudio.config import split
from systems.threestudio.recorder import load_state

CONFIG = """
name: scene
system: {prompt_processor: {prompt: a cup}}
solver: {window: {size: 3}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "scene.yaml"
    path.write_text(CONFIG)
    return path


def test_our_settings_are_taken_out_and_theirs_left(config: Path) -> None:
    ours, theirs, dotted = split(
        config,
        [
            "backend=threestudio",
            "solver.threshold.name=ema",
            "threestudio.verify=false",
            "system.loss.lambda_sds=0.1",
        ],
    )
    assert ours.solver.window == dp.SlidingWindow(3)
    assert ours.solver.threshold == dp.EMAThreshold()
    assert not ours.threestudio.verify
    assert set(theirs) == {"name", "system"}
    assert dotted == ["system.loss.lambda_sds=0.1"]


def test_window_auto_is_resolved_from_the_workers(config: Path) -> None:
    settings = ["solver.window.name=auto", "dispatch.num_workers=2"]
    ours, _, _ = split(config, settings)
    assert ours.solver.window == dp.AdaptiveWindow(2, 8, 2)


def test_numbers_of_a_file_are_not_those_of_another_threshold(tmp_path: Path) -> None:
    path = tmp_path / "scene.yaml"
    path.write_text("solver: {threshold: {name: ema, value: 3.e-5}}")
    for settings, expected in (
        ([], dp.EMAThreshold(3e-5, 0.9, "median")),
        (["solver.threshold.name=drift"], dp.DriftThreshold()),
        (["solver.threshold={name: drift}"], dp.DriftThreshold()),
    ):
        ours, _, _ = split(path, settings)
        assert ours.solver.threshold == expected


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("--test", [], "only trains"),
        ("--export", [], "only trains"),
        ("--train", ["threestudio.root=nowhere"], "holds no `threestudio` folder"),
        ("--train", ["solver.windw.size=3"], "windw"),
        ("--train", ["resume=x/last.ckpt"], "threestudio cannot be imported"),
    ],
)
def test_refusals_are_a_message(
    task: str,
    settings: list[str],
    message: str,
    config: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["--config", str(config), task, "backend=threestudio", *settings]
    assert launch.main(command) == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "threestudio"
    package.mkdir()
    (package / "__init__.py").write_text("import tinycudann_is_missing")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    with pytest.raises(ConfigError, match="`tinycudann_is_missing` is missing"):
        import_threestudio(str(tmp_path))


def test_threestudios_checkpoint_is_no_state_to_go_on_from() -> None:
    with pytest.raises(ConfigError, match=r"resume=RUN`.*system\.weights"):
        load_state("run/ckpts/last.ckpt")


def test_the_front_door_opens_without_our_own_systems_packages() -> None:
    """Beside threestudio's older stack nothing newer may be imported on the way."""
    program = """
import sys

class Missing:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("diffusers", "transformers", "skimage", "nerfacc"):
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
import launch
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
