"""Training of a threestudio system, in this process or on several ranks."""

from __future__ import annotations

import functools
import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

import dreampropeller as dp
from dreampropeller.adapters.threestudio import ThreestudioTrajectory
from dreampropeller.dispatch import process_group
from systems.runs import workers
from systems.runs.stopping import STOP
from systems.settings.dispatch import DispatchConfig, is_rank
from systems.settings.reader import ConfigError
from systems.threestudio.checkout import import_threestudio
from systems.threestudio.config import BackendConfig, split
from systems.threestudio.recorder import Recorder, check_state, load_state

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def run(path: Path | None, trains: bool, overrides: Sequence[str]) -> int:
    """Train a system of threestudio.

    Args:
        path: threestudio's YAML file; it may hold `solver` and `dispatch` sections.
        trains: Whether `--train` was given, the only supported task.
        overrides: Overrides `key=value`, ours and threestudio's.

    Raises:
        ConfigError: A setting or the environment cannot be used; says what to do.
    """
    if not trains:
        raise ConfigError(
            "`backend=threestudio` only trains: what it writes is threestudio's own. "
            "In the checkout, run `python launch.py --config RUN/configs/parsed.yaml "
            "--test resume=RUN/ckpts/last.ckpt` (or `--export`, `--validate`)."
        )
    if path is None:
        raise ConfigError(
            "Which config? With `backend=threestudio`, name a YAML of threestudio: "
            "`--config <checkout>/configs/dreamfusion-sd.yaml`."
        )
    ours, theirs, dotted = split(path, overrides)
    if ours.dispatch.backend != "processes":
        raise ConfigError(
            "`dispatch.backend=ray` cannot hold a threestudio system: leave it out."
        )
    if ours.dispatch.max_restarts:
        raise ConfigError(
            "`dispatch.max_restarts` has no effect with `backend=threestudio`: leave "
            "it out, and resume a failed run with `resume=RUN`."
        )
    workers.check(ours.dispatch)
    count = ours.dispatch.num_workers
    asked: Any = OmegaConf.merge(theirs, OmegaConf.from_dotlist(dotted))
    if asked.get("timestamp") is None and asked.get("use_timestamp", True):
        # Several processes share one folder: ranks of `torchrun` get it from rank 0.
        now = datetime.now().strftime("@%Y%m%d-%H%M%S")
        theirs.timestamp = None if is_rank() else now
    text = OmegaConf.to_yaml(theirs)
    job = (ours, text, dotted, path.resolve())
    if count == 1 or is_rank():
        return work(*job, None)
    with tempfile.TemporaryDirectory() as scratch:  # the run folder has no name yet
        stop = Path(scratch) / STOP
        return workers.start(work, *job, stop, num_workers=count, stop=stop)


def work(
    ours: BackendConfig, text: str, dotted: list[str], path: Path, stop: Path | None
) -> int:
    """The work of each rank; a file `stop`, here or in the run folder, ends it."""
    rank = join(ours)
    leads = rank == 0
    torch.set_num_threads(ours.dispatch.threads or 1)
    load_config, find = import_threestudio(ours.threestudio.root)
    lightning: Any = importlib.import_module("pytorch_lightning")
    if (
        rank is not None and "timestamp: null" in text
    ):  # torchrun: the time of rank 0 counts
        now = [datetime.now().strftime("@%Y%m%d-%H%M%S")]
        dist.broadcast_object_list(now, 0, device=torch.device("cpu"))
        text = text.replace("timestamp: null", f"timestamp: '{now[0]}'")
    resume = [o.removeprefix("resume=") for o in dotted if o.startswith("resume=")]
    dotted = [o for o in dotted if not o.startswith("resume=")]
    cfg = load_config(text, cli_args=dotted, from_string=True, n_gpus=1)
    state = load_state(resume[-1]) if resume else None
    lightning.seed_everything(cfg.seed, workers=True)  # the same on every rank

    def build() -> ThreestudioTrajectory:
        datamodule = find(cfg.data_type)(cfg.data)
        system = find(cfg.system_type)(cfg.system, resumed=False)
        system.set_save_dir(os.path.join(cfg.trial_dir, "save"))
        return ThreestudioTrajectory(
            system, datamodule, cfg, verify=ours.threestudio.verify
        )

    # Rank 0 first: it fills the cache of prompt embeddings that the others read. (If
    # threestudio has a barrier of its own while loading them, the two match.)
    if not leads and rank is not None:
        dist.barrier()
    trajectory = build()
    if leads and dist.is_initialized():
        dist.barrier()
    if state is not None:
        check_state(state, trajectory)
    recorder = Recorder(
        trajectory, cfg, lightning, ours, leads=leads or rank is None, stop=stop
    )
    if recorder.leads:
        recorder.snapshot(path, "" if state is None else state.run)
    dispatcher = dp.InlineDispatcher if rank is None else spread(ours.dispatch)

    def solve(on_iteration: Any) -> dp.Solution[Any]:
        return dp.solve(
            trajectory,
            ours.solver.build(),
            dispatcher,
            state=state,
            on_iteration=on_iteration,
        )

    code = recorder.run(solve)
    if dist.is_initialized():
        dist.barrier()  # rank 0 renders its images meanwhile
        dist.destroy_process_group()
    return code


def join(ours: BackendConfig) -> int | None:
    """Join the ranks, before threestudio is imported; None: there is one process.

    threestudio chooses devices by torchrun's environment variables, so they are
    removed; each rank sees one GPU.
    """
    if not is_rank():
        return None
    rank = int(os.environ["RANK"])
    num_gpus = process_group.hide_others()
    # Rank 0 renders validation and test images while the others wait for it.
    timeout = timedelta(seconds=ours.dispatch.timeout)
    process_group.open_group(timeout, num_gpus)
    for name in _RANKS:
        os.environ.pop(name, None)
    return rank


def spread(config: DispatchConfig) -> Callable[[Any], dp.Dispatcher]:
    """The dispatcher of several ranks."""
    return functools.partial(
        dp.DistributedDispatcher,
        threads=config.threads or 1,
        timeout=config.timeout,
        heartbeat=config.heartbeat,
    )
