"""The pages that a command serves, imported when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence


def run(runs: Sequence[str] | None, words: Sequence[str]) -> int:
    """Serve the live viewer of runs, or the page to try; returns the exit code.

    Args:
        runs: Folders of the runs; None: the page to try.
        words: Settings of the page.
    """
    if runs is None:
        from systems.runs import app

        return app.run(words)
    from systems.runs import live

    return live.run([*runs, *words])
