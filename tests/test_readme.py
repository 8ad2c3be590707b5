"""What the README shows, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dreampropeller import Sequential, solve

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_own_loop_runs_and_keeps_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(
        r"```python\n(import torch, dreampropeller.*?)```", README, re.S
    )
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code.replace("1000", "200"), "README.md", "exec"), names)
    iterations = int(capsys.readouterr().out.split()[-2])
    assert iterations < 200 / 3
    trajectory, solution = names["trajectory"], names["solution"]
    exact = solve(trajectory, Sequential()).value  # pyright: ignore[reportArgumentType]
    for name, value in solution.value.items():  # pyright: ignore[reportAttributeAccessIssue]
        assert (value - exact[name]).abs().max() < 0.01


def test_notebook_lines_make_a_mesh_and_frames() -> None:
    pytest.importorskip("diffusers")
    (code,) = re.findall(r"```python\n(import dreampropeller.*?)```", README, re.DOTALL)
    prompt = '    "system.prompt_processor.prompt=a red mushroom",\n'
    assert prompt in code
    small = (
        "trainer.max_steps=6",
        "data.batch_size=1",
        "data.n_test_views=2",
        "system.geometry.resolution=12",
        "system.geometry.isosurface_threshold=1",
    )
    code = code.replace(prompt, prompt + "".join(f'"{line}",\n' for line in small))
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["mesh"].faces) > 100
    assert [tuple(frame.shape) for frame in names["frames"]] == [(3, 128, 128)] * 2


def test_there_is_one_test_command_of_one_line() -> None:
    block = README.partition("<!-- test-command -->\n")[2].partition("```\n")[0]
    assert block == '```bash\npip install -e ".[dev]" && pytest\n'
