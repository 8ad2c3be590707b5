import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "systems.toybox", *arguments],
        capture_output=True,
        text=True,
    )


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file) as picture:
        return picture.size


def test_list_shows_the_vocabulary() -> None:
    done = _run("list")
    assert done.returncode == 0
    for word in ("mushroom", "ice cream cone", "purple", "overhead", "blue sphere"):
        assert word in done.stdout
    for word in ("teapot", "black", "striped", "spots", "first 16 objects"):
        assert word in done.stdout


def test_render_writes_a_sheet(tmp_path: Path) -> None:
    file = tmp_path / "new" / "mug.png"
    options = ("--count", "3", "--columns", "2", "--size", "16", "--scale", "2")
    done = _run("render", "a blue mug, side view", "--output", str(file), *options)
    assert done.returncode == 0, done.stderr
    assert _size(file) == (64, 64)


def test_sample_writes_a_sheet(tmp_path: Path) -> None:
    file = tmp_path / "cube.png"
    options = ("--count", "2", "--steps", "2", "--scale", "1")
    done = _run("sample", "a red cube", "--output", str(file), *options)
    assert done.returncode == 0, done.stderr
    assert _size(file) == (128, 32)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sample", "a red dragon"], "nearest objects: rabbit"),
        (["render", "a red mushroom", "--count", "0"], "`--count 0` is too small"),
        (["render", "a red cube", "--output", "cube.xyz"], "write `cube.png`"),
        (["render", "a mushroom"], "names no colour"),
        (["paint"], "invalid choice"),
        (
            ["sample", "a red mug", "--weights", "nowhere"],
            "`nowhere` names no pipeline",
        ),
        (["train", "--until", "noon"], "`noon` is no clock time"),
        (["train", "--folder", "nowhere"], "holds no views"),
        (["export", "--folder", "nowhere"], "There is no `nowhere/state.pt`"),
    ],
    ids=[
        *("word", "count", "format", "colour", "command", "weights", "clock", "views"),
        "state",
    ],
)
def test_a_mistake_is_answered_on_one_screen(
    arguments: list[str], complaint: str
) -> None:
    done = _run(*arguments)
    assert done.returncode != 0
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 20
