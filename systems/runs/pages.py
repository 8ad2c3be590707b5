"""The pages that a command serves, imported when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from systems.settings.reader import ConfigError


def run(runs: Sequence[str] | None, words: Sequence[str], config: Path | None) -> int:
    """Serve the live viewer of runs, or the page to try; returns the exit code.

    Args:
        runs: Folders of the runs; None: the page to try.
        words: Settings of the page.
        config: What the command line names, though a page needs none.

    Raises:
        ConfigError: A config was named.
    """
    if config is not None:
        raise ConfigError(
            "`--view` shows runs with their own configs, and the page of `--app` "
            f"offers those it needs: leave out `--config {config}`."
        )
    if runs is None:
        from systems.runs import app

        return app.run(words)
    from systems.runs import live

    return live.run([*runs, *words])
