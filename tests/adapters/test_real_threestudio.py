"""The promise itself: an unmodified checkout, in its own environment.

`THREESTUDIO_ROOT` names the checkout (`THREESTUDIO_3DGS_ROOT` the extension for growing
Gaussians), `THREESTUDIO_PYTHON` the interpreter of its environment, and
`THREESTUDIO_PATH` what else belongs on the path (stand-ins for CUDA packages).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


def compare(case: str) -> dict[str, Any]:
    path = [os.environ.get("THREESTUDIO_PATH", ""), str(ROOT)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": "1",
        **({"TS_FAKE_CUDA": "1"} if case == "3dgs" else {}),
    }
    run = subprocess.run(
        [
            os.environ.get("THREESTUDIO_PYTHON", sys.executable),
            "-m",
            "tests.adapters.real_threestudio",
            case,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


@pytest.mark.skipif(
    "THREESTUDIO_ROOT" not in os.environ,
    reason="`THREESTUDIO_ROOT` does not name a checkout of threestudio",
)
@pytest.mark.parametrize("case", ["dreamfusion", "prolificdreamer", "3dgs"])
def test_an_unmodified_checkout_is_driven_bit_for_bit(case: str) -> None:
    if case == "3dgs" and "THREESTUDIO_3DGS_ROOT" not in os.environ:
        pytest.skip("`THREESTUDIO_3DGS_ROOT` does not name threestudio-3dgs")
    found = compare(case)
    print(json.dumps(found))
    assert found["steps_compared"] >= {"dreamfusion": 40, "3dgs": 13}.get(case, 8)
    assert found["steps_equal"] == found["steps_compared"], found["first_difference"]
    assert found["threshold_zero_equal"]
    assert found["published_speed_up"] > 1
    assert found["sizes"] == [12, 16], "a resolution milestone"
    if case == "3dgs":
        rows = found["rows"]["geometry._xyz"]
        assert rows[1] > rows[0], "growth"
    else:
        assert "renderer.estimator.binaries" in found["changed_buffers"] or case != (
            "dreamfusion"
        ), "a grid update"
