"""Running a chain by an estimator's settings, with its state on disk."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from dreampropeller.mixtures.blocks import Blocks
from dreampropeller.mixtures.chain import Chain
from dreampropeller.mixtures.exact import ExactChain
from dreampropeller.mixtures.inputs import at_least
from dreampropeller.mixtures.priors import PartitionPrior
from dreampropeller.mixtures.random import generator
from dreampropeller.mixtures.subclusters import SubclusterChain

FINAL = 5
"""Last sweeps of "subcluster", without moves; the very last takes likeliest labels."""
EVERY = 25
"""Sweeps between two checkpoints."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run; the estimators document them."""

    method: str
    n_sweeps: int
    burn_in: int
    patience: int | None
    n_proposals: int | None
    init_components: int


def settings_of(estimator: Any) -> Settings:
    """An estimator's settings, checked."""
    if estimator.method not in ("subcluster", "exact"):
        raise ValueError(
            f"`method` is {estimator.method!r}: write 'subcluster' for the fast "
            "sampler or 'exact' for the one that leaves the posterior invariant."
        )
    patience, proposals = estimator.patience, estimator.n_proposals
    jobs = estimator.n_jobs
    if jobs is not None and jobs != "ranks" and (not isinstance(jobs, int) or not jobs):
        raise ValueError(
            f"`n_jobs` is {jobs!r}: write a number of processes, -1 for one per core, "
            "or 'ranks' inside a `torch.distributed` group."
        )
    return Settings(
        estimator.method,
        at_least(estimator.n_sweeps, 1, "n_sweeps"),
        at_least(estimator.burn_in, 0, "burn_in"),
        None if patience is None else at_least(patience, FINAL + 1, "patience"),
        None if proposals is None else at_least(proposals, 0, "n_proposals"),
        at_least(estimator.init_components, 1, "init_components"),
    )


def start(
    settings: Settings, blocks: Blocks, prior: PartitionPrior, group: Tensor, seed: int
) -> Chain:
    """A chain at random labels."""
    n, k = blocks.num_points, min(settings.init_components, blocks.num_points)
    rng = generator(seed, 0, "start")
    labels = torch.from_numpy(rng.permutation(np.arange(n) % k))  # none is empty
    if settings.method == "subcluster":
        return SubclusterChain(blocks, prior, group, seed, labels)
    return ExactChain(blocks, prior, group, seed, labels, settings.n_proposals)


def run(
    chain: Chain,
    settings: Settings,
    checkpoint: str | os.PathLike[str] | None,
    state: dict[str, Any] | None,
) -> None:
    """Sweep until the settings end the run, from a saved state if there is one."""
    path = Path(checkpoint) if checkpoint is not None else None
    if state is not None:
        _check(chain, state["labels"])
        chain.load(state)
    first = chain.sweeps
    mark = fingerprint(chain)
    if path is not None and path.exists():
        saved = read(path, mark)
        _check(chain, saved["labels"])
        chain.load(saved)
        first = saved.get("first", first)
    end = _end(chain, settings, first)
    while chain.sweeps < end:
        if isinstance(chain, ExactChain):
            if chain.sweeps >= settings.burn_in:
                chain.freeze()
            chain.sweep()
        else:
            assert isinstance(chain, SubclusterChain)
            left = end - chain.sweeps
            chain.sweep(moves=left > FINAL, best=left == 1)
        if path is not None and (chain.sweeps - first) % EVERY == 0:
            write({**chain.state(), "first": first, "mark": mark}, path)
        end = _end(chain, settings, first)
    if path is not None:
        write({**chain.state(), "first": first, "mark": mark}, path)


def _end(chain: Chain, settings: Settings, first: int) -> int:
    """The sweep to stop at; every split or merge postpones it."""
    last = first + settings.n_sweeps
    if settings.patience is None or not isinstance(chain, SubclusterChain):
        return last
    quiet = max(first + settings.burn_in, chain.moved) + settings.patience
    return min(last, quiet)


def _check(chain: Chain, labels: Tensor) -> None:
    if len(labels) != len(chain.labels):
        raise ValueError(
            f"The state to continue from has {len(labels)} points and the data "
            f"{len(chain.labels)}: pass the same points, or start anew."
        )


def fingerprint(chain: Chain) -> str:
    """The values that a resumed chain must share: data, seed and method."""
    x = chain.blocks.x
    parts = [x.data, x.indices, x.indptr] if sparse.issparse(x) else [x]
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes())
    digest.update(chain.group.numpy().tobytes())
    digest.update(f"{x.shape}/{chain.seed}/{type(chain).__name__}".encode())
    return digest.hexdigest()


def write(state: dict[str, Any], path: Path) -> None:
    """Save a state; the file appears complete or not at all."""
    beside = path.with_name(path.name + ".part")
    torch.save(state, beside)
    os.replace(beside, path)


def read(path: Path, mark: str) -> dict[str, Any]:
    """Load a state of the same chain."""
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"`{path}` is not a state of a mixture: write another `checkpoint`."
        ) from error
    if state.get("mark", mark) != mark:
        raise ValueError(
            f"`{path}` belongs to other data, another `random_state` or another "
            "`method`: write another `checkpoint`, or delete the file."
        )
    return state
