"""Running a chain by an estimator's settings, with its state on disk."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from dreampropeller.mixtures.blocks import Blocks
from dreampropeller.mixtures.chain import Chain
from dreampropeller.mixtures.exact import ExactChain
from dreampropeller.mixtures.inputs import NIW, Dirichlet, at_least
from dreampropeller.mixtures.priors import PartitionPrior
from dreampropeller.mixtures.random import generator
from dreampropeller.mixtures.states import (
    Mark,
    differing,
    digest,
    prior_mark,
    read,
    write,
)
from dreampropeller.mixtures.subclusters import SETTLE, SubclusterChain

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
    path = estimator.checkpoint
    if not (path is None or isinstance(path, (str, os.PathLike))):
        raise ValueError(f"`checkpoint` is {path!r}: write the path of a file.")
    settings = Settings(
        estimator.method,
        at_least(estimator.n_sweeps, 1, "n_sweeps"),
        at_least(estimator.burn_in, 0, "burn_in"),
        None if patience is None else at_least(patience, FINAL + 1, "patience"),
        # Without proposals the number of clusters would stay as it is.
        None if proposals is None else at_least(proposals, 1, "n_proposals"),
        at_least(estimator.init_components, 1, "init_components"),
    )
    if settings.method == "subcluster":
        continued = estimator.warm_start and hasattr(estimator, "state_")
        _check_length(settings, continued)
    return settings


def _check_length(settings: Settings, continued: bool) -> None:
    """Refuse runs of "subcluster" that end before a cluster may split."""
    quiet = settings.burn_in + (settings.patience or 0)
    least, why = FINAL + 1, f"'subcluster' does not split in the last {FINAL} sweeps"
    if not continued:  # else the sub-clusters have settled
        least = SETTLE + FINAL
        why = (
            f"'subcluster' splits after {SETTLE} sweeps at the earliest, and not in "
            f"the last {FINAL}"
        )
    if settings.n_sweeps < least:
        raise ValueError(
            f"`n_sweeps` is {settings.n_sweeps}: write at least {least}, because {why}."
        )
    if settings.patience is not None and quiet < least:
        raise ValueError(
            f"`burn_in` and `patience` add up to {quiet}: write at least {least} "
            f"together, because {why}."
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


def mark_of(
    settings: Settings,
    x: Any,
    given: NIW | Dirichlet,
    prior: PartitionPrior,
    group: Tensor,
    seed: int,
) -> Mark:
    """What determines a chain, from the arguments as they were given."""
    mark = {
        "data": digest(x),
        "groups": digest(group),
        "random_state": str(seed),
        "method": settings.method,
        "prior": prior_mark(given),
        "init_components": str(settings.init_components),
        **{name: repr(value) for name, value in prior.settings.items()},
    }
    if settings.method == "exact":
        mark["n_proposals"] = str(settings.n_proposals)
        if settings.n_proposals is None:
            mark["burn_in"] = str(settings.burn_in)  # it ends where they are frozen
    return mark


def newest(
    blocks: Blocks,
    mark: Mark,
    checkpoint: str | os.PathLike[str] | None,
    state: dict[str, Any] | None,
) -> dict[str, Any] | None:
    """The state in the file, unless the last fit's `state` is newer."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    found = blocks.lead(lambda: read(path, mark, state and state["mark"]))
    # A file of the last fit is older than the state that this one continues.
    older = found and state and found["first"] < state["sweeps"]
    return None if older else found


def settle(blocks: Blocks, mark: Mark, state: dict[str, Any] | None) -> None:
    """Give all ranks the components' prior of the state they continue, or rank 0's.

    What it takes from the data is rounded differently by different CPUs.
    """
    settings = blocks.family.settings
    if state is not None and not {"data", "prior"} & {*differing(state["mark"], mark)}:
        settings = state["components"]
    blocks.family.restore(blocks.lead(lambda: settings))


def run(
    chain: Chain,
    settings: Settings,
    mark: Mark,
    checkpoint: str | os.PathLike[str] | None,
    state: dict[str, Any] | None,
    saved: dict[str, Any] | None,
) -> dict[str, Any]:
    """Sweep until the settings end the run, from a saved state if there is one.

    Args:
        chain: A chain at its start.
        settings: When to stop.
        mark: The mark of the chain, see `mark_of`.
        checkpoint: A file for the state, which need not exist yet.
        state: The state of the last fit, to go on from for `n_sweeps` more.
        saved: The state in the file, to go on from with what is missing.

    Returns:
        The last state.
    """
    path = Path(checkpoint) if checkpoint is not None else None
    if state is not None:
        _continue(chain, state, mark)
    first = chain.sweeps
    blocks = chain.blocks
    if saved is not None:
        chain.load(saved)
        first = saved["first"]
        _warn_if_quiet(chain, settings, saved)

    def present() -> dict[str, Any]:
        return {
            **chain.state(),
            "components": chain.family.settings,
            "first": first,
            "n_sweeps": settings.n_sweeps,
            "mark": mark,
        }

    end = _end(chain, settings, first)
    _warn_if_never_frozen(chain, settings, end)
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
            blocks.lead(lambda: write(present(), path))
        end = _end(chain, settings, first)
    if path is not None:
        blocks.lead(lambda: write(present(), path))
    return present()


def agree(
    blocks: Blocks,
    settings: Settings,
    mark: Mark,
    checkpoint: str | os.PathLike[str] | None,
    state: dict[str, Any] | None,
) -> None:
    """Refuse ranks that would run different chains, or for a different time."""
    length = {
        name: str(getattr(settings, name))
        for name in ("n_sweeps", "burn_in", "patience")
    }
    last = "" if state is None else digest(state["labels"], state["first"])
    written = str(checkpoint is not None)
    blocks.agree({**mark, **length, "checkpoint": written, "warm_start": last})


def _end(chain: Chain, settings: Settings, first: int) -> int:
    """The sweep to stop at; every split or merge postpones it."""
    last = first + settings.n_sweeps
    if settings.patience is None or not isinstance(chain, SubclusterChain):
        return last
    quiet = max(first + settings.burn_in, chain.moved) + settings.patience
    return min(last, quiet)


def _continue(chain: Chain, state: dict[str, Any], mark: Mark) -> None:
    """Load the last fit's state into a chain whose settings may have changed."""
    if len(state["labels"]) != len(chain.labels):
        raise ValueError(
            f"The state to continue from has {len(state['labels'])} points and the "
            f"data {len(chain.labels)}: pass the same points, or write "
            "`warm_start=False`."
        )
    names = differing(state["mark"], mark)
    for name in ("method", "prior"):
        old, new = (m[name].split("/")[0] for m in (state["mark"], mark))
        if old != new:
            raise ValueError(
                f"`warm_start` continues a chain whose `{name}` is {old!r}, and it is "
                f"now {new!r}: write the same, or `warm_start=False`."
            )
    chain.load(state)
    if "data" in names or "prior" in names:
        chain.refresh()  # sums are kept relative to the prior's mean


def _warn_if_quiet(chain: Chain, settings: Settings, saved: dict[str, Any]) -> None:
    """Say so if more sweeps are asked for and the chain had stopped before its end."""
    first, asked = saved["first"], settings.n_sweeps
    if asked > saved["n_sweeps"] and _end(chain, settings, first) <= chain.sweeps:
        warnings.warn(
            f"The chain in `checkpoint` stopped at sweep {chain.sweeps}, after "
            f"`patience`={settings.patience} sweeps without a split or merge, as it "
            f"would with `n_sweeps`={asked}: write `patience=None` for all sweeps.",
            ConvergenceWarning,
            stacklevel=2,
        )


def _warn_if_never_frozen(chain: Chain, settings: Settings, end: int) -> None:
    """Say so if the number of proposals of "exact" follows the clusters to the end."""
    if not isinstance(chain, ExactChain) or chain.proposals or chain.frozen:
        return
    if end <= settings.burn_in:
        warnings.warn(
            f"`burn_in` is {settings.burn_in} and the chain ends at sweep {end}: the "
            "number of proposals is never fixed, so the labels are not a draw from the "
            "posterior. Write a smaller `burn_in`, or `n_proposals`.",
            ConvergenceWarning,
            stacklevel=2,
        )
