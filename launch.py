r"""Run a config: make, compare, test or export a 3D object, or sample images.

    python launch.py --config configs/dreamfusion-toybox.yaml --train \
        system.prompt_processor.prompt="a red mushroom"

`--train` makes the object (`--fast`: a first look at it). `--compare` makes it with and
without acceleration and reports whether that pays. `--test resume=RUN` renders and
measures it, `--export resume=RUN` writes its mesh, `--parts resume=RUN` takes the mesh
apart by colour, and `--render resume=RUN cameras=path.json` films a camera path.
`--sample` samples images (`configs/sample-toybox.yaml`). `--view RUN` opens a live page
of a run, `--app` a page to try all this in a browser. `--plan` says what a run would
cost, and `--doctor` what this machine offers.

Settings follow as `key=value`; `--settings [SECTION]` lists all settings.
`dispatch.num_workers=2` starts two processes, and `torchrun launch.py …` and `srun
python launch.py …` work too (`docs/faults.md`).
With `backend=threestudio`, config and system are a checkout's (`docs/threestudio.md`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dreampropeller.dispatch import environment
from systems import doctor, list_settings
from systems.runs import (
    compare,
    folders,
    pages,
    parts,
    paths,
    plan,
    run,
    stages,
    workers,
)
from systems.settings import presets
from systems.threestudio import training
from systems.threestudio.config import is_asked


def make_parser() -> argparse.ArgumentParser:
    """The options; everything else is `key=value`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="a YAML file; default: the run's")
    parser.add_argument("--fast", action="store_true", help="the config's first look")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--train", action="store_true", help="make the object")
    task.add_argument(
        "--compare",
        nargs="*",
        metavar="RUN",
        help="with and without acceleration; `rivals` adds sequential runs of the same "
        "budget; two RUNs compares what is finished",
    )
    task.add_argument("--plan", action="store_true", help="what a run would cost")
    task.add_argument("--test", action="store_true", help="turntable and quality")
    task.add_argument("--export", action="store_true", help="mesh")
    task.add_argument("--render", action="store_true", help="video of a camera path")
    task.add_argument(
        "--parts",
        nargs="*",
        metavar="RUN",
        help="the parts of a mesh; several RUNs share a palette",
    )
    task.add_argument("--sample", action="store_true", help="images of a prompt")
    task.add_argument("--doctor", action="store_true", help="check this machine")
    task.add_argument("--view", nargs="+", metavar="RUN", help="live page (port=8080)")
    task.add_argument("--app", action="store_true", help="a page to try (port=7860)")
    task.add_argument(
        "--settings",
        nargs="?",
        const="",
        metavar="SECTION",
        help="list all settings, or those of a section such as `solver.window`",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; user errors give a message and exit code 2."""
    arguments, overrides = make_parser().parse_known_args(argv)
    try:
        environment.read()
        if arguments.settings is not None:
            print(list_settings(arguments.settings))
            return 0
        if arguments.doctor:
            return doctor.run(overrides, arguments.config)
        if arguments.fast:
            overrides = [*presets.fast(arguments.config), *overrides]
        overrides, named = stages.last_stages(arguments, overrides)
        if stages.is_asked(arguments.config, overrides, named):
            return stages.run(arguments.config, arguments.train, overrides)
        if arguments.compare is not None:
            words = [*arguments.compare, *overrides]
            return compare.run(arguments.config, words)
        if arguments.parts is not None:
            return parts.run([*arguments.parts, *overrides], arguments.config)
        if arguments.app or arguments.view is not None:
            return pages.run(arguments.view, overrides, arguments.config)
        if is_asked(overrides):
            return training.run(arguments.config, arguments.train, overrides)
        if arguments.render:
            return paths.run(arguments.config, overrides)
        config = folders.load_config(arguments.config, overrides)
        if arguments.plan:
            return plan.run(config)
        if arguments.train or arguments.sample:
            return run.execute(config, "--train" if arguments.train else "--sample")
        return run.look(config, video=arguments.test)
    except workers.FAULTS as error:
        workers.complain(workers.words(error))
    except KeyboardInterrupt:
        print("Stopped. What was saved is in the run folder.", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
