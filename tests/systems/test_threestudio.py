"""`backend=threestudio`: what it refuses, and what it takes out of a config."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from omegaconf import OmegaConf

import dreampropeller as dp
import launch
from dreampropeller.checkpoint import CheckpointError
from systems.settings.reader import ConfigError
from systems.threestudio.checkout import import_threestudio
from systems.threestudio.config import BackendConfig, split
from systems.threestudio.recorder import Recorder, check_state, load_state

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


def make_recorder(folder: Path, prompt: str = "a cup") -> Recorder:
    cfg = OmegaConf.create(
        {
            "trial_dir": str(folder),
            "system": {"prompt_processor": {"prompt": prompt}},
            "data": {"width": 64},
            "trainer": {},
            "checkpoint": {},
        }
    )
    nothing: Any = None
    return Recorder(nothing, cfg, nothing, BackendConfig(), leads=True, stop=None)


@pytest.fixture
def loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loggers of an environment without Lightning 2.0."""
    fake = types.ModuleType("pytorch_lightning.loggers")
    vars(fake).update(TensorBoardLogger=mock.Mock(), CSVLogger=mock.Mock())
    monkeypatch.setitem(sys.modules, "pytorch_lightning.loggers", fake)


@pytest.mark.usefixtures("loggers")
def test_the_config_of_another_run_is_never_overwritten(
    config: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    make_recorder(folder).snapshot(config, "")
    before = (folder / "configs" / "parsed.yaml").read_text()
    make_recorder(folder).snapshot(config, "")  # of the same problem, not yet saved
    with pytest.raises(ConfigError, match="holds another run: leave `use_timestamp`"):
        make_recorder(folder, "a car").snapshot(config, "")
    assert (folder / "configs" / "parsed.yaml").read_text() == before


@pytest.mark.usefixtures("loggers")
def test_two_processes_do_not_write_to_one_folder(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "configs").mkdir(parents=True)
    program = (
        "import sys, time; from pathlib import Path;"
        "from dreampropeller import checkpoint;"
        "checkpoint.lock(Path(sys.argv[1])); print('locked', flush=True);"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        with pytest.raises(CheckpointError, match="Another process writes"):
            make_recorder(folder).snapshot(config, "")
        other.communicate()


def test_a_run_resumes_with_its_own_settings_alone() -> None:
    def problem(steps: int, prompt: str) -> Any:
        about = {"system": {"prompt_processor": {"prompt": prompt}}}
        return {"num_steps": steps, "seed": 0, "about": about}

    trajectory: Any = mock.Mock(fingerprint=lambda: problem(20, "a cup"))
    state: Any = mock.Mock(problem=problem(12, "a cup"))
    check_state(state, trajectory)
    for found, message in (
        (problem(12, "a car"), r"prompt` was 'a car' and is 'a cup'.*parsed\.yaml"),
        (problem(30, "a cup"), "`num_steps` was 30 and is 20"),
    ):
        state.problem = found
        with pytest.raises(ConfigError, match=message):
            check_state(state, trajectory)
