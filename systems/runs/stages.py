"""Several runs in a row from one config: each starts from the result of the one before.

A config with `stages` names a config for each, and what differs there:

    stages:
      coarse:
        config: dreamfusion-toybox.yaml
      refine:
        config: magic3d-refine-toybox.yaml
        system:
          geometry_convert_from: ${stage:coarse}

Settings beside `stages` belong to all of them, and `stages.refine.trainer.max_steps=50`
on the command line to one. `${stage:NAME}` is the folder of an earlier stage. A stage
is a run of its own, in a folder of the common one; a finished stage is not run again.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from dreampropeller import checkpoint
from systems import build_problem, check_sections
from systems.files import written
from systems.runs import folders
from systems.runs.run import execute
from systems.settings.config import Config, load
from systems.settings.dispatch import is_rank
from systems.settings.notes import note
from systems.settings.reader import ConfigError
from systems.settings.yaml_files import open_yaml

STAGES = "stages"
_REFERENCE = re.compile(r"\$\{stage:([^}]*)\}")
_OWN = (STAGES, "name", "tag", "exp_root_dir", "resume")
"""Keys of the common config that are not passed on to the stages."""


@dataclass(frozen=True)
class Stage:
    """One of the runs.

    Attributes:
        name: Its name, and that of its folder.
        path: Its config.
        settings: Dotted settings that differ from it.
    """

    name: str
    path: Path
    settings: tuple[str, ...]

    def config(self, folder: Path) -> Config:
        """The config of the stage, with the folders of earlier stages put in.

        Raises:
            ConfigError: A setting cannot be used.
        """
        settings = [
            _REFERENCE.sub(lambda found: str(folder / found[1]), setting)
            for setting in self.settings
        ]
        return load(self.path, settings)


def is_asked(
    path: Path | None, overrides: Sequence[str], runs: Iterable[str] = ()
) -> bool:
    """Whether a command line names a config, or a run, of several stages.

    Args:
        path: The config it names.
        overrides: Dotted settings.
        runs: Words that may be run folders.
    """
    files = [Path(run) / folders.CONFIG for run in runs]
    if path is not None:
        files.append(path)
    elif any(word.startswith("resume=") for word in overrides):
        files.append(folders.config_of(overrides))
    return any(_exists(file) and STAGES in open_yaml(file) for file in files)


def _exists(file: Path) -> bool:
    """Whether there is a file; a name that is too long is none."""
    return os.path.isfile(file)


def last_stages(
    arguments: argparse.Namespace, overrides: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Replace a run of several stages by its last finished one, except to train it.

    Args:
        arguments: Options of `launch.py`; those that name runs are replaced in place.
        overrides: Settings, `resume=RUN` among them.

    Returns:
        The settings, and the words of all options that may name runs.
    """
    options = ("compare", "parts", "view")
    if not arguments.train:
        overrides = [_last_stage(word) for word in overrides]
        for option in options:
            words = getattr(arguments, option)
            if words:
                setattr(arguments, option, [_last_stage(word) for word in words])
    named = [word for option in options for word in getattr(arguments, option) or ()]
    return list(overrides), named


def _last_stage(word: str) -> str:
    option, name = "", word
    if word.startswith("resume="):
        option, name = "resume=", word.removeprefix("resume=")
    elif "=" in word or len(word) > 255:
        return word  # a setting, or a prompt
    file = Path(name) / folders.CONFIG
    if not _exists(file) or STAGES not in (whole := open_yaml(file)):
        return word
    names = [str(stage) for stage in whole[STAGES]]
    done = [stage for stage in names if folders.report(Path(name) / stage)]
    if not done:
        return word
    note(f"`{name}` has the stages {', '.join(names)}: taking `{done[-1]}`.")
    return f"{option}{Path(name) / done[-1]}"


def run(path: Path | None, train: bool, overrides: Sequence[str]) -> int:
    """Run the stages that are not finished; returns the exit code.

    Args:
        path: The config; None: that of the run to resume.
        train: Whether `--train` is asked for.
        overrides: Dotted settings.

    Raises:
        ConfigError: A setting cannot be used, or something else than training is asked.
    """
    if not train:
        raise ConfigError(
            "A config of several stages is trained: write `--train`, or name the run "
            "of one stage, the folder `RUN/STAGE`."
        )
    resumed = [w.removeprefix("resume=") for w in overrides if w.startswith("resume=")]
    overrides = [word for word in overrides if not word.startswith("resume=")]
    folder = folders.folder_of(resumed[0]) if resumed else None
    whole = open_yaml(path or folder / folders.CONFIG)  # pyright: ignore[reportOptionalOperand]
    stages = list(read(whole, overrides, (path or Path()).parent))
    if is_rank():
        raise ConfigError(
            "Several stages start their own workers: write `python launch.py … "
            "dispatch.num_workers=2` instead of `torchrun`."
        )
    check(stages)
    if folder is None:
        folder = _open(whole, stages, overrides)
    checkpoint.lock(folder)
    try:
        return _advance_all(stages, folder)
    except ValueError:
        for stage in stages:
            folders.discard(folder / stage.name)
        if not resumed:
            folders.discard(folder)
        raise
    finally:
        checkpoint.unlock(folder)


def _advance_all(stages: Sequence[Stage], folder: Path) -> int:
    print(f"Stages in {folder}: {', '.join(stage.name for stage in stages)}")
    reports: dict[str, Any] = {}
    for stage in stages:
        code = _advance(stage, folder)
        reports[stage.name] = folders.report(folder / stage.name)
        folders.write_json(folder / "report.json", {STAGES: reports})
        if code:
            print(f"Stopped in `{stage.name}`. Resume: --train resume={folder}")
            return code
    print("\n".join(_summary(reports)))
    return 0


def check(stages: Sequence[Stage]) -> None:
    """Refuse stages with settings that cannot be used, before anything is made.

    Raises:
        ConfigError: Names those of the first such stage.
    """
    for stage in stages:
        check_sections(stage.config(Path("stage")))


def _advance(stage: Stage, folder: Path) -> int:
    """Run a stage, from its last checkpoint if it has one."""
    place = folder / stage.name
    config = stage.config(folder)
    done = folders.report(place)
    if done.get("steps", 0) >= config.trainer.max_steps:
        # Refused if it was made with other settings than those asked for now.
        folders.load_own_state(build_problem(replace(config, resume=str(place))))
        print(f"--- {stage.name}: finished before")
        return 0
    print(f"--- {stage.name}")
    place.mkdir(exist_ok=True)
    config = folders.continued(config, place)
    folders.write_setup(place, config)
    return execute(config, folder=place)


def read(whole: DictConfig, overrides: Sequence[str], beside: Path) -> Iterator[Stage]:
    """The stages of a config, each with its settings.

    Args:
        whole: The config.
        overrides: Dotted settings of all stages, or of one.
        beside: Folder that the stages' configs are beside.

    Raises:
        ConfigError: A stage has no config, or names one that does not come before it.
    """
    sections: Any = OmegaConf.to_container(whole)
    given = sections[STAGES]
    if not isinstance(given, dict) or not given:
        raise ConfigError("`stages` is empty: write a name and a `config` for each.")
    common = {key: value for key, value in sections.items() if key not in _OWN}
    before: list[str] = []
    for name, section in given.items():
        if not isinstance(section, dict) or "config" not in section:
            raise ConfigError(
                f"`stages.{name}` names no config: write `config: FILE.yaml` there."
            )
        own = {key: value for key, value in section.items() if key != "config"}
        prefix = f"{STAGES}.{name}."
        settings = [
            *_dotted(common),
            *_dotted(own),
            *(
                word
                for word in overrides
                if not word.startswith((f"{STAGES}.", *_NAMES))
            ),
            *(
                word.removeprefix(prefix)
                for word in overrides
                if word.startswith(prefix)
            ),
        ]
        for word in settings:
            for named in _REFERENCE.findall(word):
                if named not in before:
                    known = ", ".join(f"`{known}`" for known in before) or "none"
                    raise ConfigError(
                        f"`{word}` of stage `{name}` names a stage that does not come "
                        f"before it; earlier stages: {known}."
                    )
        before.append(name)
        file = Path(section["config"])
        yield Stage(
            name, file if file.is_absolute() else beside / file, tuple(settings)
        )
    for word in overrides:
        if word.startswith(f"{STAGES}."):
            named = word.split(".")[1]
            if named not in before:
                raise ConfigError(
                    f"`{word}` names no stage: write one of "
                    f"{', '.join(f'`{name}`' for name in before)}."
                )


_NAMES = tuple(f"{name}=" for name in _OWN)


def _dotted(section: Any, prefix: str = "") -> Iterator[str]:
    """Settings of nested sections as `key=value`, values as YAML in one line."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            shown = value
            if not isinstance(value, str):
                shown = yaml.safe_dump(value, default_flow_style=True, width=10**6)
                shown = shown.removesuffix("\n...\n").strip()
            yield f"{prefix}{key}={shown}"


def _open(whole: DictConfig, stages: Sequence[Stage], overrides: Sequence[str]) -> Path:
    """The folder of all stages, with the config that resumes them."""
    first = stages[0].config(Path("stage"))
    given: Any = OmegaConf.to_container(whole)
    names = dict(w.split("=", 1) for w in overrides if w.startswith(_NAMES))
    name = names.get("name", given.get("name", first.name))
    root = names.get("exp_root_dir", given.get("exp_root_dir", first.exp_root_dir))
    folder = folders.make(replace(first, name=name, exp_root_dir=root))
    with written(folder / folders.CONFIG) as part:
        text = {"name": name, STAGES: _kept(stages)}
        part.write_text(yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
    return folder


def _kept(stages: Sequence[Stage]) -> dict[str, Any]:
    """Stages as sections of a config, with all their settings."""
    found: dict[str, Any] = {}
    for stage in stages:
        section = OmegaConf.from_dotlist(list(stage.settings))
        plain: Any = OmegaConf.to_container(section)
        found[stage.name] = {"config": str(stage.path.resolve()), **plain}
    return found


def _summary(reports: dict[str, Any]) -> list[str]:
    """A line for each stage."""
    lines = []
    for name, report in reports.items():
        words = [f"{report['steps']} steps in {report['iterations']} iterations"]
        quality, mesh = report.get("quality", {}), report.get("mesh_quality", {})
        if "psnr" in quality:
            words.append(f"PSNR {quality['psnr']:.1f} dB")
        if "iou_3d" in mesh:
            words.append(f"3D IoU {mesh['iou_3d']:.2f}, Chamfer {mesh['chamfer']:.3f}")
        lines.append(f"{name}: {', '.join(words)}")
    return lines
