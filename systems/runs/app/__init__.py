"""A page to try the workspace: `launch.py --app [port=7860]` (extra `app`, gradio).

A prompt, a system and a choice between speed and exactness make a run like any other,
in a process of its own and a folder of `exp_root_dir`; the page shows its preview, then
its mesh and files, and the runs of before. Closing the page leaves a run alone. Served
to this machine alone, without analytics or fonts from elsewhere.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from systems.runs.app.page import make_page
from systems.runs.live.address import Address
from systems.settings.reader import ConfigError

PORT = 7860


def run(words: Sequence[str]) -> int:
    """Serve the page until Ctrl-C; returns the exit code.

    Args:
        words: `host=…`, `port=…` and `exp_root_dir=…`.

    Raises:
        ConfigError: A word is no setting, the port is taken, or gradio is missing.
    """
    root, others = Path("outputs"), []
    for word in words:
        if word.startswith("exp_root_dir="):
            root = Path(word.removeprefix("exp_root_dir="))
        else:
            others.append(word)
    address = Address.read(others, "--app", PORT)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        gradio: Any = importlib.import_module("gradio")
    except ImportError as error:
        raise ConfigError(
            'The page needs gradio: `pip install -e ".[app]"`, or train without it: '
            "`python launch.py --train …`."
        ) from error
    address.check()
    root.mkdir(parents=True, exist_ok=True)
    page, look = make_page(gradio, root)
    print(f"http://{address.host}:{address.port} (Ctrl-C ends the page, not a run)")
    page.launch(
        **look,
        server_name=address.host,
        server_port=address.port,
        allowed_paths=[str(root.resolve())],
        quiet=True,
    )
    return 0
