"""What README and docs show, run as it is printed.

A Python block runs as a script; one that begins with `if __name__` takes the place of
those lines of the block before. Of a shell block every option and setting is read by
the program's own parser, and what is cheap runs. What cannot run says so, in a comment
`# not run: why`, which goes for the rest of its block. The README's blocks always run;
those of the other pages take minutes, and run with `pytest -m docs`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUARD = 'if __name__ == "__main__":'
NOT_RUN = "# not run: "
TEST_COMMAND = 'pip install -e ".[dev]" && pytest -n 2'
"""The one command that neither runs here nor says why: it is what runs this file."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> Iterator[Block]:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for found in re.finditer(r"^( *)```(\w+)\n(.*?)^ *```$", text, re.S | re.M):
            indent, language, body = found.groups()
            if language in languages:
                lines = [line.removeprefix(indent) for line in body.splitlines()]
                number = text.count("\n", 0, found.start()) + 1
                page = str(path.relative_to(ROOT))
                yield Block(page, number, language, "\n".join(lines) + "\n")


def scripts() -> Iterator[Any]:
    """Python blocks as whole scripts."""
    before = ""
    for block in blocks("python"):
        text = block.text
        if text.startswith(GUARD):
            text = before[: before.index(GUARD)] + text
        before = text
        why = re.findall(f"^{NOT_RUN}(.+)$", text, re.M)
        skip = [pytest.mark.skip(reason=why[0])] if why else marks(block.page)
        yield pytest.param(text, id=str(block), marks=skip)


def marks(page: str) -> list[pytest.MarkDecorator]:
    return [] if page == "README.md" else [pytest.mark.docs]


@pytest.mark.parametrize("text", list(scripts()))
def test_python_blocks_run_as_printed(
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "systems" in text:
        pytest.importorskip("diffusers")
    if "lightning" in text:
        pytest.importorskip("lightning")
    if "_workers" in text or "systems" not in text:  # loads little
        script = tmp_path / "script.py"
        script.write_text(text, encoding="utf-8")
        done = run([sys.executable, "-W", "error", str(script)], tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        output = done.stdout
    else:
        set_up(tmp_path, monkeypatch)
        exec(compile(text, "script.py", "exec"), {"__name__": "__main__"})
        output = capsys.readouterr().out
    said = re.search(r"1000 steps in (\d+) iterations", output)
    if said is not None:  # the loop that everybody starts from
        (printed,) = re.findall(r"It prints (\d+) iterations", README)
        assert int(said[1]) == pytest.approx(int(printed), rel=0.1)
        assert text.count("num_workers=2") == int("launch" in text)


def set_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder that has the repository's files and is written to alone."""
    link(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


def link(folder: Path) -> None:
    for name in ("configs", "launch.py", "systems", "benchmarks", "docs"):
        (folder / name).symlink_to(ROOT / name)


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run in such a folder, in a process of its own."""
    link(folder)
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )


def commands() -> Iterator[tuple[Block, str, bool]]:
    """Lines of shell blocks, and whether they run here."""
    seen: set[str] = set()
    for block in blocks("bash", "sh", "shell", "console"):
        runs = True
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.startswith(NOT_RUN):
                assert line.removeprefix(NOT_RUN).strip(), f"{block}: say why"
                runs = False
            if line not in seen and shlex.split(line, comments=True):
                seen.add(line)  # the same elsewhere need not run again
                yield block, line, runs


def ours() -> Iterator[Any]:
    """Lines that run here."""
    for block, line, runs in commands():
        if runs and line != TEST_COMMAND:
            yield pytest.param(line, id=f"{block} {line[:40]}", marks=marks(block.page))


@pytest.mark.parametrize(
    ("line", "runs"),
    [pytest.param(line, runs, id=f"{b} {line[:40]}") for b, line, runs in commands()],
)
def test_shell_blocks_are_understood(
    line: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for part in line.split("&&"):
        words = shlex.split(part, comments=True)
        if not understood(words, monkeypatch):
            known = ("git", "cd", "pip", "source", "pytest", "pre-commit", "mkdocs")
            assert words[0] in known or words[1:3] == ["-m", "venv"], part
            assert not runs or line == TEST_COMMAND, f"`{line}` says not why"


@pytest.mark.parametrize("line", list(ours()))
def test_shell_blocks_run(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for part in line.split("&&"):
        words = shlex.split(part, comments=True)
        if understood(words, monkeypatch):
            set_up(tmp_path, monkeypatch)
            module, *rest = words[2:] if words[1] == "-m" else ["launch", *words[2:]]
            monkeypatch.setattr(sys, "argv", [module, *rest])
            assert not main_of(module)()


def understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether it is a command of ours; its own parser has then read all of it."""
    if words[0] == "dreampropeller":
        monkeypatch.syspath_prepend(str(ROOT / "workspace"))
        command = importlib.import_module("dreampropeller_workspace.command")
        given = command.make_parser().parse_args(words[1:])
        read_settings(command.translate(given.task, given.words, given.config))
        return True
    if words[0] == "torchrun":  # its own options come first
        program = "-m" if "-m" in words else "launch.py"
        words = ["python", *words[words.index(program) :]]
    if words[0] == "srun":
        words = words[words.index("python") :]
    if words[0] != "python" or words[1:3] == ["-m", "venv"]:
        return False
    if words[1] == "launch.py":
        read_settings(words[2:])
        return True
    assert words[1] == "-m", words
    arguments = parsed(words[2], words[3:], monkeypatch)
    if words[2].startswith("benchmarks."):
        for name in ("config", "log"):
            path = getattr(arguments, name, None)
            assert path is None or Path(path).exists() or name == "log", path
    return True


def read_settings(words: list[str]) -> None:
    """Read options and settings as `launch.py` does, up to building the system."""
    import launch
    from systems import build_problem
    from systems.runs import live, stages
    from systems.settings.config import load
    from systems.settings.yaml_files import open_yaml

    arguments, overrides = launch.make_parser().parse_known_args(words)
    if arguments.app or arguments.view is not None:
        words = [*(arguments.view or ())[1:], *overrides]
        live.Address.read([w for w in words if not w.startswith("exp_root_dir=")])
        return
    if arguments.parts is not None:  # run folders alone
        assert all(w.removeprefix("resume=").count("=") == 0 for w in arguments.parts)
        assert arguments.parts
        assert not overrides
        return
    overrides = [*(arguments.compare or []), *overrides]  # `nargs="*"` takes them
    assert all("=" in setting for setting in overrides), overrides
    if "<" in str(arguments.config) or any("<" in word for word in overrides):
        return  # a place that only the reader knows
    if stages.is_asked(arguments.config, overrides):
        whole = open_yaml(arguments.config)
        stages.check(list(stages.read(whole, overrides, arguments.config.parent)))
        return
    build_problem(load(arguments.config, overrides))


class _Parsed(Exception):
    pass


def parsed(
    module: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> argparse.Namespace:
    """What a module's own parser makes of its options; the module does no more."""
    found: list[argparse.Namespace] = []
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
        found.append(parse(parser, *arguments))
        raise _Parsed

    main = main_of(module)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [module, *words])
        with pytest.raises(_Parsed):
            main()
    return found[0]


def main_of(module: str) -> Callable[[], int | None]:
    """The function behind `python -m MODULE`."""
    name = module
    if (ROOT.joinpath(*module.split(".")) / "__main__.py").exists():
        name = f"{module}.__main__"
    return importlib.import_module(name).main


def test_there_is_one_test_command_of_one_line() -> None:
    block = README.partition("<!-- test-command -->\n")[2].partition("```\n")[0]
    assert block == f"```bash\n{TEST_COMMAND}\n"
