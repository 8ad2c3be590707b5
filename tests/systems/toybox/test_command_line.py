import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from systems.toybox.__main__ import main


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """The command line, in this process."""

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["systems.toybox", *arguments])
        monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
        try:
            code = main()
        except SystemExit as end:
            code = int(str(end.code))
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return call


@pytest.mark.long
def test_it_is_a_module_to_run() -> None:
    command = [sys.executable, "-m", "systems.toybox", "render", "a mushroom"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "names no colour" in done.stderr


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def test_list_shows_the_vocabulary(run: Callable[..., Done]) -> None:
    done = run("list")
    assert done.returncode == 0
    for word in ("mushroom", "ice cream cone", "purple", "overhead", "blue sphere"):
        assert word in done.stdout
    for word in ("teapot", "black", "striped", "spots", "first 16 objects"):
        assert word in done.stdout


def test_render_writes_a_sheet(run: Callable[..., Done], tmp_path: Path) -> None:
    file = tmp_path / "new" / "mug.png"
    options = ("--count", "3", "--columns", "2", "--size", "16", "--scale", "2")
    done = run("render", "a blue mug, side view", "--output", str(file), *options)
    assert done.returncode == 0, done.stderr
    assert _size(file) == (64, 64)


def test_sample_writes_a_sheet(run: Callable[..., Done], tmp_path: Path) -> None:
    file = tmp_path / "cube.png"
    options = ("--count", "2", "--steps", "2", "--scale", "1")
    done = run("sample", "a red cube", "--output", str(file), *options)
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
    run: Callable[..., Done], arguments: list[str], complaint: str
) -> None:
    done = run(*arguments)
    assert done.returncode != 0
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 20


def test_export_writes_the_averaged_weights(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    from systems.toybox.pipeline import load
    from systems.toybox.train import Run

    small = (8, 16, 16)
    begun = Run(None, widths=small)
    begun.save(tmp_path / "state.pt")
    options = ("--folder", str(tmp_path), "--to", str(tmp_path / "pipeline"))
    done = run("export", *options, "--widths", "8", "16", "16")
    assert done.returncode == 0, done.stderr
    assert "0 steps, 0 images" in done.stdout
    exported = load(tmp_path / "pipeline").unet.state_dict()
    for name, value in begun.average.unet.state_dict().items():
        torch.testing.assert_close(exported[name], value, atol=1e-3, rtol=1e-3)
    # A sample of it, from a camera and after an image.
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 40), "red").save(image)
    sample = ("sample", "a red teapot", "--weights", str(tmp_path / "pipeline"))
    sheet = ("--output", str(tmp_path / "a.png"), "--steps", "1", "--count", "2")
    done = run(*sample, *sheet, "--azimuth", "30", "--image", str(image))
    assert done.returncode == 0, done.stderr
    assert _size(tmp_path / "a.png") == (4 * 4 * 64, 4 * 64)
    done = run(*sample, *sheet, "--image", str(image))
    assert "write `--azimuth` too" in done.stderr
