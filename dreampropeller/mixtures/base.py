"""The common base of both mixtures as scikit-learn estimators."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from dreampropeller.mixtures import fitting
from dreampropeller.mixtures.blocks import opened
from dreampropeller.mixtures.chain import Chain
from dreampropeller.mixtures.family import join
from dreampropeller.mixtures.inputs import (
    Dirichlet,
    as_jobs,
    as_prior,
    at_least,
    check_counts,
)
from dreampropeller.mixtures.multinomial import Multinomial
from dreampropeller.mixtures.passes import predict_pass
from dreampropeller.mixtures.priors import PartitionPrior
from dreampropeller.mixtures.random import generator
from dreampropeller.mixtures.states import write


class Mixture(ClusterMixin, BaseEstimator):
    """The base of both mixtures; `DPMixture` documents the parameters."""

    prior: Any
    random_state: Any
    n_jobs: Any
    device: Any
    warm_start: Any
    checkpoint: Any
    partition_: Any

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        counts = self.prior == "multinomial" or isinstance(self.prior, Dirichlet)
        tags.input_tags.positive_only = counts
        tags.input_tags.sparse = counts
        return tags

    def _array(self, x: Any, *, reset: bool, least: int = 1) -> Any:
        counts = isinstance(as_prior(self.prior), Dirichlet)
        x = validate_data(
            self,
            x,
            reset=reset,
            accept_sparse="csr" if counts else False,
            dtype=np.float64,
            ensure_min_samples=least,
        )
        if counts:
            check_counts(x)
        return x

    def _run(self, x: Any, group: Tensor, prior: PartitionPrior) -> None:
        settings, jobs = fitting.settings_of(self), as_jobs(self.n_jobs)
        given = as_prior(self.prior)
        own = int(check_random_state(self.random_state).randint(2**31 - 1))
        with opened(given.resolve(x), x, jobs, self.device) as blocks:
            seed = blocks.lead(lambda: own)  # without a seed ranks draw different ones
            mark = fitting.mark_of(settings, x, given, prior, group, seed)
            state = getattr(self, "state_", None) if self.warm_start else None
            fitting.agree(blocks, settings, mark, self.checkpoint, state)
            saved = fitting.newest(blocks, mark, self.checkpoint, state)
            fitting.settle(blocks, mark, saved or state)
            chain = fitting.start(settings, blocks, prior, group, seed)
            path = self.checkpoint
            state = fitting.run(chain, settings, mark, path, state, saved)
        self._keep(chain, state)

    def _keep(self, chain: Chain, state: dict[str, Any]) -> None:
        self.state_ = state
        self.family_, self.partition_ = chain.family, chain.prior
        self.statistics_ = chain.statistics()
        self.labels_ = chain.labels.numpy().copy()
        self.counts_ = chain.counts()
        self.n_components_ = chain.num_clusters
        self.weights_ = self.counts_.sum(0) / self.counts_.sum()
        self.history_ = {k: np.array(v) for k, v in vars(chain.history).items()}
        self.n_iter_ = chain.sweeps

    def _log_joint(self, x: Any, group: np.ndarray, log_weights: np.ndarray) -> Any:
        """Log predictive density and component, the new one last, ``(rows, K + 1)``."""
        none = {k: torch.zeros_like(v[:1]) for k, v in self.statistics_.items()}
        params = self.family_.predictive(join([self.statistics_, none]))
        shared = {"params": params, "log_weights": torch.from_numpy(log_weights)}
        with opened(self.family_, x, None, self.device) as blocks:
            points = {"group": torch.from_numpy(group)}
            found = blocks.map(predict_pass, points, shared)
        logs = torch.cat(found, 1).T.double().numpy()
        lost = np.flatnonzero(~np.isfinite(logs[:, :-1].max(1)))
        if len(lost):
            raise ValueError(
                f"Row {lost[0]} lies so far from every cluster that its density is "
                "lost in single precision: leave it out."
            )
        return logs

    def _points(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A point from each label's component, whose parameters are drawn once."""
        params = self.family_.draw(self.statistics_, rng)
        index = torch.from_numpy(labels)
        if isinstance(self.family_, Multinomial):
            length = round(
                float(self.statistics_["C"].sum() / self.statistics_["n"].sum())
            )
            lengths = np.full(len(labels), max(length, 1))
            return self.family_.simulate(params, index, rng, lengths)
        return self.family_.simulate(params, index, rng)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the chain's state; `checkpoint=path` resumes it on the same points."""
        check_is_fitted(self)
        write(self.state_, Path(path))

    def _drawn(
        self, n_samples: int, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Points and labels of the present clusters."""
        n_samples = at_least(n_samples, 1, "n_samples")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        rng = generator(seed, 0, "sample")
        labels = rng.choice(self.n_components_, n_samples, p=weights)
        return self._points(labels, rng), labels
