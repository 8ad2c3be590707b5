"""The installable workspace: its command, and the wheel from an empty folder."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from systems.runs.report.runs import open_run
from tests.systems.scenes import SMALL

ROOT = Path(__file__).parent.parent.parent
PROMPT = "system.prompt_processor.prompt"
TOYBOX = str(ROOT / "configs" / "dreamfusion-toybox.yaml")
IMAGE = TOYBOX.replace("dreamfusion", "zero123")
SAMPLE = str(ROOT / "configs" / "sample-toybox.yaml")
FEW = (*SMALL[1:], "trainer.max_steps=8", "dispatch.threads=1")


@pytest.fixture(scope="module")
def command() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "workspace"))
        yield importlib.import_module("dreampropeller_workspace.command")


@pytest.mark.parametrize(
    ("line", "options"),
    [
        (
            ["train", "a red mushroom"],
            ["--config", TOYBOX, "--train", f"{PROMPT}=a red mushroom"],
        ),
        (
            ["train", "a cube", "trainer.max_steps=9", "--config", "sample-toybox"],
            ["--config", SAMPLE, "--train", f"{PROMPT}=a cube", "trainer.max_steps=9"],
        ),
        (
            ["train", "--config", "configs/dreamfusion-toybox.yaml", f"{PROMPT}=x"],
            ["--config", TOYBOX, "--train", f"{PROMPT}=x"],
        ),
        (["train", "resume=out"], ["--train", "resume=out"]),
        (["sample", "a cup"], ["--config", SAMPLE, "--sample", f"{PROMPT}=a cup"]),
        (
            ["compare", "rivals", "a cube"],
            ["--config", TOYBOX, "--compare", "rivals", f"{PROMPT}=a cube"],
        ),
        (["compare", "one", "two"], ["--compare", "one", "two"]),
        (["test", "one"], ["--test", "resume=one"]),
        (["export", "resume=one"], ["--export", "resume=one"]),
        (["parts", "one", "two"], ["--parts", "one", "two"]),
        (["view", "one", "port=81"], ["--view", "one", "port=81"]),
        (
            ["train", "my mug.PNG", "seed=1"],
            ["--config", IMAGE, "--train", "data.image=my mug.PNG", "seed=1"],
        ),
        (
            ["plan", "data.image=a.png"],
            ["--config", IMAGE, "--plan", "data.image=a.png"],
        ),
        (
            ["train", "a cube", "--fast"],
            ["--fast", "--config", TOYBOX, "--train", f"{PROMPT}=a cube"],
        ),
        (["settings"], ["--settings"]),
        (["settings", "solver.window"], ["--settings", "solver.window"]),
        (
            ["train", "a cube", "quality.clip=m"],
            [
                *("--config", TOYBOX, "--train"),
                f"quality.prompts={ROOT / 'configs' / 'prompts.txt'}",
                *(f"{PROMPT}=a cube", "quality.clip=m"),
            ],
        ),
    ],
    ids=" ".join,
)
def test_words_become_options_of_launch(
    command: ModuleType,
    line: list[str],
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("one", "two"):
        Path(run).mkdir()
    told: list[list[str]] = []
    monkeypatch.setattr(
        command, "_launch", lambda translated, _: told.append(translated) or 0
    )
    assert command.main(line) == 0
    assert told == [options]
    launch = importlib.import_module("launch")
    launch.make_parser().parse_known_args(options)  # every option exists


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["train"], 'Write `dreampropeller train "a red mushroom"`'),
        (["train", "a", "red", "cube"], '`dreampropeller train "a red cube"`'),
        (["export"], "Write `dreampropeller export RUN`"),
        (["parts"], "Write `dreampropeller parts RUN`"),
    ],
)
def test_what_is_missing_is_said(
    command: ModuleType, line: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(line) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_option_and_help(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["train", "a cube", "--steps", "3"])
    assert "`--steps` is no option" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {task} " in shown for task in command.TASKS)


def test_configs_are_found_by_name(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "dreamfusion-toybox" in command.configs()
    Path("dreamfusion-toybox").write_text("the user's own file goes first")
    assert command.find_config("dreamfusion-toybox") == "dreamfusion-toybox"
    assert command.find_config("elsewhere/dreamfusion-toybox") == (
        "elsewhere/dreamfusion-toybox"
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network."""
    builder = pytest.importorskip(
        "hatchling.builders.wheel", reason="`pip install hatchling`"
    )
    folder = tmp_path_factory.mktemp("wheel")
    built = builder.WheelBuilder(str(ROOT / "workspace")).build(directory=str(folder))
    return Path(next(iter(built)))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages that holds the wheel's content alone."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_brings_all_files_and_one_name(site: Path, wheel: Path) -> None:
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {
        "dreampropeller_workspace"
    }
    inside = site / "dreampropeller_workspace"
    for folder in ("systems", "configs"):
        tracked = subprocess.run(
            ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True
        ).stdout.split()
        missing = [name for name in tracked if not (inside / name).is_file()]
        assert not missing
    assert (inside / "launch.py").read_bytes() == (ROOT / "launch.py").read_bytes()
    (entry,) = site.glob("*.dist-info/entry_points.txt")
    assert "dreampropeller = dreampropeller_workspace.command:main" in entry.read_text()
    assert wheel.stat().st_size < 20e6


def run(
    site: Path, folder: Path, *words: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """The command in a folder of the user's, with nothing of the clone on the path."""
    package = site / "only_dreampropeller"
    package.mkdir(exist_ok=True)
    link = package / "dreampropeller"
    if not link.exists():
        link.symlink_to(ROOT / "dreampropeller")
        metadata = package / "dreampropeller-0.1.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(
            "Metadata-Version: 2.1\nName: dreampropeller\nVersion: 0.1.0"
        )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), str(package)]),
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
        **more,
    }
    return subprocess.run(
        [sys.executable, "-m", "dreampropeller_workspace", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.long
def test_the_wheel_trains_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    (tmp_path / "systems.py").write_text("raise ImportError('not this one')")
    done = run(site, tmp_path, "train", "a red cube", *FEW, "dispatch.num_workers=2")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs" / "dreamfusion-toybox").glob("a_red_cube@*")
    assert open_run(folder).report["workers"] == 2
    assert not re.search(r"\d+/\d+ \[", done.stderr)  # no bars: not a terminal
    told = (folder / "command.txt").read_text()
    assert told.startswith("python -m dreampropeller_workspace train 'a red cube'")
    done = run(site, tmp_path, "export", str(folder))
    assert done.returncode == 0, done.stderr
    assert (folder / "mesh.glb").is_file()
    assert "launch.py" not in done.stdout
    done = run(site, tmp_path, "export", "nowhere")
    assert done.returncode == 2
    assert "There is nothing to resume at `nowhere`" in done.stderr
