"""The front door: a config becomes an object.

    python launch.py --config configs/dreamfusion-toybox.yaml --train \
        system.prompt_processor.prompt="a red mushroom"

`--train` makes it, `--compare` makes it with and without acceleration and says whether
that pays, `--test resume=RUN` renders and measures it, `--export resume=RUN` writes its
mesh; `--sample` draws pictures (`configs/sample-toybox.yaml`). Settings follow as
`key=value`; `dispatch.num_workers=2` starts two processes, and `torchrun launch.py …`
works too. With `backend=threestudio`, config and system are those of a threestudio
checkout (`docs/threestudio.md`).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

import dreampropeller as dp
import systems
from dreampropeller.checkpoint import CheckpointError
from systems import sampling
from systems.runs import compare, folders, results, workers
from systems.runs.recorder import Recorder
from systems.settings.config import Config, is_rank, load
from systems.threestudio import training
from systems.threestudio.config import is_asked


def train(config: Config, folder: Path | None = None) -> int:
    """Make the object, here or on several ranks; gives the exit code."""
    if is_rank():  # started by torchrun
        return work(config, leads=os.environ["RANK"] == "0")
    if config.dispatch.num_workers == 1:
        return work(config, folder)
    system = systems.build(config)  # refuse before anything is made or started
    folders.start_of(config, system)
    return workers.run(work, config, folder or folders.open_folder(config))


def work(config: Config, folder: Path | None = None, leads: bool = True) -> int:
    """What each rank does; the one that leads writes it down, in a folder."""
    dispatcher, threads = workers.dispatcher(config.dispatch)
    torch.set_num_threads(threads)
    system = systems.build(config)
    state = folders.start_of(config, system)
    trajectory, solver = system.trajectory(), system.solver()
    folder = folder or (folders.open_folder(config) if leads else None)
    recorder = Recorder(system, folder, begin=state.step if state else 0)
    with recorder.recording():
        try:
            solution = dp.solve(
                trajectory, solver, dispatcher, state=state, on_iteration=recorder
            )
        except dp.NotConverged as error:
            recorder.save(error.solution.state)
            raise
        recorder.save(solution.state)
    if folder is None:
        return 0
    exports = recorder.interrupted is None or recorder.interrupted.name == "SIGINT"
    made = results.write(folder, system, solution.value) if exports else {}
    report = results.write_report(folder, recorder, solution, made)
    print(results.summary(folder, report))
    return 128 + recorder.interrupted if recorder.interrupted else 0


def make_parser() -> argparse.ArgumentParser:
    """The options; everything else is `key=value`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="a YAML file; default: the run's")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--train", action="store_true", help="make the object")
    task.add_argument(
        "--compare",
        nargs="*",
        metavar="RUN",
        help="with and without acceleration; `rivals` adds plain loops of the same "
        "budget; two RUNs compares what is finished",
    )
    task.add_argument("--test", action="store_true", help="turntable and quality")
    task.add_argument("--export", action="store_true", help="mesh")
    task.add_argument("--sample", action="store_true", help="pictures of a prompt")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run; a user's mistake is a message and exit code 2, never a traceback."""
    arguments, overrides = make_parser().parse_known_args(argv)
    try:
        if arguments.compare is not None:
            words = [*arguments.compare, *overrides]
            return compare.run(arguments.config, words, train)
        if is_asked(overrides):
            return training.run(arguments.config, arguments.train, overrides)
        config = load(arguments.config or folders.config_of(overrides), overrides)
        if arguments.sample:
            return sampling.run(config)
        if arguments.train:
            return train(config)
        return results.look(config, film=arguments.test)
    except (CheckpointError, ValueError, OSError, dp.NotConverged) as error:
        print(f"error: {error}", file=sys.stderr)
    except dp.WorkerError as error:
        print(f"error: {workers.last_words(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("Stopped. What was saved is in the run folder.", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
