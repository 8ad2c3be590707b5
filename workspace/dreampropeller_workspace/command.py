r"""Make, compare and export 3D objects with parallel score distillation.

    dreampropeller train "a red mushroom"
    dreampropeller train mug.png
    dreampropeller compare "a red mushroom" dispatch.num_workers=2
    dreampropeller export outputs/dreamfusion-toybox/a_red_mushroom@<time>

Settings follow as `key=value`; `dreampropeller settings [SECTION]` lists them.
Results go to `./outputs`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PROMPT = "system.prompt_processor.prompt"
IMAGE = "data.image"
IMAGE_CONFIG = "zero123-toybox"
_IMAGES = (".png", ".jpg", ".jpeg", ".webp")
_SETTING = re.compile(r"[\w.]+=")


@dataclass(frozen=True)
class Task:
    """A word of the command line, as options of `launch.py`.

    Args:
        help: One line for `--help`.
        words: What it takes, as shown in `--help`.
        config: The packaged config used without `--config`; None: that of the run.
    """

    help: str
    words: str
    config: str | None = None


TASKS = {
    "train": Task("make an object", "PROMPT | IMAGE", "dreamfusion-toybox"),
    "compare": Task(
        "make it with and without acceleration, or compare two finished runs; the word "
        "`rivals` adds sequential runs of the same budget",
        "PROMPT | IMAGE | RUN RUN",
        "dreamfusion-toybox",
    ),
    "plan": Task("say what a run would cost", "PROMPT | IMAGE", "dreamfusion-toybox"),
    "sample": Task("sample images of a prompt", "PROMPT", "sample-toybox"),
    "test": Task("render and measure a run", "RUN"),
    "export": Task("write the mesh of a run", "RUN"),
    "parts": Task("take meshes apart by colour", "RUN..."),
    "view": Task("open the live viewer of a run, or of several", "RUN..."),
    "render": Task("film a run along a camera path", "RUN cameras=PATH"),
    "app": Task("open a page to try it in a browser", ""),
    "doctor": Task("check this machine", ""),
    "settings": Task("list all settings, or those of a section", "[SECTION]"),
    "configs": Task("list the packaged configs", ""),
}


class UsageError(ValueError):
    """A command line that cannot be translated; the message says what to write."""


def configs() -> list[str]:
    """Names of the packaged configs."""
    return sorted(path.stem for path in (_data() / "configs").glob("*.yaml"))


def find_config(name: str) -> str:
    """The path of a config: a file of the user's, or a packaged one by its name."""
    packaged = _data() / "configs" / f"{Path(name).stem}.yaml"
    plain = Path(name).parent in (Path(), Path("configs"))
    if not Path(name).is_file() and plain and packaged.is_file():
        return str(packaged)
    return name


def translate(task: str, words: Sequence[str], config: str | None = None) -> list[str]:
    """The options of `launch.py` that do a task.

    Args:
        task: A key of `TASKS`.
        words: Prompt or runs, and settings as ``key=value``.
        config: Name or path of a config; None: the task's own, unless a run is named.

    Raises:
        UsageError: Words are missing, or there are too many.
    """
    settings = [word for word in words if _SETTING.match(word)]
    others = [word for word in words if not _SETTING.match(word)]
    if task == "settings":
        return ["--settings", *_at_most_one(task, others)]
    if task in ("app", "doctor"):
        if others:
            raise UsageError(f"`dreampropeller {task}` takes no `{others[0]}`.")
        return [f"--{task}", *settings]
    if task in ("parts", "view"):
        if not others:
            raise UsageError(f"Which run? Write `dreampropeller {task} RUN`.")
        return [f"--{task}", *others, *settings]
    if task in ("test", "export", "render"):
        runs = [f"resume={run}" for run in _at_most_one(task, others)]
        if not any(word.startswith("resume=") for word in [*settings, *runs]):
            raise UsageError(f"Which run? Write `dreampropeller {task} RUN`.")
        return [*_option(config), f"--{task}", *runs, *settings]
    head = []
    if task == "compare":
        head = [w for w in others if w == "rivals" or Path(w).is_dir()]
        others = [word for word in others if word not in head]
    if any(Path(word).is_dir() for word in head):
        return ["--compare", *head, *others, *settings]
    subject = _at_most_one(task, others)
    shows = task != "sample" and any(
        Path(word).suffix.lower() in _IMAGES for word in subject
    )
    prompts = [f"{IMAGE if shows else PROMPT}={word}" for word in subject]
    resumes = any(word.startswith("resume=") for word in settings)
    named = (PROMPT, IMAGE)
    given = [*prompts, *(word for word in settings if word.startswith(named))]
    if config is None and not resumes:
        if not given:
            raise UsageError(
                f'Of what? Write `dreampropeller {task} "a red mushroom"`.'
            )
        shows = shows or any(word.startswith(IMAGE) for word in settings)
        config = IMAGE_CONFIG if shows else TASKS[task].config
    if any(word.startswith("quality.clip=") for word in settings):
        # Its default is a path inside of the clone.
        prompts = [f"quality.prompts={_data() / 'configs' / 'prompts.txt'}", *prompts]
    return [*_option(config), f"--{task}", *head, *prompts, *settings]


def _option(config: str | None) -> list[str]:
    return [] if config is None else ["--config", find_config(config)]


def _at_most_one(task: str, words: Sequence[str]) -> Sequence[str]:
    if len(words) > 1:
        what = TASKS[task].words
        together = " ".join(words)
        raise UsageError(
            f"`dreampropeller {task}` takes one {what}, got {len(words)} words. Quote "
            f'words that belong together: `dreampropeller {task} "{together}"`.'
        )
    return words


def _data() -> Path:
    """The folder of systems, configs and launch.py: the package, or the clone."""
    return HERE if (HERE / "launch.py").is_file() else HERE.parent.parent


def make_parser() -> argparse.ArgumentParser:
    """One sub-command per task."""
    parser = argparse.ArgumentParser(
        prog="dreampropeller",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, task in TASKS.items():
        one = tasks.add_parser(
            name,
            help=task.help,
            description=f"{task.help[0].upper()}{task.help[1:]}.",
            usage=f"dreampropeller {name} {task.words} [--config CONFIG] [key=value …]",
        )
        one.add_argument("words", nargs="*", metavar=task.words or "-")
        one.add_argument(
            "--config",
            metavar="CONFIG",
            help="a YAML file, or the name of a packaged config (`configs` lists "
            f"them); default: {task.config or 'that of the run'}",
        )
        if task.config is not None:
            one.add_argument("--fast", action="store_true", help="only a first look")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Translate the command line and run `launch.py`; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(
            f"`{unknown[0]}` is no option: settings are written `key=value`, for "
            "example `trainer.max_steps=400`."
        )
    if arguments.task == "configs":
        print("\n".join(configs()))
        return 0
    try:
        words = [*arguments.words, *rest]
        translated = translate(arguments.task, words, arguments.config)
        if getattr(arguments, "fast", False):
            translated = ["--fast", *translated]
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _launch(translated, argv)


def _launch(translated: list[str], argv: list[str]) -> int:
    """Import `launch` from the package's own folder, for this process and its workers.

    The folder goes before all others on the path, so that another module named
    `systems` is not taken for ours.
    """
    folder = str(_data())
    inherited = os.environ.get("PYTHONPATH")
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, inherited)))
    os.environ["DREAMPROPELLER_COMMAND"] = "dreampropeller"  # named in messages
    sys.argv = ["-m", "dreampropeller_workspace", *argv]  # recorded in `command.txt`
    import launch

    return launch.main(translated)
