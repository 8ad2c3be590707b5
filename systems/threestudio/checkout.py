"""threestudio, imported from an unmodified checkout."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from systems.settings.reader import ConfigError


def import_threestudio(root: str | None) -> tuple[Any, Any]:
    """Import threestudio: its `load_config` and `find`, with extensions registered.

    Raises:
        ConfigError: There is no checkout, or a package it needs is missing.
    """
    if root is not None:
        if not (Path(root) / "threestudio").is_dir():
            raise ConfigError(
                f"`threestudio.root` is `{root}`, which holds no `threestudio` folder; "
                "name a checkout of https://github.com/threestudio-project/threestudio."
            )
        os.chdir(root)  # `load/` and `custom/` are read from here
        sys.path.insert(0, os.getcwd())
    try:
        threestudio: Any = importlib.import_module("threestudio")
        config: Any = importlib.import_module("threestudio.utils.config")
    except ImportError as error:
        missing = error.name or str(error)
        raise ConfigError(
            f"threestudio cannot be imported: `{missing}` is missing ({error}). "
            + (
                "Write `threestudio.root=<checkout>`."
                if missing == "threestudio"
                else "Run this command with the Python in which threestudio itself "
                "trains, and install dreampropeller there."
            )
        ) from error
    version = importlib.import_module("pytorch_lightning").__version__
    if int(version.split(".")[0]) < 2:
        raise ConfigError(
            f"pytorch-lightning is {version}, whose training step differs; threestudio "
            "asks for 2.0: `pip install lightning==2.0.0`."
        )
    for extension in sorted(Path("custom").glob("*")):
        import_extension(extension)
    return config.load_config, threestudio.find


def import_extension(path: Path) -> None:
    """Register a custom extension as threestudio's launcher does."""
    file = path / "__init__.py" if path.is_dir() else path
    if file.suffix != ".py" or not file.is_file() or path.name.endswith("_disabled"):
        return
    name = str(path.with_suffix("")) if path.is_file() else str(path)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception:  # an unused extension must not stop the run
        print(f"warning: `{path}` could not be imported:", file=sys.stderr)
        traceback.print_exc()
