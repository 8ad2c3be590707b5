"""The live viewer of runs: `launch.py --view RUN [RUN]`.

A web page of viser beside a run, which it only reads: the mesh or the splats, frames
rendered from any kept checkpoint, and the curves of stride, window and threshold. The
run may be in progress; closing the page or the viewer leaves it alone. The page can
ask a run to pause or to stop, by files that `systems.runs.stopping` looks for, and
collects cameras for a film. Several runs stand side by side.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from systems.runs.live.address import Address
from systems.runs.live.page import Page
from systems.runs.live.reading import open_folder

INTERVAL = 1.0
"""Seconds between two looks at the folders."""


def run(words: Sequence[str]) -> int:
    """Serve the page of one or more runs until Ctrl-C; returns the exit code.

    Args:
        words: Folders of the runs, `host=…` and `port=…`.

    Raises:
        ConfigError: There is no such run, the port is taken, or viser is missing.
    """
    settings = [w for w in words if "=" in w and not w.startswith("resume=")]
    runs = [word for word in words if word not in settings]
    address = Address.read(settings)
    page = Page([open_folder(run) for run in runs], address)
    shown = " and ".join(str(panel.folder) for panel in page.panels)
    print(f"http://{address.host}:{address.port} shows {shown} (Ctrl-C ends it)")
    try:
        while True:
            time.sleep(INTERVAL)
            page.refresh()
    except KeyboardInterrupt:
        print("The viewer has ended; the run has not.", file=sys.stderr)
        return 0
    finally:
        page.close()
